"""From a scale as some checkpoint spells it to the fp32 tensor one rank needs.

Every published shape is brought to one of three forms, for H kv heads and head size D:
tensor ``()``, head ``(H,)``, channel ``(H, D)``. Channels are head-major, as the output of
``k_proj`` is. The forms are tried in this order and the first whose shapes match wins:

1. tensor: ``()`` or ``(1,)``
2. head: ``(H,)``, ``(H, 1)`` or ``(H, 1, 1)``
3. channel: ``(H*D,)``, ``(H*D, 1)``, ``(1, H*D)``, ``(H, D)`` or ``(H, 1, D)``

With H == 1, ``(1,)`` is thus a tensor scale and ``(1, D)`` a channel scale. No other shape
fits two forms, because D is at least 16; where two spellings of one form coincide (``(1, D)``
is ``(1, H*D)`` and ``(H, D)``) they mean the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

import torch

from kvq_plugin.formats import Kind, KVFormat

#: A placeholder's value, and a checkpoint's way to say "no scale" where it must say something.
ABSENT = -1.0


@dataclass(frozen=True)
class HeadShard:
    """The kv heads one of ``ranks`` holds: ``count`` of ``total``, from ``first``."""

    total: int
    first: int
    count: int
    ranks: int = 1

    @classmethod
    def of(
        cls,
        count: int,
        stated_total: int | None,
        rank: int,
        world: int,
        own_total: int | None = None,
    ) -> HeadShard:
        """Shard of a layer with *count* kv heads on this rank.

        *stated_total* is the model configuration's number of kv heads, *own_total* the layer's
        (:func:`own_kv_heads`), which comes first: models may have several kinds of layers. They
        decide whether a single head per rank is one of ``world`` or a replica (fewer kv heads
        than ranks); a layer that contradicts both is evenly divided.
        """
        stated = (t for t in (own_total, stated_total) if t and count == max(1, t // world))
        total = next(stated, count * world)
        if total < world:  # each head is held by world / total neighbouring ranks
            return cls(total, rank * total // world, 1, world)
        return cls(total, rank * count, count, world)

    def cut(self, scale: torch.Tensor) -> torch.Tensor:
        """This rank's part of a ``()``, ``(H,)`` or ``(H, D)`` tensor."""
        return scale if scale.dim() == 0 else scale[self.first : self.first + self.count]


