"""Public operators: choose the kernels once, call, and say what was wrong with a call that failed.

The compiled operators look at everything they rely on, in C++, where it costs a tenth of what it
does in Python; the checks of :mod:`kvq_plugin.arguments` run after a refusal, to word it. GPUs and
the reference are asked after the checks.

The device of the cache decides: on a CPU the compiled library and pages of layout ``cpu-v1``, on a
CUDA or ROCm device :mod:`kvq_plugin.kernels` and ``gpu-v1``. ``KVQ_KERNELS=reference`` runs
:mod:`kvq_plugin.reference` instead on either, for debugging; it is slow. There is no other
fallback: without the compiled library, loading fails.
"""

from __future__ import annotations

import os
from functools import cache

import torch

from kvq_plugin import _native, reference
from kvq_plugin.arguments import check_attend, check_slots, check_store, check_tables
from kvq_plugin.calls import Attend, Store, Workspace
from kvq_plugin.formats import KVFormat
from kvq_plugin.layout import page_layout
from kvq_plugin.reference import StaticScale

_KERNELS = ("native", "reference")


@cache
def _use_reference(device: str = "cpu") -> bool:
    kernels = os.environ.get("KVQ_KERNELS", "native")
    if kernels not in _KERNELS:
        raise ValueError(f"KVQ_KERNELS={kernels!r}: expected one of {', '.join(_KERNELS)}")
    if kernels == "native" and device == "cpu":
        _native.load()
        _register_fakes()
        _native.survive_forks(_use_reference.cache_clear)
    return kernels == "reference"


def _register_fakes() -> None:
    for name in ("store", "attend"):
        torch.library.register_fake(f"kvq::{name}", _fake)


def _fake(*args, **kwargs) -> None:
    # Both operators only write into an argument, so there is nothing to describe. One tensor of
    # the meta device is enough to end here.
    devices = {x.device for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)}
    if len(devices) > 1:
        raise RuntimeError(f"kvq: all tensors must be on one device, got {devices}")


