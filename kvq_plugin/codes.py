"""Codes and scales of rows and groups in plain torch: what :mod:`kvq_plugin.reference` stores.

Every kernel computes these bit for bit: fp32 operations that IEEE rounds, minima and maxima, and
rounding to nearest even. No other order or contraction of them gives the same bytes.
"""

from __future__ import annotations

import torch

from kvq_plugin.formats import Code, Kind, Stream

#: Floor of a row's amax (and so of its scale): zero rows need no special case, and the
#: inverse stays finite. 2**-100 is far below any activation and far above fp32's subnormals.
AMAX_FLOOR = 2.0**-100
FP16_MAX = 65504.0
#: A lite min is a multiple of this times its scale: half, because whole multiples cost `k3v2` a
#: tenth more KL, and quarters gain nothing.
LITE_STEP = 0.5
#: A lite scale is at least the min's magnitude over this, so that the min's byte, up to 127 steps,
#: can say it: the scale may be rounded down by a seventeenth, which makes 112 steps 119.
LITE_RANGE = 112.0 * LITE_STEP


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


def encode_affine(
    x: torch.Tensor, dim: int, stream: Stream, left_out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (uint8) and metadata words of fp32 *x*, one word for all of *dim*, which it lacks.

    Words are int32 (fp16 scale low, fp16 min high) or, lite, int16 (scale byte low, min in
    ``LITE_STEP`` scales high). Infinities count as the largest fp16; a NaN makes the scale NaN (and
    the min), so that it reaches the output as it would from an unquantized cache, and counts as 0
    elsewhere. Codes are those that the *stored* scale and min give. *left_out* (bool, *x*'s shape)
    has no say in the scale; what lies outside takes the nearest code.
    """
    heard = torch.ones_like(x, dtype=torch.bool) if left_out is None else ~left_out
    poison = (x.isnan() & heard).any(dim, keepdim=True)
    x = x.nan_to_num(nan=0.0).clamp(-FP16_MAX, FP16_MAX)
    inf = float("inf")
    # Adding 0.0 makes -0 into +0, which the order of a reduction would decide otherwise.
    low = x.masked_fill(~heard, inf).amin(dim, keepdim=True) + 0.0
    high = x.masked_fill(~heard, -inf).amax(dim, keepdim=True) + 0.0
    scale = (high - low) * torch.tensor(1.0 / stream.code.qmax)
    if stream.lite:
        codes, words = _encode_lite(x, scale, low, stream.code, poison)
    else:
        codes, words = _encode_halves(x, scale, low, stream.code, poison)
    return codes, words.squeeze(dim)


def _encode_halves(x, scale, low, code: Code, poison):
    scale, minimum = scale.half(), low.half()
    codes = encode((x - minimum.float()) * _inverse(scale.float()), code)
    nan = torch.tensor(float("nan"), dtype=torch.float16)
    halves = torch.stack([torch.where(poison, nan, y) for y in (scale, minimum)], -1)
    return codes, halves.contiguous().view(torch.int32).squeeze(-1)


def _encode_lite(x, scale, low, code: Code, poison):
    byte = encode_scale(torch.maximum(scale, low.abs() * torch.tensor(1.0 / LITE_RANGE)))
    scale = decode_scale(byte)
    inverse = _inverse(scale)
    steps = (low * inverse / LITE_STEP).clamp(-128.0, 127.0).round()
    codes = encode((x - steps * (scale * LITE_STEP)) * inverse, code)
    byte = torch.where(poison, 0xFF, byte)
    steps = torch.where(poison, 0, steps.to(torch.int32))
    return codes, (byte | steps << 8).to(torch.int16)


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale > 0, 1.0 / scale, torch.zeros(()))


def decode_affine(
    codes: torch.Tensor, words: torch.Tensor, dim: int, stream: Stream
) -> torch.Tensor:
    """Inverse of :func:`encode_affine`, fp32."""
    words = words.unsqueeze(dim)
    if stream.lite:
        return (codes.float() + (words >> 8) * LITE_STEP) * decode_scale(words.int() & 0xFF)
    halves = words.contiguous().view(torch.float16).unflatten(-1, (-1, 2)).float()
    return codes.float() * halves[..., 0] + halves[..., 1]


def encode_scale(x: torch.Tensor) -> torch.Tensor:
    """fp32 of 0 and more, below 63488 -> the scale byte (int32): the nearest, ties to even.

    It is the top of a positive fp16: 5 bits of exponent, 3 of mantissa. That is e4m3's precision
    without the sign, over fp16's range, so that no factor of its own is needed.
    """
    _, exponent = torch.frexp(x)
    exponent = torch.where(x > 0, exponent - 1, -14).clamp(min=-14)
    steps = torch.ldexp(x, 3 - exponent).round()  # exact but for the rounding: 8 to 16 if normal
    return (steps + (exponent + 14) * 8).to(torch.int32)


def decode_scale(byte: torch.Tensor) -> torch.Tensor:
    """Scale bytes (int32) -> fp32; 0xFF is NaN."""
    return (byte << 7).to(torch.int16).view(torch.float16).float()
