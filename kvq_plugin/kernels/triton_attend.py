"""Dequantize on read: paged attention over pages of layout ``gpu-v1``, split over the context.

A program owns a tile of query rows (BLOCK_Q tokens times HEADS query heads of one kv head) and a
range of the context; each K and V tile is loaded and decoded once for all its rows. Nothing is
multiplied per element of the cache. With q normalised per row by a power of two:

* K's static scale goes into q, its token scale and the softmax scale onto the scores;
* V's token scale goes onto the probabilities, its static scale onto the output;
* zero points and minima are rank-1 terms, in fp32.

Products take fp16 operands, in which every code is exact and q and P keep 11 bits; scores,
softmax and sums are fp32. Probabilities are scaled by up to 2**15 to use fp16's range, and the
running maximum includes V's token scale, so that neither can overflow (see :func:`weigh`).

Split ranges follow from ``seq_lens`` on the device; the host only chooses how many splits there
are at most, from shapes. Programs whose range is empty leave a log-sum-exp of -inf behind.
Flash decoding: https://pytorch.org/blog/flash-decoding/
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvq_plugin.kernels.codec import INT4_CENTER, decode, to_output
from kvq_plugin.kernels.triton_rotate import channels_of, fields_of, rotate, unrotate
from kvq_plugin.kernels.triton_softmax import (
    HEADROOM,
    LOG2E,
    bent,
    high_half,
    load_query,
    locate,
    normal_unit,
    operand,
    rows_of,
    token_scale,
    total_of,
    weigh,
    words,
    write,
    zero_dot,
)


# Numbers that change from batch to batch do not make a kernel of their own, nor does the alignment
# of tables, which depends on how many decodes come before the rest.
@triton.jit(
    do_not_specialize=("window", "num_seqs", "table_stride"),
    do_not_specialize_on_alignment=("block_table", "seq_lens", "query_start"),
)
def attend_kernel(
    out, query, cache, block_table, seq_lens, query_start, key_scale, key_zero, value_scale,
    value_zero, alibi, sinks, partial, partial_lse, scale, softcap, window, num_seqs,
    out_stride_t, out_stride_h, query_stride_t, query_stride_h, block_stride, head_stride,
    table_stride,
    PAGE: tl.constexpr, ROWS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, SPLIT: tl.constexpr, MIN_TILES: tl.constexpr, BLOCK_N: tl.constexpr,
    ISA: tl.constexpr, EXACT_DOT: tl.constexpr,
):  # fmt: skip
    """PAGE is a :class:`~kvq_plugin.kernels.pages.Page`, ROWS a
    :class:`~kvq_plugin.kernels.launch.Rows`. Grid ``(blocks of queries, kv heads * ROWS.chunks,
    splits)``.

    With SPLIT, results go to ``partial [blocks, axis 1, splits, ROWS.block_m, PAGE.d]`` and
    ``partial_lse [blocks, axis 1, splits, ROWS.block_m]`` fp32; otherwise to ``out``.
    """
    K: tl.constexpr = PAGE.k
    V: tl.constexpr = PAGE.v
    D: tl.constexpr = PAGE.d
    BLOCK_M: tl.constexpr = ROWS.block_m
    seq, start, count, first, length = locate(query_start, seq_lens, num_seqs, ROWS)
    if first >= count:
        return
    kv_head, row, token, head, real = rows_of(first, count, ROWS)
    place = length - count + token  # of a query in its sequence

    # Context that any row sees, and this program's tiles of it.
    last = length - count + tl.minimum(first + ROWS.block_q, count) - 1
    end = length
    begin = 0
    if CAUSAL:
        end = tl.minimum(end, last + 1)
    if WINDOW:
        begin = tl.maximum(length - count + first - window + 1, 0)
        if not CAUSAL:
            end = tl.minimum(end, last + window)
    tile_begin, tile_end = begin // BLOCK_N, tl.cdiv(tl.maximum(end, 0), BLOCK_N)
    if SPLIT:
        share = tl.cdiv(tl.maximum(tile_end - tile_begin, 0), tl.num_programs(2))
        share = tl.maximum(share, MIN_TILES)
        tile_begin += tl.program_id(2) * share
        tile_end = tl.minimum(tile_end, tile_begin + share)

    # Queries: fp16, each row divided by the power of two of its largest element.
    K_FIELDS: tl.constexpr = 8 // K.bits  # of a byte, in dims 4 apart
    channel = tl.arange(0, K_FIELDS * K.width)
    static_k = key_scale + kv_head * D if key_scale is not None else None
    rows = (start + token).to(tl.int64) * query_stride_t + head.to(tl.int64) * query_stride_h
    q = load_query(query, rows, static_k, channel, D, real)
    if K.rotated:
        q = rotate(q, channel, BLOCK_M, K_FIELDS * K.width, PAGE)
    queries, amax = (q,), tl.max(tl.abs(q), 1)
    if K_FIELDS == 2:  # before all else: sm_80 spills registers if rows are taken apart later
        queries = fields_of(q, BLOCK_M, 2 * K.width)
        amax = tl.maximum(tl.max(tl.abs(queries[0]), 1), tl.max(tl.abs(queries[1]), 1))
    unit, shrink = normal_unit(amax)
    queries = [(x * shrink[:, None]).to(tl.float16) for x in queries]
    bias = tl.zeros([BLOCK_M], tl.float32)
    if K_FIELDS == 2:
        bias = tl.sum(queries[0].to(tl.float32), 1) + tl.sum(queries[1].to(tl.float32), 1)
    elif key_zero is not None:
        bias = zero_dot(queries[0].to(tl.float32), key_zero + kv_head * D, channel, D)
    factor = unit * (scale if SOFTCAP else scale * LOG2E)
    slope = None
    if alibi is not None:
        slope = tl.load(alibi + head, mask=real, other=0.0) * LOG2E

    k_at, v_at = tl.arange(0, K.width), tl.arange(0, V.width)
    V_FIELDS: tl.constexpr = 8 // V.bits
    V_WIDTH: tl.constexpr = V.width
    nothing = tl.zeros([BLOCK_M, V_WIDTH], tl.float32)
    sums = (nothing,) * V_FIELDS
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
    pages = cache + kv_head.to(tl.int64) * head_stride

    for tile in range(tile_begin, tile_end):
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        seen = (n >= begin) & (n < end)  # outside: stale bytes, or a page given back
        if PAGE.size % BLOCK_N == 0:  # one page per tile
            block = tl.load(table + (tile * BLOCK_N) // PAGE.size)
            position = (tile * BLOCK_N) % PAGE.size + tl.arange(0, BLOCK_N)
        else:
            block = tl.load(table + n // PAGE.size, mask=seen, other=0)
            position = n % PAGE.size
        page = pages + block.to(tl.int64) * block_stride
        k_rows = page + (K.codes + position * K.row)
        mask = seen[None, :] if K.width == K.row else seen[None, :] & (k_at < K.row)[:, None]
        k = tl.load(k_rows[None, :] + k_at[:, None], mask=mask, other=0)
        s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for f in tl.static_range(K_FIELDS):
            part = operand(decode(k, K.code, ISA, f == 1), EXACT_DOT)
            s = tl.dot(operand(queries[f], EXACT_DOT), part, s)
        if key_zero is not None:
            s -= bias[:, None]
        if K.dynamic:
            word = words(page, K.metadata, position, seen)
            s *= token_scale(word, K.code)[None, :]
            if K_FIELDS == 2:
                s += bias[:, None] * high_half(word)[None, :]
        s *= factor[:, None]
        away = place[:, None] - n[None, :]
        s = bent(s, away, slope, softcap, SOFTCAP)
        visible = seen[None, :] & real[:, None]
        if CAUSAL:
            visible = visible & (away >= 0)
        if WINDOW:
            visible = visible & (away < window)
            if not CAUSAL:
                visible = visible & (-away < window)
        s = tl.where(visible, s, float("-inf"))

        v_scale = None
        if V.dynamic:
            word = words(page, V.metadata, position, seen)
            v_scale = token_scale(word, V.code)
        p, shrink, top, mass = weigh(s, v_scale, top, mass)
        if V.dynamic:
            # A hidden token's scale may be NaN, and 0 * NaN is NaN.
            if V_FIELDS == 2:
                offset = high_half(word) + INT4_CENTER * v_scale
                lift = tl.where(visible, p * offset[None, :], 0.0)
                minima = minima * shrink + tl.sum(lift, 1)
            p = tl.where(visible, p * v_scale[None, :], 0.0)
        p = operand(p.to(tl.float16), EXACT_DOT)
        v_rows = page + (V.codes + position * V.row)
        mask = seen[:, None] if V.width == V.row else seen[:, None] & (v_at < V.row)[None, :]
        v = tl.load(v_rows[:, None] + v_at[None, :], mask=mask, other=0)
        for f in tl.static_range(V_FIELDS):
            part = operand(decode(v, V.code, ISA, f == 1, IN_PLACE=True), EXACT_DOT)
            # The field at hand leaves at the front, and comes in at the end.
            sums = sums[1:] + (tl.dot(p, part, sums[0] * shrink[:, None]),)

    origin, total = total_of(top, mass, sink)
    inverse = tl.where(total == 0.0, 0.0, 1.0 / total)
    O_WIDTH: tl.constexpr = V_FIELDS * V.width
    o_dims, result = tl.arange(0, O_WIDTH), sums[0]
    if V_FIELDS == 2:
        sums = [(x + minima[:, None]) * inverse[:, None] for x in sums]
        result = channels_of(sums[0], sums[1], BLOCK_M, O_WIDTH)
    channel, inside = kv_head * D + o_dims, o_dims < D
    if value_zero is not None:
        zero = tl.load(value_zero + channel, mask=inside, other=0.0)
        result -= mass[:, None] * zero[None, :]
    if value_scale is not None:
        result *= tl.load(value_scale + channel, mask=inside, other=0.0)[None, :]
    if V_FIELDS == 1:
        result *= inverse[:, None]
    if V.rotated:
        result = unrotate(result, o_dims, BLOCK_M, O_WIDTH, PAGE)
    rows = (start + token).to(tl.int64) * out_stride_t + head.to(tl.int64) * out_stride_h
    write(result, origin, total, out, partial, partial_lse, rows, row, real, o_dims, D, BLOCK_M,
          SPLIT, EXACT_DOT)  # fmt: skip


@triton.jit(
    do_not_specialize=("num_seqs", "splits"),
    do_not_specialize_on_alignment=("query_start", "seq_lens"),
)
def merge_kernel(
    out, query_start, seq_lens, partial, partial_lse, num_seqs, splits,
    out_stride_t, out_stride_h,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Combine the splits of a query row. Grid ``(blocks of queries, query heads)``, blocks as
    in :func:`attend_kernel`; SPLITS is *splits* rounded up to a power of two."""
    HEADS: tl.constexpr = ROWS.heads
    BLOCK_M: tl.constexpr = ROWS.block_m
    seq, start, count, first, length = locate(query_start, seq_lens, num_seqs, ROWS)
    head = tl.program_id(1)
    member = head % ROWS.group
    axis1 = (head // ROWS.group) * ROWS.chunks + member // HEADS
    programs = tl.num_programs(1) // ROWS.group * ROWS.chunks
    program = tl.program_id(0).to(tl.int64) * programs + axis1
    at = tl.arange(0, WIDTH)
    for i in range(tl.minimum(count - first, ROWS.block_q)):
        slot = program * splits * BLOCK_M + i * HEADS + member % HEADS
        s = tl.arange(0, SPLITS)
        lse = tl.load(partial_lse + slot + s * BLOCK_M, mask=s < splits, other=float("-inf"))
        top = tl.max(lse, 0)
        origin = tl.where(top == float("-inf"), 0.0, top)
        total = tl.sum(tl.exp2(lse - origin), 0)
        acc = tl.zeros([WIDTH], tl.float32)
        for s0 in range(0, splits, BLOCK_S):
            part = s0 + tl.arange(0, BLOCK_S)
            at_part = slot + part * BLOCK_M
            level = tl.load(partial_lse + at_part, mask=part < splits, other=float("-inf"))
            mask = (level != float("-inf"))[:, None] & (at < D)[None, :]
            x = tl.load(partial + at_part[:, None] * D + at[None, :], mask=mask, other=0.0)
            acc += tl.sum(x * tl.exp2(level - origin)[:, None], 0)
        acc *= tl.where(total == 0.0, 0.0, 1.0 / total)
        row = (start + first + i).to(tl.int64) * out_stride_t + head.to(tl.int64) * out_stride_h
        tl.store(out + row + at, to_output(acc, out.dtype.element_ty, INTERPRETED), mask=at < D)
