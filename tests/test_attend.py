"""ops.attend against reference.attend in float64 on the same codes.

Tolerances and shapes: ``cases.py``. Every cache is built with 0xFF (NaN) in each byte that no
token owns, so every test here is also a test that stale bytes do not matter.
"""

from dataclasses import replace
from functools import lru_cache

import oracle
import pytest
import torch
from cases import (
    ACTIVATIONS,
    ATTEND_ISAS,
    BATCHES,
    BLOCK_SIZES,
    GRANULARITIES,
    GROUPS,
    HEAD_SIZES,
    ISAS,
    LONG_CONTEXT,
    OFFSET_SLACK,
    ROWS,
    SIGNED_STATIC_ROWS,
    SMALL_BATCH,
    STATIC_ROWS,
    name_of,
    nrmse_bound,
    use_isa,
)

from kvq_plugin import ops, reference
from kvq_plugin.formats import Kind, get_format

every_isa = pytest.mark.parametrize("isa", ATTEND_ISAS)
every_format = pytest.mark.parametrize("format", ROWS, ids=name_of)
every_dtype = pytest.mark.parametrize("dtype", ACTIVATIONS, ids=name_of)
NAN = float("nan")


def run(problem: oracle.Problem, isa: str, out: torch.Tensor | None = None) -> torch.Tensor:
    """ops.attend's output; *out* is written if given (rows beyond the batch keep their value)."""
    out = torch.full_like(problem.query, NAN) if out is None else out
    with use_isa(isa):
        ops.attend(out, *problem.arguments(), **problem.options)
    return out


@lru_cache(maxsize=4)
def _case(format, key):
    """The problem, its float64 result and bound; shared by the instruction sets of one case."""
    options = dict(key)
    batch = options.pop("batch", SMALL_BATCH)
    problem = oracle.build(format, batch, **options)
    return problem, problem.expected(), oracle.attention_bound(problem)


def check(isa: str, format, *, nrmse: bool = True, **options) -> None:
    """Both bounds of ``cases.py`` for one problem on one instruction set."""
    problem, expected, bound = _case(format, tuple(options.items()))
    compare(format, run(problem, isa), expected, bound, nrmse)


def compare(format, got, expected, bound, nrmse: bool = True) -> None:
    assert torch.isfinite(expected).all()
    error = (got.double() - expected).abs()
    excess = (error / bound).nan_to_num(nan=float("inf"))
    worst = int(excess.argmax())
    assert excess.max() <= 1, (
        f"element {worst} (of {list(error.shape)}) is off by {error.flatten()[worst]:.3g}, "
        f"{excess.max():.3g} times the bound"
    )
    if nrmse:
        allowed = nrmse_bound(format, got.dtype) * expected.square().mean().sqrt()
        rms = error.square().mean().sqrt()
        assert rms <= allowed + OFFSET_SLACK[format.value.code.kind]


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
        compare(q.format, run(q, isa), q.expected(), oracle.attention_bound(q))


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
@pytest.mark.parametrize("format", [f for f in ROWS if f.is_dynamic], ids=name_of)
def test_token_scales_a_thousand_apart(format, isa):
    check(isa, format, batch=((500, 1), (130, 40)), key_spread=1e3, value_spread=1e3)


@every_isa
@every_format
def test_value_rows_of_zero(format, isa):
    """A uniform zero V gives zero, not NaN from 0 / 0 scales; and exact but for the offset."""
    p = oracle.build(format, ((40, 3),), kv_heads=1)
    slots = oracle_slots(p, 0)
    zero = torch.zeros(40, 1, 64)
    reference.store(p.keys[0], zero, p.cache, slots, format, p.key_static, p.value_static)
    assert run(p, isa).abs().max() <= OFFSET_SLACK[format.value.code.kind]


