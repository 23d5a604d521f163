"""Attention against fp32 over the same codes: a grid of decoding steps, and ragged batches."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvq_plugin import reference
from kvq_plugin.gpu_check.candidates import ROWS, Candidate
from kvq_plugin.gpu_check.problems import Pool, decode, decoded, fill, relative_error, tolerance
from kvq_plugin.gpu_check.report import Clock, Outcome
from kvq_plugin.layout import GPU_V1


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

    def cases(self):
        """(head size, page, format) with its (context, batch, group) list; the product once."""
        for i, (d, page) in enumerate(itertools.product(self.head_sizes, self.pages)):
            shapes = list(itertools.product(self.contexts, self.batches, self.groups))
            for row, format in enumerate(ROWS):
                yield (
                    (d, page, format),
                    [shape for j, shape in enumerate(shapes) if (i + j) % len(ROWS) == row],
                )


GRID = Grid()


def _compare(outcome: Outcome, name: str, problem, candidate: Candidate, compared: int) -> None:
    out = problem.run(candidate)
    if not bool(out.isfinite().all()):
        return outcome.check(name, False, "the output is not finite")
    count = len(problem.lengths)
    # The first and the last sequence, and some between.
    picks = sorted({round(i * (count - 1) / max(1, compared - 1)) for i in range(compared)})
    worst = max(relative_error(out[s], problem.expected(s)) for s in picks)
    bound = tolerance(out.dtype)
    outcome.check(name, worst <= bound, f"relative RMS error {worst:.2g}, allowed {bound:.2g}")
    return None


def check_grid(
    candidates: Sequence[Candidate],
    device: torch.device,
    clock: Clock,
    share: float,
    grid: Grid = GRID,
    shard: tuple[int, int] = (0, 1),
) -> Outcome:
    """Every shape of *grid*, with each candidate that serves it, for at most *share* seconds.
    *shard* (index, count): of the kinds of page only each count-th from index on."""
    outcome = Outcome()
    pools = list(grid.cases())
    random.Random(0).shuffle(pools)  # so that a run cut short has seen some of everything
    pools = pools[shard[0] :: shard[1]]
    total = sum(len(shapes) for _, shapes in pools)
    done = 0
    work = ((key, shape) for key, shapes in pools for shape in shapes)
    pool: Pool | None = None
    held = None
    for key, (context, batch, group) in clock.within(work, share):
        d, page, format = key
        if key != held:
            pool, held = None, key  # free the old pages before there are new ones
            blocks = max(grid.contexts) // page + 1
            pool = decoded(fill(candidates[0], format, d, page, blocks, 1, device))
        problem = decode(pool, batch, context, group, seed=done)
        for candidate in candidates:
            if candidate.refusal(format, d, pool.cache) is None:
                name = (
                    f"{candidate.name} {format.name} D={d} G={group} context {context} "
                    f"B={batch} pages of {page}"
                )
                _compare(outcome, name, problem, candidate, grid.compared)
        done += 1
    if done < total:
        outcome.skipped = f"{total - done} of {total} shapes, for time"
    return outcome


def _ragged(rng: random.Random, page: int) -> list[tuple[int, int]]:
    """(cached tokens, query tokens) of a few sequences, empty ones among them."""
    batch = []
    for _ in range(rng.randint(1, 6)):
        length = rng.choice((0, 1, page - 1, page, page + 1, rng.randint(1, 700)))
        batch.append((length, min(length, rng.choice((0, 1, 1, 1, 2, 4, 8)))))
    if not any(count for _, count in batch):
        batch[0] = (page + 3, 1)
    return batch


def _options(rng: random.Random, heads: int, device: torch.device) -> dict:
    options: dict = {"causal": rng.random() < 0.9}
    if rng.random() < 0.3:
        options["window"] = rng.choice((1, 7, 64, 200))
    if rng.random() < 0.3:
        options["softcap"] = rng.choice((5.0, 30.0))
    if rng.random() < 0.3:
        options["alibi_slopes"] = torch.rand(heads) / 8
    if rng.random() < 0.3:
        options["sinks"] = torch.randn(heads)
    return options


def _to(device, options: dict) -> dict:
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}


def check_ragged(
    candidates: Sequence[Candidate],
    device: torch.device,
    clock: Clock,
    share: float,
    cases: int = 120,
    shard: tuple[int, int] = (0, 1),
) -> Outcome:
    """Random batches with random options against the float64 reference on the CPU, including the
    stores' bytes against the reference's."""
    outcome = Outcome()
    seeds, done = range(cases)[shard[0] :: shard[1]], 0
    for seed in clock.within(seeds, share):
        _ragged_case(outcome, candidates, device, seed)
        done += 1
    if done < len(seeds):
        outcome.skipped = f"{len(seeds) - done} of {len(seeds)} batches, for time"
    return outcome


def _ragged_case(outcome: Outcome, candidates, device, seed: int) -> None:
    rng = random.Random(seed)
    format = ROWS[seed % len(ROWS)]
    page, heads = rng.choice((16, 48, 64)), rng.choice((1, 2))
    d, group = rng.choice((32, 64, 96, 128, 256)), rng.choice((1, 3, 4, 8, 20))
    dtype = rng.choice((torch.bfloat16, torch.float16, torch.float32))
    batch = _ragged(rng, page)
    options = _options(rng, heads * group, device)
    counts = [max(1, -(-length // page)) for length, _ in batch]
    pool = fill(candidates[0], format, d, page, sum(counts) + 1, heads, device, seed)
    on_cpu = pool.cache.cpu()
    scales = [None if s is None else _static_to(s, "cpu") for s in pool.statics]
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(pool.cache.shape[0], generator=g).int().split([*counts, 1])
    table = torch.full((len(batch), max(counts)), int(order[-1][0]), dtype=torch.int32)
    for s, blocks in enumerate(order[:-1]):
        table[s, : counts[s]] = blocks
    lengths = torch.tensor([length for length, _ in batch], dtype=torch.int32)
    starts = torch.tensor([0, *itertools.accumulate(c for _, c in batch)], dtype=torch.int32)
    query = torch.randn(int(starts[-1]), heads * group, d, generator=g).to(dtype)
    expected = reference.attend(
        query, on_cpu, table, lengths, starts, format, d**-0.5, *scales, **options,
        dtype=torch.float64, layout=GPU_V1,
    )  # fmt: skip
    moved = [x.to(device) for x in (query, table, lengths, starts)]
    for candidate in candidates:
        if candidate.refusal(format, d, pool.cache) is not None:
            continue
        out = torch.full_like(moved[0], float("nan"))
        candidate.attend(
            out, moved[0], pool.cache, *moved[1:], format, d**-0.5, *pool.statics,
            **_to(device, options), max_query_len=max(c for _, c in batch),
            max_seq_len=max(1, int(lengths.max())),
        )  # fmt: skip
        name = f"{candidate.name} {format.name} D={d} G={group} pages of {page} {batch} {options}"
        error = relative_error(out.cpu(), expected) if expected.any() else float(out.abs().max())
        outcome.check(name, error <= tolerance(dtype), f"relative RMS error {error:.2g}")


def _static_to(static: reference.StaticScale, device) -> reference.StaticScale:
    zero = static.zero_point
    zero = None if zero is None else zero.to(device)
    return reference.StaticScale(static.scale.to(device), static.inverse.to(device), zero)


def check_graphs(candidates: Sequence[Candidate], device: torch.device) -> Outcome:
    """Store and attention captured once and replayed over new rows, lengths and pages."""
    outcome = Outcome()
    for format, candidate in itertools.product(ROWS, candidates):
        pool = fill(candidate, format, 128, 16, 257, 2, device)
        if candidate.refusal(format, 128, pool.cache) is not None:
            continue
        problem = decode(pool, 3, 4096, 4, torch.bfloat16, ragged=False)
        rows = [torch.zeros(3, 2, 128, dtype=torch.bfloat16, device=device) for _ in "kv"]
        slots = torch.full((3,), -1, device=device)
        out = torch.zeros_like(problem.query)

        def step(problem=problem, candidate=candidate, rows=rows, slots=slots, out=out):
            pool = problem.pool
            candidate.store(*rows, pool.cache, slots, pool.format, *pool.statics)
            candidate.attend(out, *problem.arguments(), max_query_len=1, max_seq_len=4096)

        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            step()  # compiles, where that is still to do
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        for length in (1, 700, 4096):
            problem.lengths.fill_(length)
            problem.query.normal_()
            problem.table.copy_(problem.table.roll(5, 1))
            for x in rows:
                x.normal_()
            slots.copy_(torch.arange(3, device=device) + length)
            graph.replay()
            replayed = out.clone()
            step()
            same = torch.equal(replayed, out) and bool(out.isfinite().all())
            outcome.check(f"{candidate.name} {format.name} replayed at {length} tokens", same)
    return outcome
