"""ops.attend on formats with recent rows, against reference.attend in float64 on the same codes.

Bounds: ``sealed_problem.bound`` and ``cases.nrmse_bound``. Bytes that no query reads are NaN and
block tables hold nothing there, so every test is also a test of what is read.
"""

from functools import lru_cache

import pytest
import sealed_problem
import torch
from attending import every_dtype, every_isa
from cases import ATTEND_ISAS, WINDOW_ROWS, is_nibble, name_of, nrmse_bound
from sealed_problem import NAN, build

every_format = pytest.mark.parametrize("format", WINDOW_ROWS, ids=name_of)

BATCHES = {
    "decode": ((1, 1), (32, 1), (63, 1), (64, 1), (65, 1), (95, 1), (600, 1)),
    "prefill": ((1, 1), (17, 17), (64, 64), (130, 130)),
    "chunked": ((100, 7), (257, 64), (65, 33), (70, 2), (80, 3), (64, 16)),
    "mixed": ((40, 40), (530, 1), (130, 5), (17, 1), (0, 0), (50, 0), (64, 63)),
}


@lru_cache(maxsize=2)
def _case(format, key):
    options = dict(key)
    problem = build(format, options.pop("batch", ((130, 1), (100, 9), (40, 40))), **options)
    return problem, problem.expected(), sealed_problem.bound(problem)


def check(isa, format, *, nrmse=True, **options):
    problem, expected, bound = _case(format, tuple(options.items()))
    error = (problem.run(isa).double() - expected).abs()
    assert torch.isfinite(expected).all()
    excess = (error / bound).nan_to_num(nan=float("inf"))
    assert excess.max() <= 1, f"{float(excess.max()):.3g} times the bound"
    if nrmse:
        rms = error.square().mean().sqrt() / expected.square().mean().sqrt()
        assert rms <= nrmse_bound(format, problem.query.dtype), float(rms)


@every_isa
@every_dtype
@pytest.mark.parametrize("batch", BATCHES)
@every_format
def test_batches_and_dtypes(format, batch, dtype, isa):
    check(isa, format, batch=BATCHES[batch], dtype=dtype)


@every_isa
@pytest.mark.parametrize("head_size", (32, 64, 80, 96, 128, 160, 256, 512))
@every_format
def test_head_sizes(format, head_size, isa):
    if head_size % format.head_size_step == 0:
        check(isa, format, batch=((100, 9), (70, 1)), head_size=head_size, group=3)


@every_isa
@pytest.mark.parametrize("group", (1, 2, 3, 5, 7, 8, 16, 32, 71))
@every_format
def test_group_sizes(format, group, isa):
    check(isa, format, batch=((100, 2), (70, 1)), group=group, kv_heads=1)


@every_isa
@pytest.mark.parametrize("sizes", ((32, 32), (32, 64), (128, 64), (96, 160)), ids=str)
@every_format
def test_block_sizes(format, sizes, isa):
    block_size, recent_block = sizes
    check(isa, format, batch=((300, 1), (200, 40)), group=2, block_size=block_size,
          recent_block=recent_block)  # fmt: skip


OPTIONS = {
    "window 1": {"window": 1},
    "window 20": {"window": 20},
    "window 33": {"window": 33},
    "window 64": {"window": 64},
    "window 100": {"window": 100},
    "softcap": {"softcap": 3.0},
    "alibi": {"alibi_slopes": torch.tensor([2.0**-n for n in range(1, 9)])},
    "sinks": {"sinks": torch.tensor([-30.0, -1.0, 0.0, 1.0, 3.0, 30.0, 0.5, 2.0])},
}
OPTIONS["all"] = {k: v for o in OPTIONS.values() for k, v in o.items()}


@every_isa
@pytest.mark.parametrize("option", OPTIONS)
@every_format
def test_options(format, option, isa):
    check(isa, format, batch=((300, 1), (130, 130)), **OPTIONS[option])


@every_isa
@every_format
def test_scales_a_thousand_apart(format, isa):
    check(isa, format, nrmse=False, spread=1e3)


@every_isa
@every_format
def test_logits_in_the_hundreds(format, isa):
    check(isa, format, nrmse=False, query_gain=60.0)


