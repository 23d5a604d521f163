"""``kvq bench engine``: the median decode step of real engines, alive at once and stepped in turn.

Every engine is a process of its own that prefills the same distinct prompts and then decodes in
bursts on command, so that all of them see the same moments of a shared machine. Only steps after
the last prefill count.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection

from kvq_plugin.evaluate import BASELINE, Window
from kvq_plugin.servers import EngineProcess, engine_process, run_engine

BURST = 8
BLOCK = 128
WARM_UP = 3  # steps that are not counted
#: Tokens of a step at most: vLLM's number for an LLM on a CPU.
STEP_TOKENS = 4096


@dataclass(frozen=True)
class Load:
    """``prompts`` decoded together for ``bursts`` bursts of :data:`BURST` steps."""

    model: str
    prompts: Sequence[Window]
    bursts: int
    eager: bool
    kv_memory_bytes: int

    @property
    def tokens(self) -> int:
        """That each stream decodes at most: the first ones go on while the last are prefilled, and
        one that ended early would leave the others a faster step."""
        # Streams that decode take a token each of a step's.
        room = max(STEP_TOKENS - len(self.prompts), 1)
        return -(-sum(map(len, self.prompts)) // room) + WARM_UP + self.bursts * BURST + 2

    @property
    def length(self) -> int:
        """Tokens of the longest stream at its end."""
        return max(map(len, self.prompts)) + self.tokens


@dataclass(frozen=True)
class Step:
    """One timed decode step of an engine."""

    engine: str
    burst: int
    milliseconds: float


@dataclass(frozen=True)
class Engine:
    """One engine to compare. ``plugin`` False: vLLM alone, with its own kernels."""

    name: str
    kv_cache_dtype: str
    plugin: bool = True


def beside_stock(dtypes: Sequence[str]) -> list[Engine]:
    """vLLM alone with ``auto`` and ``fp8``, then ours with *dtypes*, ``auto`` left out."""
    stock = [Engine(f"vLLM {dtype}", dtype, plugin=False) for dtype in (BASELINE, "fp8")]
    return [*stock, *(Engine(dtype, dtype) for dtype in dtypes if dtype != BASELINE)]


def decode_steps(
    load: Load,
    engines: Sequence[Engine],
    stage: Callable[[str], None] = lambda text: None,
    tick: Callable[[], None] = lambda: None,
) -> list[Step]:
    """Every timed step in the order of time. *tick* after each start and each round of bursts.

    Raises ServerError with the end of an engine's log when it fails, and ValueError where its KV
    cache does not hold all streams at once.
    """
    with ExitStack() as stack:
        running: dict[str, EngineProcess] = {}
        for engine in engines:
            stage(f"{engine.name}: starting and prefilling")
            process = engine_process(__name__, f"for {engine.name}", as_served=True)
            running[engine.name] = stack.enter_context(process)
            running[engine.name].send((load, engine))
            running[engine.name].receive()
            tick()
        steps: list[Step] = []
        for burst in range(load.bursts):
            for name, process in running.items():
                stage(name)
                process.send(BURST)
                seconds, streams = zip(*process.receive(), strict=True)
                check_streams(load, name, min(streams))
                # The first wakes threads and caches.
                steps += [Step(name, burst, 1e3 * each) for each in seconds[1:]]
            tick()
        return steps


def check_streams(load: Load, name: str, decoding: int) -> None:
    """ValueError where a step of engine *name* gave a token to *decoding* streams, not to all: it
    would be a step of another load than the title says."""
    if decoding < len(load.prompts):
        raise ValueError(
            f"{name}: expected every step to decode all {len(load.prompts)} streams of "
            f"{len(load.prompts[0]):,} tokens, got one with {decoding}: "
            f"{load.kv_memory_bytes / 2**30:g} GiB of KV cache do not hold them at once; raise "
            "--kv-memory-gib, or lower --streams or --context"
        )


def _work(pipe: Connection) -> None:
    """The engine's process: told what to run, and then again and again how many steps to time."""
    load, engine = pipe.recv()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # a step is one call in this process
    if not engine.plugin:
        os.environ["VLLM_PLUGINS"] = ""
    step = _start(load, engine)
    pipe.send(None)
    while True:
        pipe.send([step() for _ in range(pipe.recv())])


def _start(load: Load, engine: Engine) -> Callable[[], tuple[float, int]]:
    """Prefill everything; returns a function that decodes one step and says how long it took, and
    how many streams got a token."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        load.model,
        kv_cache_dtype=engine.kv_cache_dtype,
        kv_cache_memory_bytes=load.kv_memory_bytes,
        max_model_len=load.length,
        max_num_seqs=len(load.prompts),
        max_num_batched_tokens=max(STEP_TOKENS, len(load.prompts)),
        enforce_eager=load.eager,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    params = SamplingParams(max_tokens=load.tokens, temperature=0.0, ignore_eos=True)
    core = llm.llm_engine
    for i, prompt in enumerate(load.prompts):
        core.add_request(str(i), {"prompt_token_ids": prompt}, params)
    decoding: set[str] = set()
    while len(decoding) < len(load.prompts):
        decoding |= {out.request_id for out in core.step() if out.outputs[0].token_ids}

    def step() -> tuple[float, int]:
        begin = time.perf_counter()
        outputs = core.step()
        return time.perf_counter() - begin, len(outputs)

    for _ in range(WARM_UP):
        step()
    return step


def medians(steps: Sequence[Step]) -> dict[str, float]:
    """Median milliseconds of each engine's steps."""
    each: dict[str, list[float]] = {}
    for step in steps:
        each.setdefault(step.engine, []).append(step.milliseconds)
    return {name: statistics.median(values) for name, values in each.items()}


if __name__ == "__main__":
    run_engine(_work)
