"""What the operators were given, against what they ask: ValueErrors that name both.

:mod:`kvq_plugin.ops` calls these after the compiled operators refused a call, to word it, and
before GPUs and the reference are asked.
"""

from __future__ import annotations

import torch

from kvq_plugin.calls import Attend, Store
from kvq_plugin.formats import GROUP, KVFormat
from kvq_plugin.layout import MAX_HEAD_SIZES, page_layout

ACTIVATIONS = (torch.bfloat16, torch.float16, torch.float32)
#: What fp32 computes: ``csrc/cpu/checks.h`` says how well, and what came of others.
SOFTCAPS = (1e-4, 1e4)


def check_store(call: Store) -> None:
    cache, format, slots, recent_slots = (
        call.cache, call.format, call.slot_mapping, call.recent_slot_mapping,
    )  # fmt: skip
    _check_rows("key", call.key)
    _check_pages(cache, call.key, format)
    _check_apart("cache", cache)
    _check_recent(call, recent_slot_mapping=recent_slots)
    if call.recent_cache is not None:
        _check_apart("recent_cache", call.recent_cache)
    _check_device(cache, key=call.key, value=call.value, slot_mapping=slots)
    _check_rows("value", call.value)
    for name, x in (("key", call.key), ("value", call.value)):
        if x.shape[1] != cache.shape[1]:
            raise ValueError(f"{name} has {x.shape[1]} kv heads, the cache {cache.shape[1]}")
    if call.value.shape != call.key.shape or call.value.dtype != call.key.dtype:
        key, value = map(_describe, (call.key, call.value))
        raise ValueError(f"key {key} and value {value} must agree")
    _check_vector("slot_mapping", slots, torch.int64)
    if slots.shape[0] > call.key.shape[0]:
        raise ValueError(f"{slots.shape[0]} slots for {call.key.shape[0]} rows of key")
    _check_static(call)
    if format.recent is None:
        return
    _check_vector("recent_slot_mapping", recent_slots, torch.int64)
    if recent_slots.shape != slots.shape:
        raise ValueError(f"{recent_slots.shape[0]} recent slots for {slots.shape[0]} slots")
    if slots.device.type != "cpu":
        return  # to look at them would wait for the device, which a graph's capture forbids
    both = (slots >= 0) & (recent_slots >= 0)
    apart = ((slots - recent_slots) % GROUP != 0) & both
    if bool(apart.any()):
        at = int(apart.nonzero()[0])
        raise ValueError(
            f"slot_mapping and recent_slot_mapping must agree modulo {GROUP}, got "
            f"{int(slots[at])} and {int(recent_slots[at])} for row {at}"
        )


def check_attend(call: Attend) -> None:
    out, query, cache, format = call.out, call.query, call.cache, call.format
    _check_rows("query", query)
    _check_pages(cache, query, format)
    _check_recent(call, recent_block_table=call.recent_block_table)
    if format.recent is not None and not call.causal:
        raise ValueError(f"{format.name} has recent rows, which serve causal attention only")
    names = ("query", "out", "block_table", "seq_lens", "query_start_loc", "alibi_slopes", "sinks")
    _check_device(cache, **{name: getattr(call, name) for name in names})
    _check_rows("out", out)
    if out.shape != query.shape or out.dtype != query.dtype:
        raise ValueError(f"query {_describe(query)} and out {_describe(out)} must agree")
    _check_apart("out", out)
    _check_in_place(out, query)
    if query.shape[1] % cache.shape[1]:
        raise ValueError(
            f"{query.shape[1]} query heads do not divide into {cache.shape[1]} kv heads"
        )
    _check_vector("seq_lens", call.seq_lens, torch.int32)
    sequences = call.seq_lens.shape[0]
    _check_vector("query_start_loc", call.query_start_loc, torch.int32)
    if call.query_start_loc.shape[0] < sequences + 1:
        raise ValueError(
            f"query_start_loc has {call.query_start_loc.shape[0]} entries for "
            f"{sequences} sequences; expected one more than sequences"
        )
    for name in ("block_table", "recent_block_table"):
        x = getattr(call, name)
        if x is None:
            continue
        if x.dtype != torch.int32 or x.dim() != 2 or x.stride(1) != 1:
            raise ValueError(f"{name} must be int32 [S, blocks], got {_describe(x)}")
        if x.shape[0] < sequences:
            raise ValueError(f"{name} has {x.shape[0]} rows for {sequences} sequences")
    for name in ("alibi_slopes", "sinks"):
        x = getattr(call, name)
        if x is not None:
            _check_vector(name, x, torch.float32)
            if x.shape[0] != query.shape[1]:
                raise ValueError(f"{name} has {x.shape[0]} entries for {query.shape[1]} heads")
    if call.softcap != 0.0 and not SOFTCAPS[0] <= call.softcap <= SOFTCAPS[1]:
        raise ValueError(
            f"softcap must be 0 (none) or between {SOFTCAPS[0]:g} and {SOFTCAPS[1]:g}, "
            f"got {call.softcap}"
        )
    _check_static(call)


