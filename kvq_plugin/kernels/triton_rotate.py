"""The rotation of :mod:`kvq_plugin.rotation` before and after Triton's kernels.

A launch for each of q, the output, new K and new V, through a copy of the rows in fp32: 8 bytes of
traffic more for each element of q and of the output, where the cache itself is read at half a byte
per element and token. Small beside a context of a few hundred tokens; the launches are not, in a
step that is not captured in a graph. The CUDA C++ kernels rotate within theirs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvq_plugin import rotation
from kvq_plugin.kernels import launch
from kvq_plugin.kernels.codec import bits_float, to_output, widen

_LIMIT = tl.constexpr(rotation.LIMIT)
#: Elements of one program, and its warps.
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
def rotate_kernel(
    source, target, query_start, num_seqs, tokens, heads,
    source_stride_t, source_stride_h, target_stride_t, target_stride_h,
    D: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr, FACTOR: tl.constexpr,
    INVERSE: tl.constexpr, ROWS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Grid ``ceil(tokens * heads * (D / WIDTH) / ROWS)``, WIDTH = 2**STAGES channels of a row
    each. With *query_start*, rows of no sequence are left alone."""
    PARTS: tl.constexpr = D // WIDTH
    item = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = item // PARTS
    token, head = row // heads, row % heads
    keep = token < tokens
    if query_start is not None:
        first, last = tl.load(query_start), tl.load(query_start + num_seqs)
        keep = keep & (token >= first) & (token < last)
    channel = (item % PARTS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    at = token.to(tl.int64) * source_stride_t + head.to(tl.int64) * source_stride_h
    x = tl.load(source + at[:, None] + channel, mask=keep[:, None], other=0.0)
    x = bits_float(widen(x))
    factor = _signs(channel) * FACTOR
    if not INVERSE:
        x = tl.where(x > _LIMIT, _LIMIT, tl.where(x < -_LIMIT, -_LIMIT, x))  # a NaN stays
        x *= factor
    for stage in tl.static_range(STAGES):
        x = _mix(x, ROWS, WIDTH, 1 << stage)
    if INVERSE:
        x *= factor
    at = token.to(tl.int64) * target_stride_t + head.to(tl.int64) * target_stride_h
    x = to_output(x, target.dtype.element_ty, INTERPRETED)
    tl.store(target + at[:, None] + channel, x, mask=keep[:, None])


def constants(head_size: int, inverse: bool) -> dict:
    """The ``constexpr`` arguments of :func:`rotate_kernel`, INTERPRETED excepted."""
    width = rotation.width(head_size)
    size = 2.0 ** -rotation.exponent(head_size)
    return {
        "D": head_size,
        "WIDTH": width,
        "STAGES": width.bit_length() - 1,
        "FACTOR": size * rotation.gain(head_size) if inverse else size,
        "INVERSE": inverse,
        "ROWS": ELEMENTS // width,
    }


def _run(source, target, query_start, num_seqs: int, inverse: bool) -> None:
    tokens, heads, head_size = source.shape
    if not source.numel():
        return
    chosen = constants(head_size, inverse)
    items = tokens * heads * (head_size // chosen["WIDTH"])
    with launch.on_device_of(source):
        rotate_kernel[(triton.cdiv(items, chosen["ROWS"]),)](
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
