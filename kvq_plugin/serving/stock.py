"""Layers that stay unquantized in a quantized run of ours: vLLM's own CPU backend, unchanged but
for being told that its layers are ``auto``."""

from __future__ import annotations

import copy

from kvq_plugin.mapping import NAMES
from kvq_plugin.serving.compat import (
    AttentionType,
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
    get_current_vllm_config_or_none,
)
from kvq_plugin.serving.mapped import PACKED_LAYOUT


class StockBuilder(CPUAttentionMetadataBuilder):
    """vLLM's builder, told that its layers are unquantized whatever the run's dtype is."""

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device) -> None:
        stated = vllm_config
        if vllm_config.cache_config.cache_dtype in NAMES:
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
            "auto" if kv_cache_dtype in NAMES else kv_cache_dtype,
            logits_soft_cap,
            attn_type,
            kv_sharing_target_layer_name,
            **kwargs,
        )
        run = get_current_vllm_config_or_none()
        self._shares_blocks = run is not None and run.cache_config.kv_cache_layout == PACKED_LAYOUT

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping) -> None:
        """vLLM's, into blocks that hold no codes of other layers, which might be read as NaN: it
        multiplies them by probabilities of 0. vLLM zeroes new blocks itself, but on CPUs not those
        of layers that have pages of several sizes."""
        if self._shares_blocks and kv_cache.numel():  # encoder-only layers have none
            size = kv_cache.shape[2]
            new = slot_mapping[(slot_mapping >= 0) & (slot_mapping % size == 0)] // size
            kv_cache[new] = 0
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)


class StockCPUBackend(CPUAttentionBackend):
    """vLLM's backend for skipped and for encoder layers."""

    @staticmethod
    def get_impl_cls() -> type[StockImpl]:
        return StockImpl

    @staticmethod
    def get_builder_cls() -> type[StockBuilder]:
        return StockBuilder
