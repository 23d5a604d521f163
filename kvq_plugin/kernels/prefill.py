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

from kvq_plugin.calls import Attend, statics
from kvq_plugin.kernels import launch
from kvq_plugin.kernels.pages import page_of
from kvq_plugin.kernels.triton_prefill import combine_kernel, gather_kernel, plan_kernel

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
    """Whether :func:`attend` is for *device*, and this PyTorch has what it calls. ROCm has a
    FlashAttention too, which none of our tests ran."""
    built = torch.backends.cuda.is_flash_attention_available()
    return device.type == "cuda" and torch.version.hip is None and built


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
    return 1 + (launch.cdiv(past, share) if past else 0), share


def _steps(batch: int) -> int:
    """Of a search among sequences, in fours: each number of them is a kernel of its own, to be
    compiled in the middle of serving."""
    return launch.cdiv(batch.bit_length(), 4) * 4


def serves(call: Attend) -> bool:
    """Whether :func:`attend` serves this call, and is the faster way."""
    if not available(call.cache.device) or not call.causal or call.window or call.softcap:
        return False
    if call.format.recent is not None:
        return False
    if call.sinks is not None or call.alibi_slopes is not None:
        return False
    query = call.query
    if query.dtype not in (torch.bfloat16, torch.float16) or call.max_query_len < MIN_QUERY:
        return False
    room = SCRATCH if call.workspace is None else call.workspace.scratch.nbytes
    shape = call.seq_lens.shape[0], call.cache.shape[1], query.shape[2], query.shape[0]
    return 1 <= calls(*shape, call.max_seq_len, room)[0] <= MAX_CALLS


def attend(call: Attend, flash=flash_attention) -> None:
    """Causal :func:`kvq_plugin.ops.attend` by FlashAttention, for a checked call.

    The workspace's scratch has SCRATCH bytes, on the device; with fewer, the context takes more
    calls. None: allocated here. *flash*: as :func:`flash_attention`.

    Raises ValueError for what ``launch.check`` refuses, and for a workspace that does not hold
    this step's tokens.
    """
    launch.check(call)
    out, query, cache, format = call.out, call.query, call.cache, call.format
    tokens, heads, d = query.shape
    seq_lens, query_start_loc, table = call.seq_lens, call.query_start_loc, call.block_table
    batch, kv_heads, device = seq_lens.shape[0], cache.shape[1], cache.device
    if not batch or not tokens:
        return
    if call.workspace is None:
        scratch = torch.empty(SCRATCH, dtype=torch.uint8, device=device)
    else:
        scratch = call.workspace.scratch.flatten()
    room = scratch.nbytes
    count, share = calls(batch, kv_heads, d, tokens, call.max_seq_len, room)
    if not count:
        raise ValueError(
            f"the workspace must hold {tokens} tokens of K and V, {4 * kv_heads * d * tokens} "
            f"bytes, got {room}; reserve kvq_plugin.kernels.new_workspace(...)"
        )
    rows = max(tokens, share * batch)
    scratch = scratch[: 4 * kv_heads * d * rows]
    keys, values = scratch.view(query.dtype).view(2, rows, kv_heads, d)
    plan = torch.empty(count * (2 * batch + 1), dtype=torch.int32, device=device)
    starts = plan[: count * (batch + 1)].view(count, batch + 1)
    firsts = plan[starts.numel() :].view(count, batch)
    with launch.on_device_of(cache):
        plan_kernel[(count,)](starts, firsts, query_start_loc, seq_lens, batch, share,
                              BLOCK=BLOCK_S)  # fmt: skip
        total, lse = None, None
        for nth in range(count):
            most = tokens if nth == 0 else share * batch
            gather_kernel[launch.cdiv(most, BLOCK_T), kv_heads, 2](
                keys, values, cache, table, starts[nth], firsts[nth], *statics(call, "scale"),
                batch, cache.stride(0), cache.stride(1), table.stride(0),
                PAGE=page_of(format, d, cache.shape[2]), HEADS=kv_heads, STEPS=_steps(batch),
                BLOCK_T=BLOCK_T, ISA=launch.decoder(device), INTERPRETED=launch.interpreted(),
                num_warps=4,
            )  # fmt: skip
            part, part_lse = flash(
                query, keys[:most], values[:most], query_start_loc, starts[nth],
                call.max_query_len, call.max_query_len if nth == 0 else share, nth == 0,
                call.scale,
            )  # fmt: skip
            last = nth == count - 1
            if nth == 0:
                total, lse = part, part_lse
                if not last:
                    continue
                part = part_lse = None
            target = out if last else total
            combine_kernel[(launch.cdiv(tokens * heads, ROWS),)](
                target, None if last else lse, total, lse, part, part_lse, query_start_loc, batch,
                tokens, heads, *target.stride()[:2], D=d, WIDTH=launch.power_of_2(d),
                ROWS=ROWS, INTERPRETED=launch.interpreted(), num_warps=4,
            )  # fmt: skip
