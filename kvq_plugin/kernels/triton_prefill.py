"""The kernels around FlashAttention in :mod:`kvq_plugin.kernels.prefill`: which rows of the cache a
call reads, those rows decoded, and two calls' results together."""

from __future__ import annotations

import triton
import triton.language as tl

from kvq_plugin.kernels.codec import INT4, decode, to_output
from kvq_plugin.kernels.triton_rotate import channels_of, unrotate
from kvq_plugin.kernels.triton_softmax import LOG2E, high_half, token_scale, words


@triton.jit(
    do_not_specialize=["num_seqs", "share"],
    do_not_specialize_on_alignment=["starts", "firsts", "query_start", "seq_lens"],
)
def plan_kernel(starts, firsts, query_start, seq_lens, num_seqs, share, BLOCK: tl.constexpr):
    """Grid ``(calls,)``. Sequence s of call c reads rows ``starts[c, s] : starts[c, s + 1]`` of the
    scratch, tokens from ``firsts[c, s]`` on: call 0 this step's tokens, at the rows of their
    queries; call c those before them in ``[(c - 1) * share, c * share)``."""
    call = tl.program_id(0)
    total = tl.where(call == 0, tl.load(query_start), 0)
    starts += call * (num_seqs + 1)
    tl.store(starts, total)
    for begin in range(0, num_seqs, BLOCK):
        s = begin + tl.arange(0, BLOCK)
        inside = s < num_seqs
        count = tl.load(query_start + s + 1, mask=inside, other=0)
        count -= tl.load(query_start + s, mask=inside, other=0)
        past = tl.maximum(tl.load(seq_lens + s, mask=inside, other=0) - count, 0)
        first = tl.where(call == 0, past, (call - 1) * share)
        used = tl.where(call == 0, count, tl.minimum(tl.maximum(past - first, 0), share))
        used = tl.where(inside, used, 0)
        tl.store(firsts + call * num_seqs + s, first, mask=inside)
        tl.store(starts + s + 1, total + tl.cumsum(used, 0), mask=inside)
        total += tl.sum(used, 0)


@triton.jit
def _row(page, position, keep, at, mask, channel, scale, zero, PART: tl.constexpr,
         ISA: tl.constexpr, HIGH: tl.constexpr):  # fmt: skip
    """fp32 ``[T, W]`` of codes at bytes *at* of tokens' rows."""
    rows = page + (PART.codes + position * PART.row)
    c = tl.load(rows[:, None] + at[None, :], mask=mask, other=0)
    x = decode(c, PART.code, ISA, HIGH).to(tl.float32)
    if zero is not None:
        x -= tl.load(zero + channel)[None, :]
    if scale is not None:
        x *= tl.load(scale + channel)[None, :]
    if PART.dynamic:
        word = words(page, PART.metadata, position, keep)
        x *= token_scale(word, PART.code)[:, None]
        if PART.code == INT4:
            x += high_half(word)[:, None]
    return x


