"""Decoding and storing, timed beside a device copy, PyTorch's attention and vLLM's.

Every measurement replays a CUDA graph of several calls, so that no launch overhead of Python is
in it, and streams more than any GPU's L2 holds. Bytes are those of the cache: a kernel's rate
divided by the copy's is what it reaches of the memory's speed.
"""

from __future__ import annotations

import csv
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import torch

from kvq_plugin.formats import FORMATS
from kvq_plugin.gpu_check import stock
from kvq_plugin.gpu_check.candidates import Candidate
from kvq_plugin.gpu_check.problems import decode, fill
from kvq_plugin.gpu_check.report import Clock, Outcome

#: (sequences, context): one long one, an awkward number, many.
SHAPES = ((1, 131072), (17, 16384), (64, 8192))
KV_HEADS, GROUP, HEAD_SIZE, PAGE = 8, 4, 128, 16
FORMATS_TIMED = ("fp8_e4m3", "int8_per_token_head", "int4_per_token_head")
#: Tokens of a store: a step of decoding, and a chunk of prefill.
STORES = (64, 8192)


@dataclass(frozen=True)
class Row:
    """One measurement. ``gb_per_s`` counts the bytes of the cache (both ways for a copy);
    ``of_copy`` is that over the copy's."""

    what: str
    kernel: str
    format: str
    batch: int
    context: int
    kv_heads: int
    group: int
    head_size: int
    page: int
    microseconds: float
    gb_per_s: float
    of_copy: float


def microseconds(call: Callable[[], None], calls: int = 5, repeats: int = 15) -> float:
    """Median time of one *call* among *repeats* replays of a graph of *calls* of them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in "be")
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / calls)
    return statistics.median(times)


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of a device-to-device copy of 2 GB, read and written bytes together."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / microseconds(lambda: target.copy_(source)) / 1e3


@dataclass
class Bench:
    """Collects rows; ``copy`` is the copy's GB/s."""

    copy: float
    rows: list[Row]
    outcome: Outcome

    def add(self, what, kernel, format, batch, context, size: int, call) -> None:
        """Time *call*, which moves *size* bytes of cache. A failure is noted and ends nothing."""
        try:
            time = microseconds(call)
        except Exception as e:
            name = f"{what} {kernel} {format} B={batch} context {context}"
            self.outcome.failures.append(f"{name}: {type(e).__name__}: {e}")
            return
        rate = size / time / 1e3
        shape = (batch, context, KV_HEADS, GROUP, HEAD_SIZE, PAGE)
        self.rows.append(Row(what, kernel, format, *shape, time, rate, rate / self.copy))
        self.outcome.passed += 1


def _ours(bench: Bench, candidates: Sequence[Candidate], device) -> Iterator[None]:
    for (batch, context), name in ((s, f) for s in SHAPES for f in FORMATS_TIMED):
        format = FORMATS[name]
        blocks = batch * context // PAGE
        pool = fill(candidates[0], format, HEAD_SIZE, PAGE, blocks, KV_HEADS, device)
        problem = decode(pool, batch, context, GROUP, torch.bfloat16, ragged=False)
        # Every sequence has pages of its own, in shuffled order.
        order = torch.randperm(blocks, device=device).int().view(batch, -1)
        problem.table.copy_(order)
        out = torch.empty_like(problem.query)
        for candidate in candidates:
            call = partial(problem.run, candidate, out)
            bench.add("attend", candidate.name, name, batch, context, pool.cache.numel(), call)
        yield


def _stores(bench: Bench, candidates: Sequence[Candidate], device) -> Iterator[None]:
    for tokens, name in ((t, f) for t in STORES for f in FORMATS_TIMED):
        format = FORMATS[name]
        pool = fill(candidates[0], format, HEAD_SIZE, PAGE, tokens // PAGE, KV_HEADS, device)
        shape = (tokens, KV_HEADS, HEAD_SIZE)
        rows = [torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in "kv"]
        slots = torch.randperm(tokens, device=device)
        size = pool.cache.numel() + sum(x.numel() * 2 for x in rows)
        for candidate in candidates:
            call = partial(candidate.store, *rows, pool.cache, slots, format, *pool.statics)
            bench.add("store", candidate.name, name, tokens, 0, size, call)
        yield


def _others(bench: Bench, device) -> Iterator[None]:
    for batch, context in SHAPES:
        shape = (batch, KV_HEADS, context, HEAD_SIZE)
        keys, values = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in "kv")
        query = torch.randn(
            batch, KV_HEADS * GROUP, 1, HEAD_SIZE, device=device, dtype=torch.bfloat16
        )
        call = partial(
            torch.nn.functional.scaled_dot_product_attention, query, keys, values, enable_gqa=True
        )
        bench.add("attend", "torch sdpa", "bf16", batch, context, 4 * keys.numel(), call)
        del keys, values, call
        yield
        for mode in stock.MODES if stock.missing() == "" else ():
            call, size = stock.decode(
                mode, batch, context, KV_HEADS, GROUP, HEAD_SIZE, PAGE, device
            )
            bench.add("attend", "vllm triton", mode, batch, context, size, call)
            yield


def run(
    candidates: Sequence[Candidate], device: torch.device, clock: Clock, share: float
) -> tuple[list[Row], Outcome]:
    """All rows, as far as *share* seconds reach; ours first."""
    outcome = Outcome()
    copy = copy_bandwidth(device)
    shape = (0, 0, 0, 0, 0, 0)
    bench = Bench(copy, [Row("copy", "torch", "", *shape, 0.0, copy, 1.0)], outcome)
    parts = (
        part
        for make in (
            lambda: _ours(bench, candidates, device),
            lambda: _others(bench, device),
            lambda: _stores(bench, candidates, device),
        )
        for part in make()
    )
    done = object()
    work = clock.within(iter(lambda: next(parts, done), done), share)
    for _ in work:
        torch.cuda.empty_cache()
    if next(parts, done) is not done:
        outcome.skipped = "the last measurements, for time"
    elif stock.missing():
        outcome.skipped = f"vLLM's own kernels: {stock.missing()}"
    return bench.rows, outcome


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """All rows, a column per field of :class:`Row`; complete, or not there at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Row)])
            writer.writeheader()
            for row in rows:
                values = asdict(row)
                writer.writerow(
                    {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in values.items()}
                )
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
