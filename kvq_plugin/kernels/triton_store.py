"""Quantize on write: new K and V rows into pages of layout ``gpu-v1``.

A program quantizes BLOCK_T tokens of one kv head, K or V. All arithmetic that decides a byte is
the reference's, operation by operation; reductions are minima and maxima, whose order is free.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvq_plugin.calls import Store, statics
from kvq_plugin.codes import AMAX_FLOOR, FP16_MAX
from kvq_plugin.kernels import launch
from kvq_plugin.kernels.codec import (
    INT4,
    NAN_BITS,
    bits_float,
    encode,
    float_bits,
    is_nan_bits,
    round_to_int,
    widen,
)
from kvq_plugin.kernels.pages import page_of
from kvq_plugin.kernels.triton_rotate import fields_of, rotate

_AMAX_FLOOR = tl.constexpr(AMAX_FLOOR)
_FP16_MAX = tl.constexpr(FP16_MAX)
_FP32_MAX = tl.constexpr(torch.finfo(torch.float32).max)


@triton.jit
def _fields(u, inverse, zero, dims, valid, HAS_ZERO: tl.constexpr, CODE: tl.constexpr):
    """Static scales: ``u [T, W]`` fp32 bits of the columns *dims* -> fields."""
    factor = tl.load(inverse + dims, mask=valid, other=1.0)[None, :]
    y = bits_float(u) * factor
    if HAS_ZERO:
        y = tl.where(y == y, y, 0.0)
        y = tl.minimum(tl.maximum(y, -508.0), 508.0)  # 4 * 127, as the reference
        y = round_to_int(y).to(tl.float32) + tl.load(zero + dims, mask=valid, other=0.0)[None, :]
    # The product of a NaN loses its sign on a GPU; a positive scale keeps that of any other.
    return encode(tl.where(is_nan_bits(u) & (not HAS_ZERO), u, float_bits(y)), CODE)


@triton.jit
def _finite(u):
    """fp32 with NaN as 0 and infinities as the largest finite value."""
    x = bits_float(tl.where(is_nan_bits(u), 0, u))
    return tl.minimum(tl.maximum(x, -_FP32_MAX), _FP32_MAX)


@triton.jit
def _store_stream(
    x, cache, slots, inverse, zero, tokens, num_slots,
    stride_t, stride_h, block_stride, head_stride,
    PART: tl.constexpr, PAGE: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """4-bit codes are two to a byte."""
    CODE: tl.constexpr = PART.code
    PACKED: tl.constexpr = CODE == INT4
    D: tl.constexpr = PAGE.d
    WIDTH: tl.constexpr = PAGE.width
    tl.static_assert(PART.dynamic or not PART.rotated)
    head = tl.program_id(1)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    slot = tl.load(slots + token, mask=token < tokens, other=-1)
    keep = (slot >= 0) & (slot < num_slots)  # never a byte outside of the cache
    dims = tl.arange(0, WIDTH)
    rows = x + token.to(tl.int64)[:, None] * stride_t + head.to(tl.int64) * stride_h
    low = widen(tl.load(rows + dims[None, :], mask=keep[:, None] & (dims < D)[None, :], other=0.0))
    if PART.rotated:
        low = float_bits(rotate(bits_float(low), dims, BLOCK_T, WIDTH, PAGE))
    at = tl.arange(0, WIDTH // 2 if PACKED else WIDTH)
    inside = at < PART.row
    position = slot % PAGE.size
    page = cache + (slot // PAGE.size) * block_stride + head.to(tl.int64) * head_stride
    if not PART.dynamic:
        HAS_ZERO: tl.constexpr = zero is not None
        fields = _fields(
            low, inverse + head * D, zero + head * D if HAS_ZERO else None, dims, inside, HAS_ZERO,
            CODE,
        )  # fmt: skip
    elif PACKED:
        x0, x1 = fields_of(bits_float(low), BLOCK_T, WIDTH)
        low, high = float_bits(x0), float_bits(x1)
        poison = tl.max((is_nan_bits(low) | is_nan_bits(high)).to(tl.int32), 1) > 0
        x0 = tl.minimum(tl.maximum(_finite(low), -_FP16_MAX), _FP16_MAX)
        x1 = tl.minimum(tl.maximum(_finite(high), -_FP16_MAX), _FP16_MAX)
        # Adding 0.0 makes -0 into +0, which the order of a reduction would decide otherwise.
        least = tl.min(tl.where(inside[None, :], tl.minimum(x0, x1), _FP16_MAX), 1) + 0.0
        most = tl.max(tl.where(inside[None, :], tl.maximum(x0, x1), -_FP16_MAX), 1) + 0.0
        scale = ((most - least) * PART.qmax_inverse).to(tl.float16)
        minimum = least.to(tl.float16)
        step = scale.to(tl.float32)
        # The codes use the scale and min as stored.
        one = tl.full(step.shape, 1.0, tl.float32)
        factor = tl.where(step > 0, tl.div_rn(one, tl.where(step > 0, step, one)), 0.0)
        base = minimum.to(tl.float32)[:, None]
        fields = encode(float_bits((x0 - base) * factor[:, None]), CODE)
        fields |= encode(float_bits((x1 - base) * factor[:, None]), CODE) << 4
        word = scale.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        word |= minimum.to(tl.int16, bitcast=True).to(tl.int32) << 16
        word = tl.where(poison, 0x7E007E00, word)
    else:
        poison = tl.max(is_nan_bits(low).to(tl.int32), 1) > 0
        y = _finite(low)
        amax = tl.maximum(tl.max(tl.abs(y), 1), _AMAX_FLOOR)
        factor = tl.div_rn(tl.full(amax.shape, PART.qmax, tl.float32), amax)
        fields = encode(float_bits(y * factor[:, None]), CODE)
        word = tl.where(poison, NAN_BITS, float_bits(amax * PART.qmax_inverse))
    tl.store(
        page[:, None] + PART.codes + position[:, None] * PART.row + at[None, :],
        fields.to(tl.uint8),
        mask=keep[:, None] & inside[None, :],
    )
    if PART.dynamic:
        words = (page + PART.metadata + position * 4).to(tl.pointer_type(tl.int32), bitcast=True)
        tl.store(words, word, mask=keep)


@triton.jit(do_not_specialize=("tokens", "num_slots"), do_not_specialize_on_alignment=("slots",))
def store_kernel(
    key, value, cache, slots, key_inverse, key_zero, value_inverse, value_zero,
    tokens, num_slots, key_stride_t, key_stride_h, value_stride_t, value_stride_h,
    block_stride, head_stride, PAGE: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Grid ``(ceil(tokens / BLOCK_T), kv heads, 2)``; the last axis is K or V."""
    K: tl.constexpr = PAGE.k
    V: tl.constexpr = PAGE.v
    if tl.program_id(2) == 0:
        _store_stream(
            key, cache, slots, key_inverse, key_zero, tokens, num_slots,
            key_stride_t, key_stride_h, block_stride, head_stride, K, PAGE, BLOCK_T,
        )  # fmt: skip
    else:
        _store_stream(
            value, cache, slots, value_inverse, value_zero, tokens, num_slots,
            value_stride_t, value_stride_h, block_stride, head_stride, V, PAGE, BLOCK_T,
        )  # fmt: skip


def store(call: Store) -> None:
    """:func:`kvq_plugin.ops.store` by Triton, for a checked call without recent rows.

    The data is never looked at on the host: slots outside of the cache are skipped, where the
    CPU's operator raises.
    """
    launch.check(call)
    key, value, cache, slots = call.key, call.value, call.cache, call.slot_mapping
    tokens, heads, head_size = slots.shape[0], *key.shape[1:]
    if not tokens or not heads:
        return
    choice = launch.store_choice(tokens)
    grid = (launch.cdiv(tokens, choice.block_t), heads, 2)
    with launch.on_device_of(cache):
        store_kernel[grid](
            key, value, cache, slots, *statics(call, "inverse"),
            tokens, cache.shape[0] * cache.shape[2],
            key.stride(0), key.stride(1), value.stride(0), value.stride(1),
            cache.stride(0), cache.stride(1),
            PAGE=page_of(call.format, head_size, cache.shape[2]),
            BLOCK_T=choice.block_t, num_warps=choice.warps, num_stages=1,
            enable_fp_fusion=False,
        )  # fmt: skip
