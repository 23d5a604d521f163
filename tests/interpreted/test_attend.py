"""Triton's attention in its interpreter against the float64 reference on the same codes.

The interpreter multiplies in fp32, operands rounded to fp16 as on a GPU. Every unused byte of the
cache is 0xFF, a NaN wherever one can be, so stale bytes show.
"""

import fp16_bound
import oracle
import pytest
import torch
from cases import BATCHES, PLAIN_ROWS, name_of

from kvq_plugin.calls import Attend
from kvq_plugin.formats import CODES, Granularity, Kind, get_format
from kvq_plugin.kernels import Workspace, launch
from kvq_plugin.kernels import triton_paged as paged
from kvq_plugin.layout import GPU_V1, PageLayout

SMALL = ((65, 1), (40, 9), (16, 16))
INT8, INT4, FP8 = map(get_format, ("int8_per_token_head", "int4_per_token_head", "fp8"))
NAN = float("nan")


def run(p: oracle.Problem, out=None, **options) -> torch.Tensor:
    out = torch.full_like(p.query, NAN) if out is None else out
    counts = p.query_start_loc.diff()
    bounds = {"max_query_len": int(counts.max()), "max_seq_len": int(p.seq_lens.max())}
    paged.attend(Attend(out, *p.arguments(), **p.options, **{**bounds, **options}))
    return out


def check(format, batch=SMALL, **options) -> None:
    p = oracle.build(format, batch, kind=GPU_V1, **{"head_size": 32, "group": 3, **options})
    fp16_bound.compare(p, run(p), p.expected())


@pytest.mark.parametrize(
    ("format", "dtype"),
    [*((f, torch.bfloat16) for f in PLAIN_ROWS), (INT4, torch.float16), (INT8, torch.float32)],
    ids=name_of,
)
def test_formats_and_dtypes(format, dtype):
    check(format, dtype=dtype, granularity=Granularity.CHANNEL)


@pytest.mark.parametrize("format", (get_format("int8"), INT4, FP8), ids=name_of)
def test_split_contexts(format):
    """Decodes of up to 900 tokens, in four splits each, some of them empty; block size 48."""
    check(format, ((900, 1), (1, 1), (530, 1)), kv_heads=1, block_size=48, sinks=torch.randn(3))


@pytest.mark.parametrize(
    ("format", "batch"), [*((INT8, batch) for batch in BATCHES), (INT4, "mixed")], ids=name_of
)
def test_batches(format, batch):
    """Ragged, speculative, chunked and mixed batches, which need both launches."""
    check(format, BATCHES[batch], kv_heads=1)


@pytest.mark.parametrize("head_size", (16, 80, 256))
@pytest.mark.parametrize("format", (INT8, INT4), ids=name_of)
def test_head_sizes(format, head_size):
    check(format, ((65, 1), (40, 3)), head_size=head_size, kv_heads=1)


@pytest.mark.parametrize(
    ("block_size", "style"), ((16, "interleaved"), (48, "head_major"), (128, "padded"))
)
def test_pages(block_size, style):
    check(INT4, ((130, 1), (33, 20)), block_size=block_size, style=style)


@pytest.mark.parametrize("group", (1, 7, 16, 71))
def test_groups(group):
    """71 query heads per kv head are dealt out in two chunks."""
    check(INT8, ((65, 1), (20, 2)), group=group, kv_heads=2)


OPTIONS = {
    "window": {"window": 20},
    "softcap": {"softcap": 4.0},
    "encoder": {"causal": False},
    "encoder_window": {"causal": False, "window": 9},
    "alibi": {"alibi_slopes": torch.linspace(0.1, 1.0, 6)},
    "sinks": {"sinks": torch.linspace(-3.0, 3.0, 6)},
    "all": {
        "window": 33,
        "softcap": 6.0,
        "alibi_slopes": torch.linspace(0.1, 1.0, 6),
        "sinks": torch.linspace(-3.0, 3.0, 6),
    },
}


@pytest.mark.parametrize(
    ("format", "options"),
    [*((INT8, options) for options in OPTIONS), (INT4, "all"), (FP8, "all")],
    ids=name_of,
)
def test_options(format, options):
    check(format, ((300, 1), (90, 40)), **OPTIONS[options])


@pytest.mark.parametrize("granularity", (Granularity.TENSOR, Granularity.CHANNEL), ids=name_of)
def test_zero_points(granularity):
    batch = ((300, 1), (40, 30))
    check(get_format("int8"), batch, granularity=granularity, zero_point=True,
          sinks=torch.randn(6))  # fmt: skip


