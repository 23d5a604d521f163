"""What must not change the output of ops.attend: neighbours, stale bytes, batches and threads.

NaN is the probe: in one token, one query or every byte that no token owns.
"""

from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from attending import NAN, every_dtype, every_format, every_isa, run, slots_of
from cases import BATCHES, ISAS, ROWS, name_of, use_isa

from kvq_plugin import ops, reference
from kvq_plugin.formats import Kind, get_format

# --- isolation -----------------------------------------------------------------------------------


def poison(p: oracle.Problem, s: int, token: int, key: bool, value: bool, head: int) -> None:
    """Rewrite one token from its dequantized K and V, one kv head of either set to NaN.

    Rewriting may move a dynamic scale by one ulp, so a clean run is taken after a rewrite that
    poisons nothing.
    """
    slot = slots_of(p, s)[token : token + 1]
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


#: Bits of NaNs: quiet and signalling, of either sign, with the lowest, the highest and all bits.
NAN_BITS = {
    torch.float32: (0x7FC00000, 0x7F800001, 0xFF800001, 0x7FBFFFFF, 0x7FFFFFFF, 0xFFFFFFFF),
    torch.bfloat16: (0x7FC0, 0x7F81, 0xFF81, 0x7FBF, 0x7FFF, 0xFFFF),
    torch.float16: (0x7E00, 0x7C01, 0xFC01, 0x7DFF, 0x7FFF, 0xFFFF),
}


def nan_of(dtype: torch.dtype, bits: int) -> torch.Tensor:
    """A NaN scalar of these bits, which no conversion has touched."""
    raw = np.array([bits], dtype=np.uint32 if dtype == torch.float32 else np.uint16)
    return torch.from_numpy(raw.view(raw.dtype.name.removeprefix("u"))).view(dtype)


@every_isa
@every_dtype
@every_format
def test_a_nan_of_any_bits_in_a_query(format, dtype, isa):
    """Exponents were computed with integers, which made numbers of NaNs with low bits set."""
    for options in ({}, {"softcap": 3.0}, {"sinks": torch.zeros(8)}):
        p = oracle.build(format, ((600, 5), (40, 6)), dtype=dtype, group=4, **options)
        clean = run(p, isa)
        for row, bits in enumerate(NAN_BITS[dtype]):
            p.query[row, row, 7 * row : 7 * row + 1] = nan_of(dtype, bits)
        out = run(p, isa)
        hit = torch.zeros(out.shape[:2], dtype=torch.bool)
        hit[range(6), range(6)] = True
        assert out[hit].isnan().all()
        assert torch.equal(out[~hit], clean[~hit])


@every_isa
@every_dtype
@pytest.mark.parametrize("where", ("key", "value"))
@pytest.mark.parametrize(
    "format", [f for f in ROWS if f.is_dynamic or f.key.code.kind is Kind.FLOAT], ids=name_of
)
def test_a_nan_of_any_bits_in_a_stored_row(format, where, dtype, isa):
    p = oracle.build(format, ((70, 1),), dtype=dtype, group=2)
    slot = slots_of(p, 0)[20:21]
    for bits in NAN_BITS[dtype]:
        rows = {"key": p.keys[0][20:21].to(dtype), "value": p.values[0][20:21].to(dtype)}
        rows[where][:, 1, 5:6] = nan_of(dtype, bits)
        with use_isa(isa):
            ops.store(*rows.values(), p.cache, slot, format, p.key_static, p.value_static)
        nan = run(p, isa)[0].isnan()
        assert not nan[:2].any()
        if where == "value" and not format.is_dynamic:
            assert nan[2:, 5].all() and nan.sum() == 2, "one channel of V"
        else:
            assert nan[2:].all()


