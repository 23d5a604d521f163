"""Public operators: check once, choose the kernels once, call.

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
    # Both operators only write into an argument, so there is nothing to describe.
    for name in ("store", "attend"):
        torch.library.register_fake(f"kvq::{name}", lambda *args, **kwargs: None)


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
    if _use_reference(cache.device.type):
        _check_slots(slot_mapping, cache)
        n = slot_mapping.shape[0]
        args = (key[:n], value[:n], cache, slot_mapping, format, key_static, value_static)
        return reference.store(*args, layout=page_layout(cache.device))
    if cache.device.type != "cpu":
        from kvq_plugin import kernels

        return kernels.store(key, value, cache, slot_mapping, format, key_static, value_static)
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
    except RuntimeError:  # looking at the data first would cost every step a few microseconds
        _check_slots(slot_mapping, cache)
        raise


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
    tokens of its ``seq_lens[s]`` cached ones (which this step's :func:`store` already wrote).

    Args:
        out, query: ``[T, heads, D]`` of one dtype; D contiguous, other strides free.
        cache: as in :func:`store`.
        block_table: ``[S, blocks]`` int32; seq_lens: ``[S]`` int32; query_start_loc: ``[S+1]``
            int32.
        scale: factor of q . k before softcap and softmax.
        window: 0, or the number of tokens a query sees, itself included.
        softcap: 0, or ``s -> softcap * tanh(s / softcap)``.
        alibi_slopes, sinks: ``[heads]`` fp32; a sink is a logit that joins the denominator.
        max_query_len, max_seq_len, workspace: read on GPUs only. Bounds of the batch, by default
            what the shapes of query and block_table allow, and scratch memory of
            :func:`kvq_plugin.kernels.workspace_size` bytes, by default allocated for the call.

    Raises ValueError naming what was expected and what came.
    """
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
    _check_static(format, query, cache, key_static, value_static)
    options = {
        "causal": causal,
        "window": window,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
    }
    if _use_reference(cache.device.type):
        _check_tables(query, cache, block_table, seq_lens, query_start_loc)
        n = int(query_start_loc[seq_lens.shape[0]])  # rows after it are padding: left alone
        out[:n] = reference.attend(
            query[:n],
            cache,
            block_table,
            seq_lens,
            query_start_loc,
            format,
            scale,
            key_static,
            value_static,
            **options,
            layout=page_layout(cache.device),
        )
        return
    if cache.device.type != "cpu":
        from kvq_plugin import kernels

        kernels.attend(
            out,
            query,
            cache,
            block_table,
            seq_lens,
            query_start_loc,
            format,
            scale,
            key_static,
            value_static,
            **options,
            max_query_len=query.shape[0] if max_query_len is None else max_query_len,
            max_seq_len=(
                block_table.shape[1] * cache.shape[2] if max_seq_len is None else max_seq_len
            ),
            workspace=workspace,
        )
        return
    try:
        torch.ops.kvq.attend(
            out,
            query,
            cache,
            block_table,
            seq_lens,
            query_start_loc,
            format.id,
            scale,
            *_pair(key_static, "scale"),
            *_pair(value_static, "scale"),
            *options.values(),
        )
    except RuntimeError:
        _check_tables(query, cache, block_table, seq_lens, query_start_loc)
        raise


def _pair(static: StaticScale | None, which: str):
    return (None, None) if static is None else (getattr(static, which), static.zero_point)


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
    if head_size % LANES or head_size > largest:
        raise ValueError(
            f"head size {head_size} on {cache.device.type}: expected a multiple of {LANES} up to "
            f"{largest}; use --kv-cache-dtype auto"
        )
    content = format.bytes_per_token(head_size)
    good = cache.dtype == torch.uint8 and cache.dim() == 4 and cache.shape[3] == content
    if not good or cache.stride(3) != 1 or cache.stride(2) != content or cache.shape[2] % LANES:
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
        if static is not None and static.scale.shape != shape:
            raise ValueError(
                f"{name} scale must be [kv heads, head size] = {list(shape)}, "
                f"got {list(static.scale.shape)}"
            )


def _check_slots(slot_mapping, cache) -> None:
    slots = cache.shape[0] * cache.shape[2]
    if slot_mapping.numel() and int(slot_mapping.max()) >= slots:
        raise ValueError(
            f"slot_mapping names slot {int(slot_mapping.max())}, the cache has {slots}"
        )


def _check_tables(query, cache, block_table, seq_lens, query_start_loc) -> None:
    room = block_table.shape[1] * cache.shape[2]
    if seq_lens.numel() and int(seq_lens.max()) > room:
        raise ValueError(
            f"a sequence has {int(seq_lens.max())} tokens, its row of block_table holds {room}"
        )
    starts = query_start_loc[: seq_lens.shape[0] + 1]
    if int(starts[0]) < 0 or int(starts[-1]) > query.shape[0] or bool((starts.diff() < 0).any()):
        raise ValueError(
            f"query_start_loc must rise from 0 to at most {query.shape[0]} rows of query, "
            f"got {starts.tolist()}"
        )
