"""Scratch memory of the GPU kernels, reserved once per metadata builder."""

from __future__ import annotations

from typing import Any

import torch


def reserve(
    kv_cache_spec: Any,
    layer_names: list[str],
    vllm_config: Any,
    device: torch.device,
    decode_query_len: int,
) -> torch.Tensor | None:
    """A buffer (uint8) for the largest batch of the layers *layer_names*.

    Args:
        kv_cache_spec: of these layers: kv heads and head size.
        vllm_config: bounds on requests, tokens and context.
        decode_query_len: rows of a decode, speculated tokens included.

    Returns None where the kernels need none. Like the scratch of vLLM's own Triton backend it
    lies outside what vLLM measures before it sizes the cache.
    """
    from kvq_plugin import kernels

    layers = vllm_config.compilation_config.static_forward_context
    scheduler = vllm_config.scheduler_config
    size = kernels.workspace_size(
        max_seqs=scheduler.max_num_seqs,
        max_tokens=scheduler.max_num_batched_tokens,
        max_query_len=decode_query_len,
        max_seq_len=vllm_config.model_config.max_model_len,
        num_heads=max(layers[name].num_heads for name in layer_names),
        num_kv_heads=kv_cache_spec.num_kv_heads,
        head_size=kv_cache_spec.head_size,
        device=device,
    )
    return torch.empty(size, dtype=torch.uint8, device=device) if size else None
