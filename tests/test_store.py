"""ops.store against reference.store: every byte of the storage behind the cache, bit for bit.

The comparison covers bytes that must not change: other slots, other layers, padding, and the
half of a shared byte that belongs to a neighbour.
"""

from functools import lru_cache

import oracle
import pytest
import torch
from cases import (
    ACTIVATIONS,
    BLOCK_SIZES,
    GRANULARITIES,
    HEAD_SIZES,
    ISAS,
    PLAIN_ROWS,
    SIGNED_STATIC_ROWS,
    STATIC_ROWS,
    TOKENS,
    name_of,
    use_isa,
)

from kvq_plugin import ops, reference
from kvq_plugin.formats import Granularity, get_format
from kvq_plugin.layout import PageLayout

every_isa = pytest.mark.parametrize("isa", ISAS)
every_format = pytest.mark.parametrize("format", PLAIN_ROWS, ids=name_of)
every_dtype = pytest.mark.parametrize("dtype", ACTIVATIONS, ids=name_of)
NAN, INF = float("nan"), float("inf")


def scales(format, granularity, heads, head_size, zero_point=False, seed=7):
    """Different static scales for K and V; (None, None) for dynamic formats."""
    if format.is_dynamic:
        return None, None
    g = torch.Generator().manual_seed(seed)
    return tuple(
        oracle.static_scale(format, granularity, heads, head_size, g, zero_point) for _ in "kv"
    )


def random_slots(tokens, blocks, block_size, seed=0):
    """Distinct shuffled slots, every fifth one -1 (skipped)."""
    g = torch.Generator().manual_seed(seed)
    slots = torch.randperm(blocks * block_size, generator=g)[:tokens]
    slots[4::5] = -1
    return slots


@lru_cache(maxsize=8)
def wanted(format, dtype, heads, head_size, block_size, tokens, style, granularity, zero_point):
    """(key, value, slots, statics, cache before, whole storage after) by the reference."""
    g = torch.Generator().manual_seed(tokens)
    key, value = (torch.randn(tokens, heads, head_size, generator=g).to(dtype) for _ in "kv")
    blocks = -(-tokens // block_size) + 2
    before = oracle.empty_cache(format, blocks, heads, head_size, block_size, style)
    oracle.whole_storage(before).random_(generator=g)
    slots = random_slots(tokens, blocks, block_size)
    statics = scales(format, granularity, heads, head_size, zero_point)
    after = oracle.clone_storage(before)
    reference.store(key, value, after, slots, format, *statics)
    return key, value, slots, statics, before, oracle.whole_storage(after)


def check(
    isa,
    format,
    dtype=torch.bfloat16,
    heads=3,
    head_size=64,
    block_size=32,
    tokens=17,
    style="plain",
    granularity=Granularity.CHANNEL,
    zero_point=False,
):
    key, value, slots, statics, before, after = wanted(
        format, dtype, heads, head_size, block_size, tokens, style, granularity, zero_point
    )
    cache = oracle.clone_storage(before)
    with use_isa(isa):
        ops.store(key, value, cache, slots, format, *statics)
    assert not torch.equal(after, oracle.whole_storage(before)), "the case must write something"
    assert torch.equal(oracle.whole_storage(cache), after)


@every_isa
@every_dtype
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@every_format
def test_head_sizes_and_dtypes(format, head_size, dtype, isa):
    check(isa, format, dtype, head_size=head_size, tokens=7)


@every_isa
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@every_format
def test_block_sizes_and_token_counts(format, block_size, tokens, isa):
    check(isa, format, block_size=block_size, tokens=tokens, head_size=80)


@every_isa
@pytest.mark.parametrize("style", oracle.CACHE_STYLES)
@every_format
def test_cache_strides(format, style, isa):
    check(isa, format, torch.float16, style=style, tokens=33, block_size=16)


@every_isa
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=name_of)
@every_dtype
@pytest.mark.parametrize("format", STATIC_ROWS, ids=name_of)
def test_static_granularities(format, dtype, granularity, isa):
    check(isa, format, dtype, granularity=granularity)


@every_isa
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=name_of)
@every_dtype
@pytest.mark.parametrize("format", SIGNED_STATIC_ROWS, ids=name_of)
def test_zero_points(format, dtype, granularity, isa):
    check(isa, format, dtype, granularity=granularity, zero_point=True)


@every_isa
@pytest.mark.parametrize("heads", (1, 2, 8))
@every_format
def test_head_counts(format, heads, isa):
    check(isa, format, heads=heads, head_size=112)