SEES = {  # options, batch, which of sequence 0's queries see its token 37
    "causal": ({}, ((40, 9), (33, 33)), lambda position: position >= 37),
    "causal, across items": ({}, ((60, 60),), lambda position: position >= 37),
    "window": ({"window": 10}, ((70, 60),), lambda position: (position >= 37) & (position < 47)),
    "window, both ways": (
        {"window": 10, "causal": False},
        ((70, 70), (20, 20)),
        lambda position: (position > 27) & (position < 47),
    ),
}


@every_isa
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=name_of)
@pytest.mark.parametrize("case", SEES)
@pytest.mark.parametrize("where", ("key", "value"))
@pytest.mark.parametrize(
    "format", [f for f in ROWS if f.is_dynamic or f.key.code.kind is Kind.FLOAT], ids=name_of
)
def test_a_nan_reaches_only_the_queries_that_see_it(format, where, case, dtype, isa):
    """Queries of one sequence share a tile of its cache, and a weight of 0 times NaN is NaN."""
    options, batch, sees = SEES[case]
    p = oracle.build(format, batch, dtype=dtype, kv_heads=2, group=4, **options)
    poison(p, 0, 37, False, False, head=1)
    clean = run(p, isa)
    poison(p, 0, 37, where == "key", where == "value", head=1)
    out = run(p, isa)
    length, count = batch[0]
    hit = torch.zeros(out.shape[:2], dtype=torch.bool)
    hit[:count, 4:] = sees(torch.arange(length - count, length))[:, None]
    assert 0 < hit.sum() < 4 * count
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
            if which.stream.is_dynamic:
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
def test_subnormal_numbers_come_back(isa):
    """Kernels have the processor flush them, on the threads that other operators use too."""
    run(oracle.build(get_format("int8_per_token_head"), ((3000, 1),)), isa)
    tiny = torch.full((1 << 20,), 2.0**-140)  # enough for every thread
    assert torch.equal(tiny * 0.5, torch.full_like(tiny, 2.0**-141))


@pytest.mark.parametrize("kernels", [*ISAS, "reference"])
def test_part_of_a_batch(kernels, monkeypatch):
    """As the GPU backend launches it: the last sequences' tables, all rows of the query."""
    p = oracle.build(get_format("int8_per_token_head"), ((40, 1), (20, 1), (33, 5), (12, 12)))
    isa = ISAS[0]
    if kernels == "reference":
        monkeypatch.setattr(ops, "_use_reference", lambda device="cpu": True)
    else:
        isa = kernels
    whole = run(p, isa)
    part = replace(
        p,
        block_table=p.block_table[2:],
        seq_lens=p.seq_lens[2:],
        query_start_loc=p.query_start_loc[2:],
    )
    out = torch.full_like(p.query, 7.0)
    run(part, isa, out)
    assert torch.equal(out[2:], whole[2:]) and bool((out[:2] == 7.0).all())


@every_isa
def test_queries_of_a_sequence_without_context_are_zero(isa):
    """An empty row attends to nothing: zero, not what the output buffer held before."""
    p = oracle.build(get_format("int8_per_token_head"), ((20, 1), (5, 2)))
    p.seq_lens[1] = 0
    out = run(p, isa)
    assert torch.isfinite(out[0]).all() and (out[1:] == 0).all()


@every_isa
def test_a_sink_of_minus_infinity_is_none(isa):
    """For queries without context too: the reference made NaN of them."""
    batch = ((20, 1), (5, 7), (600, 3))
    p = oracle.build(get_format("int8_per_token_head"), batch)
    no_sink = replace(p, options={"sinks": torch.full((8,), -torch.inf)})
    assert torch.equal(run(no_sink, isa), run(p, isa))
    assert torch.equal(no_sink.expected(), p.expected())
    assert (run(no_sink, isa)[1:3] == 0).all()


@every_isa
@every_format
def test_out_may_be_the_query(format, isa):
    """In chunks of several threads, for several heads."""
    p = oracle.build(format, ((3000, 1), (700, 70)))
    query = p.query.clone()
    assert torch.equal(run(replace(p, query=query), isa, query), run(p, isa))


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
