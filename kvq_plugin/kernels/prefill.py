"""Prefill through FlashAttention: the pages a chunk of queries reads, decoded once, in the queries'
dtype.

A fused kernel decodes every K and V tile again for each 64 rows of queries, which costs more than
the products themselves. Here all tokens of the context that a batch reads go through a scratch of
fixed size: this step's own in one causal call, those before them in as many calls as the scratch
needs, put together by their log-sum-exps. K and V are rounded to the queries' dtype once, as an
unquantized cache has them. A NaN of V may reach earlier queries of its own prompt, as it does in
FlashAttention over such a cache.

Nothing here looks at data on the device: a CUDA graph may capture every call.
"""

from __future__ import annotations

import torch
import triton

from kvq_plugin.formats import KVFormat
from kvq_plugin.kernels import launch
from kvq_plugin.kernels.triton_paged import page_constants
from kvq_plugin.kernels.triton_prefill import combine_kernel, gather_kernel, plan_kernel
from kvq_plugin.reference import StaticScale

#: Query tokens of a sequence from which the detour through the scratch wins. An H100, 32/8 heads,
#: 4 sequences of 8,192 tokens: 32 take the fused kernel 179 us (fp8), 324 (int8 per token) and 419
#: (int4 per token), the detour 332 to 353; 128 take 561 and more against 334 to 340.
MIN_QUERY = 64
#: Bytes of scratch that are reserved: 32,768 tokens of 8 kv heads of 128 channels.
SCRATCH = 128 << 20
#: Calls of FlashAttention per batch; beyond, sequences are so many or so long beside the scratch
#: that a call has too little to do.
MAX_CALLS = 33
#: Tokens of one program that decodes (32 of int4 spill registers on sm_80), sequences of one that
#: plans, rows of one that combines.
BLOCK_T, BLOCK_S, ROWS = 16, 128, 8


def flash_attention(query, keys, values, query_start, key_start, most_queries, most_keys, causal,
                    scale):  # fmt: skip
    """PyTorch's FlashAttention over packed sequences: ``[T, heads, D]`` and ``[heads, T]``."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        query, keys, values, query_start, key_start, most_queries, most_keys, 0.0, causal, False,
        scale=scale,
    )  # fmt: skip
    return out, lse


def available(device: torch.device) -> bool:
    """Whether :func:`attend` is for *device*. ROCm has a FlashAttention too, which none of our
    tests ran."""
    return device.type == "cuda" and torch.version.hip is None


def workspace_size(head_size: int, device: torch.device) -> int:
    """Bytes that :func:`attend` wants, whatever the batch."""
    return SCRATCH if available(device) else 0


def calls(batch: int, kv_heads: int, head_size: int, tokens: int, max_seq_len: int, room: int):
    """(calls of FlashAttention, tokens of a sequence per call) for a scratch of *room* bytes; the
    first is 0 if it is too small."""
    rows, past = room // (4 * kv_heads * head_size), max(max_seq_len - 1, 0)
    share = min(rows // max(batch, 1), past)
    if rows < tokens or (past and not share):
        return 0, 0
    return 1 + (triton.cdiv(past, share) if past else 0), share


def serves(query: torch.Tensor, cache: torch.Tensor, batch: int, *, causal: bool = True,
           window: int = 0, softcap: float = 0.0, alibi_slopes=None, sinks=None,
           max_query_len: int, max_seq_len: int,
           workspace: torch.Tensor | None = None) -> bool:  # fmt: skip
    """Whether :func:`attend` serves this call, and is the faster way."""
    if not available(cache.device) or not causal or window or softcap or sinks is not None:
        return False
    if alibi_slopes is not None:
        return False
    if query.dtype not in (torch.bfloat16, torch.float16) or max_query_len < MIN_QUERY:
        return False
    room = SCRATCH if workspace is None else workspace.numel() * workspace.element_size()
    shape = batch, cache.shape[1], query.shape[2], query.shape[0]
    return 1 <= calls(*shape, max_seq_len, room)[0] <= MAX_CALLS


def attend(
    out: torch.Tensor,
    query: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    format: KVFormat,
    scale: float,
    key_static: StaticScale | None = None,
    value_static: StaticScale | None = None,
    *,
    max_query_len: int,
    max_seq_len: int,
    workspace: torch.Tensor | None = None,
    flash=flash_attention,
) -> None:
    """Causal :func:`kvq_plugin.ops.attend` by FlashAttention, for checked arguments.

    Args:
        max_query_len, max_seq_len: upper bounds of the batch, known on the host.
        workspace: uint8 of SCRATCH bytes, on the device; allocated here if None. With fewer, the
            context takes more calls.
        flash: as :func:`flash_attention`.

    Raises ValueError for what ``launch.check`` refuses, and for a workspace that does not hold
    this step's tokens.
    """
    launch.check(format, query, cache)
    tokens, heads, d = query.shape
    batch, kv_heads, device = seq_lens.shape[0], cache.shape[1], cache.device
    if not batch or not tokens:
        return
    if workspace is None:
        workspace = torch.empty(SCRATCH, dtype=torch.uint8, device=device)
    room = workspace.numel() * workspace.element_size()
    count, share = calls(batch, kv_heads, d, tokens, max_seq_len, room)
    if not count:
        raise ValueError(
            f"the workspace must hold {tokens} tokens of K and V, {4 * kv_heads * d * tokens} "
            f"bytes, got {room}; reserve kvq_plugin.kernels.new_workspace(...)"
        )
    rows = max(tokens, share * batch)
    scratch = workspace.view(torch.uint8).flatten()[: 4 * kv_heads * d * rows]
    keys, values = scratch.view(query.dtype).view(2, rows, kv_heads, d)
    statics = [
        getattr(static, name) if static is not None else None
        for static in (key_static, value_static)
        for name in ("scale", "zero_point")
    ]
    constants = page_constants(format, d, cache.shape[2])
    plan = torch.empty(count * (2 * batch + 1), dtype=torch.int32, device=device)
    starts = plan[: count * (batch + 1)].view(count, batch + 1)
    firsts = plan[starts.numel() :].view(count, batch)
    with launch.on_device_of(cache):
        plan_kernel[(count,)](starts, firsts, query_start_loc, seq_lens, batch, share,
                              BLOCK=BLOCK_S)  # fmt: skip
        total, lse = None, None
        for call in range(count):
            most = tokens if call == 0 else share * batch
            gather_kernel[triton.cdiv(most, BLOCK_T), kv_heads, 2](
                keys, values, cache, block_table, starts[call], firsts[call], *statics, batch,
                cache.stride(0), cache.stride(1), block_table.stride(0), **constants,
                HEADS=kv_heads, STEPS=batch.bit_length(), BLOCK_T=BLOCK_T,
                ISA=launch.decoder(device), INTERPRETED=launch.interpreted(), num_warps=4,
            )  # fmt: skip
            part, part_lse = flash(
                query, keys[:most], values[:most], query_start_loc, starts[call], max_query_len,
                max_query_len if call == 0 else share, call == 0, scale,
            )  # fmt: skip
            last = call == count - 1
            if call == 0:
                total, lse = part, part_lse
                if not last:
                    continue
                part = part_lse = None
            target = out if last else total
            combine_kernel[(triton.cdiv(tokens * heads, ROWS),)](
                target, None if last else lse, total, lse, part, part_lse, query_start_loc, batch,
                tokens, heads, *target.stride()[:2], D=d, WIDTH=triton.next_power_of_2(d),
                ROWS=ROWS, INTERPRETED=launch.interpreted(), num_warps=4,
            )  # fmt: skip
