"""Pages full of random tokens on a device, what they decode to, and attention over them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch

from kvq_plugin import reference, rotation, sealed
from kvq_plugin.formats import Kind, KVFormat
from kvq_plugin.gpu_check.candidates import Candidate
from kvq_plugin.gpu_check.context import Refused
from kvq_plugin.kernels import Workspace
from kvq_plugin.layout import GPU_V1, PageLayout
from kvq_plugin.reference import StaticScale

#: RMS error over RMS output on N(0, 1) data that two kernels with fp16 operands may show: q and P
#: are rounded to 2**-12 of an element each, codes are exact, sums are fp32. Doubled for V's token
#: scales, which some kernels round into P a second time.
OPERANDS = 2.0**-10
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}


def tolerance(dtype: torch.dtype, rounded: bool = False) -> float:
    """*rounded*: through FlashAttention, which takes K, V and its weights in *dtype* as well."""
    return OPERANDS + (3 if rounded else 1) * ROUNDING[dtype] / 3**0.5


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """RMS error over RMS of *expected*; NaN if *got* has one."""
    scale = expected.double().square().mean().sqrt()
    return float((got.double() - expected.double()).square().mean().sqrt() / scale)


def statics(format: KVFormat, heads: int, head_size: int, generator, device) -> list:
    """Channel scales under which N(0, 1) fills the codes, for K and V; None each if dynamic."""
    out = []
    for stream in (format.key, format.value):
        if stream.is_dynamic:
            out.append(None)
            continue
        top = stream.code.qmax if stream.code.kind is Kind.SIGNED else 8.0
        scale = 4.0 / top * (1.0 + torch.rand(heads, head_size, generator=generator))
        out.append(StaticScale.expand(scale.to(device), heads, head_size))
    return out


@dataclass(frozen=True)
class Pool:
    """Pages of one format that the sequences of many problems share.

    Attributes:
        cache: ``[B, H, N, C]`` uint8, all slots written.
        recent: of formats with recent rows: as many pages of those, all slots written too.
        keys, values: what the cache decodes to, fp32 ``[B * N, H, D]``; None unless asked for.
        recent_keys, recent_values: what the recent pages do.
        firsts: the first rows of K and V of each page, ``[B, H, D]``.
    """

    format: KVFormat
    head_size: int
    cache: torch.Tensor
    statics: tuple[StaticScale | None, StaticScale | None]
    recent: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None
    recent_keys: torch.Tensor | None = None
    recent_values: torch.Tensor | None = None
    firsts: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def block_size(self) -> int:
        return self.cache.shape[2]

    @property
    def caches(self) -> tuple[torch.Tensor, ...]:
        return (self.cache,) if self.recent is None else (self.cache, self.recent)

    def copies(self) -> tuple[torch.Tensor, ...]:
        """Its caches, on the CPU."""
        return tuple(x.to("cpu", copy=True) for x in self.caches)

    def storing(self, slots: torch.Tensor, recent: torch.Tensor | None = None) -> dict:
        """Keywords of ``store`` about recent rows, if there are; *recent*: the cache, if it is not
        the pool's."""
        if self.recent is None:
            return {}
        recent = self.recent if recent is None else recent
        return {"recent_cache": recent, "recent_slot_mapping": slots}

    def attending(self, table: torch.Tensor, recent: torch.Tensor | None = None) -> dict:
        """The same of ``attend``."""
        if self.recent is None:
            return {}
        recent = self.recent if recent is None else recent
        return {"recent_cache": recent, "recent_block_table": table}


