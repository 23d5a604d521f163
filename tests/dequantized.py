"""transformers' own cache, holding what the codes of a format decode to: the oracle of KVQCache."""

from __future__ import annotations

import torch
import transformers
from transformers.cache_utils import DynamicCache, DynamicLayer

from kvq_plugin import reference
from kvq_plugin.formats import Stream, get_format
from kvq_plugin.reference import StaticScale

#: How ``generate`` and the models take a cache; ``past_key_values`` goes in 6.0.
VERSION = tuple(int(x) for x in transformers.__version__.split(".")[:2])
CACHE = "cache" if VERSION >= (5, 24) else "past_key_values"


class DequantizedCache(DynamicCache):
    """Full-attention layers keep K and V rounded to *format*; *scales* as KVQCache takes them."""

    def __init__(self, config, format: str, scales=None) -> None:
        super().__init__(config=config)
        self.format, self.scales = get_format(format), scales or {}

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if type(self.layers[layer_idx]) is DynamicLayer:
            scales = self.scales.get(layer_idx, {})
            key_states = rounded(key_states, self.format.key, "k", scales)
            value_states = rounded(value_states, self.format.value, "v", scales)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def rounded(x: torch.Tensor, stream: Stream, name: str, scales) -> torch.Tensor:
    """``[B, H, T, D]``, quantized and dequantized."""
    batch, heads, tokens, size = x.shape
    rows = x.transpose(1, 2).reshape(batch * tokens, heads, size)
    static = None
    if not stream.is_dynamic:
        scale = scales.get(f"{name}_scale", torch.tensor(1.0))
        static = StaticScale.expand(scale, heads, size, scales.get(f"{name}_zero_point"))
    codes, metadata = reference.quantize(rows, stream, static)
    back = reference.dequantize(codes, metadata, stream, static).to(x.dtype)
    return back.view(batch, tokens, heads, size).transpose(1, 2)
