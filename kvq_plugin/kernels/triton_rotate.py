"""The rotation of :mod:`kvq_plugin.rotation` in Triton: on rows that kernels hold in registers and,
for FlashAttention, of whole tensors.

Every row of a tile is as wide as the next power of two from the head size D on, zeros behind it;
STAGES, the logarithm of the channels that are mixed, and FACTOR come from :func:`constants`.
"""

from __future__ import annotations

from functools import cache as memoize

import torch
import triton
import triton.language as tl

from kvq_plugin import rotation
from kvq_plugin.kernels import launch
from kvq_plugin.kernels.codec import bits_float, to_output, widen

_LIMIT = tl.constexpr(rotation.LIMIT)
#: Elements of one program of the kernel below, and its warps.
ELEMENTS, WARPS = 1024, 4


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
def turn(x, channel, ROWS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
         FACTOR: tl.constexpr):  # fmt: skip
    """fp32 ``x [ROWS, WIDTH]``, columns *channel*, rotated."""
    x = tl.where(x > _LIMIT, _LIMIT, tl.where(x < -_LIMIT, -_LIMIT, x))  # a NaN stays
    x *= (_signs(channel) * FACTOR)[None, :]
    for stage in tl.static_range(STAGES):
        x = _mix(x, ROWS, WIDTH, 1 << stage)
    return x


@triton.jit
def turn_back(x, channel, ROWS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
              FACTOR: tl.constexpr):  # fmt: skip
    """The inverse of :func:`turn`, up to rounding."""
    for stage in tl.static_range(STAGES):
        x = _mix(x, ROWS, WIDTH, 1 << stage)
    return x * (_signs(channel) * FACTOR)[None, :]


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


@triton.jit(do_not_specialize=("num_seqs", "tokens"))
def rotate_kernel(
    source, target, query_start, num_seqs, tokens, heads,
    source_stride_t, source_stride_h, target_stride_t, target_stride_h,
    D: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr, FACTOR: tl.constexpr,
    INVERSE: tl.constexpr, ROWS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Grid ``ceil(tokens * heads / ROWS)``. With *query_start*, rows of no sequence are left
    alone."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, head = row // heads, row % heads
    keep = token < tokens
    if query_start is not None:
        first, last = tl.load(query_start), tl.load(query_start + num_seqs)
        keep = keep & (token >= first) & (token < last)
    channel = tl.arange(0, WIDTH)
    mask = keep[:, None] & (channel < D)[None, :]
    at = token.to(tl.int64) * source_stride_t + head.to(tl.int64) * source_stride_h
    x = bits_float(widen(tl.load(source + at[:, None] + channel[None, :], mask=mask, other=0.0)))
    if INVERSE:
        x = turn_back(x, channel, ROWS, WIDTH, STAGES, FACTOR)
    else:
        x = turn(x, channel, ROWS, WIDTH, STAGES, FACTOR)
    at = token.to(tl.int64) * target_stride_t + head.to(tl.int64) * target_stride_h
    x = to_output(x, target.dtype.element_ty, INTERPRETED)
    tl.store(target + at[:, None] + channel[None, :], x, mask=mask)


@memoize
def constants(head_size: int) -> dict:
    """``constexpr`` arguments: STAGES, and the FACTOR of :func:`turn` and :func:`turn_back`."""
    size = 2.0 ** -rotation.exponent(head_size)
    return {
        "STAGES": rotation.width(head_size).bit_length() - 1,
        "TURN": size,
        "TURN_BACK": size * rotation.gain(head_size),
    }


@memoize
def kernel_constants(head_size: int, inverse: bool) -> dict:
    """The ``constexpr`` arguments of :func:`rotate_kernel`, INTERPRETED excepted."""
    width, chosen = triton.next_power_of_2(head_size), constants(head_size)
    return {
        "D": head_size,
        "WIDTH": width,
        "STAGES": chosen["STAGES"],
        "FACTOR": chosen["TURN_BACK" if inverse else "TURN"],
        "INVERSE": inverse,
        "ROWS": ELEMENTS // width,
    }


def _run(source, target, query_start, num_seqs: int, inverse: bool) -> None:
    tokens, heads, head_size = source.shape
    if not source.numel():
        return
    chosen = kernel_constants(head_size, inverse)
    with launch.on_device_of(source):
        rotate_kernel[(triton.cdiv(tokens * heads, chosen["ROWS"]),)](
            source, target, query_start, num_seqs, tokens, heads, *source.stride()[:2],
            *target.stride()[:2], **chosen, INTERPRETED=launch.interpreted(), num_warps=WARPS,
            enable_fp_fusion=False,
        )  # fmt: skip


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rows ``[T, H, D]`` of any dtype and strides, D contiguous -> rotated, fp32 and contiguous."""
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    _run(x, out, None, 0, inverse=False)
    return out


def unrotate(
    x: torch.Tensor, out: torch.Tensor, query_start_loc: torch.Tensor, num_seqs: int
) -> None:
    """Rows of *x* ``[T, H, D]`` fp32 that belong to a sequence, rotated back, into *out*."""
    _run(x, out, query_start_loc, num_seqs, inverse=True)
