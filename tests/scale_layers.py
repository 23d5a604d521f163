"""A light attention layer and what is done to it; shared by the tests of scale loading."""

from __future__ import annotations

import torch

from kvq_plugin.serving.scales.config import KVQConfig
from kvq_plugin.serving.scales.load import ScaleLoad
from kvq_plugin.serving.scales.method import KVQCacheMethod

HEADS, QUERY_HEADS, HEAD_SIZE = 2, 6, 32


class Layer(torch.nn.Module):
    """What the method reads of vLLM's ``Attention``."""

    def __init__(self, kv_cache_dtype="fp8", name="layers.0.attn", heads=HEADS, **attributes):
        super().__init__()
        self.layer_name = name
        self.kv_cache_dtype = kv_cache_dtype
        self.num_heads = attributes.pop("num_heads", heads * QUERY_HEADS // HEADS)
        self.num_kv_heads = heads
        self.head_size = self.head_size_v = HEAD_SIZE
        self.attn_type = "decoder"
        self.kv_sharing_target_layer_name = None
        for key, value in attributes.items():
            setattr(self, key, value)
        from vllm.model_executor.layers.attention.attention import set_default_quant_scales

        set_default_quant_scales(self, register_buffer=True)


def build(*layers, scheme=None, total_kv_heads=None):
    """One method for *layers*, whose placeholders it creates and which it loads as one model."""
    method = KVQCacheMethod(KVQConfig(scheme))
    for layer in layers:
        method.create_weights(layer)
    if layers:
        method.load = ScaleLoad([x.layer_name for x in layers], scheme, total_kv_heads)
    return method


def give(layer, **tensors):
    """Load *tensors* through the placeholders' weight loaders, as a model's loader does."""
    for name, value in tensors.items():
        parameter = getattr(layer, name)
        value = value if isinstance(value, torch.Tensor) else torch.tensor(value)
        parameter.weight_loader(parameter, value)


def loaded(dtype="fp8", scheme=None, layer=None, total_kv_heads=None, **tensors):
    """A processed layer that was given *tensors*."""
    layer = layer or Layer(dtype)
    method = build(layer, scheme=scheme, total_kv_heads=total_kv_heads)
    give(layer, **tensors)
    method.process_weights_after_loading(layer)
    return layer


def results(layer):
    return [getattr(layer, f"_{x}_scale_float") for x in ("k", "v", "q", "prob")]
