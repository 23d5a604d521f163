"""What sealing must write and what attention over two ranges must read, from their definitions.

One value at a time, in Python's own floats rounded to fp32 where the specification rounds: nothing
is shared with ``kvq_plugin.codes`` and ``kvq_plugin.sealed``. Nothing here is a test.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from kvq_plugin import reference, rotation
from kvq_plugin.formats import GROUP, Granularity, KVFormat, Stream

F32 = np.float32


@lru_cache
def scale_values() -> tuple[float, ...]:
    """What each scale byte stands for: the fp16 whose top byte, without the sign, it is."""
    return tuple(struct.unpack("<e", struct.pack("<H", byte << 7))[0] for byte in range(256))


def nearest_scale(x: float) -> int:
    """The byte of the nearest scale, the even one of two."""
    values = scale_values()[:248]  # the finite ones, ascending
    distance = [abs(v - x) for v in values]
    least = min(distance)
    found = [b for b, apart in enumerate(distance) if apart == least]
    return min(found, key=lambda byte: byte % 2)


def half(x) -> float:
    return float(np.float16(x))


@dataclass(frozen=True)
class Codes:
    """What shares one scale: its codes, its word (bits of scale and min or zero point), values."""

    codes: list[int]
    word: int
    values: list[float]


def affine(values: list[float], stream: Stream, heard: list[bool]) -> Codes:
    """*values* fp32; those not *heard* have no say in the scale. Values are fp32 too."""
    top = int(stream.code.qmax)
    poison = any(math.isnan(v) for v, h in zip(values, heard, strict=True) if h)
    x = [F32(0.0 if math.isnan(v) else max(-65504.0, min(65504.0, v))) for v in values]
    low = min(v for v, h in zip(x, heard, strict=True) if h) + F32(0)
    high = max(v for v, h in zip(x, heard, strict=True) if h) + F32(0)
    step = F32(F32(high - low) * F32(1.0 / top))
    if stream.lite:
        byte = nearest_scale(float(max(step, F32(abs(low) * F32(1.0 / 56.0)))))
        scale = F32(scale_values()[byte])
        inverse = F32(1) / scale if scale > 0 else F32(0)
        halves = round(max(-128.0, min(127.0, 2 * float(low * inverse))))
        minimum = F32(halves / 2 * float(scale))
    else:
        scale, minimum = F32(half(step)), F32(half(low))
        inverse = F32(1) / scale if scale > 0 else F32(0)
    codes = [round(max(0.0, min(float(top), float(F32(v - minimum) * inverse)))) for v in x]
    if stream.lite:
        if poison:
            byte, halves, scale = 0xFF, 0, F32("nan")
        word = byte | (halves & 0xFF) << 8
        return Codes(codes, word, [float(F32(c + halves / 2) * scale) for c in codes])
    if poison:
        scale = minimum = F32("nan")
    word = sum(
        struct.unpack("<H", struct.pack("<e", float(v)))[0] << 16 * i
        for i, v in enumerate((scale, minimum))
    )
    return Codes(codes, word, [float(F32(F32(c) * scale) + minimum) for c in codes])


def seal_head(
    rows: torch.Tensor, stream: Stream, starts_page: bool
) -> tuple[np.ndarray, dict, torch.Tensor]:
    """Rotated int8 rows ``[GROUP, D]`` fp32 of one head -> codes ``[GROUP, D]``, words by their
    index in the page's metadata of this group, and values ``[GROUP, D]``."""
    x = rows.tolist()
    d = len(x[0])
    codes, words = np.zeros((GROUP, d), np.int64), {}
    values = torch.zeros(GROUP, d)
    if Granularity.CHANNEL_GROUP in stream.granularities:
        heard = [not (starts_page and t == 0) for t in range(GROUP)]
        for c in range(d):
            one = affine([x[t][c] for t in range(GROUP)], stream, heard)
            codes[:, c], words[c] = one.codes, one.word
            values[:, c] = torch.tensor(one.values)
        return codes, words, values
    width = GROUP if Granularity.TOKEN_GROUP in stream.granularities else d
    for t in range(GROUP):
        for c in range(0, d, width):
            one = affine(x[t][c : c + width], stream, [True] * width)
            codes[t, c : c + width] = one.codes
            words[t if width == d else c // width * GROUP + t] = one.word
            values[t, c : c + width] = torch.tensor(one.values)
    return codes, words, values


def recent_rows(x: torch.Tensor, format: KVFormat) -> torch.Tensor:
    """``[T, H, D]`` as the recent cache holds it, rotated, fp32."""
    codes, words = reference.quantize(x, format.recent.key)
    return codes.float() * words.view(torch.float32)[..., None]


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    format: KVFormat,
    scale: float,
    block_size: int,
    *,
    window: int = 0,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Queries of one sequence's last tokens over rows ``[L, H, D]``, float64, one at a time."""
    length, kv_heads, d = key.shape
    heads, count = query.shape[1], query.shape[0]
    recent = [recent_rows(x, format) for x in (key, value)]
    old = [torch.zeros_like(x) for x in recent]
    for t in range(0, length // GROUP * GROUP, GROUP):
        for x, rows, stream in zip(old, recent, (format.key, format.value), strict=True):
            for h in range(kv_heads):
                x[t : t + GROUP, h] = seal_head(
                    rows[t : t + GROUP, h], stream, t % block_size == 0
                )[2]
    if length:
        for x, rows in zip(old, recent, strict=True):
            x[0] = rows[0]
    old, recent = ([rotation.unrotate(x).double() for x in pair] for pair in (old, recent))
    out = torch.zeros(count, heads, d, dtype=torch.float64)
    for i in range(count):
        p = length - count + i
        b = max(0, (p + 1 - 32) // 32 * 32)
        first = max(0, p - window + 1) if window else 0
        for h in range(heads):
            g = h * kv_heads // heads
            k, v = (
                torch.cat([a[:b, g], c[b : p + 1, g]])[first:]
                for a, c in zip(old, recent, strict=True)
            )
            logits = (k @ query[i, h].double()) * scale
            if softcap:
                logits = softcap * torch.tanh(logits / softcap)
            if alibi_slopes is not None:
                logits = logits - float(alibi_slopes[h]) * (p - torch.arange(first, p + 1)).double()
            if sinks is not None:
                logits = torch.cat([logits, sinks[h : h + 1].double()])
                v = torch.cat([v, torch.zeros(1, d, dtype=torch.float64)])
            out[i, h] = torch.softmax(logits, -1) @ v
    return out


def canonical(word: int, stream) -> int:
    """A scale (and min) as pages hold it: NaN has one pattern."""
    return word if stream.lite or word & 0x7C00 != 0x7C00 else 0x7E007E00
