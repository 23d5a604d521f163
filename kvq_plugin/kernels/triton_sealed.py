"""Attention over formats with recent rows: sealed groups, the sequence's first row, recent rows.

A tile is one group, so that K's scales, one a channel and group, are a vector beside it. K is
decoded with them, to fp16: a quarter of it, because K may be beyond fp16's range. V's token scales
go onto the probabilities as in ``triton_attend.py``; scales of a group of channels go into V, where
values have both signs (see ``INT4_CENTER`` in ``codec.py``).

Int8 rows, the first one and recent ones, are tiles of the same length, loaded in the order of the
sealed codes' fields, for the same q and the same sums. All tiles of a sequence are one list, sealed
ones first, of which splits take shares.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvq_plugin import formats
from kvq_plugin.kernels.codec import (
    INT4,
    INT4_CENTER,
    INT8,
    bits_float,
    decode,
    decode_field,
)
from kvq_plugin.kernels.triton_rotate import channels_of, fields_of, rotate, unrotate
from kvq_plugin.kernels.triton_softmax import (
    HEADROOM,
    LOG2E,
    bent,
    high_half,
    load_query,
    locate,
    low_half,
    normal_unit,
    operand,
    rows_of,
    total_of,
    weigh,
    words,
    write,
)

#: Of a group.
TOKENS = tl.constexpr(formats.GROUP)
#: What scales of K, and of V's groups of channels, are multiplied by.
UNIT = tl.constexpr(0.25)


@triton.jit
def _sealed_before(position, RECENT: tl.constexpr):
    return tl.maximum(position + 1 - RECENT, 0) // TOKENS * TOKENS


@triton.jit
def _channels(at, FIELD: tl.constexpr, FIELDS: tl.constexpr):
    """Channel of field FIELD of byte *at* of a row, of words of 4 * FIELDS channels."""
    return at // 4 * (4 * FIELDS) + 4 * FIELD + at % 4


@triton.jit
def _lite(word):
    """UNIT times scales and mins, as halves, of lite words (int16)."""
    scale = ((word & 0xFF) << 7).to(tl.float16, bitcast=True) * UNIT
    return scale, (word >> 8).to(tl.float16) * (scale * 0.5)


@triton.jit
def _scaled(codes, scale, minimum, EXACT_DOT: tl.constexpr):
    """codes * scale + minimum in fp16, rounded once."""
    if EXACT_DOT:  # the interpreter would round twice
        wide = codes.to(tl.float32) * scale.to(tl.float32) + minimum.to(tl.float32)
        return wide.to(tl.float16).to(tl.float32)
    scale, minimum = tl.broadcast_to(scale, codes.shape), tl.broadcast_to(minimum, codes.shape)
    return tl.fma(codes, scale, minimum)


@triton.jit
def _field(c, third, FIELD: tl.constexpr, FIELDS: tl.constexpr, ISA: tl.constexpr,
           IN_PLACE: tl.constexpr):  # fmt: skip
    if FIELDS == 2:
        return decode(c, INT4, ISA, FIELD == 1, IN_PLACE)
    else:
        return decode_field(c, third, FIELD, ISA, IN_PLACE)


@triton.jit
def _key(c, third, scales, at, FIELD: tl.constexpr, FIELDS: tl.constexpr, LITE: tl.constexpr,
         D: tl.constexpr, ISA: tl.constexpr, EXACT_DOT: tl.constexpr):  # fmt: skip
    """UNIT times K of one field, ``[W, TOKENS]``; *scales*: the address of the group's words."""
    channel = _channels(at, FIELD, FIELDS)
    inside = channel < D
    if LITE:
        word = tl.load(scales.to(tl.pointer_type(tl.int16), bitcast=True) + channel, mask=inside,
                       other=0)  # fmt: skip
        scale, minimum = _lite(word)
    else:
        word = tl.load(scales.to(tl.pointer_type(tl.int32), bitcast=True) + channel, mask=inside,
                       other=0)  # fmt: skip
        scale = word.to(tl.int16).to(tl.float16, bitcast=True) * UNIT
        minimum = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True) * UNIT
    codes = _field(c, third, FIELD, FIELDS, ISA, False)
    return _scaled(codes, scale[:, None], minimum[:, None], EXACT_DOT)


