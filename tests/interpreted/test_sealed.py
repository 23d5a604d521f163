"""Formats with recent rows in Triton's interpreter: sealing in the reference's bytes, and attention
over sealed groups, the first row and recent rows against float64.

As in ``test_sealed_attend.py``, bytes that no query reads are NaN and block tables hold nothing
there: what should not be read is found out.
"""

from dataclasses import replace

import golden_cases
import oracle
import pytest
import sealed_problem
import torch
from cases import OUTPUT_ROUNDING, WINDOW_ROWS, name_of
from test_seal_kernel import EDGES, Case

from kvq_plugin import reference
from kvq_plugin.calls import Attend, Store
from kvq_plugin.kernels import launch, triton_paged, triton_seal, triton_store
from kvq_plugin.layout import GPU_V1

every_format = pytest.mark.parametrize("format", WINDOW_ROWS, ids=name_of)
#: RMS error over RMS output on N(0, 1) data: 4e-4 as in fp16_bound.py, where q and P are rounded to
#: 2**-11 / sqrt(3) each; here decoded K is besides, as much again: sqrt(3 / 2) times that. Measured
#: 2.4e-4 to 3.6e-4.
NRMSE = 4.9e-4
NAN = float("nan")


@pytest.fixture(autouse=True)
def fewer_programs(monkeypatch):
    """The interpreter's time goes by programs: tiles of 64 tokens from 5 tokens on."""
    for name in ("STORE", "SEAL"):
        choices = ((4, launch.StoreChoice(1, warps=1)), (None, launch.StoreChoice(64, warps=4)))
        monkeypatch.setattr(launch, name, choices)


# Store ------------------------------------------------------------------------------------------


def write(*args, **recent) -> None:
    call = Store(*args, **recent)
    triton_store.store(call.recent_rows())
    triton_seal.seal(call)


def check_store(case: Case) -> None:
    """All bytes of both storages, those between pages included, against the reference's."""
    found = []
    for store, layout in ((write, {}), (reference.store, {"layout": GPU_V1})):
        caches = [oracle.clone_storage(c) for c in case.caches]
        store(case.key, case.value, caches[0], case.slots[0], case.format,
              recent_cache=caches[1], recent_slot_mapping=case.slots[1], **layout)  # fmt: skip
        found.append([oracle.whole_storage(c) for c in caches])
    for got, expected in zip(*found, strict=True):
        differ = got != expected
        assert not differ.any(), f"{int(differ.sum())} of {got.numel()} bytes differ"


@pytest.mark.parametrize(
    "name", ("int4 d64 n64 bfloat16 token_head", "k3v2 d64 n64 float16 token_head")
)
def test_golden_hashes(name):
    case = next(c for c in golden_cases.cases() if c.name == name)
    digest = golden_cases.digest(golden_cases.stored(case, write, GPU_V1))
    assert digest == golden_cases.golden()[name]


@every_format
def test_every_edge(format):
    """A head for each of them."""
    case = Case(format, kv_heads=len(EDGES))
    for i, edge in enumerate(EDGES.values()):
        for rows in (case.key, case.value):
            rows[:, i : i + 1] = edge(rows[:, i : i + 1].clone())
    check_store(case)


@every_format
def test_rows_that_are_no_power_of_two_in_any_order(format):
    check_store(Case(format, head_size=96, kv_heads=1, block_size=96, style="padded", seed=1,
                     dtype=torch.bfloat16))  # fmt: skip


@every_format
def test_sealing_noise_of_many_sequences_at_once(format):
    """Every token completes a group, whose other rows hold any bits; a program takes each."""
    case = Case(format, kv_heads=1, block_size=128, recent_block=64)
    g = torch.Generator().manual_seed(3)
    for cache in case.caches:
        storage = oracle.whole_storage(cache)
        storage.copy_(torch.randint(256, storage.shape, generator=g, dtype=torch.uint8))
    ends = (case.slots[0] % 32 == 31).nonzero()[:4, 0]
    case.key, case.value = case.key[ends], case.value[ends]
    case.slots = [s[ends] for s in case.slots]
    check_store(case)


@every_format
def test_slots_past_either_cache_write_nothing(format):
    case = Case(format, kv_heads=1, head_size=32)
    case.key, case.value = case.key[:3], case.value[:3]
    far = (10**12 + 31) // 32 * 32 + 31
    case.slots = [torch.tensor([far, 31, -1]), torch.tensor([-1, far, -1])]
    call = Store(case.key, case.value, case.caches[0], case.slots[0], format,
                 recent_cache=case.caches[1], recent_slot_mapping=case.slots[1])  # fmt: skip
    triton_seal.seal(call)
    assert all((oracle.whole_storage(c) == 0xFF).all() for c in case.caches)