def _describe(x: torch.Tensor) -> str:
    return f"{x.dtype} {list(x.shape)} strides {list(x.stride())}".removeprefix("torch.")


def _check_rows(name: str, x: torch.Tensor) -> None:
    if x.dim() != 3 or x.dtype not in ACTIVATIONS or x.stride(2) != 1:
        raise ValueError(
            f"{name} must be bfloat16, float16 or float32 [tokens, heads, head size] with "
            f"contiguous head size, got {_describe(x)}"
        )


def _check_apart(name: str, x: torch.Tensor) -> None:
    """*x* is written, by many threads at once."""
    steps = x.stride()
    if 0 in steps and any(n > 1 and step == 0 for n, step in zip(x.shape, steps, strict=True)):
        raise ValueError(
            f"{name} is written, but repeats memory (Tensor.expand), got {_describe(x)}; pass a "
            f"tensor of its own, as {name}.clone() makes one"
        )


def _check_in_place(out: torch.Tensor, query: torch.Tensor) -> None:
    """As torch's own operators, this looks at tensors without gaps only. Of GPUs' it asks nothing:
    what traces a call has no addresses."""
    if out.device.type != "cpu" or not (out.is_contiguous() and query.is_contiguous()):
        return
    apart = abs(out.data_ptr() - query.data_ptr())
    if 0 < apart < out.numel() * out.element_size():
        raise ValueError(
            f"out overlaps query {apart} bytes away: pass query itself, or memory of its own"
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


def _check_recent(call: Store | Attend, **where) -> None:
    """*where*: the slots or block table that come with the recent cache, by their name."""
    ((name, x),) = where.items()
    format, recent = call.format, call.recent_cache
    if format.recent is None:
        if recent is not None or x is not None:
            raise ValueError(
                f"{format.name} has no recent rows: it takes no recent_cache or {name}"
            )
        return
    if recent is None or x is None:
        raise ValueError(f"{format.name} keeps recent rows: it needs recent_cache and {name}")
    _check_pages(recent, call.rows, format.recent, GROUP)
    _check_device(call.cache, recent_cache=recent, **where)
    if recent.shape[1] != call.cache.shape[1]:
        raise ValueError(
            f"recent_cache has {recent.shape[1]} kv heads, the cache {call.cache.shape[1]}"
        )


def _check_device(cache: torch.Tensor, **others: torch.Tensor | None) -> None:
    elsewhere = [n for n, x in others.items() if x is not None and x.device != cache.device]
    if elsewhere:
        raise ValueError(
            f"all tensors must be on one device: the cache is on {cache.device}, "
            f"{', '.join(elsewhere)} elsewhere"
        )


def _check_static(call: Store | Attend) -> None:
    format, cache = call.format, call.cache
    shape = (cache.shape[1], call.rows.shape[-1])
    for name, stream, static in (
        ("key", format.key, call.key_static),
        ("value", format.value, call.value_static),
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


def check_slots(call: Store) -> None:
    for name, slots, cache in (
        ("slot_mapping", call.slot_mapping, call.cache),
        ("recent_slot_mapping", call.recent_slot_mapping, call.recent_cache),
    ):
        room = 0 if cache is None else cache.shape[0] * cache.shape[2]
        if cache is not None and slots.numel() and int(slots.max()) >= room:
            raise ValueError(f"{name} names slot {int(slots.max())}, the cache has {room}")


def check_tables(call: Attend) -> None:
    query, format, window, seq_lens = call.query, call.format, call.window, call.seq_lens
    tables = [("block_table", call.block_table, call.cache)]
    if call.recent_cache is not None:
        tables.append(("recent_block_table", call.recent_block_table, call.recent_cache))
    for name, table, pages in tables:
        room = table.shape[1] * pages.shape[2]
        if seq_lens.numel() and int(seq_lens.max()) > room:
            raise ValueError(
                f"a sequence has {int(seq_lens.max())} tokens, its row of {name} holds {room}"
            )
    if seq_lens.numel() and int(seq_lens.min()) < 0:
        raise ValueError(f"a sequence has {int(seq_lens.min())} tokens: expected 0 or more")
    starts = call.query_start_loc[: seq_lens.shape[0] + 1]
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
        if call.recent_cache is not None:
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
