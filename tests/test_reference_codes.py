"""The executable specification of codes against numpy codecs and torch casts, and properties that
hold for every input (hypothesis)."""

import numpy as np
import oracle
import pytest
import torch
from cases import (
    ACTIVATIONS,
    PLAIN_ROWS,
    SIGNED_STATIC_ROWS,
    name_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from kvq_plugin import reference
from kvq_plugin.formats import CODES, FP8_E4M3, INT4, INT8, Kind, get_format
from kvq_plugin.reference import AMAX_FLOOR, StaticScale, decode, encode

FLOAT_CODES = tuple(c for c in CODES.values() if c.kind is Kind.FLOAT)
INT8_ROW = get_format("int8_per_token_head").key
FP8_ROW = get_format("fp8_per_token_head").key
INT4_ROW = oracle.unrotated(get_format("int4_per_token_head").key)
NAN, INF = float("nan"), float("inf")

every_float_code = pytest.mark.parametrize("code", FLOAT_CODES, ids=name_of)


def row(values) -> torch.Tensor:
    """One token, one head."""
    return torch.tensor(values, dtype=torch.float32)[None, None]


def fp32_scale(words: torch.Tensor) -> torch.Tensor:
    return words.view(torch.float32)


def fp16_scale_and_min(words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return words.contiguous().view(torch.float16).view(*words.shape, 2).unbind(-1)


# --- float codes -------------------------------------------------------------------------------


@every_float_code
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=name_of)
def test_float_encode_of_every_16_bit_input(code, dtype):
    x = oracle.all_inputs(dtype).float()
    got = encode(x, code)
    assert np.array_equal(got.numpy(), oracle.float8_encode(x.numpy(), code.name))
    torch_type = getattr(torch, code.torch_dtype)
    by_torch = x.clamp(-code.qmax, code.qmax).to(torch_type).view(torch.uint8)
    assert torch.equal(got, by_torch)


@every_float_code
def test_float_encode_ties_go_to_the_even_code(code):
    values = oracle.float8_values(code.name)
    finite = [b for b in range(127) if np.isfinite(values[b]) and np.isfinite(values[b + 1])]
    x = torch.tensor([(values[b] + values[b + 1]) / 2 for b in finite], dtype=torch.float64)
    assert torch.equal(x, x.float().double()), "midpoints must be exact in fp32"
    even = torch.tensor([b if b % 2 == 0 else b + 1 for b in finite], dtype=torch.uint8)
    assert torch.equal(encode(x.float(), code), even)
    # The fp32 neighbours of a tie go to their own side.
    up = torch.nextafter(x.float(), torch.tensor(INF))
    down = torch.nextafter(x.float(), torch.tensor(-INF))
    assert encode(up, code).tolist() == [b + 1 for b in finite]
    assert encode(down, code).tolist() == finite


@every_float_code
def test_float_decode_of_every_byte(code):
    got = decode(torch.arange(256, dtype=torch.int32).to(torch.uint8), code).double().numpy()
    expected = oracle.float8_values(code.name)
    assert np.array_equal(got, expected, equal_nan=True)
    assert np.array_equal(np.signbit(got)[~np.isnan(got)], np.signbit(expected)[~np.isnan(got)])


@every_float_code
def test_float_special_values(code):
    fnuz = code.name == "fp8_e4m3fnuz"
    got = encode(torch.tensor([INF, -INF, 1e30, -1e30, 0.0, -0.0, NAN]), code)
    top = int(encode(torch.tensor(code.qmax), code))
    assert decode(got[:4], code).tolist() == [code.qmax, -code.qmax, code.qmax, -code.qmax]
    assert got[0] == top and got[1] == top | 0x80, "infinities saturate"
    assert got[4] == 0 and got[5] == (0 if fnuz else 0x80), "-0 is kept where the format has one"
    assert got[6] == (0x80 if fnuz else 0x7F)


@every_float_code
@given(data=st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=40))
@settings(max_examples=60, deadline=None)
def test_float_encode_is_nearest_monotone_and_idempotent(code, data):
    x = torch.tensor(sorted(data), dtype=torch.float32)
    codes = encode(x, code)
    assert np.array_equal(codes.numpy(), oracle.float8_encode(x.numpy(), code.name))
    y = decode(codes, code)
    assert (y.diff() >= 0).all()
    again = encode(y, code)
    assert torch.equal(decode(again, code), y)


