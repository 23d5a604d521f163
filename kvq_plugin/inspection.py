"""``kvq inspect``: the KV scales a checkpoint carries, and what each KV-cache dtype does with them.

Asks the code that serving loads scales with (:mod:`kvq_plugin.serving.scales`), but needs no
vLLM: the scales alone are read, not the weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from kvq_plugin.formats import SERVED, KVFormat
from kvq_plugin.hub import checkpoint_folder
from kvq_plugin.mapping import MIXED, declared_mapping, parse
from kvq_plugin.serving.scales import keys
from kvq_plugin.serving.scales.declared import (
    KVScheme,
    declared_scheme,
    quantization_section,
    read_json,
)
from kvq_plugin.serving.scales.shapes import HeadShard, ScaleReader

_FORMS = {0: "tensor", 1: "head", 2: "channel"}
#: Weights by which an attention module shows in a checkpoint.
_ATTENTION = re.compile(
    r"\.(?:k_proj|qkv_proj|qkqkv_proj|kv_proj|c_attn|query_key_value|Wqkv)\.(?:weight|qweight)"
)
_OTHER = re.compile(r"vision|visual|audio|image", re.I)  # stacks that keep no KV cache
_INDEX = "model.safetensors.index.json"
#: A scale this many times the layer's median is one channel (or head) running away: the others
#: would be left with a tenth of the codes if it set the scale for all.
OUTLIER = 10.0


@dataclass(frozen=True)
class Geometry:
    """Attention of the model: ``heads`` query heads over ``kv_heads`` of ``head_size``."""

    heads: int
    kv_heads: int
    head_size: int

    @classmethod
    def of(cls, config: Mapping[str, Any], folder: Path) -> Geometry:
        """From config.json, whatever it calls them. ValueError where it says nothing."""
        text = config.get("text_config") or config
        heads = _first(text, "num_attention_heads", "n_head", "num_heads")
        hidden = _first(text, "hidden_size", "n_embd", "d_model")
        if not heads or not (hidden or text.get("head_dim")):
            raise ValueError(
                f"{folder / 'config.json'} does not say how many attention heads the model has: "
                "expected num_attention_heads, and head_dim or hidden_size"
            )
        kv_heads = _first(text, "num_key_value_heads", "num_kv_heads", "n_head_kv") or heads
        return cls(heads, kv_heads, text.get("head_dim") or hidden // heads)


def _first(config: Mapping[str, Any], *keys: str) -> int | None:
    return next((config[key] for key in keys if config.get(key)), None)


@dataclass
class Layer:
    """The scales of one attention module.

    Attributes:
        owner: its name in the checkpoint.
        values: parameter -> fp32 ``()``, ``(H,)`` or ``(H, D)``; zero points likewise.
        keys: parameter -> the checkpoint's key.
    """

    owner: str
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def number(self) -> int | None:
        return keys.layer_number(self.owner)


@dataclass
class Checkpoint:
    """What a checkpoint says about its KV cache.

    Attributes:
        folder: where it lies; geometry: its attention; weights: the quantization of its
            weights, or None; scheme: what it declares about KV scales.
        layers: attention modules with scales, in the model's order.
        bare: attention modules without a K or V scale.
        origins: the tools whose spelling the scales have.
        problems: what serving would refuse, one sentence each.
        mapping: KV cache of each layer in order, as the checkpoint declares; None without.
    """

    folder: Path
    geometry: Geometry
    weights: str | None
    scheme: KVScheme | None
    layers: list[Layer] = field(default_factory=list)
    bare: list[str] = field(default_factory=list)
    origins: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    mapping: list[str] | None = None


def read(path: str | Path) -> Checkpoint:
    """Read the checkpoint in directory *path*, or of the hub model of that name.

    Raises FileNotFoundError or ValueError where there is no such checkpoint, or none whose
    tensors can be read.
    """
    folder = checkpoint_folder(path)
    config = read_json(folder / "config.json")
    checkpoint = Checkpoint(
        folder,
        Geometry.of(config, folder),
        _weights(quantization_section(config, folder)),
        declared_scheme(config, folder),
    )
    owners, scales = _tensors(folder)
    layers: dict[str, Layer] = {}
    for found, tensor in scales:
        owner = _module(found, owners)
        _add(checkpoint, layers.setdefault(owner, Layer(owner)), found, tensor)
    checkpoint.layers = [layers[name] for name in sorted(layers, key=_order)]
    checkpoint.origins = sorted({found.origin for found, _ in scales})
    whole = {name for name, x in layers.items() if {"k_scale", "v_scale"} <= x.values.keys()}
    stacks = {_stack(name) for name in layers}
    mine = {
        name for name in owners if _stack(name) in stacks or not (stacks or _OTHER.search(name))
    }
    checkpoint.bare = sorted(mine - whole, key=_order)
    _compare(checkpoint, owners)
    _read_mapping(checkpoint, config)
    return checkpoint


def _read_mapping(checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
    """Note the KV cache of each layer, or what is wrong with the mapping among the problems."""
    if (given := declared_mapping(config)) is None:
        return
    text = config.get("text_config") or config
    windows = [kind == "sliding_attention" for kind in text.get("layer_types") or ()]
    layers = _first(text, "num_hidden_layers", "n_layer", "num_layers") or len(windows)
    try:
        mapping = parse(given, layers)
        sliding = windows or [False] * layers
        checkpoint.mapping = [mapping.name(n, sliding[n]) for n in range(layers)]
    except ValueError as error:
        checkpoint.problems.append(str(error))


def _order(name: str) -> tuple[int, str]:
    return keys.layer_number(name) or 0, name


def _stack(name: str) -> str:
    """``model.layers`` of ``model.layers.3.self_attn``: a model may have others, for images."""
    return re.split(r"\.\d+\.", name, maxsplit=1)[0]


def _weights(section: Mapping[str, Any]) -> str | None:
    """How a quantization *section* says that weights are quantized; None for not at all."""
    if section.get("quant_method") == "compressed-tensors" and not section.get("config_groups"):
        return None
    method = section.get("quant_method") or section.get("quantization", {}).get("quant_algo")
    return None if method in ("kvq", "none") else method


def _tensors(folder: Path) -> tuple[set[str], list[tuple[keys.ScaleKey, torch.Tensor]]]:
    """Attention modules that have weights, and every scale with its tensor."""
    index = folder / _INDEX
    if index.is_file():
        files = sorted({folder / name for name in read_json(index)["weight_map"].values()})
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"{folder} has no safetensors files: expected model.safetensors, or shards named by "
            f"{_INDEX}"
        )
    owners, scales = set(), []
    for key, get in _open(files):
        if match := _ATTENTION.search(key):
            owners.add(key[: match.start()])
        elif found := keys.parse(key):
            scales.append((found, get(key)))
    return owners, scales


def _open(files: list[Path]) -> Iterator[tuple[str, Any]]:
    for file in files:
        try:
            file.open("rb").close()  # safetensors says of a file it may not read: there is none
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 - no mapping
                    yield key, tensors.get_tensor
        except SafetensorError as error:
            raise ValueError(f"{file} is no safetensors file: {error}") from None


def _module(found: keys.ScaleKey, owners: set[str]) -> str:
    """The attention module of a scale, also where the key names vLLM's layer inside it."""
    outer = found.owner.removesuffix(".attn")
    return outer if outer in owners and found.owner not in owners else found.owner


