"""Prefill through FlashAttention, in Triton's interpreter: PyTorch's FlashAttention runs on GPUs
alone, so a plain one in float64 stands in for it, which leaves the same things behind."""

import oracle
import pytest
import torch
from cases import BATCHES, OUTPUT_ROUNDING, PLAIN_ROWS, name_of

from kvq_plugin.calls import Attend
from kvq_plugin.formats import Granularity, get_format
from kvq_plugin.gpu_check import checks
from kvq_plugin.kernels import Workspace, prefill
from kvq_plugin.layout import GPU_V1

INT8, INT4, STATIC = map(get_format, ("int8_per_token_head", "int4_per_token_head", "int8"))
MIXED = ((65, 1), (40, 9), (16, 16), (100, 30))


def flash(query, keys, values, query_start, key_start, most_queries, most_keys, causal, scale):
    """Rows of no sequence are NaN; without keys, outputs are zeros and the log-sum-exp is +inf."""
    out = torch.full_like(query, float("nan"))
    lse = torch.full((query.shape[1], query.shape[0]), float("nan"))
    for s in range(len(query_start) - 1):
        (q0, q1), (k0, k1) = query_start[s : s + 2].tolist(), key_start[s : s + 2].tolist()
        assert q1 - q0 <= most_queries
        assert k1 - k0 <= most_keys
        q, k, v = (x.double().transpose(0, 1) for x in (query[q0:q1], keys[k0:k1], values[k0:k1]))
        k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
        scores = q @ k.transpose(1, 2) * scale
        if causal:
            hidden = torch.ones(scores.shape[1:], dtype=torch.bool).tril(k1 - k0 - (q1 - q0))
            scores = scores.masked_fill(~hidden, float("-inf"))
        out[q0:q1] = (scores.softmax(-1) @ v).transpose(0, 1).to(out.dtype) if k1 > k0 else 0.0
        lse[:, q0:q1] = scores.logsumexp(-1).float() if k1 > k0 else float("inf")
    return out, lse


def run(p: oracle.Problem, **options) -> torch.Tensor:
    out = torch.full_like(p.query, float("nan"))
    bounds = {
        "max_query_len": int(p.query_start_loc.diff().max()),
        "max_seq_len": int(p.seq_lens.max()),
    }
    prefill.attend(Attend(out, *p.arguments(), **{**bounds, **options}), flash)
    return out


def bound(dtype) -> float:
    """RMS error over RMS output: K, V and two outputs in the queries' dtype."""
    return 2.0 * OUTPUT_ROUNDING[dtype] / 3**0.5


def check(format, batch=MIXED, tokens_of_scratch=None, **options) -> None:
    defaults = {"head_size": 32, "group": 3, "kv_heads": 2, "dtype": torch.bfloat16}
    p = oracle.build(format, batch, kind=GPU_V1, **{**defaults, **options})
    room = {}
    if tokens_of_scratch:
        size = 4 * p.cache.shape[1] * p.query.shape[2] * tokens_of_scratch
        room["workspace"] = Workspace(torch.full((size,), 0xFF, dtype=torch.uint8), None)
    expected = p.expected()
    error = (run(p, **room).double() - expected).square().mean().sqrt()
    assert error <= bound(p.query.dtype) * expected.square().mean().sqrt()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=name_of)
@pytest.mark.parametrize("format", PLAIN_ROWS, ids=name_of)
def test_formats(format, dtype):
    check(format, dtype=dtype, granularity=Granularity.CHANNEL)


@pytest.mark.parametrize("tokens", (56, 64, 200, 1000))
def test_small_scratch(tokens):
    """The context before this step takes one to six calls; 200 lies between pages."""
    check(INT4, tokens_of_scratch=tokens)
    check(STATIC, tokens_of_scratch=tokens)


@pytest.mark.parametrize("batch", BATCHES)
def test_batches(batch):
    check(INT8, BATCHES[batch])


@pytest.mark.parametrize(
    ("head_size", "block_size", "style"),
    ((16, 16, "interleaved"), (80, 48, "head_major"), (256, 128, "padded")),
)
def test_shapes(head_size, block_size, style):
    check(INT4, head_size=head_size, block_size=block_size, style=style)


def test_rows_of_no_sequence_are_left_alone():
    p = oracle.build(INT4, MIXED, kind=GPU_V1, head_size=32, group=2, dtype=torch.bfloat16)
    whole = run(p)
    # The last two sequences alone, whose rows start behind the others', and one row of padding.
    query = torch.cat([p.query, p.query[:1]])
    out = torch.full_like(query, float("nan"))
    _, cache, table, lengths, starts, *rest = p.arguments()
    prefill.attend(Attend(out, query, cache, table[2:], lengths[2:], starts[2:], *rest,
                          max_query_len=30, max_seq_len=100), flash)  # fmt: skip
    begin = int(starts[2])
    assert out[:begin].isnan().all()
    assert out[-1].isnan().all()
    assert torch.equal(out[begin:-1], whole[begin:])


def test_a_scratch_too_small_for_the_step():
    p = oracle.build(INT8, MIXED, kind=GPU_V1, head_size=32, group=2, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="must hold 56 tokens of K and V"):
        run(p, workspace=Workspace(torch.empty(64, dtype=torch.uint8), None))


def test_which_calls_it_serves(monkeypatch):
    """On a GPU; here the device is only claimed."""
    built = [True]
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: built[-1])

    class Cache:
        device, shape = torch.device("cuda"), (9, 8, 16, 264)

    query = torch.empty(512, 32, 128, dtype=torch.bfloat16)

    def serves(query=query, batch=4, **options):
        bounds = {"max_query_len": 512, "max_seq_len": 4096}
        rest = None, torch.empty(batch), None, STATIC, 1.0
        return prefill.serves(Attend(None, query, Cache, *rest, **{**bounds, **options}))

    assert serves()
    assert not serves(window=64)
    assert not serves(softcap=1.0)
    assert not serves(causal=False)
    assert not serves(sinks=torch.zeros(32))
    assert not serves(alibi_slopes=torch.zeros(32))
    assert not serves(query.float())
    assert not serves(max_query_len=prefill.MIN_QUERY - 1)
    assert not serves(batch=4096, max_seq_len=1 << 20)
    assert not serves(workspace=Workspace(torch.empty(1 << 10, dtype=torch.uint8), None))
    assert prefill.workspace_size(128, Cache.device) == prefill.SCRATCH
    built.append(False)  # a PyTorch without it, as some for ARM boards are
    assert not serves() and not prefill.workspace_size(128, Cache.device)


def test_gpu_check_knows_from_where_it_serves():
    """It must not need Triton to know which outputs have K and V rounded."""
    assert checks.LONG == prefill.MIN_QUERY
