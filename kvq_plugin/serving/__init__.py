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

    if not compat.is_cpu():
        compat.get_logger(__name__).info(
            "kvq_plugin has kernels for vLLM's CPU platform only; KV caches here stay vLLM's own"
        )
        return
    import torch

    for name in FORMATS:
        compat.register_dtype(name, torch.uint8)
    # Registers the quantization method, which vLLM looks up before any config exists.
    config = importlib.import_module(f"{__name__}.config")
    compat.override_cpu_backend(f"{__name__}.stock.StockCPUBackend")
    compat.on_backend_selection(_choose_backend)
    compat.on_config(_on_config)
    compat.on_draft_quant_config(config.wrap_draft_config)
    compat.on_model_created(_on_model_created)


def _choose_backend(kv_cache_dtype: str, attn_type: str) -> str | None:
    from kvq_plugin.serving.backend import backend_path

    return backend_path(kv_cache_dtype, attn_type)


def _on_model_created(model, vllm_config, model_config) -> None:
    from kvq_plugin.serving.scale_keys import follow

    follow(model, vllm_config, model_config)


def _on_config(vllm_config) -> None:
    from kvq_plugin.serving.checks import check
    from kvq_plugin.serving.config import wrap_quant_config

    cache = vllm_config.cache_config
    check(vllm_config)
    asked = cache.cache_dtype
    wrap_quant_config(vllm_config)
    if cache.cache_dtype != asked:  # "auto", and the checkpoint itself asks for a format
        check(vllm_config)
