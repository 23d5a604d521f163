"""Sealing in Triton: groups of rows of the recent cache become few bits of the sealed one, in the
bytes of :mod:`kvq_plugin.sealed`.

Which groups are complete, the slots on the device tell. A program looks at BLOCK_T tokens of a kv
head and seals the groups that end there, K or V. As in ``triton_store.py``, all arithmetic that
decides a byte is the reference's, and reductions are minima and maxima.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvq_plugin import codes, formats
from kvq_plugin.calls import Store
from kvq_plugin.kernels import launch
from kvq_plugin.kernels.codec import (
    FP16_MAX,
    LITE_SCALE,
    bits_float,
    encode,
    float_bits,
    int_to_float,
    is_nan_bits,
    round_to_int,
)
from kvq_plugin.kernels.pages import page_of

GROUP = tl.constexpr(formats.GROUP)
_LITE_STEP = tl.constexpr(codes.LITE_STEP)
_LITE_LEAST = tl.constexpr(float(torch.tensor(1.0 / codes.LITE_RANGE)))


@triton.jit
def _scales(low, high, poison, QMAX_INVERSE: tl.constexpr, LITE: tl.constexpr):
    """The page's word, and the min and the inverse scale that it stands for."""
    low += 0.0  # whether a -0 is found would depend on the order of looking
    step = (high + 0.0 - low) * QMAX_INVERSE
    if LITE:
        byte = encode(float_bits(tl.maximum(step, tl.abs(low) * _LITE_LEAST)), LITE_SCALE)
        scale = (byte << 7).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        half = step.to(tl.float16)
        scale = half.to(tl.float32)
    one = tl.full(scale.shape, 1.0, tl.float32)
    inverse = tl.where(scale > 0, tl.div_rn(one, tl.where(scale > 0, scale, one)), 0.0)
    if LITE:
        steps = low * inverse * (1.0 / _LITE_STEP)
        steps = round_to_int(tl.minimum(tl.maximum(steps, -128.0), 127.0))
        base = int_to_float(steps) * (scale * _LITE_STEP)
        word = tl.where(poison, 0xFF, byte | (steps << 8)).to(tl.int16)
    else:
        minimum = low.to(tl.float16)
        base = minimum.to(tl.float32)
        word = half.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        word |= minimum.to(tl.int16, bitcast=True).to(tl.int32) << 16
        word = tl.where(poison, 0x7E007E00, word)
    return word, base, inverse