@dataclass(frozen=True)
class ScaleReader:
    """Reads the scales of one layer.

    Attributes:
        layer: its name, for messages.
        shard: the kv heads of this rank.
        head_size, head_size_v: D of K (and Q), and of V.
        query_heads: of the whole model.
    """

    layer: str
    shard: HeadShard
    head_size: int
    head_size_v: int
    query_heads: int

    def read(
        self, tensors: Mapping[str, torch.Tensor], format: KVFormat | None = None
    ) -> dict[str, torch.Tensor]:
        """Parameter -> fp32 ``()``, ``(H,)`` or ``(H, D)``, for the *tensors* that say something.

        Left out are scales of -1, zero points of 0, and the query's zero point, which nothing
        uses. Raises ValueError as :meth:`scale` and :meth:`zero_point` do, and for a zero point
        of a *format* that has none.
        """
        values = {}
        for parameter, tensor in tensors.items():
            if parameter.endswith("scale"):
                value = self.scale(parameter, tensor)
                if value is not None:
                    values[parameter] = value
            elif not parameter.startswith("q") and bool(
                (value := self.zero_point(parameter, tensor)).any()
            ):
                if format is not None and format.key.code.kind is Kind.FLOAT:
                    raise ValueError(
                        f"{self.layer}: {parameter} is not zero, but {format.name} codes are "
                        "symmetric: expected zeros; use a dtype without static scales, such as "
                        "fp8_per_token_head"
                    )
                values[parameter] = value
        return values

    def scale(self, parameter: str, loaded: torch.Tensor) -> torch.Tensor | None:
        """*loaded* as fp32 in this rank's form; None when it is all -1. A query's scales come per
        query head and are reduced to ``(H,)`` by their maximum.

        Raises ValueError for a shape not listed above, and for values that are zero,
        negative, NaN, infinite, or so small that their inverse is infinite.
        """
        value = self._form(parameter, loaded)
        if bool((value == ABSENT).all()):
            return None
        sound = value.isfinite() & (value > 0) & value.reciprocal().isfinite()
        if not bool(sound.all()):
            self._refuse(parameter, loaded, f"expected finite scales > 0, got {_describe(value)}; ")
        if parameter.startswith("q") and value.dim():
            value = value.reshape(self.shard.total, -1).amax(1)
        return self.shard.cut(value)

    def zero_point(self, parameter: str, loaded: torch.Tensor) -> torch.Tensor:
        """*loaded* as fp32 in this rank's form: the code that decodes to 0, an integer.

        Raises ValueError for shapes not listed above and for values that are not int8 codes:
        other conventions (a midpoint or a minimum in the tensor's own unit) are not guessed.
        """
        value = self._form(parameter, loaded)
        if not bool(((value == value.round()) & (value >= -128) & (value <= 127)).all()):
            found = f"expected integer codes of zero, got {_describe(value)}; "
            self._refuse(parameter, loaded, found)
        return self.shard.cut(value)

    def _form(self, parameter: str, loaded: torch.Tensor) -> torch.Tensor:
        value = loaded.detach().to(torch.float32)
        for shape, spellings in self._spellings(parameter):
            if tuple(value.shape) in spellings:
                return value.reshape(shape)
        self._refuse(parameter, loaded, "")

    def _spellings(self, parameter: str) -> list[tuple[tuple[int, ...], list[tuple[int, ...]]]]:
        """Each form's canonical shape with the shapes accepted for it."""
        forms = [((), [(), (1,)])]
        if not parameter.startswith("prob"):
            h = self.query_heads if parameter.startswith("q") else self.shard.total
            d = self.head_size_v if parameter.startswith("v") else self.head_size
            forms.append(((h,), [(h,), (h, 1), (h, 1, 1)]))
            forms.append(((h, d), [(h * d,), (h * d, 1), (1, h * d), (h, d), (h, 1, d)]))
        return forms

    def _refuse(self, parameter: str, loaded: torch.Tensor, values: str) -> NoReturn:
        accepted = ", ".join(str(s) for _, shapes in self._spellings(parameter) for s in shapes)
        raise ValueError(
            f"{self.layer}: cannot use {parameter} of shape {tuple(loaded.shape)}: {values}"
            f"accepted shapes are {accepted}. Recalibrate with `kvq calibrate`, or use a dtype "
            "without static scales, such as int8_per_token_head"
        )


def own_kv_heads(model: torch.nn.Module) -> dict[str, int]:
    """Name of an attention layer -> kv heads over all ranks, where vLLM's module around it says."""
    found = {}
    for module in model.modules():
        total = getattr(module, "total_num_kv_heads", None)
        if isinstance(total, int):
            inner = (getattr(child, "layer_name", None) for child in module.children())
            found |= dict.fromkeys(filter(None, inner), total)
    return found


def check_query(layer: str, q: torch.Tensor, k: torch.Tensor) -> None:
    """ValueError unless *layer* may have q_scale *q* beside k_scale *k*, in the forms that
    :class:`ScaleReader` gives: several values of q need several of k."""
    if q.dim() and not k.dim():
        raise ValueError(
            f"{layer}: q_scale has {q.numel()} values beside a single k_scale: expected a single "
            "value; recalibrate with `kvq calibrate`"
        )


def _describe(value: torch.Tensor) -> str:
    bad = {"NaN": value.isnan(), "infinite": value.isinf(), "zero": value == 0}
    bad["negative"] = value < 0
    counts = ", ".join(f"{int(m.sum())} {name}" for name, m in bad.items() if m.any())
    span = f"values from {value.min().item():.4g} to {value.max().item():.4g}"
    return f"{span} ({counts})" if counts else span
