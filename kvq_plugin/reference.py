"""The executable specification in plain torch: quantize, dequantize, store, attend.

Every compiled kernel must produce the same codes and scales as this module bit for bit,
and the same attention within a tolerance. Written to be read, not to be fast.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvq_plugin import rotation, sealed
from kvq_plugin.codes import AMAX_FLOOR, decode, decode_affine, encode, encode_affine
from kvq_plugin.formats import Kind, KVFormat, Stream
from kvq_plugin.layout import CPU_V1, PageLayout, StreamLayout

FP32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class StaticScale:
    """Scale of one static stream, expanded to one value per channel.

    Attributes:
        scale: ``[H, D]`` fp32, what a code is multiplied by when read.
        inverse: ``[H, D]`` fp32, ``1 / scale`` rounded once, what a value is multiplied by
            when written.
        zero_point: ``[H, D]`` fp32 of integers, or None; signed codes only.
    """

    scale: torch.Tensor
    inverse: torch.Tensor
    zero_point: torch.Tensor | None = None

    @classmethod
    def expand(cls, scale, heads: int, head_size: int, zero_point=None) -> StaticScale:
        """From a tensor ``()``, head ``(H,)`` or channel ``(H, D)`` scale and zero point."""
        full = _per_channel(scale, heads, head_size)
        zero = None if zero_point is None else _per_channel(zero_point, heads, head_size)
        if zero is not None and not zero.any():
            zero = None
        return cls(full, full.reciprocal(), zero)

    def to(self, device: torch.device | str) -> StaticScale:
        """The same on *device*."""
        zero = None if self.zero_point is None else self.zero_point.to(device)
        return StaticScale(self.scale.to(device), self.inverse.to(device), zero)


def _per_channel(t, heads: int, head_size: int) -> torch.Tensor:
    t = torch.as_tensor(t, dtype=torch.float32)
    t = t[:, None] if t.dim() == 1 and t.numel() == heads else t
    return t.expand(heads, head_size).contiguous()


def quantize(
    x: torch.Tensor, stream: Stream, static: StaticScale | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Quantize ``x [T, H, D]`` to (codes ``[T, H, D]``, metadata words int32 ``[T, H]`` or None).

    Dynamic scales: ``scale = amax * fl(1/qmax)``, ``inverse = qmax / amax``. Infinities count
    as the largest finite value; a NaN makes its row's scale NaN, so that it reaches the
    output as it would from an unquantized cache, and the row's other codes are unspecified
    but deterministic. Affine codes use the *stored* (fp16) scale and min.

    A rotated stream encodes the rotated row. What is beyond ``rotation.LIMIT`` counts as that
    much, so an infinity spreads over its row as the largest value the code can hold.
    """
    x = x.float()
    code = stream.code
    if stream.rotated:
        x = rotation.rotate(x.clamp(-rotation.LIMIT, rotation.LIMIT))
    if not stream.is_dynamic:
        if static is None:
            raise ValueError(f"static {code.name} needs a StaticScale, got none")
        y = x * static.inverse
        if static.zero_point is not None:
            limit = 4 * code.qmax  # round first, so that the zero point does not move ties
            y = y.nan_to_num(nan=0.0).clamp(-limit, limit).round() + static.zero_point
        return encode(y, code), None
    if code.kind is Kind.AFFINE:
        return encode_affine(x, -1, stream)
    poison = x.isnan().any(-1, keepdim=True)
    x = x.nan_to_num(nan=0.0)
    amax = x.abs().clamp(max=FP32_MAX).amax(-1, keepdim=True).clamp(min=AMAX_FLOOR)
    scale = amax * torch.tensor(1.0 / code.qmax)
    codes = encode(x * (torch.tensor(code.qmax) / amax), code)
    scale = torch.where(poison, torch.tensor(float("nan")), scale)
    return codes, scale.squeeze(-1).view(torch.int32)


def dequantize(
    codes: torch.Tensor,
    metadata: torch.Tensor | None,
    stream: Stream,
    static: StaticScale | None = None,
) -> torch.Tensor:
    """Inverse of :func:`quantize`: codes ``[T, H, D]`` and metadata ``[T, H]`` -> fp32."""
    x = _scaled(codes, metadata, stream, static)
    return rotation.unrotate(x) if stream.rotated else x


def _scaled(codes, metadata, stream: Stream, static: StaticScale | None) -> torch.Tensor:
    if stream.code.kind is Kind.AFFINE:
        return decode_affine(codes, metadata, -1, stream)
    x = decode(codes, stream.code)
    if not stream.is_dynamic:
        if static.zero_point is not None:
            x = x - static.zero_point
        return x * static.scale
    return x * metadata.view(torch.float32)[..., None]


