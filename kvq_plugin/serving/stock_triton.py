"""Encoder layers of a quantized run on GPUs, which have no cache: vLLM's own Triton backend, told
that they are ``auto``.

Layers whose cache we quantize are given another (:mod:`kvq_plugin.serving.selection`). ``KVQ`` in
vLLM's enum of backends stands for the class here, which can be imported without knowing a format.
"""

from __future__ import annotations

from typing import ClassVar

from kvq_plugin.formats import SERVED
from kvq_plugin.serving.compat import (
    AttentionType,
    TritonAttentionBackend,
    TritonAttentionImpl,
)


class StockTritonImpl(TritonAttentionImpl):
    """vLLM's implementation, told ``auto`` by layers that have no cache.

    Raises ValueError for a decoder layer of one of our dtypes: its cache would be written in
    vLLM's byte layout while the rest of the run has ours.
    """

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
        *args,
        **kwargs,
    ) -> None:
        if kv_cache_dtype in SERVED:
            if attn_type not in (AttentionType.ENCODER, AttentionType.ENCODER_ONLY):
                raise ValueError(
                    f"a {attn_type} layer of KV-cache dtype {kv_cache_dtype} was given vLLM's own "
                    "Triton attention by the model itself: kvq_plugin does not serve it; use "
                    "--kv-cache-dtype auto"
                )
            kv_cache_dtype = "auto"
        super().__init__(
            num_heads,
            head_size,
            scale,
            num_kv_heads,
            alibi_slopes,
            sliding_window,
            kv_cache_dtype,
            logits_soft_cap,
            attn_type,
            *args,
            **kwargs,
        )


class StockTritonBackend(TritonAttentionBackend):
    """vLLM's backend, which takes the layers without a cache whatever the run's dtype is."""

    supported_kv_cache_dtypes: ClassVar[list[str]] = [
        *TritonAttentionBackend.supported_kv_cache_dtypes,
        *(n for n in SERVED if n not in TritonAttentionBackend.supported_kv_cache_dtypes),
    ]

    @staticmethod
    def get_impl_cls() -> type[StockTritonImpl]:
        return StockTritonImpl