# --- integer codes -----------------------------------------------------------------------------


def test_int8_ties_go_to_even_and_never_reach_minus_128():
    x = torch.arange(-260, 261) / 2
    got = encode(x, INT8)
    assert got.dtype == torch.int8
    expected = [max(-127, min(127, round(v))) for v in x.tolist()]  # Python rounds half to even
    assert got.tolist() == expected
    assert encode(torch.tensor([-128.0, -1e9, -INF, INF, NAN]), INT8).tolist() == [
        -127, -127, -127, 127, 0]  # fmt: skip


def test_int4_ties_go_to_even_and_clamp():
    x = torch.arange(-6, 40) / 2
    got = encode(x, INT4)
    assert got.dtype == torch.uint8
    assert got.tolist() == [max(0, min(15, round(v))) for v in x.tolist()]


def test_int4_row_ties_to_even():
    """min 0 and max 15 make the stored fp16 scale exactly 1, so halves are true ties."""
    values = [0.0, 15.0] + [n + 0.5 for n in range(14)] + [-0.0] * 16
    codes, words = reference.quantize(row(values), INT4_ROW)
    scale, minimum = fp16_scale_and_min(words)
    assert scale.item() == 1.0 and minimum.item() == 0.0
    assert codes[0, 0, 2:16].tolist() == [round(n + 0.5) for n in range(14)]


@pytest.mark.parametrize("format", SIGNED_STATIC_ROWS, ids=name_of)
@pytest.mark.parametrize("zero_point", (False, True))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=name_of)
def test_static_int8_of_every_16_bit_input(format, zero_point, dtype):
    """Scale 1/16 makes thousands of inputs exact ties."""
    x = oracle.all_inputs(dtype).view(-1, 2, 64)
    zero = torch.tensor([3.0, -7.0]) if zero_point else None
    static = StaticScale.expand(0.0625, 2, 64, zero)
    codes, words = reference.quantize(x, format.key, static)
    shift = None if zero is None else zero.numpy()[:, None]
    expected = oracle.int8_codes(x.float().numpy(), np.float32(16.0), shift)
    assert words is None
    assert np.array_equal(codes.numpy(), expected)
    assert codes.min() == -127


# --- dynamic rows ------------------------------------------------------------------------------


def test_int8_row_scale_is_amax_times_the_rounded_inverse_of_127():
    x = torch.randn(50, 2, 64, generator=torch.Generator().manual_seed(0))
    codes, words = reference.quantize(x, INT8_ROW)
    amax = x.abs().amax(-1).numpy()
    assert np.array_equal(fp32_scale(words).numpy(), amax * np.float32(1 / 127))
    inverse = np.float32(127) / amax
    expected = np.rint(x.numpy() * inverse[..., None]).clip(-127, 127)
    assert np.array_equal(codes.numpy(), expected.astype(np.int8))
    assert (codes.abs().amax(-1) == 127).all(), "the largest element reaches the last code"


def test_fp8_row_uses_the_whole_range():
    x = torch.randn(50, 2, 64, generator=torch.Generator().manual_seed(0)) * 1e-3
    codes, words = reference.quantize(x, FP8_ROW)
    amax = x.abs().amax(-1).numpy()
    assert np.array_equal(fp32_scale(words).numpy(), amax * np.float32(1 / 448))
    scaled = x.numpy() * (np.float32(448) / amax)[..., None]
    assert np.array_equal(codes.numpy(), oracle.float8_encode(scaled, FP8_E4M3.name))
    assert (decode(codes, FP8_E4M3).abs().amax(-1) == 448).all()