def store(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    format: KVFormat,
    key_static: StaticScale | None = None,
    value_static: StaticScale | None = None,
    *,
    recent_cache: torch.Tensor | None = None,
    recent_slot_mapping: torch.Tensor | None = None,
    layout: str = CPU_V1,
) -> None:
    """Write ``key``, ``value [T, H, D]`` into ``cache [B, H, N, C]`` uint8 (any strides between
    blocks and heads) at ``slot_mapping [T]``: block ``slot // N``, position ``slot % N``;
    negative slots are skipped. Pages are laid out as *layout* says. Formats with recent rows:
    into *recent_cache* at *recent_slot_mapping*, and what is complete is sealed into *cache*
    (:mod:`kvq_plugin.sealed`). See :func:`kvq_plugin.ops.store`."""
    if format.recent is not None:
        store(key, value, recent_cache, recent_slot_mapping, format.recent, layout=layout)
        caches = ((cache, format), (recent_cache, format.recent))
        both = [PageLayout(f, key.shape[-1], c.shape[2], layout) for c, f in caches]
        pages, recent_pages = (_pages(c) for c, _ in caches)
        sealed.seal(pages, slot_mapping, recent_pages, recent_slot_mapping, *both)
        return
    layout = PageLayout(format, key.shape[-1], cache.shape[2], layout)
    keep = slot_mapping >= 0
    slots = slot_mapping[keep]
    block, position = slots // layout.block_size, slots % layout.block_size
    pages = _pages(cache)
    for x, which, static in (
        (key, layout.key, key_static),
        (value, layout.value, value_static),
    ):
        codes, metadata = quantize(x[keep], which.stream, static)
        _write(pages, which, block, position, codes, metadata)


def _pages(cache: torch.Tensor) -> torch.Tensor:
    """``[B, H, N, C]`` with contiguous (N, C) -> ``[B, H, N*C]`` view, other strides kept."""
    b, h, n, c = cache.shape
    if cache.stride(3) != 1 or cache.stride(2) != c:
        raise ValueError(
            f"a page must be contiguous: expected strides (.., {c}, 1), got {cache.stride()}"
        )
    return cache.as_strided((b, h, n * c), (cache.stride(0), cache.stride(1), 1))


def _write(pages, which: StreamLayout, block, position, codes, metadata) -> None:
    bits = which.stream.code.bits
    unsigned = codes.view(torch.uint8)
    if which.stream.code.kind is Kind.SIGNED:
        unsigned = unsigned ^ 0x80
    # One token at a time, because two tokens may share a byte of packed V.
    for t in range(codes.shape[0]):
        b, n = int(block[t]), int(position[t])
        at, shift = which.code_bytes[n], which.code_shifts[n].to(torch.uint8)
        mask = torch.tensor((1 << bits) - 1, dtype=torch.uint8) << shift
        for h in range(codes.shape[1]):
            page = pages[b, h]
            if bits == 8:
                page[at] = unsigned[t, h]
                continue
            # Fields of one byte may belong to the same token (K): write field by field.
            for field in shift.unique():
                sel = shift == field
                byte = at[sel]
                page[byte] = (page[byte] & ~mask[sel]) | (unsigned[t, h][sel] << field)
        if metadata is not None:
            start = which.metadata + 4 * n
            words = metadata[t].contiguous().view(torch.uint8).view(-1, 4)
            pages[b, :, start : start + 4] = words