def compare(isa, key, value, format, block_size=16, statics=None):
    """Both implementations on the same input, slots 0..T-1, all bytes."""
    tokens, heads, head_size = key.shape
    statics = statics or scales(format, Granularity.HEAD, heads, head_size)
    blocks = -(-tokens // block_size)
    want = oracle.empty_cache(format, blocks, heads, head_size, block_size)
    got = oracle.clone_storage(want)
    slots = torch.arange(tokens)
    reference.store(key, value, want, slots, format, *statics)
    with use_isa(isa):
        ops.store(key, value, got, slots, format, *statics)
    assert torch.equal(got, want)


@every_isa
@every_dtype
@every_format
def test_slices_of_a_fused_qkv_tensor(format, dtype, isa):
    """As attention layers pass them: token stride (G + 2) * H * D, not H * D."""
    heads, head_size, group = 2, 64, 4
    g = torch.Generator().manual_seed(0)
    fused = torch.randn(9, (group + 2) * heads * head_size, generator=g).to(dtype)
    _, key, value = fused.split([n * heads * head_size for n in (group, 1, 1)], -1)
    key, value = (t.view(9, heads, head_size) for t in (key, value))
    assert not key.is_contiguous()
    compare(isa, key, value, format)


@every_isa
@every_format
def test_head_major_inputs(format, isa):
    """Token stride smaller than head stride, and K strided unlike V."""
    g = torch.Generator().manual_seed(0)
    key = torch.randn(3, 10, 64, generator=g).transpose(0, 1)
    value = torch.randn(10, 3, 64, generator=g)
    compare(isa, key, value, format)


def special_rows(dtype, head_size=64):
    """[T, 2, D]: zeros of both signs, ties, extremes, subnormals, infinities, NaN."""
    g = torch.Generator().manual_seed(5)
    info = torch.finfo(dtype)
    base = torch.randn(head_size, generator=g)
    alternating = torch.tensor([1.0, -1.0]).repeat(head_size // 2)
    rows = [
        torch.zeros(head_size),
        -torch.zeros(head_size),
        0.0 * alternating,
        -0.0 * alternating,
        torch.full((head_size,), 2.5),
        torch.full((head_size,), -2.5),
        base.abs() + 100.0,  # an affine minimum far from zero
        base * 1e-6,
        base * 1e-30,
        torch.full((head_size,), info.tiny),
        base * info.tiny,  # subnormal in every dtype but fp16's upper half
        base.clamp(-1, 1) * info.max,
        torch.full((head_size,), info.max),
        torch.full((head_size,), info.min),
        alternating * info.max,
        torch.arange(head_size) - head_size / 2 + 0.5,
        (torch.arange(head_size) % 31) / 2.0,
        base * torch.logspace(-5, 4, head_size),
    ]
    for bad in (INF, -INF, NAN, -NAN):
        for at in (0, 13, head_size - 1):
            row = base.clone()
            row[at] = bad
            rows.append(row)
        rows.append(torch.full((head_size,), bad))
    mixed = base.clone()
    mixed[3], mixed[30], mixed[40] = INF, -INF, NAN
    rows.append(mixed)
    first = torch.stack(rows)
    return torch.stack([first, first.flip(0)], 1).to(dtype)


@every_isa
@every_dtype
@every_format
def test_special_values(format, dtype, isa):
    x = special_rows(dtype)
    compare(isa, x, x.flip(0).contiguous(), format)


@every_isa
@pytest.mark.parametrize("format", SIGNED_STATIC_ROWS, ids=name_of)
def test_special_values_with_zero_points(format, isa):
    x = special_rows(torch.float32)
    statics = scales(format, Granularity.CHANNEL, 2, 64, zero_point=True)
    compare(isa, x, x.flip(0).contiguous(), format, statics=statics)


@every_isa
@pytest.mark.parametrize("scale", (1e-30, 1e-3, 1.0, 1e5, 1e30))
@pytest.mark.parametrize("format", STATIC_ROWS, ids=name_of)
def test_tiny_and_huge_static_scales(format, scale, isa):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(20, 2, 64, generator=g) * 30 * scale
    static = reference.StaticScale.expand(scale, 2, 64)
    compare(isa, x, x.flip(0).contiguous(), format, statics=(static, static))


@every_isa
@pytest.mark.parametrize("position", range(0, 64, 7))
def test_int4_minimum_of_zero_has_one_sign(position, isa):
    """A -0 anywhere in a row whose minimum is 0 must not change the metadata bytes."""
    x = torch.zeros(4, 2, 64)
    x[..., 20:] = 1.0
    x[..., position] = -0.0
    compare(isa, x, -x.abs(), get_format("int4_per_token_head"))


@every_isa
@every_format
def test_all_slots_skipped_and_no_tokens_change_nothing(format, isa):
    statics = scales(format, Granularity.TENSOR, 2, 64)
    cache = oracle.empty_cache(format, 2, 2, 64, 16)
    x = torch.randn(5, 2, 64)
    with use_isa(isa):
        ops.store(x, x, cache, torch.full((5,), -1), format, *statics)
        ops.store(x[:0], x[:0], cache, torch.zeros(0, dtype=torch.int64), format, *statics)
    assert (cache == 0xFF).all()


@every_isa
@every_format
def test_rows_past_the_slots_are_padding(format, isa):
    """vLLM pads activations to a captured size; the slot mapping says how many are real."""
    g = torch.Generator().manual_seed(3)
    key, value = (torch.randn(9, 2, 64, generator=g) for _ in "kv")
    statics = scales(format, Granularity.HEAD, 2, 64)
    want, got = (oracle.empty_cache(format, 2, 2, 64, 16) for _ in range(2))
    slots = torch.tensor([20, 3, -1, 9, 30])
    reference.store(key[:5], value[:5], want, slots, format, *statics)
    with use_isa(isa):
        ops.store(key, value, got, slots, format, *statics)
    assert torch.equal(got, want)


@every_isa
@pytest.mark.parametrize("order", ("sequential", "shuffled"))
@every_format
def test_many_tokens_from_several_threads(format, order, isa):
    """512 tokens whose packed codes share bytes with their neighbours': no lost updates."""
    heads, head_size, block_size, tokens = 3, 64, 64, 512
    g = torch.Generator().manual_seed(1)
    statics = scales(format, Granularity.CHANNEL, heads, head_size)
    inputs = [torch.randn(tokens, heads, head_size, generator=g).bfloat16() for _ in "kv"]
    layout = PageLayout(format, head_size, block_size)
    blocks = torch.randperm(tokens // block_size, generator=g)
    want = oracle.empty_cache(format, len(blocks), heads, head_size, block_size)
    for x, which, static in zip(inputs, (layout.key, layout.value), statics, strict=True):
        codes, words = reference.quantize(x, which.stream, static)
        oracle.write_blocks(want.view(len(blocks), heads, -1), which, blocks, codes, words)
    token = torch.arange(tokens)
    slots = blocks[token // block_size] * block_size + token % block_size
    if order == "shuffled":
        mix = torch.randperm(tokens, generator=g)
        inputs, slots = [x[mix] for x in inputs], slots[mix]
    with use_isa(isa):
        for _ in range(3):
            got = torch.full_like(want, 0xFF)
            ops.store(*inputs, got, slots, format, *statics)
            assert torch.equal(got, want)


@every_isa
@every_format
def test_rewriting_a_slot_replaces_it(format, isa):
    """Speculative decoding rewrites rejected positions; nothing of the old token may stay."""
    statics = scales(format, Granularity.HEAD, 2, 64)
    g = torch.Generator().manual_seed(2)
    first, second = (torch.randn(8, 2, 64, generator=g) for _ in range(2))
    slots = torch.tensor([3, 17, 4, 30, 16, 0, 31, 8])
    want, got = (oracle.empty_cache(format, 2, 2, 64, 16) for _ in range(2))
    reference.store(second, first, want, slots, format, *statics)
    with use_isa(isa):
        ops.store(first, second, got, slots, format, *statics)
        ops.store(second, first, got, slots, format, *statics)
    assert torch.equal(got, want)


@every_isa
@every_format
def test_the_last_token_of_a_slot_stays_whatever_the_threads(format, isa):
    """128 lone tokens at one offset of their blocks, slots named twice and neighbours in between:
    the same bytes from one thread and from several as from the reference."""
    heads, head_size, block_size, tokens = 2, 64, 32, 200
    g = torch.Generator().manual_seed(6)
    key, value = (torch.randn(tokens, heads, head_size, generator=g).bfloat16() for _ in "kv")
    lockstep = torch.randperm(140, generator=g)[:128] * block_size + 7
    again = lockstep[torch.randperm(128, generator=g)[:40]]
    slots = torch.cat([lockstep, again, again[:16] + 1, again[:16] - 1])
    statics = scales(format, Granularity.HEAD, heads, head_size)
    want = oracle.empty_cache(format, 140, heads, head_size, block_size)
    reference.store(key, value, want, slots, format, *statics)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            got = torch.full_like(want, 0xFF)
            with use_isa(isa):
                ops.store(key, value, got, slots, format, *statics)
            assert torch.equal(got, want), f"{threads} threads"
    finally:
        torch.set_num_threads(before)
