"""``kvq bench engine``: the median decode step of real engines, alive at once and stepped in turn.

Every engine is a process of its own that prefills the same distinct prompts and then decodes in
bursts on command, so that all of them see the same moments of a shared machine. Only steps after
the last prefill count.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kvq_plugin.evaluate import Window
from kvq_plugin.servers import ServerError, end_group, engine_env, log_tail

BURST = 8
BLOCK = 128


@dataclass(frozen=True)
class Load:
    """``prompts`` decoded together for ``bursts`` bursts of :data:`BURST` steps."""

    model: str
    prompts: Sequence[Window]
    bursts: int
    eager: bool
    kv_memory_bytes: int


@dataclass(frozen=True)
class Engine:
    """One engine to compare. ``plugin`` False: vLLM alone, with its own kernels."""

    name: str
    kv_cache_dtype: str
    plugin: bool = True


def decode_steps(
    load: Load,
    engines: Sequence[Engine],
    stage: Callable[[str], None] = lambda text: None,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of every timed step per engine. *tick* after each start and each round of bursts.

    Raises ServerError with the end of an engine's log when it fails.
    """
    workers: dict[str, _Worker] = {}
    try:
        for engine in engines:
            stage(f"{engine.name}: starting and prefilling")
            workers[engine.name] = _Worker(load, engine)
            workers[engine.name].receive()
            tick()
        steps: dict[str, list[float]] = {name: [] for name in workers}
        for _ in range(load.bursts):
            for name, worker in workers.items():
                stage(name)
                steps[name] += worker.burst()[1:]  # the first wakes threads and caches
            tick()
        return steps
    finally:
        for worker in workers.values():
            worker.stop()


class _Worker:
    def __init__(self, load: Load, engine: Engine) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.name = engine.name
        handle, log = tempfile.mkstemp(prefix="kvq-bench-", suffix=".log")
        os.close(handle)
        self.log = Path(log)
        self.process = context.Process(target=_work, args=(theirs, log, load, engine))
        self.process.start()
        theirs.close()

    def receive(self) -> list[float]:
        try:
            return self.pipe.recv()
        except EOFError:
            raise ServerError(f"no engine for {self.name}; {log_tail(self.log)}") from None

    def burst(self) -> list[float]:
        self.pipe.send(BURST)
        return self.receive()

    def stop(self) -> None:
        end_group(self.process.pid)
        self.process.kill()
        self.process.join()
        self.log.unlink(missing_ok=True)


def _work(pipe, log: str, load: Load, engine: Engine) -> None:
    os.setsid()
    with open(log, "wb", buffering=0) as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ.update(engine_env())
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # a step is one call in this process
    if not engine.plugin:
        os.environ["VLLM_PLUGINS"] = ""
    try:
        step = _start(load, engine)
        pipe.send([])
        with suppress(EOFError):
            while count := pipe.recv():
                pipe.send([step() for _ in range(count)])
    except Exception:
        traceback.print_exc()
    os._exit(1)  # closes the pipe; the parent ends the group otherwise


def _start(load: Load, engine: Engine) -> Callable[[], float]:
    """Prefill everything; returns a function that decodes one step and says how long it took."""
    from vllm import LLM, SamplingParams

    steps = load.bursts * BURST + 8
    length = max(len(p) for p in load.prompts) + steps
    llm = LLM(
        load.model,
        kv_cache_dtype=engine.kv_cache_dtype,
        kv_cache_memory_bytes=load.kv_memory_bytes,
        max_model_len=-(-length // BLOCK) * BLOCK,
        max_num_seqs=len(load.prompts),
        enforce_eager=load.eager,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    params = SamplingParams(max_tokens=steps, temperature=0.0, ignore_eos=True)
    core = llm.llm_engine
    for i, prompt in enumerate(load.prompts):
        core.add_request(str(i), {"prompt_token_ids": prompt}, params)
    decoding: set[str] = set()
    while len(decoding) < len(load.prompts):
        decoding |= {out.request_id for out in core.step() if out.outputs[0].token_ids}

    def step() -> float:
        begin = time.perf_counter()
        core.step()
        return time.perf_counter() - begin

    for _ in range(3):
        step()
    return step


def medians(steps: dict[str, list[float]]) -> dict[str, float]:
    """Median milliseconds of each engine's steps."""
    return {name: 1e3 * statistics.median(values) for name, values in steps.items()}
