"""Pages full of random tokens on a device, what they decode to, and attention over them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from kvq_plugin import reference
from kvq_plugin.formats import Kind, KVFormat
from kvq_plugin.gpu_check.candidates import Candidate
from kvq_plugin.layout import GPU_V1, PageLayout
from kvq_plugin.reference import StaticScale

#: RMS error over RMS output on N(0, 1) data that two kernels with fp16 operands may show: q and P
#: are rounded to 2**-12 of an element each, codes are exact, sums are fp32. Doubled for V's token
#: scales, which some kernels round into P a second time.
OPERANDS = 2.0**-10
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}


def tolerance(dtype: torch.dtype) -> float:
    return OPERANDS + ROUNDING[dtype] / 3**0.5


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
        keys, values: what it decodes to, fp32 ``[B * N, H, D]``; None unless asked for.
    """

    format: KVFormat
    head_size: int
    cache: torch.Tensor
    statics: tuple[StaticScale | None, StaticScale | None]
    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None

    @property
    def block_size(self) -> int:
        return self.cache.shape[2]


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
    """A pool of *blocks* pages per head, written by *candidate* from N(0, 1) rows."""
    g = torch.Generator().manual_seed(seed)
    on_device = torch.Generator(device).manual_seed(seed)
    scales = statics(format, heads, head_size, g, device)
    content = format.bytes_per_token(head_size)
    cache = torch.empty(blocks, heads, block_size, content, dtype=torch.uint8, device=device)
    step = max(1, (1 << 26) // (heads * head_size))  # rows at a time: 128 MB of K
    for first in range(0, blocks * block_size, step):
        count = min(step, blocks * block_size - first)
        rows = [
            torch.randn(count, heads, head_size, generator=on_device, device=device).bfloat16()
            for _ in "kv"
        ]
        slots = torch.arange(first, first + count, device=device)
        candidate.store(*rows, cache, slots, format, *scales)
    return Pool(format, head_size, cache, tuple(scales))


def decoded(pool: Pool) -> Pool:
    """*pool* with ``keys`` and ``values``, read by the layout's own definition."""
    layout = PageLayout(pool.format, pool.head_size, pool.block_size, GPU_V1)
    device = pool.cache.device
    pages = pool.cache.flatten(2)
    dense = []
    for which, static in zip((layout.key, layout.value), pool.statics, strict=True):
        here = replace(
            which,
            code_bytes=which.code_bytes.to(device),
            code_shifts=which.code_shifts.to(device),
        )
        codes = layout.unpack_codes(pages, here).transpose(1, 2).contiguous()
        words = layout.unpack_metadata(pages, here)
        words = None if words is None else words.transpose(1, 2).contiguous()
        dense.append(reference.dequantize(codes, words, which.stream, static).flatten(0, 1))
    return replace(pool, keys=dense[0], values=dense[1])


@dataclass(frozen=True)
class Decode:
    """One decoding step over a pool: ``lengths[s]`` tokens of blocks ``table[s]`` each."""

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

    def run(self, candidate: Candidate, out: torch.Tensor | None = None) -> torch.Tensor:
        """The output; *out*, if given."""
        out = torch.full_like(self.query, float("nan")) if out is None else out
        candidate.attend(out, *self.arguments(), max_query_len=1, max_seq_len=self.longest)
        return out

    def expected(self, sequence: int) -> torch.Tensor:
        """fp32 output ``[heads, D]`` of one sequence."""
        pool, size = self.pool, self.pool.block_size
        length = int(self.lengths[sequence])
        blocks = self.table[sequence, : -(-length // size)].long()
        inside = torch.arange(size, device=blocks.device)
        tokens = (blocks[:, None] * size + inside).flatten()[:length]
        keys, values = pool.keys[tokens], pool.values[tokens]
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