def oracle_slots(p: oracle.Problem, s: int) -> torch.Tensor:
    """Slot of each token of sequence *s*."""
    size = p.cache.shape[2]
    token = torch.arange(int(p.seq_lens[s]))
    return p.blocks[s].long()[token // size] * size + token % size


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
    expected, bound = q.expected(), oracle.attention_bound(q)
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
    compare(format, run(p, isa), p.expected(), oracle.attention_bound(p))


# --- isolation -----------------------------------------------------------------------------------


def poison(p: oracle.Problem, s: int, token: int, key: bool, value: bool, head: int) -> None:
    """Rewrite one token from its dequantized K and V, one kv head of either set to NaN.

    Rewriting may move a dynamic scale by one ulp, so a clean run is taken after a rewrite that
    poisons nothing.
    """
    slot = oracle_slots(p, s)[token : token + 1]
    k, v = p.keys[s][token : token + 1].clone(), p.values[s][token : token + 1].clone()
    if key:
        k[:, head] = NAN
    if value:
        v[:, head] = NAN
    reference.store(k, v, p.cache, slot, p.format, p.key_static, p.value_static)


@every_isa
@pytest.mark.parametrize("where", ("key", "value"))
@pytest.mark.parametrize(
    "format",
    [f for f in ROWS if f.is_dynamic or f.key.code.kind is Kind.FLOAT],
    ids=name_of,
)
def test_nan_reaches_its_own_sequence_and_head_only(format, where, isa):
    batch = ((70, 1), (40, 6), (500, 1), (33, 33))
    p = oracle.build(format, batch, kv_heads=2, group=4)
    poison(p, 1, 20, False, False, head=1)
    clean = run(p, isa)
    poison(p, 1, 20, where == "key", where == "value", head=1)
    out = run(p, isa)
    begin, end = p.query_start_loc[1:3].tolist()
    hit = torch.zeros(out.shape[:2], dtype=torch.bool)
    hit[begin:end, 4:] = True
    assert out[hit].isnan().all(), "a NaN must not be hidden"
    assert torch.equal(out[~hit], clean[~hit])


@every_isa
@pytest.mark.parametrize("length", (1, 2, 600))
@pytest.mark.parametrize("format", [f for f in ROWS if f.is_dynamic], ids=name_of)
def test_nan_in_every_token_is_not_hidden(format, length, isa):
    """No finite score at all: the running maximum never leaves -inf."""
    p = oracle.build(format, ((length, 1), (9, 1)), group=2)
    for token in range(length):
        poison(p, 0, token, True, False, head=0)
    out = run(p, isa)
    assert out[0, :2].isnan().all()
    assert torch.isfinite(out[0, 2:]).all() and torch.isfinite(out[1]).all()


@every_isa
@every_format
def test_nan_in_a_query_stays_in_its_row(format, isa):
    p = oracle.build(format, ((70, 5), (40, 6)), group=4)
    clean = run(p, isa)
    p.query[3, 5, 17] = NAN
    out = run(p, isa)
    hit = torch.zeros(out.shape[:2], dtype=torch.bool)
    hit[3, 5] = True
    assert out[hit].isnan().all()
    assert torch.equal(out[~hit], clean[~hit])


@every_isa
@every_format
def test_a_poisoned_token_before_the_window_does_not_matter(format, isa):
    """Once a token has left every query's window its tile is not read."""
    p = oracle.build(format, ((1000, 1),), window=64, group=2)
    clean = run(p, isa)
    poison(p, 0, 100, True, True, head=0)
    assert torch.equal(run(p, isa), clean)


@every_isa
@every_format
def test_every_stale_byte_pattern_is_ignored(format, isa):
    """0xFF is what all caches here hold; zeros and random bytes must give the same bits."""
    p = oracle.build(format, ((70, 1), (40, 6), (17, 17)), block_size=64)
    want = run(p, isa)
    layout = reference.PageLayout(format, 64, 64)
    owned = torch.zeros(p.cache.shape[0], 2, layout.size, dtype=torch.uint8)
    mine = owned.clone()
    # Bits that belong to a token: pack all-ones codes for the tokens of each sequence.
    for s, blocks in enumerate(p.blocks):
        used = torch.arange(len(blocks) * 64).view(-1, 64) < int(p.seq_lens[s])
        for which in (layout.key, layout.value):
            bits = (1 << which.stream.code.bits) - 1
            ones = (used * bits).to(torch.uint8)[:, None, :, None].expand(-1, 2, -1, 64)
            if which.stream.code.kind is Kind.SIGNED:
                ones = (ones ^ 0x80).view(torch.int8)
            words = (used * -1).to(torch.int32)[:, None].expand(-1, 2, -1)
            part = mine[blocks.long()]
            oracle.pack(part, which, ones)
            if which.stream.metadata_bytes:
                oracle.pack_metadata(part, which, words)
            mine[blocks.long()] = part
    pages = reference._pages(p.cache)
    g = torch.Generator().manual_seed(0)
    for filler in (owned, torch.randint(0, 256, owned.shape, dtype=torch.uint8, generator=g)):
        mixed = (pages & mine) | (filler & ~mine)
        assert not torch.equal(mixed, pages)
        got = run(replace(p, cache=mixed.view(p.cache.shape)), isa)
        assert torch.equal(got, want)


@every_isa
@every_format
def test_padding_rows_and_empty_sequences_are_left_alone(format, isa):
    """Rows past the last query belong to nobody; a sequence without queries has no rows."""
    p = oracle.build(format, ((20, 0), (33, 1), (0, 0), (12, 12), (50, 0)))
    alone = run(p, isa)
    padded = replace(p, query=torch.cat([p.query, torch.full_like(p.query[:7], NAN)]))
    out = torch.full_like(padded.query, 7.0)
    run(padded, isa, out)
    tokens = p.query.shape[0]
    assert torch.equal(out[:tokens], alone)
    assert (out[tokens:] == 7.0).all()


@every_isa
def test_queries_of_a_sequence_without_context_are_zero(isa):
    """An empty row attends to nothing: zero, not what the output buffer held before."""
    p = oracle.build(get_format("int8_per_token_head"), ((20, 1), (5, 2)))
    p.seq_lens[1] = 0
    out = run(p, isa)
    assert torch.isfinite(out[0]).all() and (out[1:] == 0).all()


@every_isa
@every_format
def test_no_sequences_at_all(format, isa):
    p = oracle.build(format, ((5, 1),))
    none = replace(
        p,
        query=p.query[:0],
        block_table=p.block_table[:0],
        seq_lens=p.seq_lens[:0],
        query_start_loc=torch.zeros(1, dtype=torch.int32),
    )
    assert run(none, isa).shape[0] == 0


@every_isa
@every_dtype
@every_format
def test_strided_query_and_out(format, dtype, isa):
    """Query as a slice of fused qkv; out as a slice of a wider buffer whose rest is kept."""
    p = oracle.build(format, dtype=dtype)
    want = run(p, isa)
    tokens, heads, head_size = p.query.shape
    fused = torch.randn(tokens, (heads + 4) * head_size).to(dtype)
    query = fused[:, : heads * head_size].view(tokens, heads, head_size)
    query.copy_(p.query)
    wide = torch.full((tokens, heads + 3, head_size + 16), 7.0, dtype=dtype)
    out = wide[:, 2 : 2 + heads, :head_size]
    run(replace(p, query=query), isa, out)
    assert torch.equal(out, want)
    out.fill_(7.0)
    assert (wide == 7.0).all(), "bytes around the output must not be written"


@every_isa
@every_format
def test_attention_does_not_write_the_cache(format, isa):
    p = oracle.build(format, BATCHES["mixed"], style="padded")
    before = oracle.whole_storage(p.cache).clone()
    run(p, isa)
    assert torch.equal(oracle.whole_storage(p.cache), before)


# --- invariance ----------------------------------------------------------------------------------


@every_isa
@every_format
def test_batch_invariance(format, isa):
    """A sequence's output has the same bits alone and in any batch (greedy decoding relies on
    it: the same prompt must give the same tokens whoever else is being served)."""
    batch = ((70, 1), (40, 9), (2500, 1), (33, 33), (600, 2), (1, 1))
    p = oracle.build(format, batch, group=3, dtype=torch.bfloat16)
    together = run(p, isa)
    for s in range(len(batch)):
        begin, end = p.query_start_loc[s : s + 2].tolist()
        assert torch.equal(run(p.only(s), isa), together[begin:end]), f"sequence {s}"


@every_isa
@every_format
def test_thread_count_invariance(format, isa):
    p = oracle.build(format, ((2500, 1), (70, 1), (40, 9), (300, 64)), group=3)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(p, isa)
        torch.set_num_threads(max(2, before))
        several = run(p, isa)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, several)


