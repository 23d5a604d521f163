"""Attention from its definition, and how far a kernel may be from it; nothing here is a test.

Dense and in float64, so that it shares no code with what it checks.
"""

from __future__ import annotations

from dataclasses import dataclass

import cases
import torch
from oracle import Problem, gain_of, rotation_matrix, single_threaded

from kvq_plugin import reference
from kvq_plugin.formats import Kind
from kvq_plugin.layout import PageLayout


def visible(length: int, count: int, causal: bool = True, window: int = 0) -> torch.Tensor:
    """Which keys each of the last *count* queries of a sequence sees, ``[count, length]``."""
    mask = torch.zeros(count, length, dtype=torch.bool)
    for i in range(count):
        position = length - count + i
        first = max(0, position - window + 1) if window else 0
        last = position if causal else length - 1
        if window and not causal:
            last = min(last, position + window - 1)
        mask[i, first : last + 1] = True
    return mask


def weights(
    problem: Problem,
    s: int,
    *,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention probabilities ``[heads, q, L]`` and mask ``[q, L]`` of sequence *s*, float64.

    Invisible keys have probability zero; with a sink the rows sum to less than one.
    """
    begin, end = problem.query_start_loc[s : s + 2].tolist()
    length, count = int(problem.seq_lens[s]), end - begin
    heads = problem.query.shape[1]
    k = problem.keys[s].double()
    group = heads // k.shape[1]
    mask = visible(length, count, causal, window)
    probabilities = torch.zeros(heads, count, length, dtype=torch.float64)
    for head in range(heads):
        q = problem.query[begin:end, head].double()
        logits = (q @ k[:, head // group].T) * problem.scale
        if softcap:
            logits = (logits / softcap).tanh() * softcap
        if alibi_slopes is not None:
            position = torch.arange(length - count, length)[:, None]
            logits = logits + float(alibi_slopes[head]) * (torch.arange(length) - position)
        logits[~mask] = -torch.inf
        extra = torch.full((count, 1), -torch.inf, dtype=torch.float64)
        if sinks is not None:
            extra[:] = float(sinks[head])
        top = torch.maximum(logits.amax(-1, keepdim=True), extra)
        mass = (logits - top).exp()
        probabilities[head] = mass / (mass.sum(-1, keepdim=True) + (extra - top).exp())
    return probabilities, mask


@single_threaded
def attend(problem: Problem) -> torch.Tensor:
    """Dense attention from the definition, float64 ``[T, heads, D]``."""
    out = torch.zeros(problem.query.shape, dtype=torch.float64)
    for s in range(problem.seq_lens.numel()):
        begin, end = problem.query_start_loc[s : s + 2].tolist()
        if begin == end:
            continue
        p, _ = weights(problem, s, **problem.options)
        group = p.shape[0] // problem.values[s].shape[1]
        for head in range(p.shape[0]):
            out[begin:end, head] = p[head] @ problem.values[s][:, head // group].double()
    return out


@dataclass(frozen=True)
class Operand:
    """One stream as kernels hold it: ``|value| <= codes * token * channel + minimum``."""

    codes: torch.Tensor  # [L, D] magnitude of the decoded code (plus zero point)
    token: torch.Tensor  # [L] per-token scale folded into the score or the probability
    channel: torch.Tensor  # [D] per-channel scale folded into q or the output
    minimum: torch.Tensor  # [L] magnitude of the affine minimum
    basis: torch.Tensor | None = None  # [D, D]: what is above describes rows times its transpose

    def query(self, q: torch.Tensor) -> torch.Tensor:
        """``|q|`` ``[T, D]`` as kernels multiply it with codes, channel scales folded in."""
        q = q if self.basis is None else q @ (gain_of(self.basis) * self.basis).T
        return (q * self.channel).abs()

    def held(self, values: torch.Tensor) -> torch.Tensor:
        """Rows ``[L, D]`` as kernels add them up."""
        return values if self.basis is None else values @ self.basis.T

    def spread(self, error: torch.Tensor) -> torch.Tensor:
        """What errors ``[T, D]`` of held sums are at worst in the output."""
        if self.basis is None:
            return error
        return error.expand(-1, self.channel.shape[0]) @ (gain_of(self.basis) * self.basis.abs())


def operand(problem: Problem, s: int, head: int, value: bool) -> Operand:
    size = problem.cache.shape[2]
    layout = PageLayout(problem.format, problem.query.shape[2], size, problem.layout)
    which = layout.value if value else layout.key
    static = problem.value_static if value else problem.key_static
    length = int(problem.seq_lens[s])
    pages = reference._pages(problem.cache)[problem.blocks[s].long(), head]
    plain = layout.unpack_codes(pages, which).reshape(-1, layout.head_size)[:length]
    codes = reference.decode(plain.contiguous(), which.stream.code).double().abs()
    ones = torch.ones(length, dtype=torch.float64)
    channel = torch.ones(layout.head_size, dtype=torch.float64)
    if static is not None:
        if static.zero_point is not None:
            codes = codes + static.zero_point[head].double().abs()
        return Operand(codes, ones, static.scale[head].double(), 0 * ones)
    basis = rotation_matrix(layout.head_size) if which.stream.rotated else None
    words = layout.unpack_metadata(pages, which).reshape(-1)[:length].contiguous()
    if which.stream.code.kind is not Kind.AFFINE:
        return Operand(codes, words.view(torch.float32).double(), channel, 0 * ones, basis)
    scale, minimum = words.view(torch.float16).view(-1, 2).double().unbind(-1)
    return Operand(codes, scale, channel, minimum.abs(), basis)


@single_threaded
def attention_bound(problem: Problem) -> torch.Tensor:
    """Worst case of ``|kernel - exact|`` per output element, ``[T, heads, D]`` float64.

    * A query element is off by ``limb`` (:func:`cases.limb`) of its row's largest (channel scales
      folded in), so the score of key t by
      ``ds_t = limb * scale * max|q| * (token_t * sum|codes_t| + D * min_t)``,
      and to first order the output by ``sum_t p_t ds_t |v_t - o| <= sum_t p_t ds_t (|v_t| + |o|)``
      (``expm1`` makes it hold for large ``ds`` too). Softcap only contracts scores.
    * A probability (value token scale folded in) is off by ``limb`` of the largest one, for
      every visible token; tiles only make this smaller.
    * Where :func:`cases.weight_rounding` allows, a probability is also off by that much of itself.
    * ``FP32_SLACK`` of the absolute sum, and rounding of the output to the activation dtype.

    Sums over V are of rotated rows where the stream is; rotating them back adds their errors up.
    """
    dtype = problem.query.dtype
    key_limb, value_limb = (cases.limb(x) for x in (problem.format.key, problem.format.value))
    bound = torch.zeros(problem.query.shape, dtype=torch.float64)
    for s in range(problem.seq_lens.numel()):
        begin, end = problem.query_start_loc[s : s + 2].tolist()
        if begin == end:
            continue
        p, mask = weights(problem, s, **problem.options)
        heads, kv_heads = p.shape[0], problem.values[s].shape[1]
        for head in range(heads):
            kv = head * kv_heads // heads
            k, v = (operand(problem, s, kv, value) for value in (False, True))
            q = k.query(problem.query[begin:end, head].double())
            mass = k.token * k.codes.sum(-1) + k.codes.shape[1] * k.minimum
            ds = key_limb * problem.scale * q.amax(-1)[:, None] * mass
            moved = p[head] * torch.expm1((2 * ds).clamp(max=40)) / 2
            values = problem.values[s][:, kv].double()
            out, held = (p[head] @ values).abs(), v.held(values)
            error = moved @ values.abs() + moved.sum(-1, keepdim=True) * out
            loudest = (p[head] * v.token).amax(-1, keepdim=True)
            sums = value_limb * loudest * (mask.double() @ v.codes) * v.channel
            loudest = p[head].amax(-1, keepdim=True)
            sums += value_limb * loudest * (mask.double() @ v.minimum)[:, None]
            rounding = cases.FP32_SLACK + cases.weight_rounding(problem.format, dtype)
            sums += rounding * (p[head] @ held.abs()) + cases.FP32_SLACK * (p[head] @ held).abs()
            error += v.spread(sums)
            error += cases.OUTPUT_ROUNDING[dtype] * (out + error) + cases.OUTPUT_FLOOR[dtype]
            bound[begin:end, head] = error
    return bound
