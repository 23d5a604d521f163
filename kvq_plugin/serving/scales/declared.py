"""What a checkpoint declares about its KV scales, and which layers have received theirs.

Plain data shared by :mod:`config` and :mod:`scales`; imports no vLLM.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvq_plugin.formats import FORMATS, Code, Kind, KVFormat
from kvq_plugin.serving.scales.offers import ScaleKeys

#: compressed-tensors' ``type`` -> how such codes decode. Its int4 is symmetric, unlike ours.
_KINDS = {"float": Kind.FLOAT, "int": Kind.SIGNED}
_NO_SCALES_NEEDED = ", ".join(sorted(n for n, f in FORMATS.items() if f.is_dynamic))


@dataclass(frozen=True)
class KVScheme:
    """A checkpoint's ``kv_cache_scheme`` in compressed-tensors' schema.

    Attributes:
        type, num_bits: the code its scales were computed for.
        dynamic: no static scales are in the checkpoint.
        every_layer: the scheme promises scales for every layer. False for ModelOpt's
            ``kv_cache_quant_algo``, whose exporters leave out scales equal to 1.
    """

    type: str
    num_bits: int
    dynamic: bool = False
    every_layer: bool = True

    @classmethod
    def from_dict(cls, scheme: Mapping[str, Any]) -> KVScheme:
        """From compressed-tensors' QuantizationArgs, whose defaults are int, 8 bits, static."""
        return cls(
            type=str(scheme.get("type") or "int"),
            num_bits=int(scheme.get("num_bits") or 8),
            dynamic=bool(scheme.get("dynamic")),
        )

    def __str__(self) -> str:
        return f"num_bits={self.num_bits}, type={self.type}, dynamic={self.dynamic}"

    @property
    def is_complete(self) -> bool:
        """True when a layer without static scales contradicts the checkpoint's own word."""
        return self.every_layer and not self.dynamic

    def fits(self, code: Code) -> bool:
        """True when scales made for this scheme mean the same for *code*.

        Float codes of one width count as equal: e5m2 reaches further than e4m3, and a
        float's relative precision does not depend on its scale.
        """
        return _KINDS.get(self.type) is code.kind and self.num_bits == code.bits

    def dtype(self) -> str:
        """The ``--kv-cache-dtype`` this scheme stands for when the user leaves it at auto.

        Float-8 is ``fp8`` whether dynamic or not, as in vLLM. ValueError when no format fits.
        """
        for format in FORMATS.values():
            dynamic = self.dynamic and format.key.code.kind is not Kind.FLOAT
            if self.fits(format.key.code) and format.is_dynamic is dynamic:
                return (*format.aliases, format.name)[0]
        raise ValueError(
            f"the checkpoint's kv_cache_scheme ({self}) is not one kvq_plugin serves: expected "
            "num_bits=8 with type int or float; pass a --kv-cache-dtype that needs no static "
            f"scales ({_NO_SCALES_NEEDED}), or bfloat16"
        )

    def check(self, format: KVFormat, asked: str) -> None:
        """Raise ValueError when *format* would read scales that were made for another code.

        A scale is amax/127 for int8 and amax/448 for fp8: taken for the other, int8 would
        clip at 28 % of the range.
        """
        if format.is_dynamic or self.dynamic or self.fits(format.key.code):
            return
        remedy = "use --kv-cache-dtype auto" if _KINDS.get(self.type) else "use another dtype"
        raise ValueError(
            f"--kv-cache-dtype {asked} was asked, but the checkpoint's KV scales are for another "
            f"code (kv_cache_scheme: {self}); {remedy}, or a dtype that needs no static scales: "
            f"{_NO_SCALES_NEEDED}"
        )


@dataclass(eq=False)
class ScaleLedger:
    """Follows the attention layers of one model from creation to loaded scales.

    One per quantization config. A layer's own loading cannot tell "this checkpoint has no
    scales" from "this layer's are missing", so the verdict falls when the last one arrives.
    Layers are held weakly: a model that failed to build leaves nothing behind.

    Attributes:
        scheme: what the checkpoint declares; None when it declares nothing.
        keys: which of its tensors became which scale.
    """

    scheme: KVScheme | None = None
    keys: ScaleKeys = field(default_factory=ScaleKeys)
    layers: weakref.WeakValueDictionary[str, Any] = field(
        default_factory=weakref.WeakValueDictionary
    )
    _pending: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)
    _lacking: list[tuple[str, KVFormat]] = field(default_factory=list)
    _some_given: bool = False

    def __reduce__(self):
        return ScaleLedger, (self.scheme,)

    def __deepcopy__(self, memo: dict) -> ScaleLedger:
        # Models may copy their quantization config while they build; its layers still belong
        # to one checkpoint.
        return self

    def enter(self, layer: Any) -> None:
        """*layer* was created and will be processed."""
        self.layers[layer.layer_name] = layer
        self._pending.add(layer)

    def record(self, layer: Any, format: KVFormat, given: bool) -> None:
        """*layer*, stored as static *format*, was given scales by the checkpoint or not."""
        if given:
            self._some_given = True
        else:
            self._lacking.append((layer.layer_name, format))

    def leave(self, layer: Any) -> bool:
        """*layer* was processed. True when it was the last one and all are well supplied.

        Raises ValueError naming every layer without scales where that cannot be meant, and
        every scale that no layer took.
        """
        self._pending.discard(layer)
        if self._pending:
            return False
        lacking, some_given, extra = self._lacking, self._some_given, self.keys.leftovers()
        self._lacking, self._some_given = [], False
        if extra and (lacking or some_given):
            raise ValueError(self._extra_message(extra, [name for name, _ in lacking]))
        promised = self.scheme is not None and self.scheme.is_complete
        if lacking and (promised or some_given):
            raise ValueError(self._missing_message([name for name, _ in lacking]))
        for name, format in lacking:
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
            f"dtype that needs no static scales: {_NO_SCALES_NEEDED}"
        )

    def _missing_message(self, names: list[str]) -> str:
        why = f"declares KV scales ({self.scheme})" if self.scheme else "has KV scales for others"
        return (
            f"the checkpoint {why} but lacks the k or v scale of {len(names)} layer(s): "
            f"{', '.join(names)}; run `kvq calibrate` to add them, list the layers in "
            "--kv-cache-dtype-skip-layers, or use a dtype that needs no static scales: "
            f"{_NO_SCALES_NEEDED}"
        )
