"""Triton's rotation in its interpreter: every bit as the specification has it."""

import pytest
import torch
from cases import ACTIVATIONS, name_of

from kvq_plugin import rotation
from kvq_plugin.kernels import triton_rotate


def rows(dtype, head_size) -> torch.Tensor:
    """Rows strided as a projection leaves them, with infinities and the largest numbers."""
    g = torch.Generator().manual_seed(head_size)
    x = torch.randn(5, 6, head_size, generator=g) * torch.logspace(-3, 3, head_size)
    x[0, 1, 3], x[1, 2, 5], x[1, 2, 6] = float("inf"), -float("inf"), float("inf")
    x[2, 3] = torch.finfo(dtype).max
    return x.to(dtype)[:, 1:4]


@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=name_of)
@pytest.mark.parametrize("head_size", (16, 80, 96, 128, 256))
def test_rows_equal_the_specification_bit_for_bit(head_size, dtype):
    x = rows(dtype, head_size)
    wide = x.float().clamp(-rotation.LIMIT, rotation.LIMIT)
    assert torch.equal(triton_rotate.rotate(x), rotation.rotate(wide))


def test_a_nan_reaches_what_it_is_mixed_with():
    x = torch.ones(1, 2, 80)
    x[0, 1, 20] = float("nan")
    hit = torch.zeros(1, 2, 80, dtype=torch.bool)
    hit[0, 1, 16:32] = True
    assert torch.equal(triton_rotate.rotate(x).isnan(), hit)


@pytest.mark.parametrize("head_size", (48, 128))
def test_rotating_back_writes_rows_of_sequences_only(head_size):
    x = torch.randn(6, 2, head_size, generator=torch.Generator().manual_seed(0))
    out = torch.full((6, 4, head_size), 7.0)[:, 1:3]
    triton_rotate.unrotate(x, out, torch.tensor([1, 2, 2, 5], dtype=torch.int32), 3)
    assert torch.equal(out[1:5], rotation.unrotate(x)[1:5])
    assert (out[:1] == 7.0).all() and (out[5:] == 7.0).all()