@triton.jit
def _save_plane(row, fields, inside, WIDTH: tl.constexpr, BITS: tl.constexpr, LOW: tl.constexpr):
    """Bits ``[LOW, LOW + BITS)`` of ``fields [GROUP, WIDTH]`` to *inside* bytes from each *row* on,
    as words of 32 / BITS channels: channel i of a word in byte ``i % 4``, field ``i // 4``."""
    PER: tl.constexpr = 8 // BITS
    part = (fields >> LOW) & ((1 << BITS) - 1)
    part = tl.reshape(part, [GROUP, WIDTH // (4 * PER), PER, 4])
    part = tl.sum(part << (tl.arange(0, PER) * BITS)[None, None, :, None], 2)
    at = tl.arange(0, WIDTH // PER)
    part = tl.reshape(part, [GROUP, WIDTH // PER]).to(tl.uint8)
    tl.store(row[:, None] + at[None, :], part, mask=(at < inside)[None, :])


@triton.jit
def _seal(
    source, position, page, within, first_codes, first_scale, NEW: tl.constexpr,
    PART: tl.constexpr, CHANNELS: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """One group of K (CHANNELS: a scale for each) or of V (a scale for each of a token's parts),
    from rows that are NEW to what is PART; its first row is also copied, where it is a page's."""
    D: tl.constexpr = PAGE.d
    WIDTH: tl.constexpr = PAGE.width
    BITS: tl.constexpr = PART.bits
    LITE: tl.constexpr = PART.lite
    codes_at, scales_at = NEW.codes + position * D, NEW.metadata + position * 4
    t, c = tl.arange(0, GROUP), tl.arange(0, WIDTH)
    real = c < D
    raw = tl.load(source + codes_at + t[:, None] * D + c[None, :], mask=real[None, :], other=128)
    scale_bits = tl.load((source + scales_at).to(tl.pointer_type(tl.int32), bitcast=True) + t)
    if within == 0:
        mine = real[None, :] & (t == 0)[:, None]
        tl.store(page + first_codes + t[:, None] * 0 + c[None, :], raw, mask=mine)
        at = (page + first_scale).to(tl.pointer_type(tl.int32), bitcast=True)
        tl.store(at + t, scale_bits, mask=t == 0)
    x = int_to_float(raw.to(tl.int32) - 128) * bits_float(scale_bits)[:, None]
    bad = is_nan_bits(float_bits(x))
    x = tl.minimum(tl.maximum(tl.where(bad, 0.0, x), -FP16_MAX), FP16_MAX)
    words = page + PART.metadata
    if CHANNELS:
        heard = ((t > 0) | (within > 0))[:, None]  # a page's first row has no say
        low = tl.min(tl.where(heard, x, FP16_MAX), 0)
        high = tl.max(tl.where(heard, x, -FP16_MAX), 0)
        poison = tl.max((bad & heard).to(tl.int32), 0) > 0
        word, base, inverse = _scales(low, high, poison, PART.qmax_inverse, LITE)
        base, inverse = base[None, :], inverse[None, :]
        at, mask = within // GROUP * D + c, real
    else:
        PARTS: tl.constexpr = WIDTH // GROUP if LITE else 1
        shape: tl.constexpr = [GROUP, PARTS, WIDTH // PARTS]
        x, heard = (
            tl.reshape(x, shape),
            tl.reshape(tl.broadcast_to(real[None, :], raw.shape), shape),
        )
        low = tl.min(tl.where(heard, x, FP16_MAX), 2)
        high = tl.max(tl.where(heard, x, -FP16_MAX), 2)
        poison = tl.max(tl.reshape(bad, shape).to(tl.int32), 2) > 0
        word, base, inverse = _scales(low, high, poison, PART.qmax_inverse, LITE)
        base, inverse = base[:, :, None], inverse[:, :, None]
        part = tl.arange(0, PARTS)[None, :]
        if PARTS == 1:
            at, mask = within + t[:, None] + part, part < 1
        else:
            at = within // GROUP * D + part * GROUP + t[:, None]
            mask = part < D // GROUP
    fields = tl.reshape(encode(float_bits((x - base) * inverse), PART.code), [GROUP, WIDTH])
    tl.store(words.to(tl.pointer_type(word.dtype), bitcast=True) + at, word, mask=mask)
    rows = page + PART.codes + (within + t) * PART.row
    if BITS == 3:
        _save_plane(rows, fields, D // 4, WIDTH, 2, 0)
        _save_plane(rows + D // 4, fields, D // 8, WIDTH, 1, 2)
    else:
        _save_plane(rows, fields, PART.row, WIDTH, BITS, 0)


@triton.jit(
    do_not_specialize=("tokens", "num_slots", "num_recent"),
    do_not_specialize_on_alignment=("slots", "recent_slots"),
)
def seal_kernel(
    cache, recent, slots, recent_slots, tokens, num_slots, num_recent,
    block_stride, head_stride, recent_block_stride, recent_head_stride,
    PAGE: tl.constexpr, RECENT_PAGE: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Grid ``(ceil(tokens / BLOCK_T), kv heads, 2)``; the last axis is K or V."""
    K: tl.constexpr = PAGE.k
    V: tl.constexpr = PAGE.v
    NEW_K: tl.constexpr = RECENT_PAGE.k
    NEW_V: tl.constexpr = RECENT_PAGE.v
    D: tl.constexpr = PAGE.d
    FIRST: tl.constexpr = PAGE.first
    head = tl.program_id(1).to(tl.int64)
    i = tl.arange(0, BLOCK_T)
    begin = tl.program_id(0) * BLOCK_T
    slot = tl.load(slots + begin + i, mask=begin + i < tokens, other=-1)
    row = tl.load(recent_slots + begin + i, mask=begin + i < tokens, other=-1)
    last = (slot >= 0) & (slot < num_slots) & (slot % GROUP == GROUP - 1)
    last = last & (row >= 0) & (row < num_recent)
    turns = tl.where(last, i, BLOCK_T)
    at = tl.min(turns, 0)
    while at < BLOCK_T:
        to = tl.load(slots + begin + at)
        source = tl.load(recent_slots + begin + at)
        page = cache + to // PAGE.size * block_stride + head * head_stride
        rows = recent + source // RECENT_PAGE.size * recent_block_stride + head * recent_head_stride
        within = to % PAGE.size // GROUP * GROUP
        position = source % RECENT_PAGE.size // GROUP * GROUP
        if tl.program_id(2) == 0:
            _seal(rows, position, page, within, FIRST, FIRST + 2 * D, NEW_K, K, True, PAGE)
        else:
            _seal(rows, position, page, within, FIRST + D, FIRST + 2 * D + 4, NEW_V, V, False, PAGE)
        turns = tl.where(i == at, BLOCK_T, turns)
        at = tl.min(turns, 0)


def seal(call: Store) -> None:
    """Seal the groups that *call* completes, whose rows are in its recent cache already."""
    launch.check(call)
    cache, recent, tokens = call.cache, call.recent_cache, call.slot_mapping.shape[0]
    if not tokens or not cache.shape[1]:
        return
    choice = launch.store_choice(tokens, launch.SEAL)
    grid = (launch.cdiv(tokens, choice.block_t), cache.shape[1], 2)
    with launch.on_device_of(cache):
        seal_kernel[grid](
            cache, recent, call.slot_mapping, call.recent_slot_mapping, tokens,
            cache.shape[0] * cache.shape[2], recent.shape[0] * recent.shape[2],
            *cache.stride()[:2], *recent.stride()[:2],
            PAGE=page_of(call.format, call.key.shape[2], cache.shape[2]),
            RECENT_PAGE=page_of(call.format.recent, call.key.shape[2], recent.shape[2]),
            BLOCK_T=choice.block_t, num_warps=choice.warps, num_stages=1,
            enable_fp_fusion=False,
        )  # fmt: skip