@pytest.mark.parametrize("format", (INT8, get_format("fp8_per_token_head")), ids=name_of)
@pytest.mark.parametrize("gain", (1e-20, 1e4))
def test_scales_that_fp16_could_not_hold(format, gain):
    """Token scales between 1e-18 and 1, and queries outside of fp16's range."""
    p = oracle.build(format, SMALL, kind=GPU_V1, head_size=32, value_spread=1e18,
                     query_gain=gain)  # fmt: skip
    out, expected = run(p), p.expected()
    excess = (out.double() - expected).abs() / fp16_bound.attention_bound(p)
    assert excess.max() <= 1


@pytest.mark.parametrize("format", (INT8, FP8, INT4), ids=name_of)
def test_nan_reaches_those_who_see_it_and_nobody_else(format):
    """A NaN key and value at token 3, behind a window for the later queries."""
    p = oracle.build(format, ((200, 1), (40, 1)), kind=GPU_V1, head_size=32, window=64)
    layout = PageLayout(format, 32, 32, GPU_V1)
    for s in range(2):
        for which in (layout.key, layout.value):
            page = p.cache[p.blocks[s][0]].flatten(1)
            if format.is_dynamic:
                at = which.metadata + 4 * 3
                page[:, at : at + 4] = torch.tensor([0, 0, 0xC0, 0x7F]).byte()
            else:
                page[:, which.code_bytes[3]] = 0x7F
    out = run(p)
    assert torch.isfinite(out[0]).all() and out[1].isnan().all()


@pytest.mark.parametrize("format", (INT8, INT4), ids=name_of)
def test_rows_outside_of_the_batch_keep_their_value(format):
    p = oracle.build(format, ((40, 1), (33, 2)), kind=GPU_V1, head_size=32)
    padded = torch.cat([p.query, p.query])
    out = torch.full_like(padded, 7.0)
    tensors = list(p.arguments())
    tensors[0] = padded
    paged.attend(Attend(out, *tensors, max_query_len=2, max_seq_len=40))
    assert (out[3:] == 7.0).all()
    assert torch.equal(out[:3], run(p))


@pytest.mark.parametrize("max_query_len", (1, 70))
def test_bounds_may_be_loose(max_query_len):
    """As under a CUDA graph: bounds larger than the batch, sequences padded with length 0."""
    p = oracle.build(INT8, ((40, 1), (300, 1)), kind=GPU_V1, head_size=32, kv_heads=1)
    args = list(p.arguments())
    args[2] = torch.cat([p.block_table, p.block_table])
    args[3] = torch.cat([p.seq_lens, torch.zeros(2, dtype=torch.int32)])
    args[4] = torch.tensor([0, 1, 2, 2, 2], dtype=torch.int32)
    out = torch.full_like(p.query, NAN)
    paged.attend(Attend(out, *args, max_query_len=max_query_len, max_seq_len=4096))
    fp16_bound.compare(p, out, p.expected())


def test_a_later_part_of_a_batch():
    """Query rows of a part count from the batch's first token (a batch launched in parts)."""
    p = oracle.build(INT8, ((40, 1), (90, 80), (33, 33)), kind=GPU_V1, head_size=32)
    out = torch.full_like(p.query, NAN)
    for begin, end, longest in ((0, 1, 1), (1, 3, 80)):
        args = list(p.arguments())
        args[2:5] = (
            p.block_table[begin:end],
            p.seq_lens[begin:end],
            p.query_start_loc[begin : end + 1],
        )
        paged.attend(Attend(out, *args, max_query_len=longest, max_seq_len=90))
    fp16_bound.compare(p, out, p.expected())


def test_workspace():
    p = oracle.build(INT8, ((900, 1),), kind=GPU_V1, head_size=32, kv_heads=1)
    size = launch.workspace_size(32, p.cache.device)
    room = torch.zeros(size, dtype=torch.uint8)
    assert torch.equal(run(p, workspace=Workspace(room, None)), run(p))
    assert room.any(), "the context was not split"
    with pytest.raises(ValueError, match=r"workspace must hold \d+ bytes.*new_workspace"):
        run(p, workspace=Workspace(room[:64], None))


@pytest.mark.parametrize("in_place", (False, True))
@pytest.mark.parametrize("code", [c for c in CODES.values() if c.bits in (4, 8)], ids=name_of)
def test_decoding_every_byte(code, in_place):
    """The portable decoder; test_ptx.py has those of NVIDIA."""
    import decoding

    got = decoding.decode_all(code, in_place)
    if code.bits == 4:
        expected = torch.tensor([[b & 15, b >> 4] for b in range(256)]).float() - 8 * in_place
    elif code.kind is Kind.SIGNED:
        expected = torch.arange(-128.0, 128.0)[:, None]
    else:
        values = torch.from_numpy(oracle.float8_values(code.name)).float()[:, None]
        expected = values
    assert torch.equal(got.nan_to_num(nan=1e6), expected.nan_to_num(nan=1e6))