@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=name_of)
def test_int4_row_uses_the_stored_fp16_scale_and_min(dtype):
    x = torch.randn(50, 2, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    codes, words = reference.quantize(x, INT4_ROW)
    scale, minimum = fp16_scale_and_min(words)
    wide = x.float().numpy()
    low, high = wide.min(-1), wide.max(-1)
    assert np.array_equal(minimum.numpy(), low.astype(np.float16))
    assert np.array_equal(scale.numpy(), ((high - low) * np.float32(1 / 15)).astype(np.float16))
    inverse = np.float32(1) / scale.float().numpy()
    steps = np.rint((wide - minimum.float().numpy()[..., None]) * inverse[..., None])
    assert np.array_equal(codes.numpy(), steps.clip(0, 15).astype(np.uint8))
    assert codes.amin() == 0 and codes.amax() == 15


@pytest.mark.parametrize("stream", (INT8_ROW, FP8_ROW), ids=("int8", "fp8"))
def test_amax_floor_keeps_zero_and_tiny_rows_finite(stream):
    tiny = [1e-40] * 16 + [-3e-39] * 16
    x = torch.cat([row([0.0] * 32), row([-0.0] * 32), row(tiny)])
    codes, words = reference.quantize(x, stream)
    expected = np.float32(AMAX_FLOOR) * np.float32(1 / stream.code.qmax)
    assert (fp32_scale(words).numpy() == expected).all()
    assert (decode(codes, stream.code) == 0).all()
    assert (reference.dequantize(codes, words, stream) == 0).all()


def test_int4_zero_and_constant_rows():
    x = torch.cat([row([0.0] * 32), row([2.5] * 32), row([-1e-9] * 32)])
    codes, words = reference.quantize(x, INT4_ROW)
    scale, _ = fp16_scale_and_min(words)
    assert (scale == 0).all() and (codes == 0).all()
    back = reference.dequantize(codes, words, INT4_ROW)
    assert back[0].eq(0).all() and back[1].eq(2.5).all() and back[2].abs().max() < 1e-7


def test_int4_minimum_of_zero_has_one_sign_wherever_minus_zero_stands():
    """The metadata bytes must not depend on the order in which a kernel takes the minimum."""
    x = torch.zeros(64, 1, 64)
    x[torch.arange(64), 0, torch.arange(64)] = -0.0
    x = torch.cat([x, -x])  # one -0 among zeros, and one +0 among minus zeros
    _, words = reference.quantize(x, INT4_ROW)
    assert words.unique().numel() == 1


@pytest.mark.parametrize("stream", (INT8_ROW, FP8_ROW, INT4_ROW), ids=("int8", "fp8", "int4"))
def test_a_nan_poisons_its_row_alone(stream):
    x = torch.randn(5, 3, 32, generator=torch.Generator().manual_seed(0))
    clean, clean_words = reference.quantize(x, stream)
    x[2, 1, 7] = NAN
    codes, words = reference.quantize(x, stream)
    back = reference.dequantize(codes, words, stream)
    hit = torch.zeros(5, 3, dtype=torch.bool)
    hit[2, 1] = True
    assert back[hit].isnan().all() and not back[~hit].isnan().any()
    assert torch.equal(codes[~hit], clean[~hit]) and torch.equal(words[~hit], clean_words[~hit])


@pytest.mark.parametrize("stream", (INT8_ROW, FP8_ROW), ids=("int8", "fp8"))
def test_infinities_count_as_the_largest_finite_value(stream):
    values = [INF, -INF, 1.0, -2.0] * 8
    largest = torch.finfo(torch.float32).max
    finite = [largest, -largest, 1.0, -2.0] * 8
    for got, expected in zip(
        reference.quantize(row(values), stream),
        reference.quantize(row(finite), stream),
        strict=True,
    ):
        assert torch.equal(got, expected)


def test_int4_saturates_at_the_range_of_fp16():
    values = [INF, -INF, 1e30, 70000.0, 0.0, -1e5] + [1.0] * 26
    codes, words = reference.quantize(row(values), INT4_ROW)
    scale, minimum = fp16_scale_and_min(words)
    assert minimum.item() == -65504.0 and scale.isfinite().all()
    assert codes[0, 0, :4].tolist() == [15, 0, 15, 15] and codes[0, 0, 5] == 0


floats = st.floats(-1e4, 1e4, width=32)
rows = st.lists(floats, min_size=32, max_size=32)


@given(values=rows)
@settings(max_examples=100, deadline=None)
def test_int8_row_properties(values):
    x = row(values)
    codes, words = reference.quantize(x, INT8_ROW)
    scale = fp32_scale(words).double()[..., None]
    back = reference.dequantize(codes, words, INT8_ROW).double()
    # Half a step, plus fp32 rounding of the inverse, the product and the scale on 127 steps.
    assert ((back - x.double()).abs() <= scale * (0.5 + 127 * 2.0**-22)).all()
    order = x.flatten().argsort()
    assert (codes.flatten()[order].int().diff() >= 0).all()
    again, _ = reference.quantize(back.float(), INT8_ROW)
    assert torch.equal(again, codes), "re-quantizing a dequantized row changes nothing"


@given(values=rows)
@settings(max_examples=100, deadline=None)
def test_int4_row_properties(values):
    x = row(values)
    codes, words = reference.quantize(x, INT4_ROW)
    scale, minimum = (t.double()[..., None] for t in fp16_scale_and_min(words))
    back = reference.dequantize(codes, words, INT4_ROW).double()
    # Half a step; plus fp16 rounding of the minimum (2**-11 of it) and of the scale on 15
    # steps, or one fp16 subnormal each.
    slack = minimum.abs() * 2.0**-11 + 15 * (scale * 2.0**-11 + 2.0**-25) + 2.0**-25
    assert ((back - x.double()).abs() <= scale / 2 * (1 + 2.0**-10) + slack).all()
    assert (codes.flatten()[x.flatten().argsort()].int().diff() >= 0).all()


@given(values=rows)
@settings(max_examples=100, deadline=None)
def test_fp8_row_properties(values):
    x = row(values)
    codes, words = reference.quantize(x, FP8_ROW)
    scale = fp32_scale(words).double()[..., None]
    back = reference.dequantize(codes, words, FP8_ROW).double()
    # 3 mantissa bits: 2**-4 relative; below the smallest normal 2**-6, half of 2**-9.
    bound = torch.maximum(x.double().abs() * 2.0**-4, scale * 2.0**-10) * (1 + 2.0**-20)
    assert ((back - x.double()).abs() <= bound).all()
    assert (back.flatten()[x.flatten().argsort()].diff() >= 0).all()


@pytest.mark.parametrize("format", PLAIN_ROWS, ids=name_of)
@pytest.mark.parametrize("head_size", (32, 64, 128, 256, 512))
def test_round_trip_error_stays_under_the_table(format, head_size):
    """Relative RMSE on N(0, 1); static scales calibrated as amax / qmax for integers."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2**17 // head_size, 2, head_size, generator=g)
    scale = format.default_scale or x.abs().max().item() / format.key.code.qmax
    static = None if format.is_dynamic else StaticScale.expand(scale, 2, head_size)
    relative = []
    for stream in (format.key, format.value):
        codes, words = reference.quantize(x, stream, static)
        error = reference.dequantize(codes, words, stream, static) - x
        relative.append(float((error.double().square().mean() / x.double().square().mean()).sqrt()))
    assert max(relative) < format.max_error
    worst = head_size == 512 or not format.is_dynamic
    assert not worst or max(relative) > format.max_error / 2, "the table's bound says nothing"