@every_isa
@every_format
def test_repeated_runs_are_deterministic(format, isa):
    p = oracle.build(format, BATCHES["mixed"])
    first = run(p, isa)
    assert all(torch.equal(run(p, isa), first) for _ in range(5))


@every_isa
@every_dtype
@every_format
def test_one_chunk_and_many_chunks_give_the_same_bits(format, dtype, isa):
    """Prefill of 100 tokens at once, and in chunks of 1, 17, 32 and 50: the same bits, so that
    a prompt's tokens do not depend on how the scheduler happened to cut it."""
    p = oracle.build(format, ((600, 100),), dtype=dtype, group=2)
    whole = run(p, isa)
    begin = 0
    for count in (1, 17, 32, 50):
        end = begin + count
        part = replace(
            p,
            query=p.query[begin:end],
            seq_lens=torch.tensor([500 + end], dtype=torch.int32),
            query_start_loc=torch.tensor([0, count], dtype=torch.int32),
        )
        assert torch.equal(run(part, isa), whole[begin:end])
        begin = end


def test_instruction_sets_agree():
    """All are within the bound of one answer; here: they are not secretly the same code."""
    if len(ISAS) == 1:
        pytest.skip("one instruction set on this machine")
    p = oracle.build(get_format("int8_per_token_head"), BATCHES["mixed"])
    outputs = [run(p, isa) for isa in ISAS]
    assert any(not torch.equal(outputs[0], other) for other in outputs[1:])


