"""A call of ops.attend on a format with recent rows, its float64 result and its bound; shared by
tests, nothing here is one."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import cases
import oracle
import torch
from cases import use_isa

from kvq_plugin import ops, reference, sealed
from kvq_plugin.formats import GROUP, Granularity, KVFormat
from kvq_plugin.layout import CPU_V1, GPU_V1, PageLayout, repack

NAN = float("nan")
NOWHERE = 10**9  # what block tables hold where nobody may look


@dataclass(frozen=True)
class Problem:
    format: KVFormat
    query: torch.Tensor
    caches: tuple[torch.Tensor, torch.Tensor]  # sealed, recent
    tables: tuple[torch.Tensor, torch.Tensor]
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    scale: float
    options: dict = field(default_factory=dict)

    def gpu_caches(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Its caches in layout gpu-v1."""
        found = []
        for f, cache in zip((self.format, self.format.recent), self.caches, strict=True):
            shape = (f, self.query.shape[2], cache.shape[2])
            layouts = (PageLayout(*shape, kind) for kind in (CPU_V1, GPU_V1))
            found.append(repack(cache.flatten(2), *layouts).view(cache.shape))
        return tuple(found)

    def _call(self, attend, *out, **more):
        return attend(
            *out, self.query, self.caches[0], self.tables[0], self.seq_lens, self.query_start_loc,
            self.format, self.scale, recent_cache=self.caches[1],
            recent_block_table=self.tables[1], **self.options, **more,
        )  # fmt: skip

    def run(self, isa: str) -> torch.Tensor:
        out = torch.full_like(self.query, NAN)
        with use_isa(isa):
            self._call(ops.attend, out)
        return out

    @oracle.single_threaded
    def expected(self) -> torch.Tensor:
        return self._call(reference.attend, dtype=torch.float64)

    def part(self, s: int, end: int, count: int) -> Problem:
        """Queries of positions [end - count, end) of sequence *s*, alone."""
        last = int(self.query_start_loc[s + 1]) - (int(self.seq_lens[s]) - end)
        return replace(
            self,
            query=self.query[last - count : last],
            tables=tuple(t[s : s + 1] for t in self.tables),
            seq_lens=torch.tensor([end], dtype=torch.int32),
            query_start_loc=torch.tensor([0, count], dtype=torch.int32),
        )

    def slot(self, which: int, s: int, position: int) -> int:
        size = self.caches[which].shape[2]
        return int(self.tables[which][s, position // size]) * size + position % size

    def store(self, s: int, begin: int, key, value, seal_before: int) -> None:
        """Rows of sequence *s* from position *begin* on; groups from *seal_before* on are not
        sealed. Written by the reference."""
        positions = range(begin, begin + len(key))
        slots = [self.slot(0, s, p) if p < seal_before else -1 for p in positions]
        recent = [self.slot(1, s, p) for p in positions]
        reference.store(
            key, value, self.caches[0], torch.tensor(slots), self.format,
            recent_cache=self.caches[1], recent_slot_mapping=torch.tensor(recent),
        )  # fmt: skip


@oracle.single_threaded
def build(
    format: KVFormat,
    batch=((130, 1), (100, 9), (40, 40)),
    *,
    dtype: torch.dtype = torch.float32,
    kv_heads: int = 2,
    group: int = 4,
    head_size: int = 64,
    block_size: int = 64,
    recent_block: int = 32,
    query_gain: float = 1.0,
    spread: float = 1.0,
    spoil=None,
    seed: int = 0,
    **options,
) -> Problem:
    """Sequences of ``(length, query length)`` in shuffled pages. Every byte that no query reads is
    0xFF: sealed groups from the last query's bound on, recent rows before the first one's.

    Args:
        spread: channels of K and tokens of V are scaled log-uniformly between ``1 / spread`` and 1.
        spoil: called with (sequence, key, value) before rows ``[L, H, D]`` are stored.
    """
    g = torch.Generator().manual_seed(seed)
    caches, tables = [], []
    for f, size in ((format, block_size), (format.recent, recent_block)):
        counts = [-(-length // size) for length, _ in batch]
        shape = (sum(counts) + 2, kv_heads, size, f.bytes_per_token(head_size, size))
        caches.append(torch.full(shape, 0xFF, dtype=torch.uint8))
        order = torch.randperm(shape[0], generator=g).int()
        table = torch.full((len(batch), max(counts) + 1), NOWHERE, dtype=torch.int32)
        for s, blocks in enumerate(torch.split(order[: sum(counts)], counts)):
            table[s, : counts[s]] = blocks
        tables.append(table)
    counts = [count for _, count in batch]
    query = torch.randn(sum(counts), kv_heads * group, head_size, generator=g) * query_gain
    problem = Problem(
        format, query.to(dtype), tuple(caches), tuple(tables),
        torch.tensor([length for length, _ in batch], dtype=torch.int32),
        torch.tensor([0, *counts]).cumsum(0).int(), head_size**-0.5, options,
    )  # fmt: skip
    for s, (length, count) in enumerate(batch):
        if not length:
            continue
        key, value = (torch.randn(length, kv_heads, head_size, generator=g) for _ in "kv")
        key *= spread ** -torch.rand(head_size, generator=g)
        value *= spread ** -torch.rand(length, 1, 1, generator=g)
        if spoil:
            spoil(s, key, value)
        first, last = (format.sealed_before(p) for p in (length - max(count, 1), length - 1))
        problem.store(s, 0, key, value, last)
        # Groups that no query reads as recent rows any more. NaN as numbers and as scales.
        size = recent_block
        for p in range(0, first, GROUP):
            page = caches[1][int(tables[1][s, p // size])].flatten(1)
            layout = PageLayout(format.recent, head_size, size)
            for which in (layout.key, layout.value):
                at = which.metadata + p % size * 4
                page[:, at : at + GROUP * 4] = 0xFF
        # Nor may block tables be read there.
        tables[0][s, -(-last // block_size) :] = NOWHERE
        tables[1][s, : first // size] = NOWHERE
    return problem


@dataclass(frozen=True)
class _Rows:
    """Rows of one head as kernels hold them: ``value = codes * scale + minimum``, ``[L, D]``."""

    codes: torch.Tensor
    scale: torch.Tensor
    minimum: torch.Tensor

    def value(self) -> torch.Tensor:
        return self.codes * self.scale + self.minimum


def _load(problem: Problem, s: int, head: int, value: bool) -> tuple[_Rows, _Rows]:
    """Sealed rows and recent rows of a sequence; those that are in no page are zeros."""
    length, head_size = int(problem.seq_lens[s]), problem.query.shape[2]
    found = []
    for which, format in enumerate((problem.format, problem.format.recent)):
        cache, table = problem.caches[which], problem.tables[which][s]
        layout = PageLayout(format, head_size, cache.shape[2])
        at = layout.value if value else layout.key
        rows = torch.zeros(3, len(table) * cache.shape[2], head_size, dtype=torch.float64)
        for i, block in enumerate(table.tolist()):
            if block == NOWHERE:
                continue
            page = cache[block, head].flatten()
            codes, words = layout.unpack_codes(page, at), layout.unpack_metadata(page, at)
            if which == 0:
                per_channel = Granularity.CHANNEL_GROUP in at.stream.granularities
                shape = (-1, GROUP, 1, head_size) if per_channel else (-1, 1, head_size)
                ends = [
                    sealed.decode_group(x.view(shape), words[:, None], at.stream)
                    for x in (torch.zeros_like(codes), torch.ones_like(codes))
                ]
                low, high = (x.reshape(-1, head_size).double() for x in ends)
                part = torch.stack([codes.double(), high - low, low])
            else:
                scale = words.view(torch.float32).double()[:, None].expand(-1, head_size)
                part = torch.stack([codes.double(), scale, 0 * scale])
            rows[:, i * cache.shape[2] : (i + 1) * cache.shape[2]] = part
        found.append(rows[:, :length])
    layout = PageLayout(problem.format, head_size, problem.caches[0].shape[2])
    block = int(problem.tables[0][s, 0])
    if block != NOWHERE:
        page = problem.caches[0][block, head].flatten()
        codes, scale = (page[x].contiguous() for x in sealed.first_row(layout, int(value)))
        found[0][0, 0] = (codes ^ 0x80).view(torch.int8).double()
        found[0][1, 0] = scale.view(torch.float32).double()
        found[0][2, 0] = 0
    return tuple(_Rows(*x) for x in found)


@oracle.single_threaded
def bound(problem: Problem) -> torch.Tensor:
    """Worst case of ``|kernel - exact|`` per output element, as in ``attention_oracle.py``.

    Where K has a scale per channel and group of tokens, q times the scales is what kernels hold:
    off by ``limb`` of the largest of q times the largest scale, so a score by that times the sum of
    the codes; and so are q and the scales that are multiplied. The mins are a sum of their own, in
    fp32, as is everything where a kernel multiplies decoded rows.
    Weights times the scales of V are off by ``limb`` of the largest of a channel's.
    """
    p = problem
    head_size, options = p.query.shape[2], p.options
    basis = oracle.rotation_matrix(head_size)
    gain = oracle.gain_of(basis)
    key_limb, value_limb = cases.limb(p.format.key), cases.limb(p.format.value)
    fp32 = head_size * 2.0**-24  # a sum over channels, one after the other
    error = torch.zeros(p.query.shape, dtype=torch.float64)
    for s in range(p.seq_lens.numel()):
        begin, end = p.query_start_loc[s : s + 2].tolist()
        length = int(p.seq_lens[s])
        for head in range(p.query.shape[1] if length else 0):
            kv = head * p.caches[0].shape[1] // p.query.shape[1]
            k, v = (_load(p, s, kv, value) for value in (False, True))
            for i in range(begin, end):
                at = length - (end - i)
                b = p.format.sealed_before(at)
                first = max(0, at - options["window"] + 1) if options.get("window") else 0
                ks, vs = (
                    _Rows(*(torch.cat([getattr(old, x)[:b], getattr(new, x)[b : at + 1]])[first:]
                            for x in ("codes", "scale", "minimum")))
                    for old, new in (k, v))  # fmt: skip
                q = gain * (basis @ p.query[i, head].double())
                folded = (q * ks.scale).abs()
                loud = q.abs().max() * ks.scale.amax(-1)
                mass = (folded * ks.codes.abs()).sum(-1) + (q * ks.minimum).abs().sum(-1)
                is_sealed = torch.arange(first, at + 1) < b
                codes = ks.codes.abs()
                factors = (q.abs().max() * ks.scale * codes).sum(-1)
                factors += ks.scale.amax(-1) * (q.abs() * codes).sum(-1)
                rounded = loud * codes.sum(-1) + factors * is_sealed
                limb = torch.where(is_sealed, key_limb, cases.LIMB)
                ds = p.scale * (limb * rounded + fp32 * mass)
                x = ks.value() @ q * p.scale
                if options.get("softcap"):
                    x = (x / options["softcap"]).tanh() * options["softcap"]
                if options.get("alibi_slopes") is not None:
                    x = x - float(options["alibi_slopes"][head]) * (
                        at - torch.arange(first, at + 1)
                    )
                extra = torch.full((1,), -torch.inf, dtype=torch.float64)
                if options.get("sinks") is not None:
                    extra[0] = float(options["sinks"][head])
                w = torch.softmax(torch.cat([x, extra]), 0)[:-1]
                held = vs.value()
                values = gain * held @ basis
                out = (w @ values).abs()
                moved = w * torch.expm1((2 * ds).clamp(max=40)) / 2
                loudest = (w[:, None] * vs.scale).amax(0)
                sums = value_limb * loudest * vs.codes.abs().sum(0)
                # Mins join the weights before they are rounded or after; and int8 codes are stored
                # plus 128.
                sums += value_limb * w.max() * vs.minimum.abs().sum(0)
                sums += cases.FP32_SLACK * (w @ (vs.codes.abs() * vs.scale + vs.minimum.abs()))
                sums += 128 * 2.0**-22 * (w[:, None] * vs.scale).sum(0)
                e = moved @ values.abs() + moved.sum() * out + sums @ (gain * basis.abs())
                rounding = cases.OUTPUT_ROUNDING[p.query.dtype] * (out + e)
                error[i, head] = e + rounding + cases.OUTPUT_FLOOR[p.query.dtype]
    return error
