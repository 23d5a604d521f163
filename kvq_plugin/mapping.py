"""Which KV cache each layer has: the mapping of ``--kv-cache-dtype kvq_mixed``.

    {"0": "int8_per_token_head", "1-28": "int4", "29": "k8v4"}

Keys are layer numbers, ranges of them with both ends, ``sliding`` (layers with a sliding window)
and ``default`` (all that nothing else names); a number wins over ``sliding``. Values are names of
the format table, or ``auto``: unquantized. Users give it in ``--additional-config '{"kvq":
{"layers": {...}}}'``, checkpoints in ``config.json`` under the same two keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from kvq_plugin.formats import SERVED, KVFormat

#: The ``--kv-cache-dtype`` that reads a mapping.
MIXED = "kvq_mixed"
#: Every ``--kv-cache-dtype`` of the plugin's.
NAMES = (*SERVED, MIXED)
#: A layer that stays unquantized.
PLAIN = "auto"
SECTION, LAYERS = "kvq", "layers"
DEFAULT, SLIDING = "default", "sliding"
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


@dataclass(frozen=True)
class LayerMapping:
    """A mapping that was checked.

    Attributes:
        numbered: name by layer number.
        default, sliding: names for what *numbered* lacks; None where the mapping has none.
    """

    numbered: dict[int, str]
    default: str | None = None
    sliding: str | None = None

    def name(self, number: int, sliding: bool = False) -> str:
        """The ``--kv-cache-dtype`` of layer *number*. ValueError where nothing names it."""
        found = self.numbered.get(number)
        if found is None and sliding:
            found = self.sliding
        found = found or self.default
        if found is None:
            raise ValueError(
                f"the layer mapping of {MIXED} says nothing about layer {number}: expected a range "
                f'with it, or "{DEFAULT}"'
            )
        return found

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that occurs, each once."""
        all_names = (*self.numbered.values(), self.sliding, self.default)
        return tuple(dict.fromkeys(name for name in all_names if name is not None))

    @property
    def formats(self) -> tuple[KVFormat, ...]:
        """Every format that occurs, each once; none for unquantized layers."""
        return tuple(dict.fromkeys(SERVED[n] for n in self.names if n != PLAIN))


def parse(given: Any, layers: int) -> LayerMapping:
    """*given*, the mapping of a model of so many *layers*, checked.

    Raises ValueError, which names the range, for a layer that the model lacks, one that is named
    twice, one that nothing names, a range that ends before it begins, and an unknown format.
    """
    if not isinstance(given, Mapping) or not given:
        raise ValueError(
            f'{SECTION}.{LAYERS} is {given!r}: expected a mapping such as {{"0": "int8_per_token_'
            'head", "1-28": "int4", "default": "k8v4"}'
        )
    numbered: dict[int, str] = {}
    owner: dict[int, str] = {}
    others: dict[str, str] = {}
    for key, name in given.items():
        if name not in (*SERVED, PLAIN):
            raise ValueError(
                f"{SECTION}.{LAYERS}: layers {key!r} are to have {name!r}, which is no KV cache of "
                f"kvq_plugin: expected one of {', '.join((*SERVED, PLAIN))}"
            )
        if key in (DEFAULT, SLIDING):
            others[key] = name
            continue
        for number in _numbers(str(key), layers):
            if number in owner:
                raise ValueError(
                    f"{SECTION}.{LAYERS}: ranges {owner[number]!r} and {key!r} overlap in layer "
                    f"{number}: expected each layer once"
                )
            numbered[number], owner[number] = name, str(key)
    mapping = LayerMapping(dict(sorted(numbered.items())), others.get(DEFAULT), others.get(SLIDING))
    missing = [n for n in range(layers) if n not in numbered]
    if missing and not others:  # with "sliding" alone, the layers themselves show what is missing
        raise ValueError(
            f"{SECTION}.{LAYERS} says nothing about layers {ranges(missing)} of 0-{layers - 1}: "
            f'name them, or add "{DEFAULT}"'
        )
    return mapping


def _numbers(key: str, layers: int) -> range:
    match = _RANGE.fullmatch(key.strip())
    if match is None:
        raise ValueError(
            f"{SECTION}.{LAYERS}: {key!r} is no range of layers: expected a number, two with a "
            f'dash ("1-28"), "{SLIDING}" or "{DEFAULT}"'
        )
    first, last = int(match[1]), int(match[2] or match[1])
    if first > last:
        raise ValueError(
            f"{SECTION}.{LAYERS}: range {key!r} ends before it begins: expected {last}-{first}"
        )
    if last >= layers:
        raise ValueError(
            f"{SECTION}.{LAYERS}: range {key!r} names layer {last}, which the model lacks: it has "
            f"0 to {layers - 1}"
        )
    return range(first, last + 1)


def ranges(numbers: Iterable[int]) -> str:
    """``[0, 1, 2, 5]`` -> ``0-2, 5``."""
    runs = groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0])
    ends = [[number for _, number in run] for _, run in runs]
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in ends)


def compact(names: Iterable[str]) -> dict[str, str]:
    """The mapping of layers whose names are *names*, in order, in as few ranges as there are runs
    of equal ones."""
    found: dict[str, str] = {}
    for name, run in groupby(enumerate(names), key=lambda pair: pair[1]):
        found[ranges(number for number, _ in run)] = name
    return found


def declared_mapping(config: Any) -> Any:
    """The mapping that a checkpoint declares, as it is written; None without one.

    *config* is config.json's content or transformers' object for it.
    """
    section = config.get(SECTION) if isinstance(config, Mapping) else getattr(config, SECTION, None)
    return section.get(LAYERS) if isinstance(section, Mapping) else None


def bytes_per_token(name: str, head_size: int, itemsize: int = 2) -> int:
    """Bytes per token and kv head of KV cache *name*, unquantized values of *itemsize* bytes."""
    return 2 * head_size * itemsize if name == PLAIN else SERVED[name].bytes_per_token(head_size)


def bits(size: float, head_size: int) -> float:
    """*size* bytes per token and kv head, as bits per value of K and V."""
    return size * 8 / (2 * head_size)