@triton.jit(
    do_not_specialize=["num_seqs", "table_stride"],
    do_not_specialize_on_alignment=["block_table", "starts", "firsts"],
)
def gather_kernel(
    keys, values, cache, block_table, starts, firsts, key_scale, key_zero, value_scale, value_zero,
    num_seqs, block_stride, head_stride, table_stride,
    PAGE: tl.constexpr, HEADS: tl.constexpr, STEPS: tl.constexpr, BLOCK_T: tl.constexpr,
    ISA: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Decode the rows that *starts* and *firsts* of one call name, rotated back, into ``keys,
    values [T, HEADS, D]``. Grid ``(ceil(T / BLOCK_T), HEADS, 2)``, the last for K and V."""
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    total = tl.load(starts + num_seqs)
    if tl.program_id(0) * BLOCK_T >= total:
        return
    keep = (row >= tl.load(starts)) & (row < total)
    # The last sequence that starts at or before the row; those without rows lie before it.
    seq = tl.zeros([BLOCK_T], tl.int32)
    for step in tl.static_range(STEPS):
        probe = seq + (1 << (STEPS - 1 - step))
        there = probe < num_seqs
        start = tl.load(starts + probe, mask=there, other=0)
        seq = tl.where(there & (start <= row), probe, seq)
    position = tl.load(firsts + seq) + row - tl.load(starts + seq)
    entry = block_table + seq.to(tl.int64) * table_stride + position // PAGE.size
    block = tl.load(entry, mask=keep, other=0)
    position = tl.where(keep, position % PAGE.size, 0)
    head = tl.program_id(1)
    page = cache + block.to(tl.int64) * block_stride + head.to(tl.int64) * head_stride
    rows = (row.to(tl.int64) * HEADS + head) * PAGE.d
    K: tl.constexpr = PAGE.k
    V: tl.constexpr = PAGE.v
    if tl.program_id(2) == 0:
        _decode_rows(keys, rows, page, position, keep, head, key_scale, key_zero, K, PAGE, BLOCK_T,
                     ISA, INTERPRETED)  # fmt: skip
    else:
        _decode_rows(values, rows, page, position, keep, head, value_scale, value_zero, V, PAGE,
                     BLOCK_T, ISA, INTERPRETED)  # fmt: skip


@triton.jit
def _decode_rows(target, rows, page, position, keep, head, scale, zero, PART: tl.constexpr,
                 PAGE: tl.constexpr, BLOCK_T: tl.constexpr, ISA: tl.constexpr,
                 INTERPRETED: tl.constexpr):  # fmt: skip
    PACKED: tl.constexpr = PART.code == INT4
    D: tl.constexpr = PAGE.d
    at = tl.arange(0, PART.width)
    inside = at < PART.row
    mask = keep[:, None] & inside[None, :]
    channel = head * D + tl.where(inside, at, 0)  # codes of 4 bits have no static scales
    x = _row(page, position, keep, at, mask, channel, scale, zero, PART, ISA, False)
    ALL: tl.constexpr = 2 * PART.width if PACKED else PART.width
    dims = tl.arange(0, ALL)
    if PACKED:
        upper = _row(page, position, keep, at, mask, channel, scale, zero, PART, ISA, True)
        x = channels_of(x, upper, BLOCK_T, ALL)
    if PART.rotated:
        x = unrotate(x, dims, BLOCK_T, ALL, PAGE)
    to = target + rows[:, None] + dims[None, :]
    x = to_output(x, target.dtype.element_ty, INTERPRETED)
    tl.store(to, x, mask=keep[:, None] & (dims < D)[None, :])


@triton.jit(
    do_not_specialize=["num_seqs", "tokens"],
    do_not_specialize_on_alignment=["first_lse", "second_lse", "query_start"],
)
def combine_kernel(
    target, target_lse, first, first_lse, second, second_lse, query_start, num_seqs, tokens, heads,
    target_stride_t, target_stride_h,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Attention over two disjoint sets of tokens, together: outputs ``[T, heads, D]`` and natural
    log-sum-exps ``[heads, T]``; a query that saw none of the second set has +inf or -inf there, as
    FlashAttention leaves it. Without *second*, a copy. Rows of no sequence are left alone. Grid
    ``ceil(T * heads / ROWS)``."""
    item = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, head = item // heads, item % heads
    keep = (token >= tl.load(query_start)) & (token < tl.load(query_start + num_seqs))
    keep = keep & (token < tokens)
    at = tl.arange(0, WIDTH)
    mask = keep[:, None] & (at < D)[None, :]
    source = item.to(tl.int64)[:, None] * D + at[None, :]
    x = tl.load(first + source, mask=mask, other=0.0).to(tl.float32)
    if second is not None:
        lse = head * tokens + token
        a = tl.load(first_lse + lse, mask=keep, other=0.0)
        b = tl.load(second_lse + lse, mask=keep, other=0.0)
        b = tl.where(b == float("inf"), float("-inf"), b)
        top = tl.maximum(a, b)
        a, b = tl.exp2((a - top) * LOG2E), tl.exp2((b - top) * LOG2E)
        y = tl.load(second + source, mask=mask, other=0.0).to(tl.float32)
        y = tl.where((b == 0.0)[:, None], 0.0, y)
        x = (x * a[:, None] + y * b[:, None]) / (a + b)[:, None]
        if target_lse is not None:
            tl.store(target_lse + lse, top + tl.log2(a + b) / LOG2E, mask=keep)
    to = token.to(tl.int64) * target_stride_t + head.to(tl.int64) * target_stride_h
    x = to_output(x, target.dtype.element_ty, INTERPRETED)
    tl.store(target + to[:, None] + at[None, :], x, mask=mask)