@pytest.mark.parametrize("isa", [isa for isa in ATTEND_ISAS if isa.startswith("amx")])
@pytest.mark.parametrize("head_size", (16, 48, 64, 112, 128, 512))
@every_format
def test_tiles_give_the_bits_of_avx512(format, head_size, isa):
    """Sums of integers are exact in any order. Five rows are the fewest that tiles are used for,
    sixteen fill one, thirty-two two; and values of four pages lie unevenly."""
    for group, block_size in ((5, 128), (16, 64), (17, 32), (32, 16)):
        batch = ((150, 1), (64, 1), (200, 3))
        p = oracle.build(format, batch, group=group, kv_heads=2, head_size=head_size,
                         block_size=block_size)  # fmt: skip
        assert torch.equal(run(p, isa), run(p, "avx512_bf16"))


# --- arguments -----------------------------------------------------------------------------------


def arguments(**changes) -> dict:
    """A valid call, int8_per_token_head, S=2, 8 query and 2 kv heads, D=64, N=32."""
    p = oracle.build(get_format("int8_per_token_head"), ((40, 1), (20, 3)))
    call = {
        "out": torch.full_like(p.query, 7.0),
        "query": p.query,
        "cache": p.cache,
        "block_table": p.block_table,
        "seq_lens": p.seq_lens,
        "query_start_loc": p.query_start_loc,
        "format": p.format,
        "scale": p.scale,
    }
    return {**call, **changes}


