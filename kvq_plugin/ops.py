"""Public operators: choose the kernels once, call, and say what was wrong with a call that failed.

The compiled operators look at everything they rely on, in C++, where it costs a tenth of what it
does here; the checks below run after a refusal, to word it. GPUs and the reference are asked after
the checks.

The device of the cache decides: on a CPU the compiled library and pages of layout ``cpu-v1``, on a
CUDA or ROCm device :mod:`kvq_plugin.kernels` and ``gpu-v1``. ``KVQ_KERNELS=reference`` runs
:mod:`kvq_plugin.reference` instead on either, for debugging; it is slow. There is no other
fallback: without the compiled library, loading fails.
"""

from __future__ import annotations

import math
import os
from functools import cache

import torch

from kvq_plugin import _native, reference
from kvq_plugin.formats import KVFormat
from kvq_plugin.layout import CPU_V1, GPU_V1, LANES, MAX_HEAD_SIZES
from kvq_plugin.reference import StaticScale

ACTIVATIONS = (torch.bfloat16, torch.float16, torch.float32)
_KERNELS = ("native", "reference")


@cache
def _use_reference(device: str = "cpu") -> bool:
    kernels = os.environ.get("KVQ_KERNELS", "native")
    if kernels not in _KERNELS:
        raise ValueError(f"KVQ_KERNELS={kernels!r}: expected one of {', '.join(_KERNELS)}")
    if kernels == "native" and device == "cpu":
        _native.load()
        _register_fakes()
    return kernels == "reference"


def page_layout(device: torch.device) -> str:
    """Id of the layout of pages on *device* (:mod:`kvq_plugin.layout`)."""
    return CPU_V1 if device.type == "cpu" else GPU_V1


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
) -> None:
    """Quantize new K and V rows into the paged cache.

    Args:
        key, value: ``[T, H, D]`` bf16, fp16 or fp32; any token and head strides, D contiguous.
        cache: ``[B, H, N, C]`` uint8, written in place; each (block, head) page is contiguous,
            block and head strides are free. C is ``format.bytes_per_token(D)``.
        slot_mapping: ``[T']`` int64, T' <= T: block ``slot // N``, position ``slot % N``;
            negative slots are skipped, as are rows past T'.
        format: what the pages hold.
        key_static, value_static: scales of static formats; None for dynamic ones.

    Raises ValueError naming what was expected and what came.
    """
    arguments = (key, value, cache, slot_mapping, format, key_static, value_static)
    device = cache.device.type
    if device == "cpu" and not _use_reference():
        try:
            torch.ops.kvq.store(
                key,
                value,
                cache,
                slot_mapping,
                format.id,
                *_pair(key_static, "inverse"),
                *_pair(value_static, "inverse"),
            )
        except RuntimeError:
            _check_store(*arguments)
            _check_slots(slot_mapping, cache)
            raise
        return
    _check_store(*arguments)
    if _use_reference(device):
        _check_slots(slot_mapping, cache)
        n = slot_mapping.shape[0]
        args = (key[:n], value[:n], cache, slot_mapping, format, key_static, value_static)
        return reference.store(*args, layout=page_layout(cache.device))
    from kvq_plugin import kernels

    return kernels.store(*arguments)


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
    max_query_len: int | None = None,
    max_seq_len: int | None = None,
    workspace: torch.Tensor | None = None,
) -> None:
    """Attention of ``query`` over the paged, quantized cache, written to ``out``.

    The queries of sequence s are rows ``query_start_loc[s] : query_start_loc[s + 1]``, the last
    tokens of its ``seq_lens[s]`` cached ones (which this step's :func:`store` already wrote). Rows
    of no sequence, before the first or after the last, are left alone.

    Args:
        out, query: ``[T, heads, D]`` of one dtype; D contiguous, other strides free.
        cache: as in :func:`store`.
        block_table: ``[S, blocks]`` int32; seq_lens: ``[S]`` int32; query_start_loc: ``[S+1]``
            int32.
        scale: factor of q . k before softcap and softmax.
        window: 0, or the number of tokens a query sees, itself included.
        softcap: 0, or a positive number: ``s -> softcap * tanh(s / softcap)``.
        alibi_slopes, sinks: ``[heads]`` fp32; a sink is a logit that joins the denominator.
        max_query_len, max_seq_len, workspace: read on GPUs only. Bounds of the batch, by default
            what the shapes of query and block_table allow, and scratch memory of
            :func:`kvq_plugin.kernels.workspace_size` bytes, by default allocated for the call.

    Raises ValueError naming what was expected and what came.
    """
    options = {
        "causal": causal,
        "window": window,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
    }
    tables = (query, cache, block_table, seq_lens, query_start_loc)
    device = cache.device.type
    if device == "cpu" and not _use_reference():
        try:
            torch.ops.kvq.attend(
                out,
                *tables,
                format.id,
                scale,
                *_pair(key_static, "scale"),
                *_pair(value_static, "scale"),
                *options.values(),
            )
        except RuntimeError:
            _check_attend(out, *tables, format, key_static, value_static, **options)
            _check_tables(*tables, window)
            raise
        return
    _check_attend(out, *tables, format, key_static, value_static, **options)
    arguments = (*tables, format, scale, key_static, value_static)
    if _use_reference(device):
        _check_tables(*tables, window)
        # Rows before belong to other launches, rows after are padding: both are left alone.
        first, n = int(query_start_loc[0]), int(query_start_loc[seq_lens.shape[0]])
        layout = page_layout(cache.device)
        result = reference.attend(query[:n], *arguments[1:], **options, layout=layout)
        out[first:n] = result[first:]
        return
    from kvq_plugin import kernels

    kernels.attend(
        out,
        *arguments,
        **options,
        max_query_len=query.shape[0] if max_query_len is None else max_query_len,
        max_seq_len=(block_table.shape[1] * cache.shape[2] if max_seq_len is None else max_seq_len),
        workspace=workspace,
    )


