"""Formats with recent rows in CUDA C++, emulated: sealing in the reference's bytes, and attention
over sealed groups, the first row and recent rows.

As in ``test_sealed_attend.py``, bytes that no query reads are NaN and block tables hold nothing
there, and every buffer is an allocation of its own: what should not be read is found out.
"""

from functools import lru_cache

import emulator
import oracle
import pytest
import sealed_problem
import torch
from cases import OUTPUT_ROUNDING, WINDOW_ROWS, name_of
from test_seal_kernel import EDGES, Case

from kvq_plugin import reference
from kvq_plugin.kernels import cuda
from kvq_plugin.layout import GPU_V1

every_format = pytest.mark.parametrize("format", WINDOW_ROWS, ids=name_of)

#: RMS error over RMS output on N(0, 1) data: as in test_cuda_emulated.py, but q is rounded to fp16
#: twice, before and after it is multiplied by a group's scales of K.
OPERANDS = 2.0**-10.5


@lru_cache(maxsize=4)
def _built(format, key):
    """A problem of sealed_problem.py with its caches in layout gpu-v1, and its float64 result."""
    problem = sealed_problem.build(format, **dict(key))
    return problem, problem.gpu_caches(), problem.expected()


def attend(tmp_path, problem, caches, **launch):
    out = torch.full_like(problem.query, float("nan"))
    arguments = (
        problem.query, caches[0], problem.tables[0], problem.seq_lens, problem.query_start_loc,
        problem.format, problem.scale, None, None,
    )  # fmt: skip
    params = emulator.attend(
        tmp_path / "call", out, arguments, **launch,
        max_query_len=int(problem.query_start_loc.diff().max()),
        max_seq_len=int(problem.seq_lens.max()), recent_cache=caches[1],
        recent_block_table=problem.tables[1], **problem.options,
    )  # fmt: skip
    return out, params


def check(tmp_path, format, batch, *, multiprocessors=4, order="", **kwargs):
    """One emulated call against float64. Returns the struct it was launched with."""
    problem, caches, expected = _built(format, (("batch", batch), *kwargs.items()))
    out, params = attend(tmp_path, problem, caches, multiprocessors=multiprocessors, order=order)
    error = (out.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error <= OPERANDS + OUTPUT_ROUNDING[out.dtype] / 3**0.5, float(error)
    return params


@every_format
def test_decode(tmp_path, format):
    """Lengths around those where a group is sealed to a query: 64, 96."""
    check(tmp_path, format, tuple((n, 1) for n in (1, 32, 63, 64, 65, 95, 96, 300)))


@pytest.mark.parametrize(
    ("head_size", "group"), ((16, 1), (32, 16), (48, 3), (64, 9), (96, 4), (128, 7), (128, 16),
                             (192, 4), (256, 8), (256, 16)),
)  # fmt: skip
@every_format
def test_head_sizes_and_groups(tmp_path, format, head_size, group):
    """A class of head sizes takes all smaller ones; rows fill their tiles or not."""
    if cuda.shape_refusal(format, head_size, 32) is None:
        check(tmp_path, format, ((140, 1), (17, 1)), head_size=head_size, group=group, kv_heads=1)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=name_of)
@every_format
def test_activations(tmp_path, format, dtype):
    check(tmp_path, format, ((130, 1), (65, 1)), dtype=dtype, block_size=128, recent_block=64)


@every_format
def test_queries_of_many_tokens(tmp_path, format):
    """Rows of one tile see different groups sealed; prompts begin before anything is."""
    check(tmp_path, format, ((70, 6), (100, 40), (40, 40), (0, 0), (50, 0), (96, 33)), group=2)


@pytest.mark.parametrize(
    "options",
    (
        {"softcap": 5.0},
        {"window": 1},
        {"window": 20},
        {"window": 50},
        {"window": 70},
        {"alibi_slopes": torch.linspace(0.01, 0.5, 8)},
        {"sinks": torch.linspace(-2.0, 3.0, 8)},
        {"spread": 100.0},
        {"query_gain": 8.0},
    ),
    ids=lambda o: "-".join(o),
)
@every_format
def test_options(tmp_path, format, options):
    check(tmp_path, format, ((130, 1), (100, 9), (33, 33)), **options)


