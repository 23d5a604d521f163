"""Triton's rotation in its interpreter: every bit as the specification has it."""

import pytest
import torch
import triton
import triton.language as tl
from cases import ACTIVATIONS, name_of

from kvq_plugin import rotation
from kvq_plugin.formats import get_format
from kvq_plugin.kernels.pages import page_of
from kvq_plugin.kernels.triton_rotate import channels_of, fields_of, rotate, unrotate


@triton.jit
def turn(source, target, PAGE: tl.constexpr, BACK: tl.constexpr):
    """Eight rows, by way of the order of 4-bit codes."""
    D: tl.constexpr = PAGE.d
    WIDTH: tl.constexpr = PAGE.width
    row, channel = tl.arange(0, 8)[:, None], tl.arange(0, WIDTH)
    inside = (channel < D)[None, :]
    x = tl.load(source + row * D + channel[None, :], mask=inside, other=0.0)
    x = unrotate(x, channel, 8, WIDTH, PAGE) if BACK else rotate(x, channel, 8, WIDTH, PAGE)
    low, high = fields_of(x, 8, WIDTH)
    x = channels_of(low, high, 8, WIDTH)
    tl.store(target + row * D + channel[None, :], x, mask=inside)


def turned(x: torch.Tensor, back: bool = False) -> torch.Tensor:
    """Rows ``[8, D]`` of fp32."""
    out = torch.empty_like(x)
    turn[1,](x, out, page_of(get_format("int8_per_token_head"), x.shape[1], 16), back)
    return out


def rows(dtype, head_size) -> torch.Tensor:
    """Rows with infinities and the largest numbers."""
    g = torch.Generator().manual_seed(head_size)
    x = torch.randn(8, head_size, generator=g) * torch.logspace(-3, 3, head_size)
    x[1, 3], x[2, 5], x[2, 6] = float("inf"), -float("inf"), float("inf")
    x[3] = torch.finfo(dtype).max
    return x.to(dtype).float()


@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=name_of)
@pytest.mark.parametrize("head_size", (16, 80, 96, 128, 256))
def test_rows_equal_the_specification_bit_for_bit(head_size, dtype):
    x = rows(dtype, head_size)
    limited = rotation.rotate(x.clamp(-rotation.LIMIT, rotation.LIMIT))
    assert torch.equal(turned(x), limited)
    assert torch.equal(turned(limited, back=True), rotation.unrotate(limited))


def test_a_nan_reaches_what_it_is_mixed_with():
    x = torch.ones(8, 80)
    x[1, 20] = float("nan")
    hit = torch.zeros(8, 80, dtype=torch.bool)
    hit[1, 16:32] = True
    assert torch.equal(turned(x).isnan(), hit)
