"""ops.attend against reference.attend in float64 on the same codes.

Tolerances and shapes: ``cases.py``. Every cache is built with 0xFF (NaN) in each byte that no
token owns, so every test here is also a test that stale bytes do not matter. What must not reach
an output at all: ``test_attend_edges.py``.
"""

from dataclasses import replace

import attention_oracle
import oracle
import pytest
import torch
from attending import check, compare, every_dtype, every_format, every_isa, run, slots_of
from cases import (
    ATTEND_ISAS,
    BATCHES,
    BLOCK_SIZES,
    GRANULARITIES,
    GROUPS,
    HEAD_SIZES,
    LONG_CONTEXT,
    OFFSET_SLACK,
    PLAIN_ROWS,
    SIGNED_STATIC_ROWS,
    STATIC_ROWS,
    is_nibble,
    name_of,
)

from kvq_plugin import reference
from kvq_plugin.formats import Kind, get_format

# --- shapes --------------------------------------------------------------------------------------


@every_isa
@every_dtype
@pytest.mark.parametrize("batch", BATCHES)
@every_format
def test_batches_and_dtypes(format, batch, dtype, isa):
    check(isa, format, batch=BATCHES[batch], dtype=dtype)


@every_isa
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@every_format
def test_head_sizes(format, head_size, isa):
    check(isa, format, head_size=head_size, group=3, dtype=torch.float32)


@every_isa
@pytest.mark.parametrize("group", GROUPS)
@every_format
def test_group_sizes(format, group, isa):
    check(isa, format, group=group, dtype=torch.bfloat16)


@every_isa
@pytest.mark.parametrize("group", (5, 6, 9, 12, 20, 32, 71))
def test_unusual_group_sizes_with_one_kv_head(group, isa):
    check(isa, get_format("int8_per_token_head"), group=group, kv_heads=1)


@every_isa
@pytest.mark.parametrize("block_size", (*BLOCK_SIZES, 48))
@every_format
def test_block_sizes(format, block_size, isa):
    check(isa, format, block_size=block_size, batch=BATCHES["decode"], group=2)


@every_isa
@pytest.mark.parametrize("style", oracle.CACHE_STYLES)
@every_format
def test_cache_strides(format, style, isa):
    check(isa, format, style=style, dtype=torch.float16)


@every_isa
@pytest.mark.parametrize("length", range(1, 100, 7))
@every_format
def test_prefill_of_any_length(format, length, isa):
    check(isa, format, batch=((length, length),), group=2, block_size=16)


@every_isa
@pytest.mark.parametrize("count", (1, 2, 3, 5, 8, 16, 31, 32, 33, 64))
@every_format
def test_chunks_in_a_context(format, count, isa):
    check(isa, format, batch=((count + 75, count),), group=2)


# --- static scales -------------------------------------------------------------------------------


@every_isa
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=name_of)
@pytest.mark.parametrize("format", STATIC_ROWS, ids=name_of)
def test_static_granularities(format, granularity, isa):
    check(isa, format, granularity=granularity)


@every_isa
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=name_of)
@pytest.mark.parametrize("head_size", (64, 112))
@pytest.mark.parametrize("format", SIGNED_STATIC_ROWS, ids=name_of)
def test_zero_points(format, head_size, granularity, isa):
    check(isa, format, granularity=granularity, zero_point=True, head_size=head_size)


# --- options -------------------------------------------------------------------------------------

SLOPES = torch.tensor([2.0**-n for n in range(1, 9)])
SINKS = torch.tensor([-30.0, -1.0, 0.0, 1.0, 3.0, 30.0, 0.5, 2.0])
OPTIONS = {
    "window 1": {"window": 1},
    "window 16": {"window": 16},
    "window 100": {"window": 100},
    "window beyond": {"window": 4096},
    "softcap": {"softcap": 3.0},
    "alibi": {"alibi_slopes": SLOPES},
    "sinks": {"sinks": SINKS},
    "bidirectional": {"causal": False},
    "bidirectional window": {"causal": False, "window": 20},
    "window sinks": {"window": 33, "sinks": SINKS},
    "window softcap": {"window": 70, "softcap": 30.0},
    "all": {"window": 50, "softcap": 10.0, "alibi_slopes": SLOPES, "sinks": SINKS},
}


@every_isa
@pytest.mark.parametrize("option", OPTIONS)
@every_format
def test_options(format, option, isa):
    batch = ((300, 1), (65, 65), (130, 9), (17, 1))
    check(isa, format, batch=batch, group=4, **OPTIONS[option])