@every_isa
@every_format
def test_long_context(format, isa):
    check(isa, format, batch=((4000, 1),), kv_heads=1, group=2, block_size=128)


# --- the same bits -------------------------------------------------------------------------------


@every_isa
@every_dtype
@every_format
def test_chunks_and_company_change_no_bit(format, dtype, isa):
    """Decoding, drafts, chunks of a prompt and all of it at once, alone or in a batch. A part's
    recent rows lie where the whole's do: nothing that it reads is spoilt."""
    lengths = (200, 600, 97)
    batch = tuple((n, n) for n in lengths)
    for group in (1, 3):
        p = build(format, batch, dtype=dtype, group=group)
        whole = p.run(isa).split(lengths)
        for s, n in enumerate(lengths):
            ends = sorted({1, 2, 33, 63, 64, 65, n - 40, n - 7, n})
            for begin, end in zip((0, *ends), ends, strict=False):
                got = p.part(s, end, end - begin).run(isa)
                assert torch.equal(got, whole[s][begin:end]), (s, begin, end)


@every_isa
@every_format
def test_threads_change_no_bit(format, isa):
    p = build(format, ((2500, 1), (70, 1), (300, 64)), group=3, block_size=128)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = p.run(isa)
        torch.set_num_threads(max(2, before))
        assert torch.equal(p.run(isa), one)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", [isa for isa in ATTEND_ISAS if isa.startswith("amx")])
@pytest.mark.parametrize("head_size", (32, 64, 80, 128, 512))
@every_format
def test_tiles_give_the_bits_of_avx512(format, head_size, isa):
    """But for 4-bit codes, with which AVX-512 multiplies other integers: there the test of chunks
    compares tiles with few rows."""
    if is_nibble(format.key):
        pytest.skip("compared with AMX's own few rows")
    for group in (5, 16, 17, 32) if head_size % format.head_size_step == 0 else ():
        p = build(format, ((150, 1), (64, 1), (200, 3)), group=group, head_size=head_size)
        assert torch.equal(p.run(isa), p.run("avx512_bf16"))


# --- NaN -----------------------------------------------------------------------------------------


@every_isa
@every_format
def test_nan_in_a_query_stays_in_its_row(format, isa):
    p = build(format, ((170, 5), (140, 9)))
    clean = p.run(isa)
    p.query[3, 5, 17] = p.query[9, 0, 0] = NAN
    out = p.run(isa)
    hit = torch.zeros(out.shape[:2], dtype=torch.bool)
    hit[3, 5] = hit[9, 0] = True
    assert out[hit].isnan().all() and torch.equal(out[~hit], clean[~hit])


@every_isa
@pytest.mark.parametrize("at", (0, 1, 40, 130, 150))
@pytest.mark.parametrize("where", ("key", "value"))
@pytest.mark.parametrize("count", (1, 160))
@every_format
def test_a_nan_reaches_only_the_queries_that_see_it(format, count, where, at, isa):
    """Sealed, a NaN of K concerns those that see any token of its group, but for the first row's,
    and one of V its token's. Rows that do not see it share the tile."""

    def spoil(s, key, value):
        if s == 0:
            (key if where == "key" else value)[at, 1] = NAN

    batch, options = ((160, count), (70, 3)), {"window": 60} if at == 40 else {}
    clean = build(format, batch, **options).run(isa)
    out = build(format, batch, spoil=spoil, **options).run(isa)
    position = torch.arange(160 - count, 160)
    bound = torch.tensor([format.sealed_before(int(p)) for p in position])
    begin = (position - options.get("window", 1000) + 1).clamp(min=0)
    sealed = bound > at
    if where == "key" and at > 0:
        sees = torch.where(sealed, begin < at // 32 * 32 + 32, (position >= at) & (begin <= at))
    else:
        sees = (position >= at) & (begin <= at)
    hit = torch.zeros(out.shape[:2], dtype=torch.bool)
    hit[:count, 4:] = sees[:, None]
    assert out[hit].isnan().all(), "a NaN must not be hidden"
    assert torch.equal(out[~hit], clean[~hit])
