"""Static scales for a KVQCache: from a calibrated checkpoint, or given as tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from kvq_plugin import inspection
from kvq_plugin.formats import KVFormat
from kvq_plugin.hf_cache.paged import say_once
from kvq_plugin.reference import StaticScale
from kvq_plugin.serving.scales.shapes import HeadShard, ScaleReader

#: Layer number -> ``k``, ``v`` -> (scale, zero point or None), each ``()``, ``(H,)``, ``(H, D)``.
LayerScales = dict[int, dict[str, tuple[torch.Tensor, torch.Tensor | None]]]


def read(
    format: KVFormat,
    given: str | Path | Mapping[int, Mapping[str, torch.Tensor]] | None,
    model: str | None,
    layers: list[int],
) -> LayerScales:
    """Scales of *layers* for *format*.

    *given* is a checkpoint (a directory or hub name), or maps a layer's number to ``k_scale``,
    ``v_scale`` and, if any, ``k_zero_point``, ``v_zero_point``. None asks *model*, the directory
    the model was loaded from. Raises ValueError where scales are wrong, for another code, or
    missing and needed; scales given for a format that computes its own are an error too.
    """
    if format.is_dynamic:
        if given is not None:
            raise ValueError(
                f"{format.name} computes its scales while writing: leave scales= out, or use "
                "'int8' or 'fp8', which take them"
            )
        return {}
    found = given
    if given is None:
        found = model if model and Path(model, "config.json").is_file() else {}
    values = found if isinstance(found, Mapping) else _checkpoint(format, found, layers)
    if values:
        return {number: _pair(number, values.get(number, {})) for number in layers}
    if format.default_scale is None or given is not None:
        raise ValueError(
            f"{format.name} needs calibrated scales and {given or model or 'the model'} has none: "
            "add them with `kvq calibrate` and pass scales=DIRECTORY, or use "
            "'int8_per_token_head', which needs none"
        )
    say_once(
        f"kvq: no scales for {format.name}, so {format.default_scale} is used; `kvq calibrate "
        "--scheme fp8` makes some"
    )
    return {}


def _checkpoint(
    format: KVFormat, path: str | Path, layers: list[int]
) -> dict[int, Mapping[str, torch.Tensor]]:
    checkpoint = inspection.read(path)
    serves, why = inspection.verdict(checkpoint, format.name, format)
    if checkpoint.layers and not serves:
        problems = "; ".join([why, *checkpoint.problems])
        raise ValueError(f"{path} cannot give scales for {format.name}: {problems}")
    if skipped := checkpoint.skipped.intersection(layers):
        raise ValueError(
            f"{path} leaves layers {', '.join(map(str, sorted(skipped)))} unquantized, as `kvq "
            "calibrate --ignore` noted: expected scales for every full-attention layer, because a "
            "KVQCache quantizes them all; calibrate without --ignore, or use "
            "'int8_per_token_head', which needs none"
        )
    return {layer.number: layer.values for layer in checkpoint.layers}


def _pair(number: int, values: Mapping[str, torch.Tensor]) -> dict:
    missing = {"k_scale", "v_scale"} - values.keys()
    if missing:
        raise ValueError(
            f"layer {number} lacks {' and '.join(sorted(missing))}: expected k_scale and v_scale "
            "for every full-attention layer"
        )
    return {x: (values[f"{x}_scale"], values.get(f"{x}_zero_point")) for x in ("k", "v")}


def expand(
    format: KVFormat,
    given: Mapping[str, tuple],
    number: int,
    heads: int,
    size: int,
    device: torch.device,
) -> tuple[StaticScale | None, StaticScale | None]:
    """K's and V's scales for the kernels, of layer *number*: None of streams that compute theirs.

    Raises ValueError for shapes and values that serving refuses in a checkpoint.
    """
    reader = ScaleReader(f"KVQCache, layer {number}", HeadShard(heads, 0, heads), size, size, heads)
    statics: list[StaticScale | None] = []
    for name, stream in (("k", format.key), ("v", format.value)):
        if stream.is_dynamic:
            statics.append(None)
            continue
        parameters = (f"{name}_scale", f"{name}_zero_point")
        pair = zip(parameters, given.get(name, (None, None)), strict=True)
        found = reader.read({p: torch.as_tensor(x) for p, x in pair if x is not None}, format)
        scale = found.get(parameters[0], format.default_scale)
        if scale is None:
            raise ValueError(
                f"KVQCache, layer {number}: {parameters[0]} is -1, which says that there is none: "
                "expected one above 0; calibrate the model with `kvq calibrate`"
            )
        static = StaticScale.expand(scale, heads, size, found.get(parameters[1]))
        statics.append(static.to(device))
    return statics[0], statics[1]
