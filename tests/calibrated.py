"""A calibrated int8 checkpoint of a real model, made the plain way: min-max over a text.

Stands in for the scales a calibration tool writes, in compressed-tensors' naming and schema.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

SCHEME = {
    "num_bits": 8,
    "type": "int",
    "strategy": "channel",
    "symmetric": True,
    "dynamic": False,
}


def add_channel_scales(model: Path, out: Path, windows: list[list[int]]) -> Path:
    """Copy *model* to *out* with int8 scales per channel: amax / 127 over *windows*.

    Keys are taken as the cache holds them, after the rotary embedding.
    """
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    peaks: dict[str, torch.Tensor] = {}
    for window in windows:
        with torch.inference_mode():
            cache = network(torch.tensor([window]), use_cache=True).past_key_values
        for i, layer in enumerate(cache.layers):
            for name, x in (("k", layer.keys), ("v", layer.values)):
                key = f"model.layers.{i}.self_attn.{name}_scale"
                peak = x.float().abs().amax((0, 2)).flatten()  # [H * D]
                peaks[key] = torch.maximum(peak, peaks.get(key, peak))
    shutil.copytree(model, out)
    [weights] = out.glob("*.safetensors")
    tensors = load_file(weights)
    tensors.update({k: (p / 127).to(torch.bfloat16) for k, p in peaks.items()})
    weights.unlink()  # it may be a link to the original
    save_file(tensors, weights, metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "config_groups": {},
        "kv_cache_scheme": SCHEME,
    }
    (out / "config.json").write_text(json.dumps(config, indent=2))
    return out
