"""The vLLM side of the plugin. Importing this package does not import vLLM."""

from __future__ import annotations

import importlib

_registered = False


def register() -> None:
    """Entry point ``vllm.general_plugins: kvq``; vLLM calls it in each of its processes.

    Adds our KV-cache dtypes, our attention backend and the loading of their scales. Does
    nothing when called again, and nothing on a platform the plugin has no kernels for.
    """
    global _registered
    if _registered:
        return
    _registered = True
    from kvq_plugin.formats import FORMATS
    from kvq_plugin.serving import compat

    if not (compat.is_cpu() or compat.is_gpu()):
        compat.get_logger(__name__).info(
            "kvq_plugin has kernels for vLLM's CPU, CUDA and ROCm platforms only; KV caches here "
            "stay vLLM's own"
        )
        return
    import torch

    for name in FORMATS:
        compat.register_dtype(name, torch.uint8)
    # Registers the quantization method, which vLLM looks up before any config exists.
    config = importlib.import_module(f"{__name__}.scales.config")
    _register_backends()
    compat.on_config(_on_config)
    compat.on_draft_quant_config(config.wrap_draft_config)
    compat.on_model_created(_on_model_created)


def _register_backends() -> None:
    from kvq_plugin.serving import compat, selection

    if compat.is_cpu():
        compat.override_backend("CPU_ATTN", f"{__name__}.stock.StockCPUBackend")
        compat.on_backend_selection(selection.choose_on_cpu)
        compat.on_kv_cache_allocation(_cache_memory)
        return
    stock = f"{__name__}.stock_triton.StockTritonBackend"
    compat.override_backend("TRITON_ATTN", stock)
    compat.add_backend(selection.BACKEND_NAME, stock)
    compat.on_backend_selection(selection.choose_on_gpu)


def _cache_memory(specs):
    from kvq_plugin.serving.backend import cache_memory

    return cache_memory(specs)


def _on_model_created(model, vllm_config, model_config) -> None:
    from kvq_plugin.serving.scales.method import begin_load

    begin_load(model, vllm_config, model_config)


def _on_config(vllm_config) -> None:
    from kvq_plugin.serving.checks import check
    from kvq_plugin.serving.scales.config import wrap_quant_config
    from kvq_plugin.serving.selection import serves

    cache = vllm_config.cache_config
    check(vllm_config)
    if not serves(vllm_config):
        return
    asked = cache.cache_dtype
    wrap_quant_config(vllm_config)
    if cache.cache_dtype != asked:  # "auto", and the checkpoint itself asks for a format
        check(vllm_config)
