"""Layers of a mapping get their formats: vLLM chooses a backend by the run's dtype alone, and makes
its implementation, before it says which layer it is for.

So under ``kvq_mixed`` a layer is given :class:`PendingBackend`, whose implementation only keeps
what it was made with, and :func:`settle` exchanges both, as soon as the layer has a name.
"""

from __future__ import annotations

from typing import Any

from kvq_plugin.mapping import MIXED, PLAIN
from kvq_plugin.serving import compat, mapped
from kvq_plugin.serving.backend import CPUBackend


class PendingImpl(compat.AttentionImpl):
    """The arguments of an implementation whose format is not known yet."""

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
        attn_type=compat.AttentionType.DECODER,
        kv_sharing_target_layer_name=None,
        **more: Any,
    ) -> None:
        self._before = (num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window)
        self._after = (logits_soft_cap, attn_type, kv_sharing_target_layer_name)
        self._more = more
        self.target = kv_sharing_target_layer_name

    def made(self, backend: type, kv_cache_dtype: str) -> Any:
        """The implementation of *backend* with the same arguments, but for the dtype."""
        return backend.get_impl_cls()(*self._before, kv_cache_dtype, *self._after, **self._more)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"a layer of --kv-cache-dtype {MIXED} was never given its format")


class PendingBackend(CPUBackend):
    """Stands for any backend until :func:`settle`."""

    impl_cls = PendingImpl


def settle(layer: Any, vllm_config: Any) -> None:
    """Give an attention *layer* of a run of MIXED its own dtype, backend and implementation.

    A layer that reads another's cache has that layer's. Does nothing for a layer that has its own
    already. Raises ValueError where the mapping lacks the layer or the plugin cannot serve it.
    """
    if not isinstance(layer.impl, PendingImpl):
        return
    if layer.attn_backend is not PendingBackend:
        raise ValueError(
            f"--kv-cache-dtype {MIXED} was asked for a model whose attention is not only causal "
            f"(layer {layer.layer_name} is {layer.attn_backend.__name__}: chunked, or in both "
            "directions): supported are full attention and sliding windows; use one KV cache for "
            "all layers, --kv-cache-dtype int8_per_token_head, or, for a model without causal "
            "attention, which keeps no KV cache, --kv-cache-dtype auto"
        )
    layers = vllm_config.compilation_config.static_forward_context
    if (target := layers.get(layer.impl.target)) is not None:
        name = target.kv_cache_dtype
    else:
        name = mapped.layer_name(mapped.run_mapping(vllm_config), layer)
    backend = compat.get_attn_backend(
        layer.head_size,
        layer.dtype,
        name,
        use_mla=False,
        has_sink=layer.has_sink,
        attn_type=layer.attn_type,
        has_sliding_window=layer.sliding_window is not None,
    )
    layer.kv_cache_dtype = name
    if name == PLAIN:
        layer.kv_cache_torch_dtype = vllm_config.model_config.dtype
    layer.attn_backend, layer.impl = backend, layer.impl.made(backend, name)
    layer.backend = compat.AttentionBackendEnum[backend.get_name()]
