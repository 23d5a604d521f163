"""Answers of several KV caches to the same items, as plain figures for tables, page and JSON."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kvq_plugin.tasks.items import Item
from kvq_plugin.tasks.statistics import mcnemar, wilson

#: Below this share of right answers of the unquantized model a cell says nothing of a cache.
ABLE = 0.5


def figures(
    items: Sequence[Item], answers: Mapping[str, Sequence[str | None]], baseline: str
) -> dict[str, Any]:
    """What the *answers* to *items*, by KV cache, show beside those of *baseline*.

    ``rows``, one per task and length: ``task``, ``length``, ``able`` (whether *baseline* has ABLE
    of it right), ``caches`` and ``cells``, one per depth with ``depth``, ``items``, ``able`` and
    ``right`` by cache. ``caches`` has by name ``items``, ``right``, the 95 % interval ``low`` to
    ``high`` of the share of right answers, and but for *baseline* ``lost``, ``gained`` and ``p``.
    ``total``: as ``caches``, of all rows.

    Items that share a context are not independent, contexts are. The interval is that of as many
    trials as there are contexts: where items do differ within one, it is wider than need be. Lost
    and gained are contexts, in which a cache has fewer, or more, right answers than *baseline*. Of
    contexts with a single item each that is McNemar's test. A cache that was not asked all of a row
    (None) is absent from it.
    """
    right = {
        name: [None if text is None else item.is_right(text) for item, text in pairs]
        for name, pairs in (
            (name, zip(items, texts, strict=True)) for name, texts in answers.items()
        )
    }
    places: dict[tuple[str, int], list[int]] = defaultdict(list)
    for at, item in enumerate(items):
        places[item.task, item.length].append(at)
    rows = [_row(items, right, baseline, of) for of in places.values()]
    total = {}
    for name in answers:
        held = [at for of in places.values() if _asked(right[name], of) for at in of]
        if held:
            total[name] = _cache(items, right, name, baseline, held)
    return {"rows": rows, "total": total}


def _asked(right: Sequence[bool | None], places: Iterable[int]) -> bool:
    return all(right[at] is not None for at in places)


def _row(items: Sequence[Item], right: Mapping, baseline: str, places: Sequence[int]) -> dict:
    asked = [name for name in right if _asked(right[name], places)]
    caches = {name: _cache(items, right, name, baseline, places) for name in asked}
    cells = []
    for depth in dict.fromkeys(items[at].depth for at in places):
        here = [at for at in places if items[at].depth == depth]
        found = {name: sum(right[name][at] for at in here) for name in asked}
        able = found[baseline] >= ABLE * len(here)
        cells.append({"depth": depth, "items": len(here), "able": able, "right": found})
    first = items[places[0]]
    able = caches[baseline]["right"] >= ABLE * len(places)
    return {
        "task": first.task,
        "length": first.length,
        "able": able,
        "cells": cells,
        "caches": caches,
    }


def _cache(items, right, name: str, baseline: str, places: Sequence[int]) -> dict[str, Any]:
    own, base = right[name], right[baseline]
    count = sum(own[at] for at in places)
    contexts = len({(items[at].task, items[at].length, items[at].context) for at in places})
    low, high = wilson(count * contexts / len(places), contexts)
    found = {"items": len(places), "right": count, "low": low, "high": high}
    if name != baseline:
        more: dict[tuple, int] = defaultdict(int)
        for at in places:
            more[items[at].task, items[at].length, items[at].context] += own[at] - base[at]
        lost, gained = (sum(sign * d > 0 for d in more.values()) for sign in (-1, 1))
        found |= {"lost": lost, "gained": gained, "p": mcnemar(lost, gained)}
    return found
