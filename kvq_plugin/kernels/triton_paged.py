"""The host side of paged attention by Triton: grids, splits and the workspace between them."""

from __future__ import annotations

from functools import cache as memoize

import torch
import triton

from kvq_plugin import rotation
from kvq_plugin.calls import Attend, statics
from kvq_plugin.formats import KVFormat
from kvq_plugin.kernels import launch, triton_rotate
from kvq_plugin.kernels.triton_attend import attend_kernel, merge_kernel
from kvq_plugin.kernels.triton_sealed import constants as sealed_constants
from kvq_plugin.kernels.triton_sealed import sealed_kernel
from kvq_plugin.layout import GPU_V1, PageLayout


@memoize
def page_constants(format: KVFormat, head_size: int, block_size: int) -> dict:
    """``constexpr`` arguments of :func:`attend_kernel` that describe a page."""
    layout = PageLayout(format, head_size, block_size, GPU_V1)
    found = {"PAGE": block_size, "D": head_size, **triton_rotate.constants(head_size)}
    for prefix, which in (("K", layout.key), ("V", layout.value)):
        code = which.stream.code
        found |= {
            f"{prefix}_CODES": which.codes,
            f"{prefix}_METADATA": which.metadata,
            f"{prefix}_CODE": code.id,
            f"{prefix}_DYNAMIC": which.stream.is_dynamic,
            f"{prefix}_ROTATED": which.stream.rotated,
            # 16 is the least inner size of a matrix product on a GPU.
            f"{prefix}_WIDTH": max(16, triton.next_power_of_2(head_size * code.bits // 8)),
        }
    return found


def row_constants(rows: launch.Rows, group: int, long: bool, most: int = launch.MAX_ROWS) -> dict:
    """``constexpr`` arguments of both kernels that say which rows a program owns; *most* of long
    queries, if a token's fit in."""
    block_m = max(most, triton.next_power_of_2(rows.heads)) if long else rows.block_m
    return {
        "GROUP": group,
        "HEADS": rows.heads,
        "LONG": long,
        "SHORT": rows.short,
        "BLOCK_M": block_m,
    }


def attend(call: Attend) -> None:
    """:func:`kvq_plugin.ops.attend` by Triton, for a checked call.

    The workspace's scratch has at least :func:`~kvq_plugin.kernels.launch.workspace_size` bytes,
    contiguous, on the device; None: allocated here.

    Raises ValueError for what ``launch.check`` refuses and for a workspace that is too small.
    """
    launch.check(call)
    out, query, cache, format, group = call.out, call.query, call.cache, call.format, call.group
    sequences, kv_heads, scale = call.seq_lens.shape[0], cache.shape[1], call.scale
    if not sequences or not query.shape[0] or not group:
        return
    if format.key.rotated:
        scale *= rotation.gain(query.shape[2])
    rows = launch.rows(group, call.max_query_len)
    chunks = triton.cdiv(group, rows.heads)
    sizes, shape = cache.stride()[:2], (format, query.shape[2], cache.shape[2])
    options = {"WINDOW": call.window > 0, "SOFTCAP": call.softcap != 0.0}
    for long in (False, True) if rows.long else (False,):
        choice = launch.attend_choice(format, query.shape[2], long)
        owned = row_constants(rows, group, long, choice.rows)
        blocks = sequences
        if long:
            blocks += query.shape[0] // (owned["BLOCK_M"] // rows.heads)
        programs = blocks * kv_heads * chunks
        splits = launch.split_count(programs, call.max_seq_len, cache.device, long)
        partial, lse = _partials(call, programs * splits, owned["BLOCK_M"], splits)
        grid = blocks, kv_heads * chunks, splits
        common = {
            **owned, **options, "SPLIT": splits > 1, "ISA": launch.decoder(cache.device),
            "MIN_TILES": triton.cdiv(launch.MIN_SPLIT_TOKENS, choice.block_n),
            "EXACT_DOT": launch.interpreted(),
            "num_warps": choice.warps, "num_stages": choice.stages,
        }  # fmt: skip
        with launch.on_device_of(cache):
            if format.recent is None:
                attend_kernel[grid](
                    out, query, cache, call.block_table, call.seq_lens, call.query_start_loc,
                    *statics(call, "scale"), call.alibi_slopes, call.sinks, partial, lse, scale,
                    call.softcap, call.window, sequences, *out.stride()[:2], *query.stride()[:2],
                    *sizes, call.block_table.stride(0), **page_constants(*shape),
                    CAUSAL=call.causal, BLOCK_N=choice.block_n, **common,
                )  # fmt: skip
            else:
                recent, table = call.recent_cache, call.recent_block_table
                sealed_kernel[grid](
                    out, query, cache, recent, call.block_table, table, call.seq_lens,
                    call.query_start_loc, call.alibi_slopes, call.sinks, partial, lse, scale,
                    call.softcap, call.window, sequences, *out.stride()[:2], *query.stride()[:2],
                    *sizes, *recent.stride()[:2], call.block_table.stride(0), table.stride(0),
                    **sealed_constants(*shape, recent.shape[2]), **common,
                )  # fmt: skip
            if splits > 1:
                merge_kernel[blocks, query.shape[1]](
                    out, call.query_start_loc, call.seq_lens, partial, lse, sequences, splits,
                    out.stride(0), out.stride(1), **owned,
                    D=query.shape[2], WIDTH=triton.next_power_of_2(query.shape[2]),
                    SPLITS=triton.next_power_of_2(splits), BLOCK_S=launch.MERGE_BLOCK,
                    INTERPRETED=launch.interpreted(), num_warps=launch.MERGE_WARPS,
                )  # fmt: skip


def _partials(call: Attend, parts: int, block_m: int, splits: int):
    """Memory for partial outputs and their log-sum-exps; (None, None) unsplit."""
    if splits == 1:
        return None, None
    query = call.query
    numbers = parts * block_m * query.shape[2], parts * block_m
    need = sum(numbers) * 4
    if call.workspace is None:
        flat = torch.empty(need, dtype=torch.uint8, device=query.device)
    else:
        flat = call.workspace.scratch.flatten()
    if flat.numel() < need or flat.device != query.device:
        raise ValueError(
            f"the workspace must hold {need} bytes on {query.device}, got {flat.numel()} on "
            f"{flat.device}; reserve kvq_plugin.kernels.new_workspace(...)"
        )
    return flat[:need].view(torch.float32).split(numbers)