def _add(checkpoint: Checkpoint, layer: Layer, found: keys.ScaleKey, tensor: torch.Tensor) -> None:
    """Put *tensor* on *layer*, or what is wrong with it among the problems."""
    g = checkpoint.geometry
    shard = HeadShard.of(g.kv_heads, g.kv_heads, 0, 1)
    reader = ScaleReader(layer.owner, shard, g.head_size, g.head_size, g.heads)
    for parameter in found.parameters:
        if parameter in layer.keys:
            checkpoint.problems.append(
                f"{layer.owner}: {parameter} is given twice, as {layer.keys[parameter]} and as "
                f"{found.key}"
            )
            continue
        layer.keys[parameter] = found.key
        try:
            layer.values |= reader.read({parameter: tensor})
        except ValueError as error:
            checkpoint.problems.append(str(error))


def _compare(checkpoint: Checkpoint, owners: set[str]) -> None:
    """Note the modules whose scales are missing, and scales without a module."""
    extra = [layer.owner for layer in checkpoint.layers if layer.owner not in owners]
    if owners and extra:
        checkpoint.problems.append(f"no weights for the scales of {', '.join(extra)}")
    promised = checkpoint.scheme is not None and checkpoint.scheme.is_complete
    if checkpoint.bare and (promised or checkpoint.layers):
        checkpoint.problems.append(f"no K or V scale for {', '.join(checkpoint.bare)}")


