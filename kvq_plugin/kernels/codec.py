"""Encoders and decoders in Triton: the same bytes as ``csrc/codec.h`` and ``reference.py``.

Integer and IEEE round-to-nearest operations only. Triton's own casts to float8 are not used:
they round twice on some devices, do not exist on others, and its interpreter gets them wrong
(3.9: 1.97 becomes 1.0), so a test without a GPU could not vouch for them.

Codes are told apart by their id in ``formats.py`` (a ``constexpr`` in every function here).
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvq_plugin import formats

INT8 = tl.constexpr(formats.INT8.id)
INT4 = tl.constexpr(formats.INT4.id)
FP8_E4M3 = tl.constexpr(formats.FP8_E4M3.id)
FP8_E5M2 = tl.constexpr(formats.FP8_E5M2.id)
FP8_E4M3FNUZ = tl.constexpr(formats.FP8_E4M3FNUZ.id)

# Adding 1.5 * 2**23 pushes the fraction out of the mantissa, which rounds it as IEEE does.
ROUND_MAGIC = tl.constexpr(12582912.0)
ROUND_MAGIC_BITS = tl.constexpr(0x4B400000)
NAN_BITS = tl.constexpr(0x7FC00000)
INF_BITS = tl.constexpr(0x7F800000)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)


@triton.jit
def float_bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def bits_float(u):
    return u.to(tl.float32, bitcast=True)


@triton.jit
def widen(x):
    """Activations as fp32 bits. NaN keeps its sign, which a GPU's conversions drop."""
    wide = float_bits(x.to(tl.float32))
    if x.dtype == tl.float32:
        sign = wide & -2147483648
    else:
        sign = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16) & -2147483648
    return tl.where((wide & MAGNITUDE) > INF_BITS, sign | NAN_BITS, wide)


@triton.jit
def is_nan_bits(u):
    return (u & MAGNITUDE) > INF_BITS


@triton.jit
def round_to_int(y):
    """Round to nearest even, |y| < 2**22, as int32."""
    return float_bits(y + ROUND_MAGIC) - ROUND_MAGIC_BITS


@triton.jit
def _encode_float(u, MANTISSA: tl.constexpr, BIAS: tl.constexpr, MAX_BITS: tl.constexpr,
                  NAN: tl.constexpr, FNUZ: tl.constexpr):  # fmt: skip
    SHIFT: tl.constexpr = 23 - MANTISSA
    magnitude = u & MAGNITUDE
    a = tl.minimum(magnitude, MAX_BITS)
    tie = (1 << (SHIFT - 1)) - 1 + ((a >> SHIFT) & 1)
    normal = ((a + tie) >> SHIFT) - ((127 - BIAS) << MANTISSA)
    # Adding MAGIC puts the format's smallest subnormal into fp32's last place.
    MAGIC: tl.constexpr = 2.0 ** (24 - BIAS - MANTISSA)
    MAGIC_BITS: tl.constexpr = (127 + 24 - BIAS - MANTISSA) << 23
    subnormal = float_bits(bits_float(a) + MAGIC) - MAGIC_BITS
    code = tl.where(a < ((128 - BIAS) << 23), subnormal, normal)
    sign = (u >> 24) & 0x80
    if FNUZ:
        finite = tl.where(code == 0, 0, code | sign)
        return tl.where(magnitude > INF_BITS, NAN, finite)
    return tl.where(magnitude > INF_BITS, NAN, code) | sign


@triton.jit
def encode(u, CODE: tl.constexpr):
    """fp32 bits of values already divided by their scale -> the unsigned fields of a page, as
    int32. Same contract as ``reference.encode``, with signed codes offset-binary."""
    if CODE == FP8_E4M3:
        return _encode_float(u, 3, 7, 0x43E00000, 0x7F, False)
    elif CODE == FP8_E5M2:
        return _encode_float(u, 2, 15, 0x47600000, 0x7F, False)
    elif CODE == FP8_E4M3FNUZ:
        return _encode_float(u, 3, 8, 0x43700000, 0x80, True)
    else:
        y = bits_float(tl.where(is_nan_bits(u), 0, u))
        if CODE == INT8:
            return round_to_int(tl.minimum(tl.maximum(y, -127.0), 127.0)) + 128
        else:
            tl.static_assert(CODE == INT4)
            return round_to_int(tl.minimum(tl.maximum(y, 0.0), 15.0))


@triton.jit
def _half(bits):
    return bits.to(tl.float16, bitcast=True)


@triton.jit
def decode(c, CODE: tl.constexpr):
    """Unsigned fields (uint8) -> fp16, exactly: every code of every format is an fp16.

    Integers are placed in the mantissa of 1024 and the 1024 taken away again, because
    converting integers to floats runs at a quarter of the rate or less.
    """
    bits = c.to(tl.int16)
    if CODE == INT8:
        return _half(bits | 0x6400) - 1152.0
    elif CODE == INT4:
        return _half(bits | 0x6400) - 1024.0
    elif CODE == FP8_E5M2:
        return _half(bits << 8)
    else:
        # The same exponent field read with fp16's bias of 15: 2**8 (fnuz: 2**7) too small.
        sign = (bits & 0x80) << 8
        magnitude = bits & 0x7F
        if CODE == FP8_E4M3:
            # 0x7F + 1 carries into fp16's top exponent bit: NaN stays NaN.
            magnitude = magnitude | ((magnitude + 1) & 0x80)
            return _half((magnitude << 7) | sign) * 256.0
        else:
            tl.static_assert(CODE == FP8_E4M3FNUZ)
            value = _half((magnitude << 7) | sign) * 128.0
            return tl.where(bits == 0x80, _half(magnitude | 0x7E00), value)
