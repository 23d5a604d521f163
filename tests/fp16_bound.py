"""How far attention with fp16 operands may be from exact: the GPU kernels' tolerance.

Errors come from three places, all others are fp32's (``cases.FP32_SLACK``):

* q, with K's static scale in it, is rounded to fp16 after a division by a power of two that
  brings its row's largest element to [1, 2): 2**-11 of the element, or half of fp16's last place
  there, 2**-25 of the largest. Codes are exact in fp16.
* P, with V's token scale in it, is rounded to fp16 with its largest element near 2**14: 2**-11 of
  the element, or 2**-25 * 2**-14 of the largest (of 1, if a sink is larger).
* The output is rounded to the activations' dtype.
"""

from __future__ import annotations

import attention_oracle
import cases
import oracle
import torch

FP16 = 2.0**-11
FP16_FLOOR = 2.0**-25
P_FLOOR = 2.0**-38
#: Products are summed in fp32, on tensor cores by truncation: relative to the sum of magnitudes.
SUM = 2.0**-20

# RMS error over RMS output on N(0, 1) data. Rounding to 11 bits costs at most 2**-11 / sqrt(3) =
# 2.8e-4 RMS; scores have RMS 1, so q and P count the same, and independently: 4e-4. Measured in
# the interpreter: 1.7e-4 to 3.1e-4, int4 5.4e-4 (whose operands are 2.8 times those of the row
# they stand for, cases.OPERAND_GAIN). bf16 operands would cost 3e-3.
NRMSE = 4e-4


def nrmse_bound(problem: oracle.Problem) -> float:
    format, dtype = problem.format, problem.query.dtype
    gain = max(cases.OPERAND_GAIN[s.code.kind] for s in (format.key, format.value))
    return NRMSE * gain + cases.OUTPUT_ROUNDING[dtype] / 3**0.5


@oracle.single_threaded
def attention_bound(problem: oracle.Problem) -> torch.Tensor:
    """Worst case of ``|kernel - exact|`` per output element, ``[T, heads, D]`` float64.

    A score is off by ``ds`` and so, to first order, the output by ``sum_t p_t ds_t |v_t - o|``
    (``expm1`` makes it hold for large ``ds``); softcap only contracts scores.
    """
    dtype = problem.query.dtype
    bound = torch.zeros(problem.query.shape, dtype=torch.float64)
    for s in range(problem.seq_lens.numel()):
        begin, end = problem.query_start_loc[s : s + 2].tolist()
        if begin == end:
            continue
        p, mask = attention_oracle.weights(problem, s, **problem.options)
        heads, kv_heads = p.shape[0], problem.values[s].shape[1]
        for head in range(heads):
            kv = head * kv_heads // heads
            k, v = (attention_oracle.operand(problem, s, kv, value) for value in (False, True))
            q = k.query(problem.query[begin:end, head].double())
            dq = (FP16 + SUM) * q + FP16_FLOOR * q.amax(-1, keepdim=True)
            keys = k.token[:, None] * k.codes + k.minimum[:, None]
            ds = problem.scale * (dq @ keys.T)
            moved = p[head] * torch.expm1((2 * ds).clamp(max=40)) / 2
            values = problem.values[s][:, kv].double()
            out, held = (p[head] @ values).abs(), v.held(values)
            error = moved @ values.abs() + moved.sum(-1, keepdim=True) * out
            product = p[head] * v.token
            sums = FP16 * (product @ v.codes) * v.channel
            loudest = product.amax(-1, keepdim=True).clamp(min=1.0)
            sums += P_FLOOR * loudest * (mask.double() @ v.codes) * v.channel
            sums += cases.FP32_SLACK * (p[head] @ (held.abs() + v.minimum[:, None]))
            error += v.spread(sums) + cases.FP32_SLACK * out
            error += cases.OUTPUT_ROUNDING[dtype] * (out + error) + cases.OUTPUT_FLOOR[dtype]
            bound[begin:end, head] = error
    return bound


def compare(problem: oracle.Problem, got: torch.Tensor, expected: torch.Tensor) -> None:
    """Both bounds: element by element, and root mean square over the batch."""
    assert torch.isfinite(expected).all()
    error = (got.double() - expected).abs()
    excess = (error / attention_bound(problem)).nan_to_num(nan=float("inf"))
    worst = int(excess.argmax())
    assert excess.max() <= 1, (
        f"element {worst} (of {list(error.shape)}) is off by {error.flatten()[worst]:.3g}, "
        f"{excess.max():.3g} times the bound"
    )
    size = expected.square().mean().sqrt()
    assert error.square().mean().sqrt() <= nrmse_bound(problem) * size