def test_the_valid_call_is_valid():
    call = arguments()
    ops.attend(**call)
    assert (call["out"] != 7.0).all()


def test_tables_that_reach_past_the_cache_are_refused():
    """A sequence longer than its row of the block table would read memory that is not a page."""
    call = arguments()
    call["seq_lens"][0] = 32 * call["block_table"].shape[1] + 1
    with pytest.raises(ValueError, match="block_table"):
        ops.attend(**call)


#: Changed arguments, and what the message must name: the argument, what came, what was expected.
WRONG = {
    "out dtype": (
        {"out": torch.full((4, 8, 64), 7.0, dtype=torch.float16)},
        ("out", "float16", "float32"),
    ),
    "out shape": ({"out": torch.full((4, 8, 32), 7.0)}, ("out", "[4, 8, 32]", "[4, 8, 64]")),
    "out tokens": ({"out": torch.full((3, 8, 64), 7.0)}, ("out", "[3, 8, 64]", "[4, 8, 64]")),
    "query dtype": (
        {"query": torch.zeros(4, 8, 64, dtype=torch.float64)},
        ("query", "float64", "bfloat16"),
    ),
    "query rank": ({"query": torch.zeros(4, 64)}, ("query", "[4, 64]", "[tokens, heads, head")),
    "query head size": ({"query": torch.zeros(4, 8, 128)}, ("head size 128", "264", "136")),
    "heads that do not divide": (
        {"query": torch.zeros(4, 7, 64), "out": torch.full((4, 7, 64), 7.0)},
        ("7 query heads", "2 kv heads"),
    ),
    "cache dtype": (
        {"cache": torch.zeros(5, 2, 32, 136, dtype=torch.int8)},
        ("cache", "int8", "uint8"),
    ),
    "cache content": (
        {"cache": torch.zeros(5, 2, 32, 72, dtype=torch.uint8)},
        ("int8_per_token_head", "[5, 2, 32, 72]", "136"),
    ),
    "table dtype": (
        {"block_table": torch.zeros(2, 3, dtype=torch.int64)},
        ("block_table", "int64", "int32"),
    ),
    "table rank": (
        {"block_table": torch.zeros(2, dtype=torch.int32)},
        ("block_table", "[2]", "[S, blocks]"),
    ),
    "lengths dtype": (
        {"seq_lens": torch.tensor([40, 20])},
        ("seq_lens", "int64", "int32"),
    ),
    "starts dtype": (
        {"query_start_loc": torch.tensor([0, 1, 4])},
        ("query_start_loc", "int64", "int32"),
    ),
    "starts count": (
        {"query_start_loc": torch.tensor([0, 1], dtype=torch.int32)},
        ("query_start_loc", "2 entries", "2 sequences"),
    ),
    # A view of a longer table, so that a kernel which does read on reads pages of this cache.
    "table rows": (
        {"block_table": torch.zeros(2, 3, dtype=torch.int32)[:1]},
        ("block_table", "1", "2"),
    ),
    "alibi count": ({"alibi_slopes": torch.zeros(2)}, ("alibi_slopes", "2", "8")),
    "alibi dtype": (
        {"alibi_slopes": torch.zeros(8, dtype=torch.bfloat16)},
        ("alibi_slopes", "bfloat16", "float32"),
    ),
    "sink count": ({"sinks": torch.zeros(9)}, ("sinks", "9", "8")),
    "static scale for a dynamic format": (
        {"key_static": reference.StaticScale.expand(1.0, 2, 64)},
        ("int8_per_token_head", "key", "no static scale"),
    ),
}


@pytest.mark.parametrize(("changes", "named"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_named_and_nothing_is_written(changes, named):
    call = arguments(**changes)
    with pytest.raises(ValueError) as error:
        ops.attend(**call)
    missing = [fact for fact in named if fact not in str(error.value)]
    assert not missing, f"{error.value} does not say {missing}"
    assert (call["out"] == 7.0).all()
