"""The randomized Hadamard transform of a rotated stream (``Stream.rotated`` in ``formats.py``).

A row's few large channels set the range of all its codes. Rotated, every element is a mixture of
all channels, the range shrinks to that of a bell curve, and 4 bits keep what matters. The rotation
is orthogonal, so q, rotated alike, has the same products with K, and the output of rotated V is
rotated back once.

With b = 2**n the largest power of two that divides the head size, and m = ceil(n / 2)::

    rotate(x) = 2**-m * H (signs * x)        unrotate(y) = 2**(m - n) * signs * (H y)

where H is the Hadamard matrix of b rows on each run of b channels. ``csrc/rotation.h`` and
``kernels/triton_rotate.py`` say the same; the elements of a rotated row are equal to the last bit
everywhere, because the order of additions is fixed (strides 1, 2, 4, ...) and all factors are
powers of two.
"""

from __future__ import annotations

import torch

#: Elements beyond count as this before rows are rotated, infinities included, so that no sum of
#: 512 of them overflows and no infinity meets another: 2**118 * 512 = 2**127.
LIMIT = 2.0**118


def width(head_size: int) -> int:
    """Channels that are mixed with each other: the largest power of two dividing *head_size*."""
    return head_size & -head_size


def exponent(head_size: int) -> int:
    """The m of :func:`rotate`, which multiplies by ``2**-m``: the least with ``4**m >= width``."""
    return width(head_size).bit_length() // 2


def gain(head_size: int) -> float:
    """1 or 2: the product of two rotated rows is that of the rows divided by this."""
    return 4.0 ** exponent(head_size) / width(head_size)


def signs(head_size: int) -> torch.Tensor:
    """``[head size]`` fp32 of 1 and -1: the highest bit of a hash of the channel's number."""
    x = (torch.arange(head_size) + 1) * 0x61C88647 & 0xFFFFFFFF
    x ^= x >> 16
    x = x * 0x2C1B3C6D & 0xFFFFFFFF
    x ^= x >> 12
    x = x * 0x297A2D39 & 0xFFFFFFFF
    return 1.0 - 2.0 * (x >> 31).float()


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rows ``[..., head size]`` (fp32 or fp64, at most ``LIMIT`` large) rotated."""
    d = x.shape[-1]
    return _hadamard(x * (signs(d) * 2.0 ** -exponent(d)).to(x))


def unrotate(x: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`rotate`, up to rounding."""
    d = x.shape[-1]
    return _hadamard(x) * (signs(d) * gain(d) * 2.0 ** -exponent(d)).to(x)


def _hadamard(x: torch.Tensor) -> torch.Tensor:
    stride = 1
    while stride < width(x.shape[-1]):
        a, b = x.unflatten(-1, (-1, 2, stride)).unbind(-2)
        x = torch.stack((a + b, a - b), -2).flatten(-3)
        stride *= 2
    return x
