"""What the attention kernels in Triton share: which rows a program owns, their queries, the running
softmax, and where results go."""

from __future__ import annotations

import triton
import triton.language as tl

from kvq_plugin.kernels.codec import INT4, bits_float, float_bits, int_to_float, to_output

LOG2E = tl.constexpr(1.4426950408889634)
#: Exponent added to probabilities: the largest becomes 2**14 (2**15 with a token scale), and
#: those fp16 loses are below 2**-38 of it.
HEADROOM = tl.constexpr(14.0)


@triton.jit
def _find_sequence(query_start, num_seqs, block, BLOCK_Q: tl.constexpr):
    """Last sequence whose blocks start at or before *block*. Sequence s starts at block
    ``query_start[s] // BLOCK_Q + s``: at least as many as needed, and known without a scan."""
    low, high = 0, num_seqs
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_start + middle) // BLOCK_Q + middle <= block:
            low = middle + 1
        else:
            high = middle
    return tl.maximum(low - 1, 0)


@triton.jit
def locate(query_start, seq_lens, num_seqs, ROWS: tl.constexpr):
    """This program's sequence, its first query row, query length, first token in the sequence's
    query, and context length. A first token at or past the query length: nothing to do.

    ROWS is a :class:`~kvq_plugin.kernels.launch.Rows`. Blocks of long queries are packed; they run
    backwards, longest ranges first.
    """
    BLOCK_Q: tl.constexpr = ROWS.block_q
    if ROWS.long:
        block = tl.num_programs(0) - 1 - tl.program_id(0)
        seq = _find_sequence(query_start, num_seqs, block, BLOCK_Q)
    else:
        block = tl.program_id(0)
        seq = block
    start = tl.load(query_start + seq)
    count = tl.load(query_start + seq + 1) - start
    first = 0
    if ROWS.long:
        first = (block - (start // BLOCK_Q + seq)) * BLOCK_Q
        count = tl.where(count <= ROWS.short, 0, count)
        first = tl.where(first < 0, count, first)  # rows before the first sequence
    else:
        count = tl.where(count > ROWS.short, 0, count)
    return seq, start, count, first, tl.load(seq_lens + seq)


@triton.jit
def rows_of(first, count, ROWS: tl.constexpr):
    """This program's kv head and rows: their numbers, tokens of the query and heads, and which of
    them there are."""
    kv_head, chunk = tl.program_id(1) // ROWS.chunks, tl.program_id(1) % ROWS.chunks
    row = tl.arange(0, ROWS.block_m)
    token = first + row // ROWS.heads
    member = chunk * ROWS.heads + row % ROWS.heads
    real = (row < ROWS.block_q * ROWS.heads) & (token < count) & (member < ROWS.group)
    return kv_head, row, token, kv_head * ROWS.group + member, real


@triton.jit
def load_query(query, rows, scale, dims, D: tl.constexpr, mask_rows):
    """fp32 query ``[M, W]`` at columns *dims*, K's static scale multiplied in."""
    inside = dims < D
    q = tl.load(query + rows[:, None] + dims[None, :], mask=mask_rows[:, None] & inside[None, :],
                other=0.0).to(tl.float32)  # fmt: skip
    if scale is not None:
        q *= tl.load(scale + dims, mask=inside, other=0.0)[None, :]
    return q


@triton.jit
def zero_dot(q, zero, dims, D: tl.constexpr):
    return tl.sum(q * tl.load(zero + dims, mask=dims < D, other=0.0)[None, :], 1)


@triton.jit
def operand(x, EXACT_DOT: tl.constexpr):
    """An fp16 operand of a matrix product; the interpreter multiplies it in fp32."""
    return x.to(tl.float32) if EXACT_DOT else x


@triton.jit
def words(page, METADATA: tl.constexpr, position, mask):
    at = (page + METADATA + position * 4).to(tl.pointer_type(tl.int32), bitcast=True)
    return tl.load(at, mask=mask, other=0)


@triton.jit
def low_half(word):
    return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def high_half(word):
    return (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def token_scale(word, CODE: tl.constexpr):
    return low_half(word) if CODE == INT4 else bits_float(word)


@triton.jit
def _tanh(y):
    # Exact limits: exp2 gives inf or 0 beyond its range.
    return 1.0 - 2.0 / (tl.exp2(y * (2.0 * LOG2E)) + 1.0)


@triton.jit
def normal_unit(amax):
    """``[M]``: the power of two of each row's largest element, and its inverse."""
    exponent = tl.minimum(tl.maximum(float_bits(amax) >> 23, 1), 253)
    return bits_float(exponent << 23), bits_float((254 - exponent) << 23)


@triton.jit
def bent(s, away, slope, softcap, SOFTCAP: tl.constexpr):
    """Scores after softcap and alibi (*slope* is None without)."""
    if SOFTCAP:
        s = (softcap * LOG2E) * _tanh(s / softcap)
    if slope is not None:
        s -= slope[:, None] * away.to(tl.float32)
    return s


@triton.jit
def weigh(s, v_scale, top, mass):
    """One tile of scores ``[M, N]`` (-inf where hidden) in the running softmax: the tile's weights,
    the factor that shrinks earlier sums, and the new maximum and mass.

    P takes V's token scale, if there is one: the maximum is that of their product, to within a
    factor 2. Scales below 2**-60 do not count, so that the mass stays far below fp32's maximum.
    """
    if v_scale is not None:
        v_exponent = ((float_bits(v_scale) >> 23) & 0xFF) - 127
        shift = int_to_float(tl.maximum(v_exponent, -60)) - HEADROOM
        loudest = tl.max(s + shift[None, :], 1)
    else:
        loudest = tl.max(s, 1) - HEADROOM
    peak = tl.maximum(top, loudest)
    origin = tl.where(peak == float("-inf"), 0.0, peak)  # rows that have seen nothing
    shrink = tl.exp2(top - origin)
    p = tl.exp2(s - origin[:, None])
    return p, shrink, peak, mass * shrink + tl.sum(p, 1)


@triton.jit
def total_of(top, mass, sink):
    """The origin of a row's sums, and the mass with its sink (None without)."""
    origin = tl.where(top == float("-inf"), 0.0, top)
    if sink is not None:
        mass += tl.exp2(sink - origin)
    return origin, mass


@triton.jit
def write(result, origin, total, out, partial, partial_lse, rows, row, real, dims, D: tl.constexpr,
          BLOCK_M: tl.constexpr, SPLIT: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """``result [M, W]`` to this split's part of *partial*, or to *out*, where *rows* are."""
    if SPLIT:
        program = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
        slot = (program * tl.num_programs(2) + tl.program_id(2)) * BLOCK_M + row
        lse = tl.where(total == 0.0, float("-inf"), origin + tl.log2(total))
        tl.store(partial_lse + slot, lse, mask=real)
        target = partial + slot[:, None] * D + dims[None, :]
    else:
        target = out + rows[:, None] + dims[None, :]
    mask = real[:, None] & (dims < D)[None, :]
    tl.store(target, to_output(result, target.dtype.element_ty, INTERPRETED), mask=mask)
