"""Attention against fp32 or fp64 over the same codes: server steps, a grid of decodes, graphs."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache as memoize
from functools import partial

import torch

from kvq_plugin.formats import KVFormat
from kvq_plugin.gpu_check.candidates import ROWS, Candidate
from kvq_plugin.gpu_check.context import Case, Context, captured
from kvq_plugin.gpu_check.problems import (
    Batch,
    Pool,
    decode,
    decoded,
    fill,
    page_of,
    relative_error,
    tolerance,
)

#: Query tokens from which FlashAttention may take over (kernels/prefill.py).
LONG = 64
#: Batches a format is checked with, the first of them those of SERVED.
BATCHES = 24
#: (tokens in the cache, new ones of them) of each request, decodes first, as vLLM orders them.
SERVED = {
    "decodes": [(1, 1), (700, 1), (64, 1), (333, 1)],
    "decodes beside prefills": [(700, 1), (17, 1), (300, 200), (64, 64)],
    "a long decode": [(3000, 1)],
    "speculative decodes": [(500, 4), (31, 4), (8, 4)],
    "chunked prefill": [(900, 1), (600, 128)],
    "long prefills": [(40, 1), (2500, 700), (800, 800), (5, 5)],
}


def _pool(candidate, context, format, requests, d=128, page=16, heads=2, seed=0) -> Pool:
    """Room for *requests*, in pages of *page* tokens or the next number that *format* allows."""
    page = page_of(format, page)
    blocks = sum(-(-length // page) for length, _ in requests) + 1
    return fill(candidate, format, d, page, blocks, heads, context.device, seed)


def _step(candidate, context, pool, requests, group=4, dtype=torch.bfloat16, seed=0, **options):
    """One eager step, checked."""
    batch = Batch.make(pool, requests, group, dtype, seed)
    before, out = pool.copies(), torch.full_like(batch.query, float("nan"))
    options = {
        k: v.to(context.device) if isinstance(v, torch.Tensor) else v for k, v in options.items()
    }
    longest = max(1, max(length for length, _ in requests))
    batch.run(pool, candidate, out, context.scratch(), _parts(requests), longest, options)
    context.synchronize()
    batch.check(pool, before, out, options, rounded=max(n for _, n in requests) >= LONG)


def _parts(requests, bound: int = 1) -> list[tuple[int, int, int]]:
    """As ``serving/gpu.py`` splits a batch: decodes of up to *bound* tokens, then the rest."""
    decodes = sum(1 for _ in itertools.takewhile(lambda r: r[1] <= bound, requests))
    longest = max(n for _, n in requests)
    if decodes in (0, len(requests)):
        return [(0, len(requests), longest)]
    return [(0, decodes, bound), (decodes, len(requests), longest)]


def _short(requests, length: int) -> list[tuple[int, int]]:
    return [(min(n, length), min(new, 20)) for n, new in requests]


def _served(candidate: Candidate, context: Context, format: KVFormat, requests) -> None:
    _step(candidate, context, _pool(candidate, context, format, requests), requests)


def _random(candidate: Candidate, context: Context, format: KVFormat, seed: int) -> None:
    rng = random.Random(seed)
    page, heads = page_of(format, rng.choice((16, 48, 64))), rng.choice((1, 2))
    d, group = rng.choice((32, 64, 96, 128, 256)), rng.choice((1, 3, 4, 8, 20))
    dtype = rng.choice((torch.bfloat16, torch.float16, torch.float32))
    requests = []
    for _ in range(rng.randint(1, 6)):
        length = rng.choice((0, 1, page - 1, page, page + 1, rng.randint(1, 700)))
        requests.append((length, min(length, rng.choice((0, 1, 1, 1, 2, 4, 8)))))
    if not any(count for _, count in requests):
        requests[0] = (page + 3, 1)
    requests.sort(key=lambda r: r[1] > 1)
    options: dict = {"causal": rng.random() < 0.9 or format.recent is not None}
    for name, values in (("window", (1, 7, 64, 200)), ("softcap", (5.0, 30.0))):
        if rng.random() < 0.3:
            options[name] = rng.choice(values)
    g = torch.Generator().manual_seed(seed)
    if rng.random() < 0.3:
        options["alibi_slopes"] = torch.rand(heads * group, generator=g) / 8
    if rng.random() < 0.3:
        options["sinks"] = torch.randn(heads * group, generator=g)
    pool = _pool(candidate, context, format, requests, d, page, heads, seed)
    _step(candidate, context, pool, requests, group, dtype, seed, **options)


def batches(candidate: Candidate, context: Context) -> Iterator[Case]:
    """Steps as a server makes them, then random ones with random options, empty sequences too."""
    for format in context.formats:
        for name, requests in SERVED.items():
            requests = _short(requests, 100) if context.quick else requests
            call = partial(_served, candidate, context, format, requests)
            yield f"{format.name} {name}", call
        for seed in range(2 if context.quick else BATCHES - len(SERVED)):
            call = partial(_random, candidate, context, format, seed)
            yield f"{format.name} random {seed}", call


def sanitized(candidate: Candidate, context: Context) -> Iterator[Case]:
    """Every kernel once or twice, on small shapes: sanitizers are slow."""
    for format in context.formats:
        for name in ("decodes beside prefills", "a long decode"):
            requests = _short(SERVED[name], 60 if context.quick else 400)
            call = partial(_served, candidate, context, format, requests)
            yield f"{format.name} {name}", call


# Graphs -----------------------------------------------------------------------------------------

#: What a graph is captured with, and replayed with.
DECODES = ([(1, 1)] * 4, [(700, 1), (3, 1), (64, 1), (65, 1)], [(512, 1), (1, 1)])
MIXED = (
    [(16, 16), (16, 16), (16, 16), (16, 16)],
    [(700, 1), (333, 1), (80, 40), (20, 20)],
    [(64, 64)],
)
#: Bounded by 256 query tokens, which go through FlashAttention.
PREFILLS = (
    [(64, 64)] * 4,
    [(700, 1), (333, 150), (80, 40), (20, 20)],
    [(400, 256)],
)


def _replays(candidate: Candidate, context: Context, format: KVFormat, kind, rows: int) -> None:
    """A step captured once, with bounds that hold for all replays, and replayed over new rows,
    lengths, pages and numbers of requests."""
    page = page_of(format, 16)
    pool = fill(candidate, format, 128, page, 80, 2, context.device)
    shape = {"group": 4, "dtype": torch.bfloat16, "sequences": 4, "rows": rows}
    live = Batch.make(pool, kind[0], seed=0, **shape)
    out, scratch = torch.empty_like(live.query), context.scratch()
    most = 1 if rows == 4 else rows
    parts, longest = [(0, 4, most)], 79 * page
    replay = captured(
        lambda: live.run(pool, candidate, out, scratch, parts, longest, {}), context.device
    )
    for seed, requests in enumerate(kind, 1):
        live.copy_(Batch.make(pool, requests, seed=seed, **shape))
        before = pool.copies()
        out.fill_(float("nan"))
        context.scratch()
        replay()
        context.synchronize()
        live.check(pool, before, out, {}, rounded=most >= LONG)


def graphs(candidate: Candidate, context: Context) -> Iterator[Case]:
    for format in context.formats:
        kinds = (("decodes", DECODES, 4), ("mixed", MIXED, 64), ("prefills", PREFILLS, 256))
        for name, kind, rows in kinds[: 1 if context.quick else 3]:
            call = partial(_replays, candidate, context, format, kind, rows)
            yield f"{format.name} {name} replayed", call


# The grid ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """Shapes whose product is checked once each; formats take turns."""

    groups: tuple[int, ...] = (1, 4, 7, 8, 16)
    head_sizes: tuple[int, ...] = (64, 128, 256)
    contexts: tuple[int, ...] = (1024, 8192, 32768, 131072)
    batches: tuple[int, ...] = (1, 8, 17, 64)
    pages: tuple[int, ...] = (16, 64, 128)
    #: Sequences of a batch whose output is compared; the others must be finite.
    compared: int = 4

    def shapes(self, turn: int, turns: int) -> list[tuple[int, int, int, int, int]]:
        """(head size, page, group, context, batch) of each *turns*-th shape from *turn* on, in an
        order in which a run cut short has compiled for as many kinds of kernels as it could: one
        of each head size and group first, then one of each page besides."""
        found = []
        for i, (d, page) in enumerate(itertools.product(self.head_sizes, self.pages)):
            inner = itertools.product(self.contexts, self.batches, self.groups)
            found += [
                (d, page, group, context, batch)
                for j, (context, batch, group) in enumerate(inner)
                if (i + j) % turns == turn
            ]
        random.Random(0).shuffle(found)
        seen: set = set()

        def rank(shape) -> int:
            d, page, group, *_ = shape
            kinds = ((d, group), (d, page, group))
            place = next((r for r, kind in enumerate(kinds) if kind not in seen), 2)
            seen.update(kinds)
            return place

        ranks = {shape: rank(shape) for shape in found}
        return sorted(found, key=ranks.__getitem__)


GRID = Grid()
SMALL = Grid((1, 4, 8), (64,), (40, 70), (1, 3), (16,), compared=2)


def _compare(candidate: Candidate, context: Context, pool_of, grid: Grid, shape, seed) -> None:
    d, page, group, length, count = shape
    pool = pool_of(d, page)
    problem = decode(pool, count, length, group, seed=seed)
    out = problem.run(candidate, context.scratch())
    assert bool(out.isfinite().all()), "the output is not finite"
    # The first and the last sequence, and some between.
    most = max(1, grid.compared - 1)
    picks = sorted({round(i * (count - 1) / most) for i in range(grid.compared)})
    worst = max(relative_error(out[s], problem.expected(s)) for s in picks)
    bound = tolerance(out.dtype)
    assert worst <= bound, f"relative RMS error {worst:.2g}, allowed {bound:.2g}"


def grid(candidate: Candidate, context: Context, shapes: Grid | None = None) -> Iterator[Case]:
    """Decoding steps of every shape, in one format each."""
    shapes = shapes or (SMALL if context.quick else GRID)
    for format in context.formats:

        @memoize
        def pool_of(d: int, page: int, format=format) -> Pool:
            page = page_of(format, page)
            blocks = max(shapes.contexts) // page + 1
            return decoded(fill(candidate, format, d, page, blocks, 1, context.device))

        for seed, shape in enumerate(shapes.shapes(ROWS.index(format), len(ROWS))):
            d, page, group, length, count = shape
            name = f"{format.name} D={d} G={group} context {length} B={count} pages of {page}"
            yield name, partial(_compare, candidate, context, pool_of, shapes, shape, seed)


# Dispatch ---------------------------------------------------------------------------------------


@contextmanager
def _watched(name: str):
    """The kernels that ``attend`` or ``store`` calls meanwhile, by family."""
    from kvq_plugin.kernels import cuda, triton_paged, triton_store

    triton, called = triton_paged if name == "attend" else triton_store, []
    originals = {"cuda": (cuda, getattr(cuda, name)), "triton": (triton, getattr(triton, name))}

    def noting(family, original):
        def call(*args, **kwargs):
            called.append(family)
            return original(*args, **kwargs)

        return call

    try:
        for family, (module, original) in originals.items():
            setattr(module, name, noting(family, original))
        yield called
    finally:
        for module, original in originals.values():
            setattr(module, name, original)


def dispatch(candidate: Candidate, context: Context) -> Iterator[Case]:
    """Which kernels ``KVQ_GPU_KERNELS=auto`` takes: CUDA C++ to decode and store, Triton for what
    CUDA C++ refuses, and both right."""

    from kvq_plugin.kernels import cuda

    def case(format: KVFormat, d: int, name: str) -> None:
        requests = SERVED["decodes"]
        pool = _pool(candidate, context, format, requests, d)
        with _watched(name) as called:
            _step(candidate, context, pool, requests)
        expected = "triton" if cuda.shape_refusal(format, d, pool.block_size) else "cuda"
        assert called == [expected], f"called {called}, expected [{expected!r}]"

    for format, d, name in itertools.product(context.formats, (128, 80), ("store", "attend")):
        if d % format.head_size_step == 0:
            yield f"{format.name} D={d} {name}", partial(case, format, d, name)
