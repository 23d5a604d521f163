"""Models and engines that the plugin has no kernels for, whatever the KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvq_plugin.serving import compat, platforms


@dataclass(frozen=True)
class Unserved:
    """A kind of model or engine that the plugin has no kernels for.

    Attributes:
        what, supported, instead: for a message.
        vllm_serves: whether vLLM has kernels for it, for the KV caches it has kernels for at all.
    """

    what: str
    supported: str
    instead: str = "use --kv-cache-dtype auto"
    vllm_serves: bool = True


def reason(vllm_config: Any) -> Unserved | None:
    """Why the model or the engine as such is not the plugin's; None when it is."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    decoder_only = "decoder-only models with softmax attention"
    if model.use_mla:
        # vLLM 0.32 takes fp8 with it on CPUs, and fails when it is to write the cache.
        mla = "a model with multi-head latent attention (MLA)"
        return Unserved(mla, decoder_only, vllm_serves=not compat.is_cpu())
    for is_so, what in (
        (model.is_encoder_decoder, "an encoder-decoder model (cross attention)"),
        (model.is_hybrid, "a hybrid of attention and state-space layers"),
        (model.is_attention_free, "a model without attention"),
    ):
        if is_so:
            return Unserved(what, decoder_only)
    if vllm_config.diffusion_config is not None:
        what = "a diffusion model, whose batches mix causal and bidirectional requests"
        return Unserved(what, decoder_only)
    offloading = vllm_config.cache_config.kv_offloading_size
    # vLLM makes a connector of the offloading size after it has called the plugin.
    if vllm_config.kv_transfer_config is not None or offloading is not None:
        return Unserved(
            "an engine with a KV connector or KV offloading",
            "engines that keep their KV cache to themselves",
            "drop --kv-transfer-config and --kv-offloading-size, or use --kv-cache-dtype auto",
        )
    for field in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        size, flag = getattr(parallel, field, 1), f"--{field.replace('_', '-')}"
        if size > 1:
            what = f"context parallelism ({flag} {size})"
            return Unserved(what, "tensor, pipeline and data parallelism", f"use {flag} 1")
    backend, head_size = platforms.backend_class(), model.get_head_size()
    if not backend.supports_head_size(head_size):
        sizes = ", ".join(map(str, backend.get_supported_head_sizes()))
        return Unserved(f"head size {head_size}", sizes)
    return None