@every_format
def test_pieces(tmp_path, format):
    """Sealed tiles in one piece, the first row and recent rows in others; a whole context of five
    tiles is two rounds."""
    batch = ((1100, 1), (30, 1), (70, 6))
    params = check(tmp_path, format, batch, multiprocessors=32, kv_heads=1, order="backwards")
    assert params.blocks > 3
    check(tmp_path, format, ((128, 1),), multiprocessors=32, kv_heads=1)


@every_format
def test_magnitudes(tmp_path, format):
    """K of 0.016, whose scales times q are near fp16's subnormals, and of V near fp16's largest."""
    for gain in (2.0**-6, 2.0**12):

        def spoil(s, key, value, gain=gain):
            key *= gain
            value *= gain

        problem, caches, expected = _built(
            format, (("batch", ((130, 1),)), ("spoil", spoil), ("query_gain", 1 / gain))
        )
        out, _ = attend(tmp_path, problem, caches)
        error = (out.double() - expected).square().mean().sqrt()
        assert error <= OPERANDS * expected.square().mean().sqrt()


@pytest.mark.parametrize("which", ("K", "V"))
@pytest.mark.parametrize("position", (5, 70, 125))
@every_format
def test_a_nan_reaches_the_queries_that_see_it(tmp_path, format, position, which):
    """Of sealed K a whole group's, of V and of recent rows one token's."""

    def spoil(s, key, value):
        if s == 0:
            (key if which == "K" else value)[position] = float("nan")

    batch = ((130, 6), (100, 1))
    problem, caches, expected = _built(
        format, (("batch", batch), ("spoil", spoil), ("window", 60), ("kv_heads", 1))
    )
    out, _ = attend(tmp_path, problem, caches)
    assert expected[:6].isnan().any() == (position > 65)
    assert torch.equal(out.isnan(), expected.isnan())


# Store ------------------------------------------------------------------------------------------


def stored(tmp_path, case) -> list[torch.Tensor]:
    caches = [oracle.clone_storage(c) for c in case.caches]
    emulator.store(
        tmp_path / "call", case.key, case.value, caches[0], case.slots[0], case.format,
        recent_cache=caches[1], recent_slot_mapping=case.slots[1],
    )  # fmt: skip
    return [oracle.whole_storage(c) for c in caches]


def check_store(tmp_path, format, **kwargs):
    case = Case(format, **kwargs)
    expected = [oracle.clone_storage(c) for c in case.caches]
    reference.store(
        case.key, case.value, expected[0], case.slots[0], format, recent_cache=expected[1],
        recent_slot_mapping=case.slots[1], layout=GPU_V1,
    )  # fmt: skip
    for got, cache in zip(stored(tmp_path, case), expected, strict=True):
        differ = got != oracle.whole_storage(cache)
        assert not differ.any(), f"{int(differ.sum())} of {got.numel()} bytes differ"


@every_format
@pytest.mark.parametrize("edge", EDGES)
def test_sealing_writes_the_reference_s_bytes(tmp_path, format, edge):
    check_store(tmp_path, format, edge=edge)


@every_format
@pytest.mark.parametrize("head_size", (16, 32, 80, 96, 128, 160, 256))
def test_sealing_of_every_head_size(tmp_path, format, head_size):
    if head_size % format.head_size_step == 0:
        check_store(tmp_path, format, head_size=head_size, kv_heads=1, block_size=96,
                    style="padded", seed=1, dtype=torch.bfloat16)  # fmt: skip


@every_format
def test_sealing_of_many_sequences_at_once(tmp_path, format):
    """Every token of a batch completes a group, of noise: any scales, NaN and infinities."""
    case = Case(format, block_size=128, recent_block=64)
    g = torch.Generator().manual_seed(3)
    for cache in case.caches:
        storage = oracle.whole_storage(cache)
        storage.copy_(torch.randint(256, storage.shape, generator=g, dtype=torch.uint8))
    ends = case.slots[0] % 32 == 31
    case.key, case.value = case.key[ends], case.value[ends]
    case.slots = [s[ends] for s in case.slots]
    assert 4 <= int(ends.sum()) <= 32
    expected = [oracle.clone_storage(c) for c in case.caches]
    reference.store(
        case.key, case.value, expected[0], case.slots[0], format, recent_cache=expected[1],
        recent_slot_mapping=case.slots[1], layout=GPU_V1,
    )  # fmt: skip
    for got, cache in zip(stored(tmp_path, case), expected, strict=True):
        assert torch.equal(got, oracle.whole_storage(cache))