# --- what it means ---------------------------------------------------------------------


def verdict(checkpoint: Checkpoint, dtype: str, format: KVFormat) -> tuple[bool, str]:
    """Whether ``--kv-cache-dtype`` *dtype* serves the checkpoint, and how it uses its scales."""
    if format.is_dynamic:
        unused = "; the checkpoint's are not used" if checkpoint.layers else ""
        return True, f"computes its own scales while writing{unused}"
    if checkpoint.scheme is not None:
        try:
            checkpoint.scheme.check(format, dtype)
        except ValueError:
            return False, f"refused: the scales are for another code ({checkpoint.scheme})"
    if checkpoint.problems:
        return False, f"refused: {len(checkpoint.problems)} problem(s), listed below"
    if checkpoint.layers:
        return True, f"uses the checkpoint's scales ({granularities(checkpoint)})"
    if format.default_scale is None:
        return False, "refused: needs calibrated scales; add them with `kvq calibrate`"
    reach = format.key.code.qmax * format.default_scale
    return True, f"scale {format.default_scale:g}: values beyond {reach:g} saturate"


def automatic(checkpoint: Checkpoint) -> tuple[bool, str]:
    """As :func:`verdict`, for ``auto``."""
    if checkpoint.mapping is not None:
        return True, f"takes {MIXED}, as the checkpoint declares"
    if checkpoint.scheme is None:
        return True, "unquantized: the checkpoint declares no KV scheme"
    try:
        dtype = checkpoint.scheme.dtype()
    except ValueError as error:
        return False, f"refused: {error}"
    serves, how = verdict(checkpoint, dtype, SERVED[dtype])
    return serves, f"takes {dtype}, as the checkpoint declares; {how}"


def granularities(checkpoint: Checkpoint) -> str:
    """``K channel, V tensor``: the granularities that occur."""
    parts = []
    for name, parameter in (("K", "k_scale"), ("V", "v_scale")):
        values = (layer.values.get(parameter) for layer in checkpoint.layers)
        forms = sorted({_FORMS[v.dim()] for v in values if v is not None})
        if forms:
            parts.append(f"{name} {' and '.join(forms)}")
    return ", ".join(parts)


def remarks(layer: Layer) -> str:
    """What stands out in a layer's scales: defaults, outliers, zero points."""
    found = []
    for name, parameter in (("K", "k_scale"), ("V", "v_scale")):
        value = layer.values.get(parameter)
        if value is None:
            found.append(f"no {name}")
        elif value.dim() == 0 and value.item() == 1:
            found.append(f"{name} is 1: uncalibrated?")
        elif outliers := int((value > OUTLIER * value.median()).sum()):
            found.append(f"{name}: {outliers} beyond {OUTLIER:g}x the median")
        if f"{name.lower()}_zero_point" in layer.values:
            found.append(f"{name} asymmetric")
    return "; ".join(found)