def _pair(static: StaticScale | None, which: str):
    return (None, None) if static is None else (getattr(static, which), static.zero_point)


def _check_store(key, value, cache, slot_mapping, format, key_static, value_static) -> None:
    _check_pages(cache, key, format)
    _check_device(cache, key=key, value=value, slot_mapping=slot_mapping)
    for name, x in (("key", key), ("value", value)):
        _check_rows(name, x)
        if x.shape[1] != cache.shape[1]:
            raise ValueError(f"{name} has {x.shape[1]} kv heads, the cache {cache.shape[1]}")
    if value.shape != key.shape or value.dtype != key.dtype:
        raise ValueError(f"key {_describe(key)} and value {_describe(value)} must agree")
    _check_vector("slot_mapping", slot_mapping, torch.int64)
    if slot_mapping.shape[0] > key.shape[0]:
        raise ValueError(f"{slot_mapping.shape[0]} slots for {key.shape[0]} rows of key")
    _check_static(format, key, cache, key_static, value_static)


def _check_attend(
    out,
    query,
    cache,
    block_table,
    seq_lens,
    query_start_loc,
    format,
    key_static,
    value_static,
    *,
    causal,
    window,
    softcap,
    alibi_slopes,
    sinks,
) -> None:
    _check_pages(cache, query, format)
    _check_device(
        cache,
        query=query,
        out=out,
        block_table=block_table,
        seq_lens=seq_lens,
        query_start_loc=query_start_loc,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
    )
    _check_rows("query", query)
    _check_rows("out", out)
    if out.shape != query.shape or out.dtype != query.dtype:
        raise ValueError(f"query {_describe(query)} and out {_describe(out)} must agree")
    if query.shape[1] % cache.shape[1]:
        raise ValueError(
            f"{query.shape[1]} query heads do not divide into {cache.shape[1]} kv heads"
        )
    _check_vector("seq_lens", seq_lens, torch.int32)
    _check_vector("query_start_loc", query_start_loc, torch.int32)
    if query_start_loc.shape[0] < seq_lens.shape[0] + 1:
        raise ValueError(
            f"query_start_loc has {query_start_loc.shape[0]} entries for "
            f"{seq_lens.shape[0]} sequences; expected one more than sequences"
        )
    if block_table.dtype != torch.int32 or block_table.dim() != 2 or block_table.stride(1) != 1:
        raise ValueError(f"block_table must be int32 [S, blocks], got {_describe(block_table)}")
    if block_table.shape[0] < seq_lens.shape[0]:
        raise ValueError(
            f"block_table has {block_table.shape[0]} rows for {seq_lens.shape[0]} sequences"
        )
    for name, x in (("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        if x is not None:
            _check_vector(name, x, torch.float32)
            if x.shape[0] != query.shape[1]:
                raise ValueError(f"{name} has {x.shape[0]} entries for {query.shape[1]} heads")
    if not 0.0 <= softcap < math.inf:
        raise ValueError(f"softcap must be a finite number, 0 (none) or more, got {softcap}")
    _check_static(format, query, cache, key_static, value_static)


def _describe(x: torch.Tensor) -> str:
    return f"{x.dtype} {list(x.shape)} strides {list(x.stride())}".removeprefix("torch.")


def _check_rows(name: str, x: torch.Tensor) -> None:
    if x.dim() != 3 or x.dtype not in ACTIVATIONS or x.stride(2) != 1:
        raise ValueError(
            f"{name} must be bfloat16, float16 or float32 [tokens, heads, head size] with "
            f"contiguous head size, got {_describe(x)}"
        )


def _check_vector(name: str, x: torch.Tensor, dtype: torch.dtype) -> None:
    if x.dim() != 1 or x.dtype != dtype or not x.is_contiguous():
        expected = str(dtype).removeprefix("torch.")
        raise ValueError(f"{name} must be a contiguous {expected} vector, got {_describe(x)}")


def _check_pages(cache: torch.Tensor, rows: torch.Tensor, format: KVFormat) -> None:
    head_size = rows.shape[-1]
    largest = MAX_HEAD_SIZES[page_layout(cache.device)]
    if head_size % LANES or not 0 < head_size <= largest:
        raise ValueError(
            f"head size {head_size} on {cache.device.type}: expected a multiple of {LANES} up to "
            f"{largest}; use --kv-cache-dtype auto"
        )
    content = format.bytes_per_token(head_size)
    good = cache.dtype == torch.uint8 and cache.dim() == 4 and cache.shape[3] == content
    good = good and cache.stride(3) == 1 and cache.stride(2) == content
    if not good or cache.shape[2] % LANES or not cache.shape[1] or not cache.shape[2]:
        raise ValueError(
            f"cache for {format.name} at head size {head_size} must be uint8 "
            f"[blocks, kv heads, block size (a multiple of {LANES}), {content}] with contiguous "
            f"pages, got {_describe(cache)}"
        )


def _check_device(cache: torch.Tensor, **others: torch.Tensor | None) -> None:
    elsewhere = [n for n, x in others.items() if x is not None and x.device != cache.device]
    if elsewhere:
        raise ValueError(
            f"all tensors must be on one device: the cache is on {cache.device}, "
            f"{', '.join(elsewhere)} elsewhere"
        )


def _check_static(format, rows, cache, key_static, value_static) -> None:
    shape = (cache.shape[1], rows.shape[-1])
    for name, stream, static in (
        ("key", format.key, key_static),
        ("value", format.value, value_static),
    ):
        if stream.is_dynamic != (static is None):
            need = "takes no static scale" if stream.is_dynamic else "needs a static scale"
            raise ValueError(f"{format.name} {need} for {name}")
        if static is None:
            continue
        for what, x in (
            ("scale", static.scale),
            ("inverse scale", static.inverse),
            ("zero point", static.zero_point),
        ):
            if x is None and what == "zero point":
                continue
            good = x.shape == shape and x.dtype == torch.float32 and x.is_contiguous()
            if not good or x.device != cache.device:
                raise ValueError(
                    f"{name} {what} must be contiguous float32 [kv heads, head size] = "
                    f"{list(shape)} on {cache.device}, got {_describe(x)} on {x.device}; "
                    f"StaticScale.expand makes one"
                )


def _check_slots(slot_mapping, cache) -> None:
    slots = cache.shape[0] * cache.shape[2]
    if slot_mapping.numel() and int(slot_mapping.max()) >= slots:
        raise ValueError(
            f"slot_mapping names slot {int(slot_mapping.max())}, the cache has {slots}"
        )


def _check_tables(query, cache, block_table, seq_lens, query_start_loc, window) -> None:
    size, blocks = cache.shape[2], cache.shape[0]
    room = block_table.shape[1] * size
    if seq_lens.numel() and int(seq_lens.max()) > room:
        raise ValueError(
            f"a sequence has {int(seq_lens.max())} tokens, its row of block_table holds {room}"
        )
    if seq_lens.numel() and int(seq_lens.min()) < 0:
        raise ValueError(f"a sequence has {int(seq_lens.min())} tokens: expected 0 or more")
    starts = query_start_loc[: seq_lens.shape[0] + 1]
    if int(starts[0]) < 0 or int(starts[-1]) > query.shape[0] or bool((starts.diff() < 0).any()):
        raise ValueError(
            f"query_start_loc must rise from 0 to at most {query.shape[0]} rows of query, "
            f"got {starts.tolist()}"
        )
    for s, (length, count) in enumerate(
        zip(seq_lens.tolist(), starts.diff().tolist(), strict=True)
    ):
        # Only what the queries see is looked at; block tables hold anything elsewhere.
        first = max(0, length - count - window + 1) // size if window > 0 else 0
        seen = block_table[s, first : -(-length // size) if count else 0]
        wrong = ((seen < 0) | (seen >= blocks)).nonzero().flatten()
        if wrong.numel():
            at = int(wrong[0])
            raise ValueError(
                f"block_table[{s}, {first + at}] of sequence {s} ({length} tokens) names block "
                f"{int(seen[at])}, the cache has {blocks}"
            )
