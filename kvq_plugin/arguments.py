"""What the operators were given, against what they ask: ValueErrors that name both.

:mod:`kvq_plugin.ops` calls these after the compiled operators refused a call, to word it, and
before GPUs and the reference are asked.
"""

from __future__ import annotations

import math

import torch

from kvq_plugin.formats import GROUP, KVFormat
from kvq_plugin.layout import MAX_HEAD_SIZES, page_layout

ACTIVATIONS = (torch.bfloat16, torch.float16, torch.float32)


def check_store(
    key,
    value,
    cache,
    slot_mapping,
    format,
    key_static,
    value_static,
    *,
    recent_cache,
    recent_slot_mapping,
) -> None:
    _check_pages(cache, key, format)
    _check_recent(format, cache, key, recent_cache, recent_slot_mapping=recent_slot_mapping)
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
    if format.recent is None:
        return
    _check_vector("recent_slot_mapping", recent_slot_mapping, torch.int64)
    if recent_slot_mapping.shape != slot_mapping.shape:
        raise ValueError(
            f"{recent_slot_mapping.shape[0]} recent slots for {slot_mapping.shape[0]} slots"
        )
    if slot_mapping.device.type != "cpu":
        return  # to look at them would wait for the device, which a graph's capture forbids
    both = (slot_mapping >= 0) & (recent_slot_mapping >= 0)
    apart = ((slot_mapping - recent_slot_mapping) % GROUP != 0) & both
    if bool(apart.any()):
        at = int(apart.nonzero()[0])
        raise ValueError(
            f"slot_mapping and recent_slot_mapping must agree modulo {GROUP}, got "
            f"{int(slot_mapping[at])} and {int(recent_slot_mapping[at])} for row {at}"
        )


def check_attend(
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
    recent_cache,
    recent_block_table,
) -> None:
    _check_pages(cache, query, format)
    _check_recent(format, cache, query, recent_cache, recent_block_table=recent_block_table)
    if format.recent is not None and not causal:
        raise ValueError(f"{format.name} has recent rows, which serve causal attention only")
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
    for name, x in (("block_table", block_table), ("recent_block_table", recent_block_table)):
        if x is None:
            continue
        if x.dtype != torch.int32 or x.dim() != 2 or x.stride(1) != 1:
            raise ValueError(f"{name} must be int32 [S, blocks], got {_describe(x)}")
        if x.shape[0] < seq_lens.shape[0]:
            raise ValueError(f"{name} has {x.shape[0]} rows for {seq_lens.shape[0]} sequences")
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


def _check_pages(
    cache: torch.Tensor, rows: torch.Tensor, format: KVFormat, step: int | None = None
) -> None:
    """*step*: what the block size is to be a multiple of, by default what the format asks."""
    head_size, multiple = rows.shape[-1], format.head_size_step
    largest = MAX_HEAD_SIZES[page_layout(cache.device)]
    if head_size % multiple or not 0 < head_size <= largest:
        raise ValueError(
            f"head size {head_size} on {cache.device.type}: expected a multiple of {multiple} up "
            f"to {largest}; use --kv-cache-dtype auto"
        )
    step = step or format.block_size_step
    blocked = cache.dim() == 4 and cache.shape[1] and cache.shape[2] and cache.shape[2] % step == 0
    content = format.bytes_per_token(head_size, cache.shape[2] if blocked else 128)
    good = blocked and cache.dtype == torch.uint8 and cache.shape[3] == content
    if not good or cache.stride(3) != 1 or cache.stride(2) != content:
        raise ValueError(
            f"cache for {format.name} at head size {head_size} must be uint8 "
            f"[blocks, kv heads, block size (a multiple of {step}), {content}] with contiguous "
            f"pages, got {_describe(cache)}"
        )


def _check_recent(format, cache, rows, recent_cache, **where) -> None:
    """*where*: the slots or block table that come with the recent cache, by their name."""
    ((name, x),) = where.items()
    if format.recent is None:
        if recent_cache is not None or x is not None:
            raise ValueError(
                f"{format.name} has no recent rows: it takes no recent_cache or {name}"
            )
        return
    if recent_cache is None or x is None:
        raise ValueError(f"{format.name} keeps recent rows: it needs recent_cache and {name}")
    _check_pages(recent_cache, rows, format.recent, GROUP)
    _check_device(cache, recent_cache=recent_cache, **where)
    if recent_cache.shape[1] != cache.shape[1]:
        raise ValueError(
            f"recent_cache has {recent_cache.shape[1]} kv heads, the cache {cache.shape[1]}"
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


def check_slots(name, slots, cache) -> None:
    room = cache.shape[0] * cache.shape[2]
    if slots.numel() and int(slots.max()) >= room:
        raise ValueError(f"{name} names slot {int(slots.max())}, the cache has {room}")


def check_tables(
    query,
    cache,
    block_table,
    seq_lens,
    query_start_loc,
    format,
    window,
    recent_cache,
    recent_block_table,
) -> None:
    tables = [("block_table", block_table, cache)]
    if recent_cache is not None:
        tables.append(("recent_block_table", recent_block_table, recent_cache))
    for name, table, pages in tables:
        room = table.shape[1] * pages.shape[2]
        if seq_lens.numel() and int(seq_lens.max()) > room:
            raise ValueError(
                f"a sequence has {int(seq_lens.max())} tokens, its row of {name} holds {room}"
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
        begin = max(0, length - count - window + 1) if window > 0 else 0
        spans = [(begin, length)]
        if recent_cache is not None:
            spans = [
                (begin, format.sealed_before(length - 1)),
                (max(begin, format.sealed_before(length - count)), length),
            ]
        for (name, table, pages), (begin, end) in zip(tables, spans, strict=True):
            size, blocks = pages.shape[2], pages.shape[0]
            first = begin // size
            seen = table[s, first : -(-end // size) if count else 0]
            wrong = ((seen < 0) | (seen >= blocks)).nonzero().flatten()
            if wrong.numel():
                at = int(wrong[0])
                raise ValueError(
                    f"{name}[{s}, {first + at}] of sequence {s} ({length} tokens) names block "
                    f"{int(seen[at])}, the cache has {blocks}"
                )