@every_isa
@pytest.mark.parametrize("option", ("sinks", "window 16", "softcap", "all"))
@pytest.mark.parametrize("format", SIGNED_STATIC_ROWS, ids=name_of)
def test_options_with_zero_points(format, option, isa):
    """A zero point is subtracted in proportion to the weights' sum, below one with a sink."""
    check(isa, format, zero_point=True, **OPTIONS[option])


@every_isa
@pytest.mark.parametrize("option", OPTIONS)
@every_dtype
def test_options_in_every_dtype(dtype, option, isa):
    check(isa, get_format("fp8_per_token_head"), dtype=dtype, **OPTIONS[option])


@every_isa
@every_format
def test_sliding_window_over_a_long_context(format, isa):
    """Whole tiles before the window have no visible key: their maximum is -inf, never NaN."""
    check(isa, format, batch=((3000, 1), (2500, 30)), window=64, group=2)


@every_isa
def test_large_scale_factor(isa):
    """The scale argument is used as given, not as head_size ** -0.5."""
    p = oracle.build(get_format("int8_per_token_head"))
    for scale in (0.01, 0.5):
        q = replace(p, scale=scale)
        compare(q.format, run(q, isa), q.expected(), attention_oracle.attention_bound(q))


# --- values --------------------------------------------------------------------------------------


@every_isa
@every_format
def test_long_context(format, isa):
    batch = ((LONG_CONTEXT, 1),)
    check(isa, format, batch=batch, kv_heads=1, group=2, block_size=128)


@every_isa
@every_format
def test_long_flat_context(format, isa):
    """Equal scores: each p is 1/20000, which one limb relative to the whole would round away."""
    batch = ((LONG_CONTEXT, 1),)
    check(isa, format, batch=batch, kv_heads=1, group=1, block_size=128, query_gain=1e-3)


@every_isa
@every_dtype
@every_format
def test_logits_in_the_hundreds(format, dtype, isa):
    """Softmax turns one-hot; limb errors scale with the logits, so only the bound applies."""
    check(isa, format, nrmse=False, dtype=dtype, query_gain=80.0, batch=BATCHES["chunked"])


@every_isa
@pytest.mark.parametrize("format", [f for f in PLAIN_ROWS if f.is_dynamic], ids=name_of)
def test_token_scales_a_thousand_apart(format, isa):
    check(isa, format, batch=((500, 1), (130, 40)), key_spread=1e3, value_spread=1e3)


@every_isa
@every_format
def test_value_rows_of_zero(format, isa):
    """A uniform zero V gives zero, not NaN from 0 / 0 scales; and exact but for the offset."""
    p = oracle.build(format, ((40, 3),), kv_heads=1)
    slots = slots_of(p, 0)
    zero = torch.zeros(40, 1, 64)
    reference.store(p.keys[0], zero, p.cache, slots, format, p.key_static, p.value_static)
    assert run(p, isa).abs().max() <= OFFSET_SLACK[format.value.code.kind]


@every_isa
@pytest.mark.parametrize("format", [f for f in STATIC_ROWS], ids=name_of)
def test_every_value_byte_decodes(format, isa):
    """A context of one token has weight 1, so the output is V itself: all 256 bytes."""
    layout = reference.PageLayout(format, 256, 16)
    p = oracle.build(format, ((1, 1),), kv_heads=1, group=1, head_size=256, block_size=16)
    pages = reference._pages(p.cache)
    block = int(p.blocks[0][0])
    pages[block, 0, layout.value.code_bytes[0]] = torch.arange(256).to(torch.uint8)
    _, v = reference.load(p.cache, format, 256, p.key_static, p.value_static)
    expected = v[block, 0, 0].double()
    out = run(p, isa)[0, 0].double()
    # No encoder writes e5m2's infinities; should one turn up it must not look like a number.
    finite = expected.isfinite()
    assert torch.equal(out.isfinite(), finite)
    assert out[expected.isnan()].isnan().all()
    # One weight, alone in its tile: its limbs are exact up to the rounding of 1 / sum.
    slack = OFFSET_SLACK[format.value.code.kind]
    torch.testing.assert_close(out[finite], expected[finite], rtol=2.0**-20, atol=slack)


@every_isa
@pytest.mark.parametrize("format", [f for f in STATIC_ROWS if f.key.code.kind is Kind.FLOAT],
                         ids=name_of)  # fmt: skip
