"""The executable specification against independent oracles: numpy codecs, torch casts, dense
attention from its definition, and properties that hold for every input (hypothesis)."""

import attention_oracle
import numpy as np
import oracle
import pytest
import torch
from cases import (
    ACTIVATIONS,
    BATCHES,
    GRANULARITIES,
    PLAIN_ROWS,
    REFERENCE_RTOL,
    SIGNED_STATIC_ROWS,
    name_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from kvq_plugin import reference
from kvq_plugin.formats import CODES, FP8_E4M3, INT4, INT8, Granularity, Kind, get_format
from kvq_plugin.layout import PageLayout
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


# --- static scales -----------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=name_of)
@pytest.mark.parametrize("heads", (1, 3))
def test_static_scale_expands_to_channels(granularity, heads):
    shape = granularity.scale_shape(0, heads, 32)
    scale = torch.rand(shape) + 0.5
    zero = torch.randint(1, 9, shape).float()
    static = StaticScale.expand(scale, heads, 32, zero)
    index = {
        Granularity.TENSOR: lambda t, h, d: t,
        Granularity.HEAD: lambda t, h, d: t[h],
        Granularity.CHANNEL: lambda t, h, d: t[h, d],
    }[granularity]
    for h in range(heads):
        for d in (0, 31):
            assert static.scale[h, d] == index(scale, h, d)
            assert static.zero_point[h, d] == index(zero, h, d)
            assert static.inverse[h, d] == 1 / index(scale, h, d)


def test_head_scale_with_as_many_heads_as_channels_is_per_head():
    static = StaticScale.expand(torch.arange(1.0, 33.0), 32, 32)
    assert (static.scale == torch.arange(1.0, 33.0)[:, None]).all()


def test_zero_point_of_zeros_is_none():
    assert StaticScale.expand(1.0, 2, 32, torch.zeros(2)).zero_point is None


def test_static_format_without_scale_is_refused():
    with pytest.raises(ValueError, match="StaticScale"):
        reference.quantize(torch.zeros(1, 1, 32), get_format("int8").key, None)


# --- store and load ----------------------------------------------------------------------------


@pytest.mark.parametrize("format", PLAIN_ROWS, ids=name_of)
@pytest.mark.parametrize("style", oracle.CACHE_STYLES)
def test_store_writes_its_slots_and_nothing_else(format, style):
    heads, head_size, block_size = 2, 32, 16
    g = torch.Generator().manual_seed(3)
    cache = oracle.empty_cache(format, 4, heads, head_size, block_size, style)
    before = oracle.clone_storage(cache)
    static = None
    if not format.is_dynamic:
        static = oracle.static_scale(format, Granularity.CHANNEL, heads, head_size, g)
    slots = torch.tensor([5, 63, -1, 21, 20, 0])
    key, value = (torch.randn(6, heads, head_size, generator=g) for _ in range(2))
    reference.store(key, value, cache, slots, format, static, static)

    loaded = reference.load(cache, format, head_size, static, static)
    untouched = reference.load(before, format, head_size, static, static)
    keep = slots >= 0
    for x, got, stale, stream in zip(
        (key, value), loaded, untouched, (format.key, format.value), strict=True
    ):
        got, stale = got.flatten(0, 1), stale.flatten(0, 1)
        codes, words = reference.quantize(x, stream, static)
        expected = reference.dequantize(codes, words, stream, static)
        assert torch.equal(got[slots[keep]], expected[keep])
        others = torch.ones(64, dtype=torch.bool)
        others[slots[keep]] = False
        assert torch.equal(got[others], stale[others]) or got[others].isnan().all()
    # Bytes outside the pages of this layer.
    inside = torch.zeros_like(oracle.whole_storage(cache), dtype=torch.bool)
    inside.as_strided(cache.shape, cache.stride(), cache.storage_offset())[:] = True
    assert (oracle.whole_storage(cache)[~inside] == 0xFF).all()


@pytest.mark.parametrize("format", PLAIN_ROWS, ids=name_of)
def test_store_one_token_at_a_time_equals_packing_whole_blocks(format):
    """Page bytes equal those of an independent packer, stale bits of shared bytes included."""
    heads, head_size, block_size, length = 2, 64, 16, 25
    g = torch.Generator().manual_seed(4)
    static = None
    if not format.is_dynamic:
        static = oracle.static_scale(format, Granularity.CHANNEL, heads, head_size, g)
    packed, stored = (oracle.empty_cache(format, 3, heads, head_size, block_size) for _ in range(2))
    layout = PageLayout(format, head_size, block_size)
    blocks, token = torch.tensor([2, 0]), torch.arange(length)
    inputs = [torch.randn(length, heads, head_size, generator=g) for _ in "kv"]
    for x, which in zip(inputs, (layout.key, layout.value), strict=True):
        codes, words = reference.quantize(x, which.stream, static)
        oracle.write_blocks(packed.view(3, heads, -1), which, blocks, codes, words)
    slots = blocks[token // block_size] * block_size + token % block_size
    reference.store(*inputs, stored, slots, format, static, static)
    assert torch.equal(packed, stored)


def test_page_must_be_contiguous():
    cache = torch.zeros(2, 1, 16, 80, dtype=torch.uint8)[..., :64]
    with pytest.raises(ValueError, match="contiguous.*expected.*got"):
        reference.load(cache, get_format("fp8"), 32, *[StaticScale.expand(1.0, 1, 32)] * 2)


# --- attention ---------------------------------------------------------------------------------

OPTIONS = {
    "causal": {},
    "window": {"window": 9},
    "window_one": {"window": 1},
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.06])},
    "sinks": {"sinks": torch.tensor([-3.0, 0.0, 2.0, 20.0])},
    "bidirectional": {"causal": False},
    "bidirectional_window": {"causal": False, "window": 5},
    "all": {
        "window": 20,
        "softcap": 5.0,
        "alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.06]),
        "sinks": torch.tensor([-3.0, 0.0, 2.0, 20.0]),
    },
}


