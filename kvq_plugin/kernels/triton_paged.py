"""The host side of paged attention by Triton: grids, splits and the workspace between them."""

from __future__ import annotations

import torch

from kvq_plugin import rotation
from kvq_plugin.calls import Attend, statics
from kvq_plugin.kernels import launch
from kvq_plugin.kernels.pages import page_of
from kvq_plugin.kernels.triton_attend import attend_kernel, merge_kernel
from kvq_plugin.kernels.triton_sealed import sealed_kernel


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
    choices = [launch.attend_choice(format, query.shape[2], long) for long in (False, True)]
    sizes, page = cache.stride()[:2], page_of(format, query.shape[2], cache.shape[2])
    for rows in launch.rows(group, call.max_query_len, choices[True].rows):
        choice, blocks = choices[rows.long], sequences
        if rows.long:
            blocks += query.shape[0] // rows.block_q
        programs = blocks * kv_heads * rows.chunks
        splits = launch.split_count(programs, call.max_seq_len, cache.device, rows.long)
        partial, lse = _partials(call, programs * splits, rows.block_m, splits)
        grid = blocks, kv_heads * rows.chunks, splits
        common = {
            "PAGE": page, "ROWS": rows, "WINDOW": call.window > 0, "SOFTCAP": call.softcap != 0.0,
            "SPLIT": splits > 1, "ISA": launch.decoder(cache.device),
            "MIN_TILES": launch.cdiv(launch.MIN_SPLIT_TOKENS, choice.block_n),
            "EXACT_DOT": launch.interpreted(),
            "num_warps": choice.warps, "num_stages": choice.stages,
        }  # fmt: skip
        with launch.on_device_of(cache):
            if format.recent is None:
                attend_kernel[grid](
                    out, query, cache, call.block_table, call.seq_lens, call.query_start_loc,
                    *statics(call, "scale"), call.alibi_slopes, call.sinks, partial, lse, scale,
                    call.softcap, call.window, sequences, *out.stride()[:2], *query.stride()[:2],
                    *sizes, call.block_table.stride(0), CAUSAL=call.causal,
                    BLOCK_N=choice.block_n, **common,
                )  # fmt: skip
            else:
                recent, table = call.recent_cache, call.recent_block_table
                sealed_kernel[grid](
                    out, query, cache, recent, call.block_table, table, call.seq_lens,
                    call.query_start_loc, call.alibi_slopes, call.sinks, partial, lse, scale,
                    call.softcap, call.window, sequences, *out.stride()[:2], *query.stride()[:2],
                    *sizes, *recent.stride()[:2], call.block_table.stride(0), table.stride(0),
                    RECENT_PAGE=page_of(format.recent, query.shape[2], recent.shape[2]), **common,
                )  # fmt: skip
            if splits > 1:
                merge_kernel[blocks, query.shape[1]](
                    out, call.query_start_loc, call.seq_lens, partial, lse, sequences, splits,
                    out.stride(0), out.stride(1), ROWS=rows,
                    D=query.shape[2], WIDTH=launch.power_of_2(query.shape[2]),
                    SPLITS=launch.power_of_2(splits), BLOCK_S=launch.MERGE_BLOCK,
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
