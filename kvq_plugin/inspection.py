"""``kvq inspect``: the KV scales a checkpoint carries, and what each KV-cache dtype does with them.

Asks the code that serving loads scales with (:mod:`kvq_plugin.serving.scales`), but needs no
vLLM: the scales alone are read, not the weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from kvq_plugin.formats import SERVED, Kind, KVFormat
from kvq_plugin.geometry import Geometry, geometries, layer_count
from kvq_plugin.hub import checkpoint_folder
from kvq_plugin.mapping import MIXED, declared_mapping, parse
from kvq_plugin.serving.scales import keys
from kvq_plugin.serving.scales.declared import (
    INDEX,
    KVScheme,
    declared_scheme,
    quantization_section,
    read_config,
    weight_map,
)
from kvq_plugin.serving.scales.shapes import HeadShard, ScaleReader, check_query

_FORMS = {0: "tensor", 1: "head", 2: "channel"}
#: Weights by which an attention module shows in a checkpoint.
_ATTENTION = re.compile(
    r"\.(?:k_proj|qkv_proj|qkqkv_proj|kv_proj|c_attn|query_key_value|Wqkv)\.(?:weight|qweight)"
)
_OTHER = re.compile(r"vision|visual|audio|image", re.I)  # stacks that keep no KV cache


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
        geometries: number of a layer -> its attention, where that is another.
        layers: attention modules with scales, in the model's order.
        bare: attention modules that need a K and a V scale and lack one.
        skipped: numbers of layers that stay unquantized, as ``kvq calibrate --ignore`` noted.
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
    skipped: frozenset[int] = frozenset()
    geometries: dict[int, Geometry] = field(default_factory=dict)
    origins: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    mapping: list[str] | None = None

    def geometry_of(self, layer: int | None) -> Geometry:
        """Attention of the layer of that number; the usual one without a number."""
        return self.geometries.get(layer, self.geometry)


def read(path: str | Path) -> Checkpoint:
    """Read the checkpoint in directory *path*, or of the hub model of that name.

    Raises FileNotFoundError or ValueError where there is no such checkpoint, or none whose
    tensors can be read.
    """
    folder = checkpoint_folder(path)
    config = read_config(folder / "config.json")
    section = quantization_section(config, folder)
    geometry = _geometry(config, folder)
    skipped = map(str, section.get("kv_cache_skip_layers") or ())
    checkpoint = Checkpoint(
        folder,
        geometry,
        _weights(section),
        declared_scheme(config, folder),
        geometries=geometries(config, geometry),
        skipped=frozenset(int(n) for n in skipped if n.isdigit()),
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
    needy = {name for name in mine - whole if _needs_scales(name, checkpoint, config)}
    checkpoint.bare = sorted(needy, key=_order)
    _compare(checkpoint, owners, config)
    _read_mapping(checkpoint, config)
    return checkpoint


def _geometry(config: Mapping[str, Any], folder: Path) -> Geometry:
    """Attention of the layers. ValueError where config.json has a list, of layers that differ."""
    with suppress(TypeError):  # arithmetic with a list
        geometry = Geometry.of(config, folder)
        if list not in map(type, astuple(geometry)):
            return geometry
    raise ValueError(
        f"{folder / 'config.json'} has heads or sizes of attention layer by layer: expected one "
        "number for all; `kvq inspect` reads no others"
    )


def _needs_scales(owner: str, checkpoint: Checkpoint, config: Mapping[str, Any]) -> bool:
    """False for layers that serving leaves unquantized or does not load: those skipped, and those
    for multi-token prediction, behind the model's own or in a stack of theirs."""
    number, count = keys.layer_number(owner), layer_count(config)
    if number in checkpoint.skipped or owner.startswith(keys.PREDICTION):
        return False
    return number is None or count is None or number < count


def _is_prediction(owner: str, config: Mapping[str, Any]) -> bool:
    """Whether serving passes over scales of *owner*: a layer for multi-token prediction."""
    text, count = config.get("text_config") or config, layer_count(config)
    behind = max(int(text.get(name) or 0) for name in keys.PREDICTION_COUNTS)
    number = keys.layer_number(owner)
    within = None not in (number, count) and count <= number < count + behind
    return within or owner.startswith(keys.PREDICTION)


