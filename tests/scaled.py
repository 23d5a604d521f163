"""Tiny checkpoints with KV scales and with quantized weights, made the plain way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

QMAX = {"int": 127.0, "float": 448.0}
_REDUCED = {"tensor": (0, 1, 2, 3), "attn_head": (0, 2, 3), "channel": (0, 2)}
DENSE = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}}


def scheme(kind: str, strategy: str) -> dict:
    """compressed-tensors' ``kv_cache_scheme`` of 8 bits; *kind* is ``int`` or ``float``."""
    return {
        "num_bits": 8,
        "type": kind,
        "strategy": strategy,
        "symmetric": True,
        "dynamic": False,
    }


def kv_of(model: Path, prompts: Sequence[Sequence[int]]) -> list[list[tuple]]:
    """K and V of every layer, each ``[1, H, tokens, D]`` fp32, for each of *prompts*."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.inference_mode():
        caches = [network(torch.tensor([p]), use_cache=True).past_key_values for p in prompts]
    return [[(layer.keys, layer.values) for layer in cache.layers] for cache in caches]


def add_scales(
    model: Path,
    out: Path,
    prompts: Sequence[Sequence[int]],
    kind: str,
    strategies: Sequence[tuple[str, str]],
) -> Path:
    """Copy *model* to *out* with scales of the largest magnitudes over *prompts*.

    Layer i gets ``strategies[i % n]``, a pair for K and for V out of tensor, attn_head and
    channel, in the shapes compressed-tensors gives them.
    """
    tensors, runs = {}, kv_of(model, prompts)
    for i in range(len(runs[0])):
        for which, (name, strategy) in enumerate(
            zip("kv", strategies[i % len(strategies)], strict=True)
        ):
            peaks = [run[i][which].abs().amax(_REDUCED[strategy]) for run in runs]
            peak = torch.stack(peaks).amax(0)
            shape = {"tensor": (1,), "attn_head": (-1, 1, 1), "channel": (-1,)}[strategy]
            scale = (peak / QMAX[kind]).reshape(shape)
            tensors[f"model.layers.{i}.self_attn.{name}_scale"] = scale
    declared = {"kv_cache_scheme": scheme(kind, strategies[0][0])}
    return change(model, out, tensors, declared)


def eagle_draft(model: Path, out: Path) -> Path:
    """A draft for *model*, of its first layer; EAGLE's has no first norm."""
    source = load_file(model / "model.safetensors")
    layer = {k.removeprefix("model."): w for k, w in source.items() if ".layers.0." in k}
    norm = source["model.norm.weight"]
    del layer["layers.0.input_layernorm.weight"]
    layer["fc.weight"] = torch.eye(len(norm), dtype=norm.dtype).repeat(1, 2)
    draft = change(model, out, dict.fromkeys(source) | layer)
    config = json.loads((draft / "config.json").read_text()) | {"num_hidden_layers": 1}
    (draft / "config.json").write_text(json.dumps(config))
    return draft


def change(model: Path, out: Path, tensors: dict, quantization: dict | None = None) -> Path:
    """Copy *model* to *out* with *tensors* added, a None taken away, and *quantization* merged
    into its quantization_config."""
    shutil.copytree(model, out)
    weights = load_file(out / "model.safetensors") | tensors
    weights = {k: v.contiguous() for k, v in weights.items() if v is not None}
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    declared = config.get("quantization_config") or DENSE
    if quantization:
        config["quantization_config"] = declared | quantization
    (out / "config.json").write_text(json.dumps(config))
    return out


def stretch_keys(model: Path, out: Path, factor: float = 1024.0) -> Path:
    """The same function with keys *factor* times larger and queries smaller: exact, because
    *factor* is a power of two."""
    weights = load_file(model / "model.safetensors")
    new = {k: w * factor for k, w in weights.items() if ".k_proj." in k}
    new |= {k: w / factor for k, w in weights.items() if ".q_proj." in k}
    return change(model, out, new)


def quantize_weights(model: Path, out: Path, bits: int, activations: bool) -> Path:
    """Copy *model* to *out* with compressed-tensors weights: *bits* of int per output channel,
    packed by compressed-tensors' own code where *activations* stay unquantized."""
    from compressed_tensors.compressors import pack_to_int32

    qmax = 2 ** (bits - 1) - 1
    tensors: dict = {}
    for name, weight in load_file(model / "model.safetensors").items():
        if "_proj.weight" not in name:
            continue
        scale = weight.float().abs().amax(1, keepdim=True) / qmax
        codes = (weight.float() / scale).round().to(torch.int8)
        tensors[name + "_scale"] = scale.to(weight.dtype)
        if activations:
            tensors[name] = codes
            continue
        tensors[name] = None
        tensors[name + "_packed"] = pack_to_int32(codes, bits)
        tensors[name + "_shape"] = torch.tensor(weight.shape)
    integers = {"num_bits": bits, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": integers | {"strategy": "channel", "dynamic": False},
        "input_activations": integers | {"strategy": "token", "dynamic": True}
        if activations
        else None,
    }
    form = "int-quantized" if activations else "pack-quantized"
    quantization = {"format": form, "config_groups": {"group_0": group}, "ignore": ["lm_head"]}
    return change(model, out, tensors, quantization)
