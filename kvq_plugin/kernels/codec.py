"""Encoders and decoders in Triton: the same bytes as ``csrc/codec.h`` and ``reference.py``.

Integer and IEEE round-to-nearest operations only. Triton's own casts to float8 are not used:
they round twice on some devices, do not exist on others, and its interpreter gets them wrong
(3.9: 1.97 becomes 1.0), so a test without a GPU could not vouch for them.

Codes are told apart by their id in ``formats.py`` (a ``constexpr`` in every function here).
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvq_plugin import codes, formats

INT8 = tl.constexpr(formats.INT8.id)
INT4 = tl.constexpr(formats.INT4.id)
FP8_E4M3 = tl.constexpr(formats.FP8_E4M3.id)
FP8_E5M2 = tl.constexpr(formats.FP8_E5M2.id)
FP8_E4M3FNUZ = tl.constexpr(formats.FP8_E4M3FNUZ.id)
INT3 = tl.constexpr(formats.INT3.id)
INT2 = tl.constexpr(formats.INT2.id)
#: Of lite metadata: no code of values, so its id is nobody's.
LITE_SCALE = tl.constexpr(-1)
FP16_MAX = tl.constexpr(codes.FP16_MAX)

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
    if x.dtype == tl.bfloat16:
        # A shift, because the interpreter's conversion makes subnormals zero.
        return x.to(tl.int16, bitcast=True).to(tl.int32) << 16
    wide = float_bits(x.to(tl.float32))
    if x.dtype == tl.float16:
        sign = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16) & -2147483648
        wide = tl.where((wide & MAGNITUDE) > INF_BITS, sign | NAN_BITS, wide)
    return wide


@triton.jit
def to_output(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """fp32 to the output's dtype, to nearest even. Triton's interpreter truncates to bf16, so
    there the rounding is done in integers first."""
    if INTERPRETED and dtype == tl.bfloat16:
        u = float_bits(x)
        u = tl.where(x == x, (u + 0x7FFF + ((u >> 16) & 1)) & -65536, u)
        return bits_float(u).to(dtype)
    else:
        return x.to(dtype)


@triton.jit
def is_nan_bits(u):
    return (u & MAGNITUDE) > INF_BITS


@triton.jit
def round_to_int(y):
    """Round to nearest even, |y| < 2**22, as int32."""
    return float_bits(y + ROUND_MAGIC) - ROUND_MAGIC_BITS


@triton.jit
def int_to_float(i):
    """Exact for |i| < 2**22; converting instructions run at a quarter of the rate or less."""
    return bits_float(i + ROUND_MAGIC_BITS) - ROUND_MAGIC


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
    elif CODE == LITE_SCALE:
        return _encode_float(u, 3, 15, 0x477FFFFF, 0xFF, False)
    else:
        y = bits_float(tl.where(is_nan_bits(u), 0, u))
        if CODE == INT8:
            return round_to_int(tl.minimum(tl.maximum(y, -127.0), 127.0)) + 128
        else:
            tl.static_assert((CODE == INT4) | (CODE == INT3) | (CODE == INT2))
            TOP: tl.constexpr = 15.0 if CODE == INT4 else 7.0 if CODE == INT3 else 3.0
            return round_to_int(tl.minimum(tl.maximum(y, 0.0), TOP))


# Decoding ------------------------------------------------------------------------------------
#
# On NVIDIA four codes of a 32-bit register become two registers of fp16 pairs in a few packed
# instructions; what Triton's own operations compile to takes four times as many, which would make
# arithmetic the limit and not memory. tests/test_ptx.py runs these programs on a small model of
# PTX, over every byte.

PORTABLE = tl.constexpr(0)  # plain Triton: AMD, and the interpreter
SM80 = tl.constexpr(80)  # PTX of sm_80 and later
SM89 = tl.constexpr(89)  # with conversions of float8

#: What ``decode(..., IN_PLACE=True)`` takes from a 4-bit code. V's sums run over the context, and
#: tensor cores truncate what they add to a large sum: off by 3 % after 131,072 tokens on an H100
#: with codes 0 to 15, which all push one way.
INT4_CENTER = tl.constexpr(8)


@triton.constexpr_function
def _integers_ptx(fetch: str, offset: int) -> str:
    """*fetch* puts integers into the bytes of ``t``; gives them less *offset*."""
    return f"""{{
    .reg .b32 bias, magic, t, h;
    mov.b32 magic, 0x64646464;
    mov.b32 bias, 0x{0x64006400 + 0x00010001 * offset:08x};
    {fetch}
    prmt.b32 $0, t, magic, 0x4140;
    prmt.b32 $1, t, magic, 0x4342;
    sub.f16x2 $0, $0, bias;
    sub.f16x2 $1, $1, bias;
}}"""


_LOW, _HIGH = (f"shr.b32 t, $2, {shift}; and.b32 t, t, 0x0F0F0F0F;" for shift in (0, 4))
_INT8_PTX = tl.constexpr(_integers_ptx("mov.b32 t, $2;", 128))
_INT4_LOW_PTX = tl.constexpr(_integers_ptx(_LOW, 0))
_INT4_HIGH_PTX = tl.constexpr(_integers_ptx(_HIGH, 0))
_INT4_LOW_CENTERED_PTX = tl.constexpr(_integers_ptx(_LOW, INT4_CENTER.value))
_INT4_HIGH_CENTERED_PTX = tl.constexpr(_integers_ptx(_HIGH, INT4_CENTER.value))
_E5M2_PTX = tl.constexpr("""{
    .reg .b32 zero;
    mov.b32 zero, 0;
    prmt.b32 $0, $2, zero, 0x1404;
    prmt.b32 $1, $2, zero, 0x3424;
}""")
_E4M3_PTX = tl.constexpr("""{
    .reg .b16 low, high;
    mov.b32 {low, high}, $2;
    cvt.rn.f16x2.e4m3x2 $0, low;
    cvt.rn.f16x2.e4m3x2 $1, high;
}""")
# The exponent field read with fp16's bias, times 2**8; 0x7F + 1 carries into fp16's top exponent
# bit, so that NaN stays NaN.
_E4M3_SM80_PTX = tl.constexpr("""{
    .reg .b32 zero, scale, t0, t1, m0, m1, n0, n1;
    mov.b32 zero, 0;
    mov.b32 scale, 0x5C005C00;
    prmt.b32 t0, $2, zero, 0x1404;
    prmt.b32 t1, $2, zero, 0x3424;
    shr.b32 m0, t0, 1;
    shr.b32 m1, t1, 1;
    and.b32 m0, m0, 0x3F803F80;
    and.b32 m1, m1, 0x3F803F80;
    add.u32 n0, m0, 0x00800080;
    add.u32 n1, m1, 0x00800080;
    and.b32 n0, n0, 0x40004000;
    and.b32 n1, n1, 0x40004000;
    and.b32 t0, t0, 0x80008000;
    and.b32 t1, t1, 0x80008000;
    or.b32 m0, m0, n0;
    or.b32 m1, m1, n1;
    or.b32 m0, m0, t0;
    or.b32 m1, m1, t1;
    mul.f16x2 $0, m0, scale;
    mul.f16x2 $1, m1, scale;
}""")


@triton.jit
def _packed(c, PTX: tl.constexpr, IN_PLACE: tl.constexpr):
    # Triton moves a pure operation behind a change of layout, an impure one stays in place.
    # "&": the first result is written before the codes are read for the last time.
    return tl.inline_asm_elementwise(
        PTX, "=&r,=&r,r", [c], tl.float16, is_pure=not IN_PLACE, pack=4
    )


@triton.jit
def _half(bits):
    return bits.to(tl.float16, bitcast=True)


@triton.jit
def _decode_portable(c, CODE: tl.constexpr, HIGH: tl.constexpr, CENTER: tl.constexpr):
    bits = c.to(tl.int16)
    if CODE == INT8:
        return _half(bits | 0x6400) - 1152.0
    elif CODE == INT4:
        bits = bits >> 4 if HIGH else bits & 15
        return _half(bits | 0x6400) - (1024.0 + CENTER)
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


@triton.jit
def decode(c, CODE: tl.constexpr, ISA: tl.constexpr, HIGH: tl.constexpr = False,
           IN_PLACE: tl.constexpr = False):  # fmt: skip
    """Bytes of a page (uint8) -> fp16, exactly: every code of every format is an fp16. 4-bit
    codes IN_PLACE come less INT4_CENTER.

    HIGH: the upper of the two codes of a byte. Integers are placed in the mantissa of 1024 and
    the 1024 taken away again, because converting integers to floats runs at a quarter of the
    rate or less.

    IN_PLACE: decode in the layout *c* was loaded in, not in that of the product's operand. Right
    where the product runs over rows (V): its operand takes single bytes from shared memory, but
    fp16 pairs by ldmatrix. Measured in instructions of the loop over fp8: 462 instead of 712.
    """
    if ISA == PORTABLE or CODE == FP8_E4M3FNUZ:
        return _decode_portable(c, CODE, HIGH, INT4_CENTER if IN_PLACE else 0)
    elif CODE == INT8:
        return _packed(c, _INT8_PTX, IN_PLACE)
    elif CODE == INT4:
        if IN_PLACE:
            return _packed(c, _INT4_HIGH_CENTERED_PTX if HIGH else _INT4_LOW_CENTERED_PTX, IN_PLACE)
        else:
            return _packed(c, _INT4_HIGH_PTX if HIGH else _INT4_LOW_PTX, IN_PLACE)
    elif CODE == FP8_E5M2:
        return _packed(c, _E5M2_PTX, IN_PLACE)
    else:
        tl.static_assert(CODE == FP8_E4M3)
        if ISA >= SM89:
            return _packed(c, _E4M3_PTX, IN_PLACE)
        else:
            return _packed(c, _E4M3_SM80_PTX, IN_PLACE)


@triton.constexpr_function
def field_ptx(field: int, planes: int) -> str:
    """Field *field* of bytes with four codes of 2 bits in ``$2``; with two *planes*, ``$3`` has
    their third bits, that of field 0 lowest."""
    fetch = f"shr.b32 t, $2, {2 * field}; and.b32 t, t, 0x03030303;"
    if planes == 2:
        fetch += f"shr.b32 h, $3, {field}; and.b32 h, h, 0x01010101;"
        fetch += "shl.b32 h, h, 2; or.b32 t, t, h;"
    return _integers_ptx(fetch, 0)


@triton.jit
def decode_field(c, third, FIELD: tl.constexpr, ISA: tl.constexpr, IN_PLACE: tl.constexpr = False):
    """One of the four 2-bit codes of bytes *c* -> fp16, exactly; of 3-bit codes if *third* (bytes
    whose bits are those of the fields of *c*, or None) is there. Else as :func:`decode`."""
    if ISA == PORTABLE:
        bits = (c.to(tl.int16) >> (2 * FIELD)) & 3
        if third is not None:
            bits |= ((third.to(tl.int16) >> FIELD) & 1) << 2
        return _half(bits | 0x6400) - 1024.0
    elif third is not None:
        return tl.inline_asm_elementwise(
            field_ptx(FIELD, 2), "=&r,=&r,r,r", [c, third], tl.float16, is_pure=not IN_PLACE,
            pack=4,
        )  # fmt: skip
    else:
        return _packed(c, field_ptx(FIELD, 1), IN_PLACE)
