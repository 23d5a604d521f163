"""The checkpoint that is calibrated: found, read, never modified."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from kvq_plugin.serving.scales.keys import parse

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
_SECTIONS = ("quantization_config", "compression_config")
#: Methods whose configuration may hold a KV scheme and nothing else.
_KV_ONLY = ("compressed-tensors", "kvq")


def is_kv_scale(name: str) -> bool:
    """Whether the loader takes the checkpoint's tensor *name* for a KV scale or zero point."""
    return parse(name) is not None


def quantization_of(config: dict[str, Any]) -> dict[str, Any] | None:
    """The section of a config.json that describes its quantization, wherever it is; or None."""
    for holder in (config, config.get("text_config")):
        for key in _SECTIONS:
            if isinstance(holder, dict) and isinstance(holder.get(key), dict):
                return holder[key]
    return None


@dataclass(frozen=True)
class Source:
    """A local checkpoint in safetensors format."""

    folder: Path

    @classmethod
    def find(cls, model: str) -> Source:
        """The checkpoint called *model*: a directory, or a hub name (downloaded, or cached).

        Raises ValueError when there is none, or none with safetensors weights.
        """
        folder = Path(model)
        if not folder.is_dir():
            folder = _downloaded(model)
        if not (folder / CONFIG).is_file():
            raise ValueError(f"{folder} has no {CONFIG}: expected a model's directory")
        source = cls(folder)
        if not source.shards:
            raise ValueError(
                f"{folder} has no safetensors weights: expected *.safetensors; convert the model "
                "with transformers' save_pretrained"
            )
        source.config  # noqa: B018  a damaged one is told of now
        return source

    @cached_property
    def config(self) -> dict[str, Any]:
        """``config.json``. ValueError when it is no JSON object."""
        try:
            config = json.loads((self.folder / CONFIG).read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.folder / CONFIG} is not JSON: {error}") from None
        if not isinstance(config, dict):
            raise ValueError(f"{self.folder / CONFIG}: expected a JSON object")
        return config

    @cached_property
    def shards(self) -> dict[str, list[str]]:
        """Weight file -> names of its tensors: those the index names, else all there are."""
        index = self.folder / INDEX
        if index.is_file():
            shards: dict[str, list[str]] = {}
            for name, file in _weight_map(index).items():
                shards.setdefault(file, []).append(name)
            return shards
        files = sorted(self.folder.glob("*.safetensors"))
        if (self.folder / "model.safetensors") in files:
            files = [self.folder / "model.safetensors"]
        return {file.name: _names(file) for file in files}

    def tensor_names(self) -> list[str]:
        """Names of all tensors that are no KV scales."""
        return [n for names in self.shards.values() for n in names if not is_kv_scale(n)]

    def kv_scheme(self) -> dict[str, Any] | None:
        """The KV scheme the checkpoint already declares, if any."""
        return (quantization_of(self.config) or {}).get("kv_cache_scheme")

    def half_dtype(self) -> str:
        """float16 for checkpoints in it, else bfloat16."""
        text = self.config.get("text_config") or {}
        stated = self.config.get("dtype") or self.config.get("torch_dtype") or text.get("dtype")
        return "float16" if stated == "float16" else "bfloat16"

    def without_kv_scheme(self) -> dict[str, Any]:
        """Arguments that make transformers load the weights and no KV scheme."""
        if self.kv_scheme() is None:
            return {}
        section = dict(quantization_of(self.config))
        del section["kv_cache_scheme"]
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self.folder)
        if section.get("config_groups") or section.get("quant_method") not in _KV_ONLY:
            config.quantization_config = section
        else:
            del config.quantization_config
        return {"config": config}

    def max_length(self) -> int | None:
        """Positions the model has, where its configuration says so."""
        text = self.config.get("text_config") or self.config
        return text.get("max_position_embeddings")


def _downloaded(model: str) -> Path:
    from huggingface_hub import snapshot_download

    if model.count("/") > 1 or model.startswith((".", "/", "~")):
        raise ValueError(f"no such model: {model} is not a directory")
    try:
        return Path(snapshot_download(model, ignore_patterns=["*.bin", "*.pth", "*.gguf"]))
    except Exception as error:  # network, authorization, names that cannot be
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"no such model: {model} is neither a directory nor on the hub ({reason})"
        ) from None


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = json.loads(index.read_text())["weight_map"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(f"{index}: expected a JSON object with a weight_map") from None
    missing = sorted({file for file in found.values() if not (index.parent / file).is_file()})
    if missing:
        raise ValueError(f"{index} names files that are not there: {', '.join(missing)}")
    return found


def _names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    except SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file: {error}") from None
