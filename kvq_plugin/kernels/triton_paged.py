"""The host side of paged attention by Triton: grids, splits and the workspace between them."""

from __future__ import annotations

from functools import cache as memoize

import torch
import triton

from kvq_plugin import rotation
from kvq_plugin.formats import KVFormat
from kvq_plugin.kernels import launch, triton_rotate
from kvq_plugin.kernels.triton_attend import attend_kernel, merge_kernel
from kvq_plugin.layout import GPU_V1, PageLayout
from kvq_plugin.reference import StaticScale


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


def row_constants(rows: launch.Rows, group: int, long: bool) -> dict:
    """``constexpr`` arguments of both kernels that say which rows a program owns."""
    block_m = launch.MAX_ROWS if long else rows.block_m
    return {
        "GROUP": group,
        "HEADS": rows.heads,
        "LONG": long,
        "SHORT": rows.short,
        "BLOCK_M": block_m,
    }


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
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    max_query_len: int,
    max_seq_len: int,
    workspace: torch.Tensor | None = None,
) -> None:
    """:func:`kvq_plugin.ops.attend` by Triton, for checked arguments.

    Args:
        max_query_len, max_seq_len: upper bounds of the batch, known on the host.
        workspace: at least :func:`~kvq_plugin.kernels.launch.workspace_size` bytes, contiguous,
            on the device; allocated here if None.

    Raises ValueError for what ``launch.check`` refuses and for a workspace that is too small.
    """
    launch.check(format, query, cache)
    sequences, kv_heads, group = seq_lens.shape[0], cache.shape[1], query.shape[1] // cache.shape[1]
    if not sequences or not query.shape[0] or not group:
        return
    if format.key.rotated:
        scale *= rotation.gain(query.shape[2])
    rows = launch.rows(group, max_query_len)
    chunks = triton.cdiv(group, rows.heads)
    statics = [
        getattr(static, name) if static is not None else None
        for static in (key_static, value_static)
        for name in ("scale", "zero_point")
    ]
    page = page_constants(format, query.shape[2], cache.shape[2])
    for long in (False, True) if rows.long else (False,):
        owned = row_constants(rows, group, long)
        choice = launch.attend_choice(format, query.shape[2], long)
        blocks = sequences
        if long:
            blocks += query.shape[0] // (owned["BLOCK_M"] // rows.heads)
        programs = blocks * kv_heads * chunks
        splits = launch.split_count(programs, max_seq_len, cache.device, long)
        partial, lse = _partials(workspace, programs * splits, owned["BLOCK_M"], query, splits)
        with launch.on_device_of(cache):
            attend_kernel[blocks, kv_heads * chunks, splits](
                out, query, cache, block_table, seq_lens, query_start_loc, *statics,
                alibi_slopes, sinks, partial, lse, scale, softcap, window, sequences,
                out.stride(0), out.stride(1), query.stride(0), query.stride(1),
                cache.stride(0), cache.stride(1), block_table.stride(0),
                **page, **owned,
                CAUSAL=causal, WINDOW=window > 0, SOFTCAP=softcap != 0.0, SPLIT=splits > 1,
                MIN_TILES=triton.cdiv(launch.MIN_SPLIT_TOKENS, choice.block_n),
                BLOCK_N=choice.block_n, ISA=launch.decoder(cache.device),
                EXACT_DOT=launch.interpreted(),
                num_warps=choice.warps, num_stages=choice.stages,
            )  # fmt: skip
            if splits > 1:
                merge_kernel[blocks, query.shape[1]](
                    out, query_start_loc, seq_lens, partial, lse, sequences, splits,
                    out.stride(0), out.stride(1), **owned,
                    D=query.shape[2], WIDTH=triton.next_power_of_2(query.shape[2]),
                    SPLITS=triton.next_power_of_2(splits), BLOCK_S=launch.MERGE_BLOCK,
                    INTERPRETED=launch.interpreted(), num_warps=launch.MERGE_WARPS,
                )  # fmt: skip


def _partials(workspace, parts: int, block_m: int, query: torch.Tensor, splits: int):
    """Views of *workspace* for partial outputs and their log-sum-exps; (None, None) unsplit."""
    if splits == 1:
        return None, None
    numbers = parts * block_m * query.shape[2], parts * block_m
    need = sum(numbers) * 4
    if workspace is None:
        workspace = torch.empty(need, dtype=torch.uint8, device=query.device)
    flat = workspace.view(torch.uint8).flatten()
    if flat.numel() < need or workspace.device != query.device:
        raise ValueError(
            f"the workspace must hold {need} bytes on {query.device}, got {flat.numel()} on "
            f"{workspace.device}; reserve kvq_plugin.kernels.new_workspace(...)"
        )
    return flat[:need].view(torch.float32).split(numbers)
