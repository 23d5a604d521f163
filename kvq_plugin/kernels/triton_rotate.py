"""The rotation of :mod:`kvq_plugin.rotation` inside Triton's kernels, on rows held in registers.

Every row of a tile is as wide as the next power of two from the head size on, zeros behind it; PAGE
is a :class:`~kvq_plugin.kernels.pages.Page`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvq_plugin import rotation

_LIMIT = tl.constexpr(rotation.LIMIT)


@triton.jit
def _signs(channel):
    """1.0 or -1.0: the highest bit of the channel's hash."""
    x = (channel.to(tl.uint32) + 1) * 0x61C88647
    x = (x ^ (x >> 16)) * 0x2C1B3C6D
    x = (x ^ (x >> 12)) * 0x297A2D39
    return tl.where((x >> 31) == 0, 1.0, -1.0)


@triton.jit
def _mix(x, ROWS: tl.constexpr, WIDTH: tl.constexpr, STRIDE: tl.constexpr):
    """Elements of ``x [ROWS, WIDTH]`` that are STRIDE apart become their sum and difference."""
    pairs = tl.reshape(x, [ROWS, WIDTH // (2 * STRIDE), 2, STRIDE])
    a, b = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
    mixed = tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2))
    return tl.reshape(mixed, [ROWS, WIDTH])


@triton.jit
def rotate(x, channel, ROWS: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr):
    """fp32 ``x [ROWS, WIDTH]``, columns *channel*, rotated."""
    x = tl.where(x > _LIMIT, _LIMIT, tl.where(x < -_LIMIT, -_LIMIT, x))  # a NaN stays
    x *= (_signs(channel) * PAGE.turn)[None, :]
    for stage in tl.static_range(tl.constexpr(PAGE.stages)):
        x = _mix(x, ROWS, WIDTH, 1 << stage)
    return x


@triton.jit
def unrotate(x, channel, ROWS: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr):
    """The inverse of :func:`rotate`, up to rounding."""
    for stage in tl.static_range(tl.constexpr(PAGE.stages)):
        x = _mix(x, ROWS, WIDTH, 1 << stage)
    return x * (_signs(channel) * PAGE.turn_back)[None, :]


@triton.jit
def fields_of(x, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Channels of ``x [ROWS, WIDTH]`` in the order of 4-bit codes: those of the lower fields of a
    row's bytes and those of the upper ones, ``[ROWS, WIDTH / 2]`` each."""
    words = tl.permute(tl.reshape(x, [ROWS, WIDTH // 8, 2, 4]), (0, 1, 3, 2))
    low, high = tl.split(words)
    return tl.reshape(low, [ROWS, WIDTH // 2]), tl.reshape(high, [ROWS, WIDTH // 2])


@triton.jit
def channels_of(low, high, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The inverse of :func:`fields_of`."""
    shape: tl.constexpr = [ROWS, WIDTH // 8, 4]
    words = tl.join(tl.reshape(low, shape), tl.reshape(high, shape))
    return tl.reshape(tl.permute(words, (0, 1, 3, 2)), [ROWS, WIDTH])
