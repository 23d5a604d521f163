"""The structs of ``csrc/cuda/params.h``, and how tensors fill them."""

from __future__ import annotations

from ctypes import Structure, c_float, c_int32, c_int64, c_void_p

import torch

from kvq_plugin.formats import KVFormat
from kvq_plugin.reference import StaticScale

ACTIVATIONS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


class Rows(Structure):
    _fields_ = [("data", c_void_p), ("token_stride", c_int64), ("head_stride", c_int64)]


class Cache(Structure):
    _fields_ = [
        ("data", c_void_p),
        ("block_stride", c_int64),
        ("head_stride", c_int64),
        ("block_size", c_int32),
        ("num_kv_heads", c_int32),
        ("head_size", c_int32),
        ("format", c_int32),
    ]


class Scale(Structure):
    _fields_ = [("factor", c_void_p), ("zero_point", c_void_p)]


class StoreParams(Structure):
    _fields_ = [
        ("key", Rows),
        ("value", Rows),
        ("cache", Cache),
        ("key_scale", Scale),
        ("value_scale", Scale),
        ("slots", c_void_p),
        ("num_tokens", c_int64),
        ("recent", Cache),
        ("recent_slots", c_void_p),
        ("activation", c_int32),
        ("aligned", c_int32),
    ]


class AttendParams(Structure):
    _fields_ = [
        ("query", Rows),
        ("out", Rows),
        ("cache", Cache),
        ("key_scale", Scale),
        ("value_scale", Scale),
        ("block_table", c_void_p),
        ("seq_lens", c_void_p),
        ("query_start", c_void_p),
        ("alibi_slopes", c_void_p),
        ("sinks", c_void_p),
        ("workspace", c_void_p),
        ("counters", c_void_p),
        ("block_table_stride", c_int64),
        ("num_tokens", c_int64),
        ("recent", Cache),
        ("recent_table", c_void_p),
        ("recent_table_stride", c_int64),
        ("num_seqs", c_int32),
        ("num_heads", c_int32),
        ("max_query_len", c_int32),
        ("window", c_int32),
        ("scale", c_float),
        ("softcap", c_float),
        ("causal", c_int32),
        ("activation", c_int32),
        ("group", c_int32),
        ("tile_tokens", c_int32),
        ("tile_rows", c_int32),
        ("abreast", c_int32),
        ("blocks", c_int32),
    ]


def _rows(x: torch.Tensor) -> Rows:
    return Rows(x.data_ptr(), x.stride(0), x.stride(1))


def _cache(cache: torch.Tensor | None, format: KVFormat | None, head_size: int) -> Cache:
    if cache is None:
        return Cache()
    blocks, heads = cache.stride()[:2]
    return Cache(cache.data_ptr(), blocks, heads, cache.shape[2], cache.shape[1], head_size,
                 format.id)  # fmt: skip


def _scale(static: StaticScale | None, which: str) -> Scale:
    if static is None:
        return Scale()
    zero = static.zero_point
    return Scale(getattr(static, which).data_ptr(), None if zero is None else zero.data_ptr())


def pointer(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def store_params(
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
) -> StoreParams:
    """The struct that the store kernels read, for the arguments of :func:`store`."""
    rows = (key, value)
    aligned = all(
        x.data_ptr() % 16 == 0 and all(s * x.element_size() % 16 == 0 for s in x.stride()[:2])
        for x in rows
    )
    return StoreParams(
        *map(_rows, rows),
        _cache(cache, format, key.shape[-1]),
        _scale(key_static, "inverse"),
        _scale(value_static, "inverse"),
        slot_mapping.data_ptr(),
        slot_mapping.shape[0],
        _cache(recent_cache, format.recent, key.shape[-1]),
        pointer(recent_slot_mapping),
        ACTIVATIONS[key.dtype],
        aligned,
    )


def attend_params(
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
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    recent_cache: torch.Tensor | None = None,
    recent_block_table: torch.Tensor | None = None,
) -> AttendParams:
    """The struct that attention reads, for the arguments of :func:`attend`; not yet planned."""
    return AttendParams(
        _rows(query),
        _rows(out),
        _cache(cache, format, query.shape[-1]),
        _scale(key_static, "scale"),
        _scale(value_static, "scale"),
        block_table.data_ptr(),
        seq_lens.data_ptr(),
        query_start_loc.data_ptr(),
        pointer(alibi_slopes),
        pointer(sinks),
        None,
        None,
        block_table.stride(0),
        query.shape[0],
        _cache(recent_cache, format.recent, query.shape[-1]),
        pointer(recent_block_table),
        0 if recent_block_table is None else recent_block_table.stride(0),
        seq_lens.shape[0],
        query.shape[1],
        max_query_len,
        window,
        scale,
        softcap,
        causal,
        ACTIVATIONS[query.dtype],
    )