@triton.jit
def _value(c, scale, minimum, FIELD: tl.constexpr, FIELDS: tl.constexpr, ISA: tl.constexpr,
           EXACT_DOT: tl.constexpr):  # fmt: skip
    """V of one field, ``[TOKENS, W]``: codes (less INT4_CENTER), or UNIT times values."""
    codes = _field(c, None, FIELD, FIELDS, ISA, True)
    if scale is not None:
        return _scaled(codes, scale, minimum, EXACT_DOT)
    return operand(codes, EXACT_DOT)


@triton.jit
def _int8(rows, seen, at, FIELD: tl.constexpr, FIELDS: tl.constexpr, D: tl.constexpr,
          TURNED: tl.constexpr, ISA: tl.constexpr, EXACT_DOT: tl.constexpr):  # fmt: skip
    """Int8 codes of one field of *rows*: ``[W, TOKENS]`` if TURNED (K), else ``[TOKENS, W]``."""
    channel = _channels(at, FIELD, FIELDS)
    inside = channel < D
    if TURNED:
        c = tl.load(rows[None, :] + channel[:, None], mask=seen[None, :] & inside[:, None], other=0)
    else:
        c = tl.load(rows[:, None] + channel[None, :], mask=seen[:, None] & inside[None, :], other=0)
    return operand(decode(c, INT8, ISA, False, not TURNED), EXACT_DOT)


@triton.jit
def _hidden(s, place, n, seen, window, WINDOW: tl.constexpr):
    """Scores of what rows at *place* may not see as -inf; *seen* ``[M, N]`` is the range's say."""
    away = place[:, None] - n[None, :]
    visible = seen & (away >= 0)
    if WINDOW:
        visible = visible & (away < window)
    return tl.where(visible, s, float("-inf")), visible


