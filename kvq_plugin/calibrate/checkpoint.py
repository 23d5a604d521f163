"""The checkpoint that is calibrated: found, read, never modified."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from kvq_plugin.geometry import Geometry, positions
from kvq_plugin.hub import checkpoint_folder
from kvq_plugin.serving.scales.declared import (
    INDEX,
    KVScheme,
    declared_scheme,
    put_section,
    quantization_section,
    read_config,
    unquantized_dtype,
    weight_map,
)
from kvq_plugin.serving.scales.keys import parse

CONFIG = "config.json"
#: Methods whose configuration may hold a KV scheme and nothing else.
_KV_ONLY = ("compressed-tensors", "kvq")
#: In config.json, what gives layers, or K and V, head sizes of their own.
_UNEVEN = ("kv_lora_rank", "v_head_dim", "per_layer_config", "global_head_dim", "block_configs")


def is_kv_scale(name: str) -> bool:
    """Whether the loader takes the checkpoint's tensor *name* for a KV scale or zero point."""
    return parse(name) is not None


@dataclass(frozen=True)
class Source:
    """A local checkpoint in safetensors format."""

    folder: Path

    @classmethod
    def find(cls, model: str) -> Source:
        """The checkpoint called *model*: a directory, or a hub name (downloaded, or cached).

        Raises FileNotFoundError when there is none, and ValueError when it has no safetensors
        weights.
        """
        folder = checkpoint_folder(model)
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
        """``config.json``. ValueError when it is no JSON object, or has values of wrong types."""
        return read_config(self.folder / CONFIG)

    @cached_property
    def shards(self) -> dict[str, list[str]]:
        """Weight file -> names of its tensors: those the index names, else all there are."""
        index = self.folder / INDEX
        if index.is_file():
            shards: dict[str, list[str]] = {}
            for name, file in weight_map(index).items():
                shards.setdefault(file, []).append(name)
            return shards
        files = sorted(self.folder.glob("*.safetensors"))
        if (self.folder / "model.safetensors") in files:
            files = [self.folder / "model.safetensors"]
        return {file.name: _names(file) for file in files}

    def tensor_names(self) -> list[str]:
        """Names of all tensors that are no KV scales."""
        return [n for names in self.shards.values() for n in names if not is_kv_scale(n)]

    @property
    def kv_scheme(self) -> KVScheme | None:
        """What the checkpoint already declares about its KV cache."""
        return declared_scheme(self.config, self.folder)

    @property
    def unquantized_dtype(self) -> str:
        """The ``--kv-cache-dtype`` that ignores it."""
        return unquantized_dtype(self.config, self.folder)

    def without_kv_scheme(self, trust_remote_code: bool = False) -> dict[str, Any]:
        """Arguments that make transformers load the weights and no KV scheme; with
        *trust_remote_code*, the configuration may be of a class that the checkpoint brings."""
        section = dict(quantization_section(self.config))
        if not section.pop("kv_cache_scheme", None):
            return {}
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self.folder, trust_remote_code=trust_remote_code)
        put_section(config, section if self.has_quantized_weights else None)
        return {"config": config}

    @property
    def has_quantized_weights(self) -> bool:
        """Whether the configuration says that weights are quantized, not a KV cache alone."""
        section = quantization_section(self.config)
        own = section.get("config_groups") or section.get("quant_method") not in _KV_ONLY
        return bool(section and own)

    def max_length(self) -> int | None:
        """Positions the model has, where its configuration says so."""
        return positions(self.config)

    def require_length(self, length: int, next_token: bool = True) -> None:
        """ValueError when the model has no room for *length* tokens and, with *next_token*, for
        the one that an engine generates after them."""
        limit = self.max_length()
        if limit is None or length <= (most := limit - next_token):
            return
        taken = ", one of them for the token after" if next_token else ""
        raise ValueError(
            f"samples of {length} tokens were asked for, and the model has {limit} "
            f"positions{taken}: use --length {most} or less"
        )

    def layer_count(self) -> int | None:
        """Layers of the decoder, where its configuration says so."""
        if self.config.get("is_encoder_decoder"):
            return None  # the number may be the encoder's
        text = self._text_config
        return next((text[key] for key in ("num_hidden_layers", "n_layer") if text.get(key)), None)

    def geometry(self) -> Geometry | None:
        """Attention of every layer, where its configuration states one for all of them."""
        if any(self._text_config.get(key) for key in _UNEVEN):
            return None
        try:
            found = Geometry.of(self.config, self.folder)
        except (ValueError, TypeError):  # arithmetic with a list, of a number for each layer
            return None
        return None if list in map(type, astuple(found)) else found

    @property
    def _text_config(self) -> dict[str, Any]:
        return self.config.get("text_config") or self.config


def _names(file: Path) -> list[str]:
    try:
        file.open("rb").close()  # safetensors says of a file it may not read that there is none
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    except SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file: {error}") from None
