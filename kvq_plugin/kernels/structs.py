"""The structs of ``csrc/cuda/params.h``, and how tensors fill them."""

from __future__ import annotations

from ctypes import Structure, c_float, c_int32, c_int64, c_void_p

import torch

from kvq_plugin.calls import Attend, Store, statics
from kvq_plugin.formats import KVFormat

ACTIVATIONS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


def _fields(*declarations: tuple[type, str]) -> list[tuple[str, type]]:
    """Of (type, names) as the header declares them."""
    return [(name, type) for type, names in declarations for name in names.split()]


class Rows(Structure):
    _fields_ = _fields((c_void_p, "data"), (c_int64, "token_stride head_stride"))


class Cache(Structure):
    _fields_ = _fields(
        (c_void_p, "data"),
        (c_int64, "block_stride head_stride"),
        (c_int32, "block_size num_kv_heads head_size format"),
    )


class StaticScale(Structure):
    _fields_ = _fields((c_void_p, "factor zero_point"))


class StoreParams(Structure):
    _fields_ = _fields(
        (Rows, "key value"),
        (Cache, "cache"),
        (StaticScale, "key_scale value_scale"),
        (c_void_p, "slots"),
        (c_int64, "num_tokens"),
        (Cache, "recent"),
        (c_void_p, "recent_slots"),
        (c_int32, "activation aligned"),
    )


class AttendParams(Structure):
    _fields_ = _fields(
        (Rows, "query out"),
        (Cache, "cache"),
        (StaticScale, "key_scale value_scale"),
        (c_void_p, "block_table seq_lens query_start alibi_slopes sinks workspace counters"),
        (c_int64, "block_table_stride num_tokens"),
        (Cache, "recent"),
        (c_void_p, "recent_table"),
        (c_int64, "recent_table_stride"),
        (c_int32, "num_seqs num_heads max_query_len window"),
        (c_float, "scale softcap"),
        (c_int32, "causal activation group tile_tokens tile_rows abreast blocks"),
    )


def _rows(x: torch.Tensor) -> Rows:
    return Rows(x.data_ptr(), x.stride(0), x.stride(1))


def _cache(cache: torch.Tensor | None, format: KVFormat | None, head_size: int) -> Cache:
    if cache is None:
        return Cache()
    blocks, heads = cache.stride()[:2]
    return Cache(cache.data_ptr(), blocks, heads, cache.shape[2], cache.shape[1], head_size,
                 format.id)  # fmt: skip


def pointer(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _scales(call: Store | Attend, which: str) -> tuple[StaticScale, StaticScale]:
    """Of K and of V."""
    key, key_zero, value, value_zero = map(pointer, statics(call, which))
    return StaticScale(key, key_zero), StaticScale(value, value_zero)


def store_params(call: Store) -> StoreParams:
    """The struct that the store kernels read."""
    rows = (call.key, call.value)
    aligned = all(
        x.data_ptr() % 16 == 0 and all(s * x.element_size() % 16 == 0 for s in x.stride()[:2])
        for x in rows
    )
    d = call.key.shape[-1]
    return StoreParams(
        *map(_rows, rows),
        _cache(call.cache, call.format, d),
        *_scales(call, "inverse"),
        call.slot_mapping.data_ptr(),
        call.slot_mapping.shape[0],
        _cache(call.recent_cache, call.format.recent, d),
        pointer(call.recent_slot_mapping),
        ACTIVATIONS[call.key.dtype],
        aligned,
    )


def attend_params(call: Attend) -> AttendParams:
    """The struct that attention reads; not yet planned."""
    recent, d = call.recent_block_table, call.query.shape[-1]
    return AttendParams(
        _rows(call.query),
        _rows(call.out),
        _cache(call.cache, call.format, d),
        *_scales(call, "scale"),
        call.block_table.data_ptr(),
        call.seq_lens.data_ptr(),
        call.query_start_loc.data_ptr(),
        pointer(call.alibi_slopes),
        pointer(call.sinks),
        None,
        None,
        call.block_table.stride(0),
        call.query.shape[0],
        _cache(call.recent_cache, call.format.recent, d),
        pointer(recent),
        0 if recent is None else recent.stride(0),
        call.seq_lens.shape[0],
        call.query.shape[1],
        call.max_query_len,
        call.window,
        call.scale,
        call.softcap,
        call.causal,
        ACTIVATIONS[call.query.dtype],
    )
