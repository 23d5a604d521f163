"""The executable specification of scales, pages and attention against independent oracles: dense
attention from its definition, torch's own."""

import attention_oracle
import oracle
import pytest
import torch
from cases import (
    BATCHES,
    GRANULARITIES,
    PLAIN_ROWS,
    REFERENCE_RTOL,
    SIGNED_STATIC_ROWS,
    name_of,
)

from kvq_plugin import reference
from kvq_plugin.formats import Granularity, Kind, get_format
from kvq_plugin.layout import PageLayout
from kvq_plugin.reference import StaticScale

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


@pytest.mark.parametrize("format", PLAIN_ROWS, ids=name_of)
def test_entries_of_a_block_table_before_the_window_may_be_anything(format):
    p = oracle.build(format, ((90, 1), (20, 3)), window=30)
    want = p.expected()
    p.block_table[0, 0] = 10**6  # tokens 60 to 89 of blocks of 32
    assert torch.equal(p.expected(), want)


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
    x = torch.full((1, 1, 32), float("nan"))
    slot = p.blocks[0][:1].long() * p.cache.shape[2] + 6
    reference.store(x, x, p.cache, slot, format, p.key_static, p.value_static)
    out = p.expected()
    if format.key.code.kind is Kind.SIGNED and not format.is_dynamic:
        assert torch.isfinite(out).all(), "static int8 has no NaN: it writes zero"
        return
    assert out[6:12].isnan().all()
    assert torch.isfinite(out[12:]).all()