# Attention --------------------------------------------------------------------------------------


def run(p: sealed_problem.Problem) -> torch.Tensor:
    out = torch.full_like(p.query, NAN)
    caches = p.gpu_caches()
    triton_paged.attend(Attend(
        out, p.query, caches[0], p.tables[0], p.seq_lens, p.query_start_loc, p.format, p.scale,
        recent_cache=caches[1], recent_block_table=p.tables[1], **p.options,
        max_query_len=int(p.query_start_loc.diff().max()), max_seq_len=int(p.seq_lens.max()),
    ))  # fmt: skip
    return out


def check(format, batch, **options) -> None:
    """Element by element, and root mean square over the batch."""
    options = {"kv_heads": 1, "group": 2, **options}
    p = sealed_problem.build(format, batch, **options)
    out, expected = run(p), p.expected()
    error = (out.double() - expected).abs()
    assert (error / sealed_problem.bound(p)).nan_to_num(nan=torch.inf).max() <= 1
    size = expected.square().mean().sqrt()
    assert error.square().mean().sqrt() <= (NRMSE + OUTPUT_ROUNDING[out.dtype] / 3**0.5) * size


@every_format
def test_decode(format):
    """Lengths around those where a group is sealed to a query."""
    check(format, tuple((n, 1) for n in (1, 32, 63, 64, 95, 130)), dtype=torch.bfloat16)


@every_format
def test_queries_of_many_tokens(format):
    """Rows of one tile see different groups sealed; prompts begin before anything is."""
    check(format, ((70, 6), (100, 40), (40, 40), (0, 0), (50, 0)), dtype=torch.float16)


@every_format
def test_splits(format):
    """Sealed tiles in four parts, the first row and recent ones in the last; a sink counts once."""
    check(format, ((1100, 1), (30, 1)), block_size=128, recent_block=64, sinks=torch.randn(2))


@pytest.mark.parametrize("head_size", (16, 96, 256))
@every_format
def test_head_sizes(format, head_size):
    if head_size % format.head_size_step == 0:
        check(format, ((100, 1),), head_size=head_size, group=5)


@pytest.mark.parametrize(
    "options",
    (
        {"window": 1},
        {"window": 50, "softcap": 5.0},
        {"window": 70, "alibi_slopes": torch.linspace(0.01, 0.5, 2), "sinks": torch.randn(2)},
    ),
    ids=lambda o: "-".join(o),
)
@every_format
def test_options(format, options):
    check(format, ((130, 3), (33, 33)), **options)


@every_format
def test_magnitudes(format):
    """K of 0.016, whose scales are near fp16's subnormals, and of V near fp16's largest."""
    for gain in (2.0**-6, 2.0**12):

        def spoil(s, key, value, gain=gain):
            key *= gain
            value *= gain

        p = sealed_problem.build(format, ((130, 1),), kv_heads=1, group=2, spoil=spoil,
                                 query_gain=1 / gain)  # fmt: skip
        error = (run(p).double() - p.expected()).square().mean().sqrt()
        assert error <= 2 * NRMSE * p.expected().square().mean().sqrt()


@pytest.mark.parametrize("which", ("K", "V"))
@every_format
def test_a_nan_reaches_the_queries_that_see_it(format, which):
    """Of sealed K a whole group's, of V and of recent rows one token's; a sequence each."""
    places = (5, 70, 125)

    def spoil(s, key, value):
        (key if which == "K" else value)[places[s]] = NAN

    p = sealed_problem.build(format, ((130, 6),) * 3, spoil=spoil, window=60, kv_heads=1, group=1)
    out, expected = run(p), p.expected()
    assert torch.equal(out.isnan(), expected.isnan())
    assert [bool(x.isnan().any()) for x in expected.split(6)] == [False, True, True]


def test_rows_outside_of_the_batch_keep_their_value():
    """The second sequence alone, whose row starts behind the other's."""
    p = sealed_problem.build(WINDOW_ROWS[0], ((70, 2), (100, 1)), kv_heads=1, group=2)
    whole = run(p)
    last = replace(p, tables=tuple(t[1:] for t in p.tables), seq_lens=p.seq_lens[1:],
                   query_start_loc=p.query_start_loc[1:])  # fmt: skip
    out = run(last)
    assert out[:2].isnan().all() and torch.equal(out[2:], whole[2:])