def store(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    format: KVFormat,
    key_static: StaticScale | None = None,
    value_static: StaticScale | None = None,
    *,
    recent_cache: torch.Tensor | None = None,
    recent_slot_mapping: torch.Tensor | None = None,
) -> None:
    """Quantize new K and V rows into the paged cache.

    Formats with recent rows (``format.recent``) write them to *recent_cache*, and each token whose
    slot is the last of ``GROUP`` seals its group: the rows in the recent slots up to its own, as
    they are once all rows of the call are written, into the slots of *cache* up to its own.

    Args:
        key, value: ``[T, H, D]`` bf16, fp16 or fp32; any token and head strides, D contiguous.
        cache: ``[B, H, N, C]`` uint8, written in place; each (block, head) page is contiguous,
            block and head strides are free. C is ``format.bytes_per_token(D, N)``.
        slot_mapping: ``[T']`` int64, T' <= T: block ``slot // N``, position ``slot % N``;
            negative slots are skipped, as are rows past T'.
        format: what the pages hold.
        key_static, value_static: scales of static formats; None for dynamic ones.
        recent_cache, recent_slot_mapping: of formats with recent rows: a cache of
            ``format.recent``, its N a multiple of ``GROUP``, and ``[T']`` int64, equal to
            slot_mapping modulo ``GROUP`` where neither is negative. None otherwise. A token with
            a negative recent slot is skipped; one with a negative slot seals nothing.

    Raises ValueError naming what was expected and what came.
    """
    device, refused = cache.device.type, None
    if device == "cpu" and not _use_reference():
        try:
            torch.ops.kvq.store(
                key, value, cache, slot_mapping, format.id, *_pair(key_static, "inverse"),
                *_pair(value_static, "inverse"), recent_cache, recent_slot_mapping,
            )  # fmt: skip
            return
        except RuntimeError as e:
            refused = e
    call = Store(
        key, value, cache, slot_mapping, format, key_static, value_static, recent_cache,
        recent_slot_mapping,
    )  # fmt: skip
    check_store(call)
    if device != "cpu" and not _use_reference(device):
        from kvq_plugin import kernels

        return kernels.store(call)
    check_slots(call)
    if refused is not None:
        raise refused
    n = slot_mapping.shape[0]
    reference.store(
        key[:n], value[:n], cache, slot_mapping, format, key_static, value_static,
        recent_cache=recent_cache, recent_slot_mapping=recent_slot_mapping,
        layout=page_layout(cache.device),
    )  # fmt: skip


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
    recent_cache: torch.Tensor | None = None,
    recent_block_table: torch.Tensor | None = None,
    max_query_len: int | None = None,
    max_seq_len: int | None = None,
    workspace: Workspace | None = None,
) -> None:
    """Attention of ``query`` over the paged, quantized cache, written to ``out``.

    The queries of sequence s are rows ``query_start_loc[s] : query_start_loc[s + 1]``, the last
    tokens of its ``seq_lens[s]`` cached ones (which this step's :func:`store` already wrote). Rows
    of no sequence, before the first or after the last, are left alone.

    Of formats with recent rows, a query at position p reads ``cache`` before
    ``format.sealed_before(p)`` and ``recent_cache`` from there on.

    Args:
        out, query: ``[T, heads, D]`` of one dtype; D contiguous, other strides free. *out* may be
            *query*, and must not overlap it otherwise.
        cache: as in :func:`store`.
        block_table: ``[S, blocks]`` int32; seq_lens: ``[S]`` int32; query_start_loc: ``[S+1]``
            int32.
        scale: factor of q . k before softcap and softmax.
        window: 0, or the number of tokens a query sees, itself included.
        softcap: 0, or 1e-4 to 1e4: ``s -> softcap * tanh(s / softcap)``.
        alibi_slopes, sinks: ``[heads]`` fp32; a sink is a logit that joins the denominator.
        recent_cache, recent_block_table: of formats with recent rows: as in :func:`store`, and
            ``[S, blocks]`` int32, in which only blocks that hold rows some query reads need to be
            right. Attention must be causal then. None otherwise.
        max_query_len, max_seq_len, workspace: read on GPUs only. Bounds of the batch, by default
            what the shapes of query and block_table allow, and scratch memory,
            a :func:`kvq_plugin.kernels.new_workspace`, by default allocated for the call.

    Raises ValueError naming what was expected and what came.
    """
    device, refused = cache.device.type, None
    if device == "cpu" and not _use_reference():
        try:
            torch.ops.kvq.attend(
                out, query, cache, block_table, seq_lens, query_start_loc, format.id, scale,
                *_pair(key_static, "scale"), *_pair(value_static, "scale"), causal, window,
                softcap, alibi_slopes, sinks, recent_cache, recent_block_table,
            )  # fmt: skip
            return
        except RuntimeError as e:
            refused = e
    call = Attend(
        out, query, cache, block_table, seq_lens, query_start_loc, format, scale, key_static,
        value_static, causal, window, softcap, alibi_slopes, sinks, recent_cache,
        recent_block_table, max_query_len, max_seq_len, workspace,
    )  # fmt: skip
    check_attend(call)
    if device != "cpu" and not _use_reference(device):
        from kvq_plugin import kernels

        return kernels.attend(call.bounded())
    check_tables(call)
    if refused is not None:
        raise refused
    # Rows before belong to other launches, rows after are padding: both are left alone.
    first, n = int(query_start_loc[0]), int(query_start_loc[seq_lens.shape[0]])
    result = reference.attend(
        query[:n], cache, block_table, seq_lens, query_start_loc, format, scale, key_static,
        value_static, causal=causal, window=window, softcap=softcap, alibi_slopes=alibi_slopes,
        sinks=sinks, recent_cache=recent_cache, recent_block_table=recent_block_table,
        layout=page_layout(cache.device),
    )  # fmt: skip
    out[first:n] = result[first:]


def _pair(static: StaticScale | None, which: str):
    return (None, None) if static is None else (getattr(static, which), static.zero_point)
