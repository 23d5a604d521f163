"""Shapes of a model's attention, from its config.json whatever that calls them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

#: What configurations call the positions that a model has.
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


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
        heads = first(text, "num_attention_heads", "n_head", "num_heads")
        hidden = first(text, "hidden_size", "n_embd", "d_model")
        if not heads or not (hidden or text.get("head_dim")):
            raise ValueError(
                f"{folder / 'config.json'} does not say how many attention heads the model has: "
                "expected num_attention_heads, and head_dim or hidden_size"
            )
        kv_heads = first(text, "num_key_value_heads", "num_kv_heads", "n_head_kv") or heads
        return cls(heads, kv_heads, text.get("head_dim") or hidden // heads)


def geometries(config: Mapping[str, Any], usual: Geometry) -> dict[int, Geometry]:
    """Layers whose kv heads or head size are not the *usual* ones, as Gemma 4's global layers."""
    text = config.get("text_config") or config
    stated = dict(text.get("per_layer_config") or {})  # since transformers 5
    if text.get("global_head_dim"):
        full = {"head_dim": text["global_head_dim"]}
        if text.get("attention_k_eq_v", True) and text.get("num_global_key_value_heads"):
            full["num_key_value_heads"] = text["num_global_key_value_heads"]
        kinds = enumerate(text.get("layer_types") or ())
        stated |= {str(n): full for n, kind in kinds if kind == "full_attention"}
    return {
        int(number): replace(
            usual,
            kv_heads=own.get("num_key_value_heads") or usual.kv_heads,
            head_size=own.get("head_dim") or usual.head_size,
        )
        for number, own in stated.items()
    }


def positions(config: Mapping[str, Any]) -> int | None:
    """Tokens that the model has positions for; None where config.json does not say."""
    text = config.get("text_config") or config
    return min((text[key] for key in _POSITIONS if (text.get(key) or 0) > 0), default=None)


def first(config: Mapping[str, Any], *keys: str) -> int | None:
    return next((config[key] for key in keys if config.get(key)), None)


def layer_count(config: Mapping[str, Any]) -> int | None:
    """Layers of the model itself, without those for multi-token prediction."""
    text = config.get("text_config") or config
    return first(text, "num_hidden_layers", "n_layer", "num_layers")