def page_of(format: KVFormat, block_size: int) -> int:
    """*block_size*, or the next one that the format has pages of."""
    return -(-block_size // format.block_size_step) * format.block_size_step


def fill(
    candidate: Candidate,
    format: KVFormat,
    head_size: int,
    block_size: int,
    blocks: int,
    heads: int,
    device: torch.device,
    seed: int = 0,
) -> Pool:
    """A pool of *blocks* pages per head, written by *candidate* from N(0, 1) rows. Raises Refused
    where it does not serve such pages."""
    g = torch.Generator().manual_seed(seed)
    on_device = torch.Generator(device).manual_seed(seed)
    scales = statics(format, heads, head_size, g, device)
    like = {"dtype": torch.uint8, "device": device}
    content = format.bytes_per_token(head_size, block_size)
    cache, recent = torch.empty(blocks, heads, block_size, content, **like), None
    if format.recent is not None:
        cache.fill_(0xFF)  # where groups leave bytes unused
        content = format.recent.bytes_per_token(head_size)
        recent = torch.empty(blocks, heads, block_size, content, **like)
    pool = Pool(format, head_size, cache, tuple(scales), recent)
    reason = candidate.refusal(format, head_size, cache)
    if reason:
        raise Refused(reason)
    # Rows at a time, whole pages of them: 128 MB of K.
    step = max(block_size, (1 << 26) // (heads * head_size) // block_size * block_size)
    for first in range(0, blocks * block_size, step):
        count = min(step, blocks * block_size - first)
        rows = [
            torch.randn(count, heads, head_size, generator=on_device, device=device).bfloat16()
            for _ in "kv"
        ]
        slots = torch.arange(first, first + count, device=device)
        candidate.store(*rows, cache, slots, format, *scales, **pool.storing(slots))
    return pool


def _layout(format: KVFormat, head_size: int, block_size: int, device) -> PageLayout:
    """A layout that reads pages on *device*."""
    layout = PageLayout(format, head_size, block_size, GPU_V1)
    with torch.device(device):
        _ = layout.key, layout.value  # which are made when first asked for
    return layout


def _dense(layout: PageLayout, cache: torch.Tensor, statics) -> list[torch.Tensor]:
    """K and V of all rows, fp32 ``[B * N, H, D]``."""
    pages, dense = cache.flatten(2), []
    for which, static in zip((layout.key, layout.value), statics, strict=True):
        codes = layout.unpack_codes(pages, which).transpose(1, 2).contiguous()
        words = layout.unpack_metadata(pages, which)
        words = None if words is None else words.transpose(1, 2).contiguous()
        dense.append(reference.dequantize(codes, words, which.stream, static).flatten(0, 1))
    return dense


def decoded(pool: Pool) -> Pool:
    """*pool* with ``keys`` and ``values``, read by the layout's own definition."""
    layout = _layout(pool.format, pool.head_size, pool.block_size, pool.cache.device)
    if pool.recent is None:
        keys, values = _dense(layout, pool.cache, pool.statics)
        return replace(pool, keys=keys, values=values)
    recent = _layout(pool.format.recent, pool.head_size, pool.block_size, pool.cache.device)
    new_keys, new_values = _dense(recent, pool.recent, (None, None))
    pages = pool.cache.flatten(2)
    keys, values = (rotation.unrotate(x).flatten(0, 1) for x in sealed.load(pages, layout))
    firsts = tuple(map(rotation.unrotate, sealed.load_first(pages, layout)))
    return replace(pool, keys=keys, values=values, recent_keys=new_keys, recent_values=new_values,
                   firsts=firsts)  # fmt: skip


@dataclass(frozen=True)
class Decode:
    """One decoding step over a pool: ``lengths[s]`` tokens of blocks ``table[s]`` each, of the
    recent pages too."""

    pool: Pool
    query: torch.Tensor
    table: torch.Tensor
    lengths: torch.Tensor
    starts: torch.Tensor
    longest: int

    def arguments(self) -> tuple:
        """Positional arguments of ``attend`` after ``out``."""
        pool = self.pool
        scale = pool.head_size**-0.5
        return (self.query, pool.cache, self.table, self.lengths, self.starts, pool.format, scale,
                *pool.statics)  # fmt: skip

    def run(self, candidate: Candidate, scratch: Workspace, out=None) -> torch.Tensor:
        """The output; *out*, if given. *scratch* is the workspace."""
        out = torch.full_like(self.query, float("nan")) if out is None else out
        candidate.attend(out, *self.arguments(), max_query_len=1, max_seq_len=self.longest,
                         workspace=scratch, **self.pool.attending(self.table))  # fmt: skip
        return out

    def expected(self, sequence: int) -> torch.Tensor:
        """fp32 output ``[heads, D]`` of one sequence."""
        pool, size = self.pool, self.pool.block_size
        length = int(self.lengths[sequence])
        blocks = self.table[sequence, : -(-length // size)].long()
        inside = torch.arange(size, device=blocks.device)
        tokens = (blocks[:, None] * size + inside).flatten()[:length]
        keys, values = pool.keys[tokens], pool.values[tokens]
        if pool.recent is not None:
            bound = pool.format.sealed_before(length - 1)
            recent = ((keys, pool.recent_keys), (values, pool.recent_values))
            for (rows, new), first in zip(recent, pool.firsts, strict=True):
                rows[bound:] = new[tokens[bound:]]
                if bound:
                    rows[0] = first[blocks[0]]
        q = self.query[sequence].float().unflatten(0, (keys.shape[1], -1))
        scores = torch.einsum("hgd,lhd->hgl", q, keys) * pool.head_size**-0.5
        return torch.einsum("hgl,lhd->hgd", scores.softmax(-1), values).flatten(0, 1)


def decode(
    pool: Pool,
    batch: int,
    context: int,
    group: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    ragged: bool = True,
) -> Decode:
    """A batch whose first sequence has *context* tokens and the others, if *ragged*, up to two
    pages fewer, each in its own order of the pool's pages."""
    g = torch.Generator().manual_seed(seed)
    blocks, heads, size, _ = pool.cache.shape
    device = pool.cache.device
    shorter = torch.randint(0, min(2 * size, context), (batch,), generator=g)
    shorter[0] = 0
    lengths = context - shorter if ragged else torch.full((batch,), context)
    needed = -(-context // size)
    # The first order is shuffled; the others start elsewhere in it.
    order = torch.randperm(blocks, generator=g)
    offsets = torch.randint(0, blocks, (batch, 1), generator=g)
    table = order[(torch.arange(needed)[None] + offsets) % blocks]
    query = torch.randn(batch, heads * group, pool.head_size, generator=g).to(dtype)
    starts = torch.arange(batch + 1, dtype=torch.int32)
    return Decode(
        pool,
        query.to(device),
        table.int().to(device),
        lengths.int().to(device),
        starts.to(device),
        context,
    )


@dataclass(frozen=True)
class Batch:
    """A step of a server: new rows of K and V to store, then attention of their queries.

    Tensors are padded as vLLM pads them for a captured graph: sequences past the last have no
    tokens and no queries, rows past the last query no slot.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    slots: torch.Tensor
    table: torch.Tensor
    lengths: torch.Tensor
    starts: torch.Tensor
    recent_slots: torch.Tensor
    recent_table: torch.Tensor

    @classmethod
    def make(
        cls,
        pool: Pool,
        requests: Sequence[tuple[int, int]],
        group: int,
        dtype: torch.dtype,
        seed: int,
        sequences: int | None = None,
        rows: int | None = None,
    ) -> Batch:
        """*requests* are (tokens in the cache after this step, new ones of them), each in blocks
        of its own; *sequences* and *rows* to pad to."""
        g = torch.Generator().manual_seed(seed)
        blocks, heads, size, _ = pool.cache.shape
        sequences, new = sequences or len(requests), [n for _, n in requests]
        rows = rows or sum(new)
        tables = []
        for _ in pool.caches:
            order, at = torch.randperm(blocks, generator=g), 0
            spare = int(order[-1])  # stands in rows of the table past a sequence's end
            table = torch.full((sequences, blocks), spare, dtype=torch.int32)
            slots = torch.full((rows,), -1)
            for s, (length, count) in enumerate(requests):
                mine = order[at : at + -(-length // size)]
                at += len(mine)
                assert at < blocks, "the pool is too small for these requests"
                table[s, : len(mine)] = mine
                tokens = torch.arange(length - count, length)
                first = sum(new[:s])
                slots[first : first + count] = mine[tokens // size] * size + tokens % size
            tables.append((slots, table))
        (slots, table), (recent_slots, recent_table) = tables[0], tables[-1]
        starts = [0, *itertools.accumulate(new)]
        starts += [starts[-1]] * (sequences - len(requests))
        lengths = [n for n, _ in requests] + [0] * (sequences - len(requests))
        shape = (rows, heads, pool.head_size)
        activations = (
            torch.randn(rows, heads * group, pool.head_size, generator=g),
            torch.randn(shape, generator=g),
            torch.randn(shape, generator=g),
        )
        integers = (torch.tensor(x, dtype=torch.int32) for x in (lengths, starts))
        tensors = (*(x.to(dtype) for x in activations), slots, table, *integers, recent_slots,
                   recent_table)  # fmt: skip
        return cls(*(x.to(pool.cache.device) for x in tensors))

    def copy_(self, other: Batch) -> None:
        """Take over the values of a batch of the same shapes, in place, as a replay needs."""
        for f in fields(self):
            getattr(self, f.name).copy_(getattr(other, f.name))

    def run(self, pool: Pool, candidate: Candidate, out, scratch, parts, longest, options) -> None:
        """Store, then attend once per part (first sequence, end, bound on queries), each with the
        views of the batch's tensors that ``serving/gpu.py`` takes."""
        statics, recent = pool.statics, pool.storing(self.recent_slots)
        candidate.store(
            self.key, self.value, pool.cache, self.slots, pool.format, *statics, **recent
        )  # fmt: skip
        for begin, end, most in parts:
            candidate.attend(
                out, self.query, pool.cache, self.table[begin:end], self.lengths[begin:end],
                self.starts[begin : end + 1], pool.format, pool.head_size**-0.5, *statics,
                **options, max_query_len=most, max_seq_len=longest, workspace=scratch,
                **pool.attending(self.recent_table[begin:end]),
            )  # fmt: skip

    def check(self, pool: Pool, before: Sequence[torch.Tensor], out: torch.Tensor, options: dict,
              rounded: bool = False) -> None:  # fmt: skip
        """The pages' bytes against the reference's on *before* (``pool.copies()`` before the
        step), then *out*, full of NaN before, against float64 over those pages; rows past the last
        query must still be NaN. Raises AssertionError."""
        here = Batch(*(getattr(self, f.name).cpu() for f in fields(self)))
        statics = [None if s is None else s.to("cpu") for s in pool.statics]
        options = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        stored = (here.key, here.value, before[0], here.slots, pool.format, *statics)
        reference.store(*stored, **pool.storing(here.recent_slots, before[-1]), layout=GPU_V1)
        out, names = out.cpu(), ("pages", "recent pages")[: len(before)]
        for name, pages, wanted in zip(names, pool.copies(), before, strict=True):
            wrong = int((pages != wanted).sum())
            assert not wrong, f"{wrong} bytes of the {name} differ from the reference's"
        count = int(here.starts[-1])
        assert bool(out[count:].isnan().all()), "rows of no sequence were written"
        expected = reference.attend(
            here.query[:count], before[0], here.table, here.lengths, here.starts, pool.format,
            pool.head_size**-0.5, *statics, **options, dtype=torch.float64, layout=GPU_V1,
            **pool.attending(here.recent_table, before[-1]),
        )  # fmt: skip
        got, bound = out[:count], tolerance(out.dtype, rounded)
        error = relative_error(got, expected) if expected.any() else float(got.abs().max())
        assert error <= bound, f"relative RMS error {error:.2g}, allowed {bound:.2g}"
