"""Layers that stay unquantized in a quantized run of ours: vLLM's own CPU backend, unchanged but
for being told that its layers are ``auto``."""

from __future__ import annotations

import copy

from kvq_plugin.formats import SERVED
from kvq_plugin.serving.compat import (
    AttentionType,
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)


class StockBuilder(CPUAttentionMetadataBuilder):
    """vLLM's builder, told that its layers are unquantized whatever the run's dtype is."""

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device) -> None:
        stated = vllm_config
        if vllm_config.cache_config.cache_dtype in SERVED:
            stated = copy.copy(vllm_config)
            stated.cache_config = copy.copy(vllm_config.cache_config)
            stated.cache_config.cache_dtype = "auto"
        super().__init__(kv_cache_spec, layer_names, stated, device)
        self.vllm_config = vllm_config


class StockImpl(CPUAttentionBackendImpl):
    """vLLM's implementation; encoder-only layers of a quantized run read no cache."""

    def __init__(
        self,
        num_heads,
        head_size,
        scale,
        num_kv_heads,
        alibi_slopes,
        sliding_window,
        kv_cache_dtype,
        logits_soft_cap=None,
        attn_type=AttentionType.DECODER,
        kv_sharing_target_layer_name=None,
        **kwargs,
    ) -> None:
        super().__init__(
            num_heads,
            head_size,
            scale,
            num_kv_heads,
            alibi_slopes,
            sliding_window,
            "auto" if kv_cache_dtype in SERVED else kv_cache_dtype,
            logits_soft_cap,
            attn_type,
            kv_sharing_target_layer_name,
            **kwargs,
        )


class StockCPUBackend(CPUAttentionBackend):
    """vLLM's backend for skipped and for encoder layers."""

    @staticmethod
    def get_impl_cls() -> type[StockImpl]:
        return StockImpl

    @staticmethod
    def get_builder_cls() -> type[StockBuilder]:
        return StockBuilder