@pytest.mark.parametrize("format", PLAIN_ROWS, ids=name_of)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_attend_equals_dense_attention(format, options):
    p = oracle.build(format, ((33, 33), (65, 1), (40, 7), (20, 0)), group=2, **options)
    got, expected = p.expected(), attention_oracle.attend(p)
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got, expected, rtol=REFERENCE_RTOL, atol=REFERENCE_RTOL)


@pytest.mark.parametrize("name", BATCHES)
def test_attend_batches(name):
    p = oracle.build(get_format("int8_per_token_head"), BATCHES[name], group=3)
    torch.testing.assert_close(
        p.expected(), attention_oracle.attend(p), rtol=REFERENCE_RTOL, atol=REFERENCE_RTOL
    )


@pytest.mark.parametrize("format", SIGNED_STATIC_ROWS, ids=name_of)
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=name_of)
def test_attend_with_zero_points(format, granularity):
    p = oracle.build(format, granularity=granularity, zero_point=True)
    torch.testing.assert_close(
        p.expected(), attention_oracle.attend(p), rtol=REFERENCE_RTOL, atol=REFERENCE_RTOL
    )


def test_attend_equals_torch_sdpa():
    """A second oracle for the plain causal case, on dequantized K and V."""
    p = oracle.build(get_format("fp8"), ((50, 50),), group=2)
    k, v = (t[0].double().transpose(0, 1).repeat_interleave(2, 0) for t in (p.keys, p.values))
    q = p.query.double().transpose(0, 1)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=p.scale
    )
    torch.testing.assert_close(
        p.expected(), expected.transpose(0, 1), rtol=REFERENCE_RTOL, atol=REFERENCE_RTOL
    )


@pytest.mark.parametrize("format", PLAIN_ROWS, ids=name_of)
def test_a_poisoned_token_reaches_the_queries_that_see_it_and_no_other_sequence(format):
    p = oracle.build(format, ((12, 12), (20, 2)), kv_heads=1, group=1, head_size=32)
    x = torch.full((1, 1, 32), NAN)
    slot = p.blocks[0][:1].long() * p.cache.shape[2] + 6
    reference.store(x, x, p.cache, slot, format, p.key_static, p.value_static)
    out = p.expected()
    if format.key.code.kind is Kind.SIGNED and not format.is_dynamic:
        assert torch.isfinite(out).all(), "static int8 has no NaN: it writes zero"
        return
    assert out[6:12].isnan().all()
    assert torch.isfinite(out[12:]).all()