def _read_mapping(checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
    """Note the KV cache of each layer, or what is wrong with the mapping among the problems."""
    if (given := declared_mapping(config)) is None:
        return
    text = config.get("text_config") or config
    windows = [kind == "sliding_attention" for kind in text.get("layer_types") or ()]
    layers = layer_count(config) or len(windows)
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
    inner = section.get("quantization")
    algorithm = inner.get("quant_algo") if isinstance(inner, Mapping) else None
    method = section.get("quant_method") or algorithm
    return None if method in ("kvq", "none") else method


def _tensors(folder: Path) -> tuple[set[str], list[tuple[keys.ScaleKey, torch.Tensor]]]:
    """Attention modules that have weights, and every scale with its tensor."""
    index = folder / INDEX
    if index.is_file():
        files = sorted({folder / name for name in weight_map(index).values()})
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"{folder} has no safetensors files: expected model.safetensors, or shards named by "
            f"{INDEX}"
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
    g = checkpoint.geometry_of(layer.number)
    shard = HeadShard.of(g.kv_heads, g.kv_heads, 0, 1)
    reader = ScaleReader(layer.owner, shard, g.head_size, g.head_size, g.heads)
    for parameter in found.parameters:
        if parameter in layer.keys:
            before = layer.keys[parameter]
            where = "in two of its files" if before == found.key else f"and as {found.key}"
            checkpoint.problems.append(
                f"{layer.owner}: {parameter} is given twice, as {before} {where}"
            )
            continue
        layer.keys[parameter] = found.key
        try:
            layer.values |= reader.read({parameter: tensor}, scales_format(checkpoint.scheme))
        except ValueError as error:
            checkpoint.problems.append(str(error))


def scales_format(scheme: KVScheme | None) -> KVFormat | None:
    """The format that *scheme* stands for; None where it declares none that is served."""
    try:
        return None if scheme is None else SERVED[scheme.dtype()]
    except ValueError:
        return None


def _compare(checkpoint: Checkpoint, owners: set[str], config: Mapping[str, Any]) -> None:
    """Note scales that contradict each other, modules whose scales are missing, and scales without
    a module."""
    for layer in checkpoint.layers:
        if {"q_scale", "k_scale"} <= layer.values.keys() and layer.number not in checkpoint.skipped:
            try:
                check_query(layer.owner, layer.values["q_scale"], layer.values["k_scale"])
            except ValueError as error:
                checkpoint.problems.append(str(error))
    lost = [layer.owner for layer in checkpoint.layers if layer.owner not in owners]
    extra = [owner for owner in lost if not _is_prediction(owner, config)]
    if owners and extra:
        checkpoint.problems.append(f"no weights for the scales of {', '.join(extra)}")
    promised = checkpoint.scheme is not None and checkpoint.scheme.is_complete
    if checkpoint.bare and (promised or _has_scales(checkpoint)):
        checkpoint.problems.append(f"no K or V scale for {', '.join(checkpoint.bare)}")


# --- what it means ---------------------------------------------------------------------


def _has_scales(checkpoint: Checkpoint) -> bool:
    """Whether any layer has a scale of K or V: -1 says that there is none, as serving reads it."""
    return any({"k_scale", "v_scale"} & layer.values.keys() for layer in checkpoint.layers)


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
    if format.key.code.kind is Kind.FLOAT and _is_asymmetric(checkpoint):
        return False, f"refused: {format.name} codes are symmetric, and the scales have zero points"
    if checkpoint.problems:
        return False, f"refused: {len(checkpoint.problems)} problem(s), listed below"
    if _has_scales(checkpoint):
        return True, f"uses the checkpoint's scales ({granularities(checkpoint)})"
    if format.default_scale is None:
        return False, "refused: needs calibrated scales; add them with `kvq calibrate`"
    reach = format.key.code.qmax * format.default_scale
    return True, f"scale {format.default_scale:g}: values beyond {reach:g} saturate"


def _is_asymmetric(checkpoint: Checkpoint) -> bool:
    used = (layer for layer in checkpoint.layers if layer.number not in checkpoint.skipped)
    return any(name.endswith("zero_point") for layer in used for name in layer.values)


def mixed(checkpoint: Checkpoint) -> tuple[bool, str]:
    """As :func:`verdict`, for the mapping that the checkpoint declares."""
    scaled = {layer.number for layer in checkpoint.layers}
    for name in set(checkpoint.mapping) & SERVED.keys():
        if SERVED[name].is_dynamic or SERVED[name].default_scale is not None:
            continue
        layers = [n for n, own in enumerate(checkpoint.mapping) if own == name]
        if bare := [str(n) for n in layers if n not in scaled]:
            which = f"layer {bare[0]} keeps" if len(bare) == 1 else f"layers {', '.join(bare)} keep"
            remedy = "needs calibrated scales; add them with `kvq calibrate`"
            return False, f"refused: {which} {name}, which {remedy}"
    return True, "each layer's own"


def automatic(checkpoint: Checkpoint) -> tuple[bool, str]:
    """As :func:`verdict`, for ``auto``."""
    if checkpoint.mapping is not None:
        serves, how = mixed(checkpoint)
        return serves, f"takes {MIXED}, as the checkpoint declares; {how}"
    if checkpoint.scheme is None:
        how = "unquantized: the checkpoint declares no KV scheme"
        if checkpoint.layers:  # Llama's of vLLM 0.32 ends in "There is no module or parameter …"
            how += ", and vLLM's own loaders may fail at its scales"
        return True, how
    try:
        dtype = checkpoint.scheme.dtype()
    except ValueError as error:
        return False, f"refused: {error}"
    serves, how = verdict(checkpoint, dtype, SERVED[dtype])
    return serves, f"takes {dtype}, as the checkpoint declares; {how}"


def check_dtypes(model: str, dtypes: Iterable[str]) -> None:
    """Raise ValueError, with the reason, for the first of *dtypes* that cannot serve *model*.

    ``auto`` is the unquantized cache here. A checkpoint that cannot be read is left to the engine.
    """
    asked = [d for d in dtypes if d == MIXED or (d in SERVED and not SERVED[d].is_dynamic)]
    if not asked:
        return
    try:
        checkpoint = read(checkpoint_folder(model, only=["*.json", "*.safetensors"]))
    except (OSError, ValueError, LookupError, TypeError):  # configurations of any shape
        return
    for dtype in asked:
        serves, why = _asked(checkpoint, dtype)
        if not serves:
            raise ValueError(f"{dtype} was asked of {model}: {why}")


def _asked(checkpoint: Checkpoint, dtype: str) -> tuple[bool, str]:
    """As :func:`verdict`, for the mapping too, with the problems and a remedy."""
    if dtype == MIXED:
        serves, why = False, "refused: the checkpoint has no KV cache for each layer"
        if checkpoint.mapping is not None:
            serves, why = mixed(checkpoint)
        if serves:
            return True, why
        remedy = "make a checkpoint with them with `kvq allocate`"
    else:
        serves, why = verdict(checkpoint, dtype, SERVED[dtype])
        if serves:
            return True, why
        remedy = "make a checkpoint with scales for it with `kvq calibrate`"
    if checkpoint.problems:  # of which `kvq inspect` prints a list
        why = "; ".join([why.replace(", listed below", ""), *checkpoint.problems])
    if "kvq calibrate" not in why:
        why = f"{why}; {remedy}"
    return False, f"{why}, or ask for int8_per_token_head, which needs none"


def granularities(checkpoint: Checkpoint) -> str:
    """``K channel, V tensor``: the granularities that occur."""
    parts = []
    for name, parameter in (("K", "k_scale"), ("V", "v_scale")):
        values = (layer.values.get(parameter) for layer in checkpoint.layers)
        forms = sorted({_FORMS[v.dim()] for v in values if v is not None})
        if forms:
            parts.append(f"{name} {' and '.join(forms)}")
    return ", ".join(parts)
