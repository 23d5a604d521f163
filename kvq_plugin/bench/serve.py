"""``kvq bench serve``: vLLM's own ``vllm bench serve`` against servers with the same KV memory.

All servers are up at once, and an idle one computes nothing; the load goes to one after the other,
round by round, so that all of them see the same moments of a shared machine. Every round has
prompts of its own, the same for every server: a prefix cache would answer repeated ones.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path

from kvq_plugin.bench.engine import BLOCK, Engine
from kvq_plugin.servers import Server, ServerError, engine_env, serve, vllm_command

#: Row -> the name in the JSON file that ``vllm bench serve`` writes.
_RESULTS = {
    "seconds": "duration",
    "requests_per_second": "request_throughput",
    "output_tokens_per_second": "output_throughput",
    "first_token_ms": "median_ttft_ms",
    "first_token_p99_ms": "p99_ttft_ms",
    "inter_token_ms": "median_itl_ms",
    "inter_token_p99_ms": "p99_itl_ms",
}
_PREEMPTIONS = "vllm:num_preemptions_total"
CLIENT_TIMEOUT = 3600.0  # seconds; the slowest load measured took 62 s


@dataclass(frozen=True)
class Load:
    """``requests`` of ``input`` random tokens that each generate ``output``, all sent at once."""

    model: str
    requests: int
    input: int
    output: int
    rounds: int
    eager: bool
    kv_memory_bytes: int

    def server_args(self) -> list[str]:
        """Arguments of ``vllm serve`` that all servers share."""
        # One token more than asked for: some tokenizers count one that begins a text.
        length = -(-(self.input + self.output + 1) // BLOCK) * BLOCK
        return [
            *(["--enforce-eager"] if self.eager else []),
            *("--max-model-len", str(length)),
            *("--kv-cache-memory-bytes", str(self.kv_memory_bytes)),
        ]


@dataclass(frozen=True)
class Row:
    """What one server did in one round, or, with ``round`` 0, the medians of all its rounds.

    Attributes:
        kv_tokens: that its KV cache holds, as it says at start.
        seconds: from the first request to the end of the last.
        first_token_ms: median over requests of the time until the first token; inter_token_ms:
            over all gaps between two tokens of a request; ``_p99_``: their 99th percentiles.
        preemptions: requests thrown out of the KV cache for others, to be computed again.
    """

    engine: str
    round: int
    kv_tokens: int
    seconds: float
    requests_per_second: float
    output_tokens_per_second: float
    first_token_ms: float
    first_token_p99_ms: float
    inter_token_ms: float
    inter_token_p99_ms: float
    preemptions: float


def run(
    load: Load,
    engines: Sequence[Engine],
    stage: Callable[[str], None] = lambda text: None,
    tick: Callable[[], None] = lambda: None,
) -> list[Row]:
    """A row per round and engine. *tick* after each start and each load.

    Raises ServerError with the end of a log when a server or the client fails.
    """
    rows: list[Row] = []
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="kvq-bench-"))
        servers: dict[str, Server] = {}
        for engine in engines:
            stage(f"{engine.name}: starting")
            env = {} if engine.plugin else {"VLLM_PLUGINS": ""}
            context = serve(load.model, engine.kv_cache_dtype, args=load.server_args(), env=env)
            servers[engine.name] = stack.enter_context(context)
            tick()
        _warm_up(load, servers.values())
        for number in range(1, load.rounds + 1):
            for name, server in servers.items():
                stage(f"{name}, round {number}")
                rows.append(_measure(load, server, name, number, Path(folder)))
                tick()
    return rows


def _warm_up(load: Load, servers) -> None:
    """One request to each server: the first wakes threads, and compiles what it has to."""
    for server in servers:
        server.client().completions.create(
            model=load.model, prompt=[7] * load.input, max_tokens=8, extra_body={"ignore_eos": True}
        )


def _measure(load: Load, server: Server, name: str, number: int, folder: Path) -> Row:
    before = server.metric(_PREEMPTIONS)
    result = _client(load, server, number, folder / f"{name}-{number}.json".replace(" ", "-"))
    if result["completed"] != load.requests:
        raise ServerError(
            f"{name}: {result['completed']} of {load.requests} requests were answered; "
            f"{server.tail()}"
        )
    return Row(
        engine=name,
        round=number,
        kv_tokens=server.kv_tokens(),
        preemptions=server.metric(_PREEMPTIONS) - before,
        **{ours: result[theirs] for ours, theirs in _RESULTS.items()},
    )


def _client(load: Load, server: Server, seed: int, out: Path) -> dict:
    """Run ``vllm bench serve`` and return what it writes into *out*."""
    command = [vllm_command(), "bench", "serve", "--backend", "openai", "--base-url", server.url]
    command += ["--model", load.model, "--dataset-name", "random", "--ignore-eos"]
    command += ["--num-prompts", str(load.requests), "--seed", str(seed)]
    command += ["--random-input-len", str(load.input), "--random-output-len", str(load.output)]
    command += ["--percentile-metrics", "ttft,itl", "--disable-tqdm", "--save-result"]
    command += ["--result-dir", str(out.parent), "--result-filename", out.name]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=CLIENT_TIMEOUT,
        # It drives any server: our part in it would be to be imported.
        env={**os.environ, **engine_env(), "VLLM_PLUGINS": ""},
    )
    if done.returncode or not out.is_file():
        said = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise ServerError(f"vllm bench serve ended with {done.returncode}; its last lines:\n{said}")
    return json.loads(out.read_text(encoding="utf-8"))


def medians(rows: Sequence[Row]) -> list[Row]:
    """A row per engine: of every figure the median over its rounds."""
    figures = [f.name for f in fields(Row) if f.name not in ("engine", "round", "kv_tokens")]
    out = []
    for name in dict.fromkeys(row.engine for row in rows):
        mine = [row for row in rows if row.engine == name]
        middle = {f: statistics.median(getattr(row, f) for row in mine) for f in figures}
        out.append(replace(mine[0], round=0, **middle))
    return out
