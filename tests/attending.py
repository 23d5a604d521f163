"""A call of ops.attend and its comparison with float64; shared by tests, nothing here is one."""

from __future__ import annotations

from functools import lru_cache

import attention_oracle
import oracle
import pytest
import torch
from cases import (
    ACTIVATIONS,
    ATTEND_ISAS,
    OFFSET_SLACK,
    PLAIN_ROWS,
    SMALL_BATCH,
    name_of,
    nrmse_bound,
    use_isa,
)

from kvq_plugin import ops

every_isa = pytest.mark.parametrize("isa", ATTEND_ISAS)
every_format = pytest.mark.parametrize("format", PLAIN_ROWS, ids=name_of)
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
    return problem, problem.expected(), attention_oracle.attention_bound(problem)


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


def slots_of(p: oracle.Problem, s: int) -> torch.Tensor:
    """Slot of each token of sequence *s*."""
    size = p.cache.shape[2]
    token = torch.arange(int(p.seq_lens[s]))
    return p.blocks[s].long()[token // size] * size + token % size