def test_keys_and_values_of_subnormal_codes(format, isa):
    """bf16 dot products flush their own denormals: codes must not be decoded to those."""
    p = oracle.build(format, ((130, 3), (70, 1)), group=2)
    tiny = 2 if format.key.code.name == "fp8_e4m3" else 1
    pages = reference._pages(p.cache)
    g = torch.Generator().manual_seed(0)
    layout = reference.PageLayout(format, 64, 32)
    smallest = float(oracle.float8_values(format.key.code.name)[1])
    static = reference.StaticScale.expand(1 / (4 * smallest), 2, 64)
    for s in range(2):
        for block in p.blocks[s].tolist():
            for which in (layout.key, layout.value):
                codes = torch.randint(0, 4 * tiny, (2, 32, 64), generator=g).to(torch.uint8)
                sign = torch.randint(0, 2, (2, 32, 64), generator=g).to(torch.uint8) << 7
                part = pages[block].clone()
                oracle.pack(part, which, codes | sign)
                pages[block] = part
    k, v = reference.load(p.cache, format, 64, static, static)
    dense = [
        tuple(t[p.blocks[s].long()].flatten(0, 1)[: int(p.seq_lens[s])] for s in range(2))
        for t in (k, v)
    ]
    q = replace(p, key_static=static, value_static=static, keys=dense[0], values=dense[1])
    expected, bound = q.expected(), attention_oracle.attention_bound(q)
    compare(format, run(q, isa), expected, bound)
    # Nor to fp32 denormals, which vanish once an application asks torch to flush them.
    if not torch.set_flush_denormal(True):
        return
    try:
        compare(format, oracle.single_threaded(run)(q, isa), expected, bound)
    finally:
        torch.set_flush_denormal(False)


@every_isa
@every_format
def test_query_of_zeros_averages_the_values(format, isa):
    p = oracle.build(format, ((37, 1), (64, 5)), query_gain=0.0)
    compare(format, run(p, isa), p.expected(), attention_oracle.attention_bound(p))


def tiled(format, head_size: int):
    """Batches with five rows a kv head, the fewest that integers use tiles for, with sixteen, which
    fill one, thirty-two, which fill two; with values of four pages, which lie unevenly."""
    batch = ((150, 1), (64, 1), (200, 3))
    for group, block_size in ((5, 128), (16, 64), (17, 32), (32, 16)):
        yield oracle.build(format, batch, group=group, kv_heads=2, head_size=head_size,
                           block_size=block_size)  # fmt: skip


def by_kind(floats: bool):
    formats = [f for f in PLAIN_ROWS if (f.key.code.kind is Kind.FLOAT) == floats]
    return pytest.mark.parametrize("format", formats, ids=name_of)


on_tiles = pytest.mark.parametrize("isa", [x for x in ATTEND_ISAS if x.startswith("amx")])


@on_tiles
@pytest.mark.parametrize("head_size", (16, 48, 64, 112, 128, 512))
@by_kind(floats=False)
def test_tiles_give_the_bits_of_avx512(format, head_size, isa):
    """Sums of integers are exact in any order; but with 4-bit codes AVX-512 multiplies others."""
    if is_nibble(format.value):
        pytest.skip("compared with AMX's own few rows")
    for p in tiled(format, head_size):
        assert torch.equal(run(p, isa), run(p, "avx512_bf16"))


@on_tiles
@pytest.mark.parametrize("head_size", (16, 48, 64, 112, 128, 512))
@by_kind(floats=False)
def test_tiles_give_the_bits_of_few_rows(format, head_size, isa):
    """Up to four query heads a kv head are multiplied without tiles."""
    kv_heads, group = 2, 16
    p = oracle.build(format, ((150, 1), (64, 1), (200, 1)), group=group, kv_heads=kv_heads,
                     head_size=head_size)  # fmt: skip

    def by_kv_head(x):
        return x.unflatten(1, (kv_heads, group))

    whole = by_kv_head(run(p, isa))
    for first in range(0, group, 4):
        few = by_kv_head(p.query)[:, :, first : first + 4].flatten(1, 2).contiguous()
        got = run(replace(p, query=few), isa).unflatten(1, (kv_heads, 4))
        assert torch.equal(got, whole[:, :, first : first + 4])


@pytest.mark.skipif("amx" not in ATTEND_ISAS, reason="needs a processor with AMX")
@pytest.mark.parametrize("head_size", (16, 48, 64, 112, 128, 512))
@by_kind(floats=True)
def test_tiles_give_the_bits_of_their_emulation(format, head_size):
    """The processor sums pairs of bf16 in the order that the emulation says."""
    for p in tiled(format, head_size):
        assert torch.equal(run(p, "amx"), run(p, "amx_emulated"))
