"""Perplexity through a serving engine, against the same engine with an unquantized cache.

The engine prefills windows of 2,048 tokens with ``prompt_logprobs``. Attention reads K and V
back from the cache while prefilling, so the figure includes what quantizing them costs. vLLM
never serves such a request from its prefix cache (some positions would lack a logprob), so
windows may be repeated and shared between servers.
"""

from __future__ import annotations

import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path

from kvq_plugin.servers import ServerError, end_group, engine_env, log_tail

WINDOW = 2048
BUILTIN_TEXT = "builtin"
BASELINE = "auto"

Window = list[int]
Tick = Callable[[], None]


def builtin_text() -> str:
    """Technical prose that every Python carries: the language reference of ``pydoc_data``.

    All topics in the order of their names, an empty line between two: 470,000 characters,
    113,000 SmolLM2 tokens. The text changes with Python's minor version, so only figures of
    one interpreter compare.
    """
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def read_text(name: str) -> str:
    """The text called ``builtin``, else the UTF-8 file *name*."""
    return builtin_text() if name == BUILTIN_TEXT else Path(name).read_text(encoding="utf-8")


def load_tokenizer(model: str):
    """The Hugging Face tokenizer of *model* (a directory or a hub name)."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def make_windows(tokenizer, text: str, count: int, length: int = WINDOW) -> list[Window]:
    """The first *count* windows of *length* tokens of *text*, one after the other.

    Where the tokenizer begins a text with a BOS token, so does every window: models trained
    with it use it as an attention sink. Raises ValueError when the text is too short.
    """
    bos = tokenizer("").input_ids[:1]
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    step = length - len(bos)
    if len(ids) < count * step:
        raise ValueError(
            f"the text has {len(ids):,} tokens, {count} windows of {length} need "
            f"{count * step:,}: ask for at most {len(ids) // step} or give a longer text"
        )
    return [bos + ids[i * step : (i + 1) * step] for i in range(count)]


def offline_logprobs(llm, window: Window) -> list[float]:
    """Natural-log probability of tokens 1.. of *window* given those before, from a vllm.LLM."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    [output] = llm.generate({"prompt_token_ids": window}, params, use_tqdm=False)
    rows = output.prompt_logprobs[1:]
    return [row[token].logprob for token, row in zip(window[1:], rows, strict=True)]


def http_logprobs(client, model: str, window: Window) -> list[float]:
    """As :func:`offline_logprobs`, from a server through an ``openai.OpenAI`` *client*."""
    extra = {"prompt_logprobs": 0}
    reply = client.completions.create(
        model=model, prompt=window, max_tokens=1, temperature=0.0, extra_body=extra
    )
    rows = reply.choices[0].prompt_logprobs[1:]
    return [row[str(token)]["logprob"] for token, row in zip(window[1:], rows, strict=True)]


@dataclass(frozen=True)
class Score:
    """Log-probabilities of every scored token of a text, in order."""

    logprobs: tuple[float, ...]

    @property
    def perplexity(self) -> float:
        return math.exp(-statistics.fmean(self.logprobs))

    def change(self, baseline: Score) -> tuple[float, float]:
        """Perplexity against *baseline* as (change, standard error), both in percent.

        The error is that of the mean paired difference per token; it tells a real loss from
        the noise of a short text. Raises ValueError when other tokens were scored.
        """
        pairs = zip(baseline.logprobs, self.logprobs, strict=True)
        differences = [before - after for before, after in pairs]
        mean = statistics.fmean(differences)
        error = statistics.stdev(differences) / math.sqrt(len(differences))
        return 100 * math.expm1(mean), 100 * math.exp(mean) * error


def perplexity_offline(llm, windows: Sequence[Window], tick: Tick = lambda: None) -> Score:
    """Score *windows* with an offline ``vllm.LLM``; *tick* is called after each window."""
    return _score(lambda window: offline_logprobs(llm, window), windows, tick)


def perplexity_http(
    client, model: str, windows: Sequence[Window], tick: Tick = lambda: None
) -> Score:
    """Score *windows* with a server through an ``openai.OpenAI`` *client*."""
    return _score(lambda window: http_logprobs(client, model, window), windows, tick)


def _score(logprobs: Callable[[Window], list[float]], windows, tick: Tick) -> Score:
    scored: list[float] = []
    for window in windows:
        scored += logprobs(window)
        tick()
    return Score(tuple(scored))


def evaluate(
    model: str,
    kv_cache_dtype: str,
    texts: Mapping[str, Sequence[Window]],
    *,
    kv_memory_bytes: int = 1 << 30,
    tick: Tick = lambda: None,
) -> dict[str, Score]:
    """Score every text's windows with an engine of its own process, which is gone afterwards.

    A second engine in one process would find the memory and threads of the first still held.
    *texts* maps a name to windows; *tick* is called after each window. Raises ServerError with
    the end of the engine's log, which is then kept, when it does not start or fails.
    """
    ours, theirs = Pipe()
    handle, name = tempfile.mkstemp(prefix=f"kvq-{kv_cache_dtype}-", suffix=".log")
    log, failed = Path(name), False
    with os.fdopen(handle, "wb") as output, theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **engine_env()},
            start_new_session=True,
        )
    ended = os.pidfd_open(process.pid)

    def receive(_: Window) -> list[float]:
        # The end, too: children of a process that crashed may still hold the pipe open.
        if ours not in wait([ours, ended]):
            raise EOFError
        return ours.recv()

    options = {
        "model": model,
        "kv_cache_dtype": kv_cache_dtype,
        "kv_cache_memory_bytes": kv_memory_bytes,
        "max_model_len": max(len(w) for windows in texts.values() for w in windows) + 1,
        "enforce_eager": True,  # compiling takes longer than the run
    }
    try:
        ours.send((options, [window for windows in texts.values() for window in windows]))
        return {text: _score(receive, windows, tick) for text, windows in texts.items()}
    except (EOFError, ConnectionError):
        failed = True
        raise ServerError(f"the engine with {kv_cache_dtype} failed; {log_tail(log)}") from None
    finally:
        end_group(process.pid)
        process.wait()
        os.close(ended)
        ours.close()
        if not failed:
            log.unlink()


def _work(pipe: Connection) -> None:
    """The engine's process: receives its options and the windows, sends each one's logprobs."""
    try:
        options, windows = pipe.recv()
        from vllm import LLM

        llm = LLM(**options)
        for window in windows:
            pipe.send(offline_logprobs(llm, window))
        pipe.recv()  # hold the engine until the parent ends the group, or dies
    except Exception:
        traceback.print_exc()
    finally:
        # The engine's own processes are in this group, and would outlive this one.
        os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    _work(Connection(int(sys.argv[1])))
