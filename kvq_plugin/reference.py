"""The executable specification in plain torch: quantize, dequantize, store, attend.

Every compiled kernel must produce the same codes and scales as this module bit for bit,
and the same attention within a tolerance. Written to be read, not to be fast.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvq_plugin import rotation
from kvq_plugin.formats import Code, Kind, KVFormat, Stream
from kvq_plugin.layout import CPU_V1, PageLayout, StreamLayout

#: Floor of a row's amax (and so of its scale): zero rows need no special case, and the
#: inverse stays finite. 2**-100 is far below any activation and far above fp32's subnormals.
AMAX_FLOOR = 2.0**-100
FP16_MAX = 65504.0
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


def _per_channel(t, heads: int, head_size: int) -> torch.Tensor:
    t = torch.as_tensor(t, dtype=torch.float32)
    t = t[:, None] if t.dim() == 1 and t.numel() == heads else t
    return t.expand(heads, head_size).contiguous()


def encode(x: torch.Tensor, code: Code) -> torch.Tensor:
    """fp32 values already divided by their scale -> codes (uint8, or int8 for SIGNED).

    Float codes round to nearest even and saturate; NaN keeps its sign and becomes the NaN
    byte, as torch does. Integer codes round to nearest even and saturate; NaN becomes 0.
    """
    if code.kind is Kind.FLOAT:
        dtype = getattr(torch, code.torch_dtype)
        return x.clamp(-code.qmax, code.qmax).to(dtype).view(torch.uint8)
    low = -code.qmax if code.kind is Kind.SIGNED else 0.0
    rounded = x.nan_to_num(nan=0.0).clamp(low, code.qmax).round()
    return rounded.to(torch.int8 if code.kind is Kind.SIGNED else torch.uint8)


def decode(codes: torch.Tensor, code: Code) -> torch.Tensor:
    """Codes -> fp32 values before scale, zero point and min."""
    if code.kind is Kind.FLOAT:
        return codes.view(getattr(torch, code.torch_dtype)).float()
    return codes.float()


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
    poison = x.isnan().any(-1, keepdim=True)
    x = x.nan_to_num(nan=0.0)
    nan = torch.tensor(float("nan"))
    if code.kind is Kind.AFFINE:
        x = x.clamp(-FP16_MAX, FP16_MAX)
        # Adding 0.0 makes -0 into +0, which the order of a reduction would decide otherwise.
        low, high = x.amin(-1, keepdim=True) + 0.0, x.amax(-1, keepdim=True) + 0.0
        scale = ((high - low) * torch.tensor(1.0 / code.qmax)).half()
        minimum = low.half()
        wide = scale.float()
        inverse = torch.where(wide > 0, 1.0 / wide, torch.zeros(()))
        codes = encode((x - minimum.float()) * inverse, code)
        scale = torch.where(poison, nan.half(), scale)
        minimum = torch.where(poison, nan.half(), minimum)
        words = torch.cat([scale, minimum], -1).contiguous().view(torch.int32)
        return codes, words.squeeze(-1)
    amax = x.abs().clamp(max=FP32_MAX).amax(-1, keepdim=True).clamp(min=AMAX_FLOOR)
    scale = amax * torch.tensor(1.0 / code.qmax)
    codes = encode(x * (torch.tensor(code.qmax) / amax), code)
    scale = torch.where(poison, nan, scale)
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
    x = decode(codes, stream.code)
    if not stream.is_dynamic:
        if static.zero_point is not None:
            x = x - static.zero_point
        return x * static.scale
    if stream.code.kind is Kind.AFFINE:
        scale, minimum = metadata[..., None].contiguous().view(torch.float16).float().unbind(-1)
        return x * scale[..., None] + minimum[..., None]
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
    layout: str = CPU_V1,
) -> None:
    """Write ``key``, ``value [T, H, D]`` into ``cache [B, H, N, C]`` uint8 (any strides between
    blocks and heads) at ``slot_mapping [T]``: block ``slot // N``, position ``slot % N``;
    negative slots are skipped. Pages are laid out as *layout* says. See
    :func:`kvq_plugin.ops.store`."""
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
    dtype: torch.dtype = torch.float32,
    layout: str = CPU_V1,
) -> torch.Tensor:
    """Paged attention over quantized pages; arguments as :func:`kvq_plugin.ops.attend`.

    *dtype* is the precision of the arithmetic (float64 for error measurements), *layout* that
    of the pages. Returns ``[T, heads, D]`` in *dtype*.
    """
    tokens, heads, head_size = query.shape
    keys, values = load(cache, format, head_size, key_static, value_static, layout=layout)
    group = heads // cache.shape[1]
    out = torch.zeros(tokens, heads, head_size, dtype=dtype)
    for s in range(seq_lens.numel()):
        begin, end = int(query_start_loc[s]), int(query_start_loc[s + 1])
        length, count = int(seq_lens[s]), end - begin
        if not count or not length:
            continue
        blocks = block_table[s, : -(-length // cache.shape[2])].long()
        k = keys[blocks].flatten(0, 1)[:length].to(dtype).repeat_interleave(group, 1)
        v = values[blocks].flatten(0, 1)[:length].to(dtype).repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", query[begin:end].to(dtype), k) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        distance = (length - count + torch.arange(count))[:, None] - torch.arange(length)[None]
        if alibi_slopes is not None:
            scores = scores - alibi_slopes.to(dtype)[:, None, None] * distance.to(dtype)
        visible = torch.ones_like(distance, dtype=torch.bool)
        if causal:
            visible &= distance >= 0
        if window > 0:
            visible &= distance < window
            if not causal:
                visible &= -distance < window
        scores = scores.masked_fill(~visible, float("-inf"))
        if sinks is not None:
            sink = sinks.to(dtype)[:, None, None].expand(-1, count, 1)
            scores = torch.cat([scores, sink], -1)
        # A query that sees nothing gets zeros, where softmax alone would give NaN.
        weights = torch.softmax(scores, -1)
        blind = ~visible.any(-1)[None, :, None] & (sinks is None)
        weights = weights.masked_fill(blind, 0.0)
        out[begin:end] = torch.einsum("hqk,khd->qhd", weights[..., :length], v)
    return out