def load(
    cache: torch.Tensor,
    format: KVFormat,
    head_size: int,
    key_static: StaticScale | None = None,
    value_static: StaticScale | None = None,
    *,
    layout: str = CPU_V1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dequantize all of ``cache [B, H, N, C]`` to fp32 K and V, each ``[B, N, H, D]``."""
    layout = PageLayout(format, head_size, cache.shape[2], layout)
    pages = _pages(cache)
    out = []
    for which, static in ((layout.key, key_static), (layout.value, value_static)):
        codes = layout.unpack_codes(pages, which).transpose(1, 2)
        metadata = layout.unpack_metadata(pages, which)
        metadata = None if metadata is None else metadata.transpose(1, 2).contiguous()
        out.append(dequantize(codes.contiguous(), metadata, which.stream, static))
    return out[0], out[1]


def load_sealed(
    cache: torch.Tensor, format: KVFormat, head_size: int, *, layout: str = CPU_V1
) -> tuple[torch.Tensor, ...]:
    """All of a sealed ``cache [B, H, N, C]`` as fp32: K and V as their codes say, each
    ``[B, N, H, D]``, and the first rows of K and of V, each ``[B, H, D]``."""
    layout = PageLayout(format, head_size, cache.shape[2], layout)
    pages = _pages(cache)
    rows = (*sealed.load(pages, layout), *sealed.load_first(pages, layout))
    return tuple(rotation.unrotate(x) for x in rows)


def attend(
    query: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    format: KVFormat,
    scale: float,
    key_static: StaticScale | None = None,
    value_static: StaticScale | None = None,
    *,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    recent_cache: torch.Tensor | None = None,
    recent_block_table: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    layout: str = CPU_V1,
) -> torch.Tensor:
    """Paged attention over quantized pages; arguments as :func:`kvq_plugin.ops.attend`.

    *dtype* is the precision of the arithmetic (float64 for error measurements), *layout* that
    of the pages. Returns ``[T, heads, D]`` in *dtype*.
    """
    tokens, heads, head_size = query.shape
    if format.recent is None:
        loaded = load(cache, format, head_size, key_static, value_static, layout=layout)
    else:
        sealed_rows = load_sealed(cache, format, head_size, layout=layout)
        recent_rows = load(recent_cache, format.recent, head_size, layout=layout)
    group = heads // cache.shape[1]
    out = torch.zeros(tokens, heads, head_size, dtype=dtype)
    for s in range(seq_lens.numel()):
        begin, end = int(query_start_loc[s]), int(query_start_loc[s + 1])
        length, count = int(seq_lens[s]), end - begin
        if not count or not length:
            continue
        position = length - count + torch.arange(count)
        distance = position[:, None] - torch.arange(length)[None]
        visible = torch.ones_like(distance, dtype=torch.bool)
        if causal:
            visible &= distance >= 0
        if window > 0:
            visible &= distance < window
            if not causal:
                visible &= -distance < window
        lowest = int(visible.any(0).int().argmax()) if bool(visible.any()) else length
        if format.recent is None:
            k, v = (_gather(x, block_table[s], lowest, length) for x in loaded)
        else:
            # The two ranges side by side, as if the context were twice as long.
            limits = torch.tensor([format.sealed_before(int(p)) for p in position])
            seals = torch.arange(length)[None] < limits[:, None]
            old = [_gather(x, block_table[s], lowest, int(limits[-1]), length)
                   for x in sealed_rows[:2]]  # fmt: skip
            if lowest == 0 and limits[-1] > 0:
                for x, first in zip(old, sealed_rows[2:], strict=True):
                    x[0] = first[int(block_table[s, 0])]
            new = [_gather(x, recent_block_table[s], max(lowest, int(limits[0])), length)
                   for x in recent_rows]  # fmt: skip
            k, v = (torch.cat(pair) for pair in zip(old, new, strict=True))
            visible = torch.cat([visible & seals, visible & ~seals], -1)
            distance = torch.cat([distance, distance], -1)
        k, v = (x.to(dtype).repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", query[begin:end].to(dtype), k) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if alibi_slopes is not None:
            scores = scores - alibi_slopes.to(dtype)[:, None, None] * distance.to(dtype)
        scores = scores.masked_fill(~visible, float("-inf"))
        if sinks is not None:
            sink = sinks.to(dtype)[:, None, None].expand(-1, count, 1)
            scores = torch.cat([scores, sink], -1)
        # A query that sees nothing gets zeros, where softmax alone would give NaN: with no sink, or
        # one of -inf.
        weights = torch.softmax(scores, -1)
        blind = ~visible.any(-1)[None, :, None]
        weights = weights.masked_fill(blind, 0.0)
        out[begin:end] = _mix(weights[..., : k.shape[0]], v, visible)
    return out


def _gather(rows, table, begin: int, end: int, length: int | None = None) -> torch.Tensor:
    """Rows ``[B, N, H, D]`` of positions ``[begin, end)`` as ``[length, H, D]``, zeros elsewhere;
    of *table* only the blocks that hold them are looked at."""
    size = rows.shape[1]
    out = torch.zeros(end if length is None else length, *rows.shape[2:])
    if begin < end:
        first = begin // size
        blocks = table[first : -(-end // size)].long()
        out[begin:end] = rows[blocks].flatten(0, 1)[begin - first * size : end - first * size]
    return out


def _mix(weights, v, visible) -> torch.Tensor:
    """``weights [H, Q, K]`` times ``v [K, H, D]``; a NaN concerns the queries that see it."""
    nan = v.isnan()
    out = torch.einsum("hqk,khd->qhd", weights, v.masked_fill(nan, 0.0))
    if nan.any():
        touched = torch.einsum("qk,khd->qhd", visible.to(v.dtype), nan.to(v.dtype))
        out = out.masked_fill(touched > 0, float("nan"))
    return out
