"""One loading of a model's scales: which key became what, and which layers lack theirs.

A layer's own loading cannot tell "this checkpoint has no scales" from "this layer's are missing",
so a :class:`ScaleLoad` follows all layers of a model, and the verdict falls with the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from kvq_plugin.formats import KVFormat
from kvq_plugin.serving.scales.declared import NO_SCALES_NEEDED, KVScheme
from kvq_plugin.serving.scales.keys import layer_number, parse

_TAIL = 4  # parts of a name that survive a model's own renaming: 3.self_attn.attn.k_scale


@dataclass(frozen=True)
class Scales:
    """What goes into one layer's buffers: fp32 scales and zero points of K and V, ``()``, ``(H,)``
    or ``(H, D)``; q's scale, ``()`` or ``(H,)``; the softmax probabilities', ``()``."""

    k: torch.Tensor
    v: torch.Tensor
    q: torch.Tensor
    prob: torch.Tensor
    k_zero: torch.Tensor | None = None
    v_zero: torch.Tensor | None = None


class ScaleLoad:
    """The state of loading one model's scales, and of loading them again.

    Holds no module but those in ``readers``, until the verdict: placeholders refer to it, and
    vLLM keeps copies of those for as long as the layer lives.

    Args:
        layers: names of the model's attention layers.
        scheme: what the checkpoint declares; None when it declares nothing.
        total_kv_heads: of the model, over all ranks; None when not known.
        optional: ``optional(key)`` is True for scales of layers that live elsewhere, which no
            layer here needs to take.

    Attributes:
        scales: layer -> what was published; for layers that read another's cache.
        readers: such layers, each with its own values, until all others are done.
    """

    def __init__(
        self,
        layers: Iterable[str],
        scheme: KVScheme | None = None,
        total_kv_heads: int | None = None,
        optional: Callable[[str], bool] = lambda key: False,
    ) -> None:
        self.layers = list(layers)
        self.scheme = scheme
        self.total_kv_heads = total_kv_heads
        self.optional = optional
        self.scales: dict[str, Scales] = {}
        self.readers: list[tuple[Any, dict[str, torch.Tensor]]] = []
        self._waiting = set(self.layers)
        # A tensor's id -> its key, and the tensor itself, so that the id stays its own.
        self._keys: dict[int, tuple[str, torch.Tensor]] = {}
        self._by_tail: dict[tuple[str, ...], str] = {}  # end of a parameter's name -> its key
        self._untaken: dict[str, None] = {}  # keys, in the checkpoint's order
        self._taken: dict[str, dict[str, str]] = {}  # layer -> parameter -> key
        self._repeated: set[str] = set()  # keys that are in several of the checkpoint's files
        self._twice: dict[str, str] = {}  # layer -> what the checkpoint gives it twice
        self._lacking: dict[str, tuple[list[str], KVFormat]] = {}  # layer -> parameters, format
        self._some_given = False

    def rename(
        self, weights: Iterable[tuple[str, torch.Tensor]], required: bool = True
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """*weights* with every KV scale under its parameter's name, and remembered.

        With *required*, a scale that is not optional and that no layer takes is an error later.
        One of a layer that the model does not have is held back, because models raise errors of
        their own about those.
        """
        numbers = {layer_number(layer) for layer in self.layers} | {None}
        seen: set[str] = set()
        for key, tensor in weights:
            found = parse(key)
            if found is None:
                yield key, tensor
                continue
            if key in seen:  # of two files; not by take, which online quantization calls twice
                self._repeated.add(key)
            seen.add(key)
            self._keys[id(tensor)] = key, tensor
            targets = found.targets(self.layers)
            self._by_tail |= {_tail(target): key for target in targets}
            if required and not self.optional(key):
                self._untaken[key] = None
                if layer_number(key) not in numbers:
                    continue
            for target in targets:
                yield target, tensor

    def take(self, layer: str, parameter: str, tensor: torch.Tensor) -> None:
        """*tensor* is being loaded as *parameter* of *layer*.

        A parameter that was given before is an error later, where scales are used at all
        (:meth:`require_once`).
        """
        target = f"{layer}.{parameter}"
        key, _ = self._keys.get(id(tensor), (None, None))
        key = key or self._by_tail.get(_tail(target), target)  # some loaders copy the tensor
        self._untaken.pop(key, None)
        before = self._taken.setdefault(layer, {}).setdefault(parameter, key)
        if before != key or key in self._repeated:
            where = "in two of its files" if before == key else f"and as {key}"
            self._twice.setdefault(layer, f"{parameter} twice, as {before} {where}")

    def require_once(self, layer: str) -> None:
        """Raise ValueError when *layer*, which uses its scales, was given one of them twice."""
        if (what := self._twice.get(layer)) is not None:
            raise ValueError(
                f"{layer}: the checkpoint gives {what}: expected one of them; remove the other "
                f"from the checkpoint, or use a dtype without static scales: {NO_SCALES_NEEDED}"
            )

    def taken(self, layer: str) -> dict[str, str]:
        """parameter -> key, of what *layer* was given since it was last asked about."""
        taken = self._taken.pop(layer, {})
        self._twice.pop(layer, None)
        if not self._taken:
            self._keys.clear()
            self._by_tail.clear()
            self._repeated.clear()
        return taken

    def has_both(self, layer: str, format: KVFormat, values: dict[str, torch.Tensor]) -> bool:
        """Whether *values* hold K's and V's scale for *layer*, stored as static *format*."""
        missing = [name for name in ("k_scale", "v_scale") if name not in values]
        self._some_given |= len(missing) < 2
        if missing:
            self._lacking[layer] = missing, format
        return not missing

    def finish(self, layer: str) -> bool:
        """*layer* was processed. True when it was the last one and all are well supplied.

        Raises ValueError naming every layer without scales where that cannot be meant, and
        every scale that no layer took. Layers loaded anew, one by one, are each the last.
        """
        self._waiting.discard(layer)
        if self._waiting:
            return False
        lacking, self._lacking = self._lacking, {}
        given, self._some_given = self._some_given, False
        extra, self._untaken = list(self._untaken), {}
        if extra and (lacking or given):
            raise ValueError(self._extra_message(extra, list(lacking)))
        promised = self.scheme is not None and self.scheme.is_complete
        if lacking and (promised or given):
            raise ValueError(self._missing_message(lacking))
        for name, (_, format) in lacking.items():
            if format.default_scale is None:
                raise ValueError(
                    f"--kv-cache-dtype {format.name} needs calibrated scales, and the checkpoint "
                    f"has none (first layer without: {name}): run `kvq calibrate` to add them, "
                    "or use --kv-cache-dtype int8_per_token_head, which needs none"
                )
        return True

    def _extra_message(self, keys: list[str], lacking: list[str]) -> str:
        without = f"; without scales are {', '.join(lacking)}" if lacking else ""
        return (
            f"the checkpoint has {len(keys)} KV scale(s) for layers that the model does not have: "
            f"{', '.join(keys)}{without}. Expected scales of the model's own attention layers: "
            "remove them from the checkpoint, run `kvq calibrate` on the model anew, or use a "
            f"dtype that needs no static scales: {NO_SCALES_NEEDED}"
        )

    def _missing_message(self, lacking: dict[str, tuple[list[str], KVFormat]]) -> str:
        why = f"declares KV scales ({self.scheme})" if self.scheme else "has KV scales"
        layers = ", ".join(
            f"{name} (no {missing[0]})" if len(missing) == 1 else name
            for name, (missing, _) in lacking.items()
        )
        return (
            f"the checkpoint {why} but lacks the k or v scale of {len(lacking)} layer(s): "
            f"{layers}. Expected both for every layer (a single kv_scale stands for both): run "
            "`kvq calibrate` to add them, list the layers in --kv-cache-dtype-skip-layers, or use "
            f"a dtype that needs no static scales: {NO_SCALES_NEEDED}"
        )


def _tail(name: str) -> tuple[str, ...]:
    return tuple(name.split(".")[-_TAIL:])