@triton.jit(
    do_not_specialize=("window", "num_seqs", "table_stride", "recent_table_stride"),
    do_not_specialize_on_alignment=("block_table", "recent_table", "seq_lens", "query_start"),
)
def sealed_kernel(
    out, query, cache, recent, block_table, recent_table, seq_lens, query_start, alibi, sinks,
    partial, partial_lse, scale, softcap, window, num_seqs,
    out_stride_t, out_stride_h, query_stride_t, query_stride_h, block_stride, head_stride,
    recent_block_stride, recent_head_stride, table_stride, recent_table_stride,
    PAGE: tl.constexpr, RECENT_PAGE: tl.constexpr, ROWS: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, SPLIT: tl.constexpr, MIN_TILES: tl.constexpr, ISA: tl.constexpr,
    EXACT_DOT: tl.constexpr,
):  # fmt: skip
    """Grid and results as of ``triton_attend.attend_kernel``."""
    K: tl.constexpr = PAGE.k
    V: tl.constexpr = PAGE.v
    NEW_K: tl.constexpr = RECENT_PAGE.k
    NEW_V: tl.constexpr = RECENT_PAGE.v
    D: tl.constexpr = PAGE.d
    WIDTH: tl.constexpr = PAGE.width
    BLOCK_M: tl.constexpr = ROWS.block_m
    FIELDS: tl.constexpr = 8 // V.bits
    WORD: tl.constexpr = WIDTH // FIELDS
    seq, start, count, first, length = locate(query_start, seq_lens, num_seqs, ROWS)
    if first >= count:
        return
    kv_head, row, token, head, real = rows_of(first, count, ROWS)
    place = length - count + token
    bound = _sealed_before(place, PAGE.recent)

    # Tiles that any row sees: groups from `group` on, the first row, recent ones from `fresh` on.
    lowest = length - count + first
    highest = length - count + tl.minimum(first + ROWS.block_q, count) - 1
    begin = 0
    if WINDOW:
        begin = tl.maximum(lowest - window + 1, 0)
    group, last_bound = begin // TOKENS, _sealed_before(highest, PAGE.recent)
    sealed = tl.maximum(last_bound // TOKENS - group, 0)
    firsts = ((begin == 0) & (last_bound > 0)).to(tl.int32)
    fresh = tl.maximum(begin, _sealed_before(lowest, PAGE.recent)) // TOKENS
    tile_begin, tile_end = 0, sealed + firsts + tl.cdiv(highest + 1, TOKENS) - fresh
    if SPLIT:
        share = tl.maximum(tl.cdiv(tile_end, tl.num_programs(2)), MIN_TILES)
        tile_begin = tl.program_id(2) * share
        tile_end = tl.minimum(tile_end, tile_begin + share)

    channel, at = tl.arange(0, WIDTH), tl.arange(0, WORD)
    rows = (start + token).to(tl.int64) * query_stride_t + head.to(tl.int64) * query_stride_h
    q = load_query(query, rows, None, channel, D, real)
    q = rotate(q, channel, BLOCK_M, WIDTH, PAGE)
    unit, inverse = normal_unit(tl.max(tl.abs(q), 1))
    queries = fields_of((q * inverse[:, None]).to(tl.float16), BLOCK_M, WIDTH)
    if FIELDS == 4:
        q0, q2 = fields_of(queries[0], BLOCK_M, WIDTH // 2)
        q1, q3 = fields_of(queries[1], BLOCK_M, WIDTH // 2)
        queries = (q0, q1, q2, q3)
    queries = [operand(x, EXACT_DOT) for x in queries]
    factor = unit * (scale if SOFTCAP else scale * LOG2E)
    slope = None
    if alibi is not None:
        slope = tl.load(alibi + head, mask=real, other=0.0) * LOG2E
    nothing = tl.zeros([BLOCK_M, WORD], tl.float32)
    sums = (nothing,) * FIELDS
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sink = None
    if sinks is not None:
        sink = tl.load(sinks + head, mask=real, other=float("-inf")) * LOG2E
        if SPLIT:  # a sink counts once
            sink = tl.where(tl.program_id(2) == 0, sink, float("-inf"))
        top = sink - HEADROOM
    mass = tl.zeros([BLOCK_M], tl.float32)
    minima = tl.zeros([BLOCK_M], tl.float32)
    table = block_table + seq.to(tl.int64) * table_stride
    fresh_table = recent_table + seq.to(tl.int64) * recent_table_stride
    pages = cache + kv_head.to(tl.int64) * head_stride
    fresh_pages = recent + kv_head.to(tl.int64) * recent_head_stride
    t = tl.arange(0, TOKENS)
    inside = at < V.row  # a plane of K is as wide

    for tile in range(tile_begin, tl.minimum(tile_end, sealed)):
        n = (group + tile) * TOKENS + t
        block = tl.load(table + (group + tile) * TOKENS // PAGE.size)
        page = pages + block.to(tl.int64) * block_stride
        position = (group + tile) * TOKENS % PAGE.size
        k_rows = page + (K.codes + (position + t) * K.row)
        c = tl.load(k_rows[None, :] + at[:, None], mask=inside[:, None], other=0)
        third = None
        if K.bits == 3:  # words of both planes end at a word of eight bytes of the first
            high = D // 4 + at // 8 * 4 + at % 4
            third = tl.load(k_rows[None, :] + high[:, None], mask=inside[:, None], other=0)
            third = third >> (at // 4 % 2 * 4).to(tl.uint8)[:, None]
        scales = page + (K.metadata + position // TOKENS * (D * (2 if K.lite else 4)))
        s = tl.zeros([BLOCK_M, TOKENS], tl.float32)
        for f in tl.static_range(FIELDS):
            k = _key(c, third, scales, at, f, FIELDS, K.lite, D, ISA, EXACT_DOT)
            s = tl.dot(queries[f], k, s)
        away = place[:, None] - n[None, :]
        s = bent(s * (factor * (1.0 / UNIT))[:, None], away, slope, softcap, SOFTCAP)
        v_scale, v_words, v_minimum = None, None, None
        if V.lite:
            # V's words of the first group of channels tell whether a token is NaN.
            part = tl.arange(0, WIDTH // TOKENS)
            lines = page + (V.metadata + position // TOKENS * (2 * D))
            lines = lines.to(tl.pointer_type(tl.int16), bitcast=True)
            bad = (tl.load(lines + t) & 0xFF) > 0xF7
            word = tl.load(lines + part[None, :] * TOKENS + t[:, None],
                           mask=(part < D // TOKENS)[None, :], other=0)  # fmt: skip
            v_words, v_minimum = _lite(tl.where(bad[:, None], 0, word).to(tl.int16))
            s = tl.where(bad[None, :], float("nan"), s)
            shape: tl.constexpr = [TOKENS, WIDTH // TOKENS, 8]
            v_words = tl.reshape(tl.broadcast_to(v_words[:, :, None], shape), [TOKENS, WORD])
            v_minimum = tl.reshape(tl.broadcast_to(v_minimum[:, :, None], shape), [TOKENS, WORD])
        else:
            word = words(page, V.metadata, position + t, t >= 0)
            v_scale = low_half(word)
        old = real[:, None] & (n >= 1)[None, :] & (n[None, :] < bound[:, None])
        s, visible = _hidden(s, place, n, old, window, WINDOW)
        p, shrink, top, mass = weigh(s, v_scale, top, mass)
        if not V.lite:  # a hidden token's scale may be NaN, and 0 * NaN is NaN
            offset = high_half(word) + INT4_CENTER * v_scale
            lift = tl.where(visible, p * offset[None, :], 0.0)
            minima = minima * shrink + tl.sum(lift, 1)
            p = tl.where(visible, p * v_scale[None, :], 0.0)
        p = operand(p.to(tl.float16), EXACT_DOT)
        v_rows = page + (V.codes + (position + t) * V.row)
        c = tl.load(v_rows[:, None] + at[None, :], mask=inside[None, :], other=0)
        for f in tl.static_range(FIELDS):
            v = _value(c, v_words, v_minimum, f, FIELDS, ISA, EXACT_DOT)
            # The field at hand leaves at the front, and comes in at the end.
            sums = sums[1:] + (tl.dot(p, v, sums[0] * shrink[:, None]),)

    for tile in range(tl.maximum(tile_begin, sealed), tile_end):
        nth = tile - sealed - firsts
        lone = nth < 0  # the first row
        from_token = tl.where(lone, 0, (fresh + nth) * TOKENS)
        n, position = from_token + t, from_token % RECENT_PAGE.size
        block = tl.load(tl.where(lone, table, fresh_table + from_token // RECENT_PAGE.size))
        block = block.to(tl.int64)
        page = tl.where(lone, pages + (block * block_stride + PAGE.first),
                        fresh_pages + block * recent_block_stride)  # fmt: skip
        seen = tl.where(lone, n == 0, (n >= begin) & (n <= highest))
        k_rows = page + tl.where(lone, 0, NEW_K.codes + position * D) + t * D
        s = tl.zeros([BLOCK_M, TOKENS], tl.float32)
        for f in tl.static_range(FIELDS):
            k = _int8(k_rows, seen, at, f, FIELDS, D, True, ISA, EXACT_DOT)
            s = tl.dot(queries[f], k, s)
        k_scales = tl.where(lone, 2 * D, NEW_K.metadata + position * 4)
        v_scales = tl.where(lone, 2 * D + 4, NEW_V.metadata + position * 4)
        s *= bits_float(words(page + k_scales, 0, t, seen))[None, :]
        v_scale = bits_float(words(page + v_scales, 0, t, seen))
        away = place[:, None] - n[None, :]
        s = bent(s * factor[:, None], away, slope, softcap, SOFTCAP)
        mine = real[:, None] & seen[None, :]
        mine = mine & ((n[None, :] < bound[:, None]) == lone)
        s, visible = _hidden(s, place, n, mine, window, WINDOW)
        p, shrink, top, mass = weigh(s, v_scale, top, mass)
        minima *= shrink
        p = tl.where(visible, p * v_scale[None, :], 0.0)
        if V.lite:
            p *= UNIT
        p = operand(p.to(tl.float16), EXACT_DOT)
        v_rows = page + tl.where(lone, D, NEW_V.codes + position * D) + t * D
        for f in tl.static_range(FIELDS):
            v = _int8(v_rows, seen, at, f, FIELDS, D, False, ISA, EXACT_DOT)
            sums = sums[1:] + (tl.dot(p, v, sums[0] * shrink[:, None]),)

    origin, total = total_of(top, mass, sink)
    inverse = tl.where(total == 0.0, 0.0, 1.0 / total)
    low, high = sums[0], sums[1]
    if FIELDS == 4:
        low = channels_of(low, sums[2], BLOCK_M, WIDTH // 2)
        high = channels_of(high, sums[3], BLOCK_M, WIDTH // 2)
    result = channels_of(low, high, BLOCK_M, WIDTH)
    if V.lite:
        result *= 1.0 / UNIT
    else:
        result += minima[:, None]
    result = unrotate(result * inverse[:, None], channel, BLOCK_M, WIDTH, PAGE)
    rows = (start + token).to(tl.int64) * out_stride_t + head.to(tl.int64) * out_stride_h
    write(result, origin, total, out, partial, partial_lse, rows, row, real, channel, D, BLOCK_M,
          SPLIT, EXACT_DOT)  # fmt: skip
