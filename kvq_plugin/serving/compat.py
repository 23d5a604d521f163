"""Every private vLLM name the plugin touches, in one place.

vLLM promises only its documented plugin interface. Whatever else the plugin needs is
imported through :data:`NAMES` (lazily, so that importing this module does not import vLLM)
or patched by a function below, and is looked up by ``tests/test_compat.py`` in the source of
each version in :data:`CHECKED_VERSIONS` without importing it.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

#: vLLM versions whose source was checked for every name in NAMES and ATTRIBUTES.
CHECKED_VERSIONS = ("0.29.0", "0.30.0", "0.31.0", "0.32.0", "0.33.0")
#: vLLM versions the engine tests were run on.
RUN_VERSIONS = ("0.32.0",)

#: Names importable from this module -> the vLLM module they come from.
NAMES: dict[str, str] = {
    "Attention": "vllm.model_executor.layers.attention",
    "AttentionBackend": "vllm.v1.attention.backend",
    "AttentionImpl": "vllm.v1.attention.backend",
    "AttentionMetadataBuilder": "vllm.v1.attention.backend",
    "AttentionType": "vllm.v1.attention.backend",
    "CommonAttentionMetadata": "vllm.v1.attention.backend",
    "MultipleOf": "vllm.v1.attention.backend",
    "CPUAttentionBackend": "vllm.v1.attention.backends.cpu_attn",
    "CPUAttentionBackendImpl": "vllm.v1.attention.backends.cpu_attn",
    "CPUAttentionMetadataBuilder": "vllm.v1.attention.backends.cpu_attn",
    "AttentionBackendEnum": "vllm.v1.attention.backends.registry",
    "register_backend": "vllm.v1.attention.backends.registry",
    "KVCacheLayout": "vllm.v1.kv_cache_interface",
    "KVQuantMode": "vllm.v1.kv_cache_interface",
    "CacheConfig": "vllm.config",
    "SpeculativeConfig": "vllm.config",
    "get_current_vllm_config": "vllm.config",
    "CacheDType": "vllm.config.cache",
    "STR_DTYPE_TO_TORCH_DTYPE": "vllm.utils.torch_utils",
    "current_platform": "vllm.platforms",
    # scale loading
    "init_logger": "vllm.logger",
    "LinearBase": "vllm.model_executor.layers.linear",
    "UnquantizedLinearMethod": "vllm.model_executor.layers.linear",
    "QuantizationConfig": "vllm.model_executor.layers.quantization.base_config",
    "register_quantization_config": "vllm.model_executor.layers.quantization",
    "CompressedTensorsKVCacheMethod": (
        "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors"
    ),
    "WeightsMapper": "vllm.model_executor.models.utils",
    "get_current_vllm_config_or_none": "vllm.config",
    "get_tensor_model_parallel_rank": "vllm.distributed.parallel_state",
    "get_tensor_model_parallel_world_size": "vllm.distributed.parallel_state",
    "model_parallel_is_initialized": "vllm.distributed.parallel_state",
    # benchmarks: vLLM's own CPU kernels
    "_get_attn_isa": "vllm.v1.attention.backends.cpu_attn",
    "cpu_attention_with_kv_cache": "vllm._custom_ops",
    "cpu_attn_get_scheduler_metadata": "vllm._custom_ops",
    "cpu_attn_reshape_and_cache": "vllm._custom_ops",
}

#: What is patched or read beside imports: "module:Class" or "module" -> attributes.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "vllm.platforms.cpu:CpuPlatform": ("get_attn_backend_cls", "check_and_update_config"),
    "vllm.config.cache:CacheConfig": (
        "cache_dtype",
        "block_size",
        "kv_cache_dtype_skip_layers",
    ),
    "vllm.config.compilation:CompilationConfig": ("static_forward_context",),
    "vllm.config.parallel:ParallelConfig": (
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
    ),
    "vllm.config.speculative:SpeculativeConfig": ("kv_cache_dtype",),
    "vllm.config.vllm:VllmConfig": (
        "additional_config",
        "cache_config",
        "kv_transfer_config",
        "model_config",
        "parallel_config",
        "quant_config",
        "speculative_config",
    ),
    "vllm.config.model:ModelConfig": (
        "dtype",
        "get_head_size",
        "get_total_num_hidden_layers",
        "get_total_num_kv_heads",
        "hf_config",
        "is_attention_free",
        "is_encoder_decoder",
        "is_hybrid",
        "model",
        "use_mla",
    ),
    "vllm.model_executor.layers.quantization.base_config:QuantizationConfig": (
        "_ignore_unexpected_suffixes",
        "get_cache_scale_mapper",
        "get_quant_method",
    ),
    "vllm.v1.kv_cache_interface:AttentionSpec": (
        "dtype",
        "head_size",
        "head_size_v",
        "state_content_bytes",
    ),
}

#: As ATTRIBUTES, for names of the official API, which older versions lack.
SINCE_0_33: dict[str, tuple[str, ...]] = {
    "vllm.config.cache": ("register_kv_cache_dtype", "KV_CACHE_DTYPES"),
    "vllm.v1.kv_cache_interface:KVQuantMode": ("CUSTOM",),
}
#: As ATTRIBUTES, for names that only the backport of that API touches.
UNTIL_0_32: dict[str, tuple[str, ...]] = {
    "vllm.engine.arg_utils": ("_compute_kwargs",),
}


def __getattr__(name: str) -> Any:
    try:
        module = NAMES[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    return getattr(importlib.import_module(module), name)


def get_logger(name: str) -> logging.Logger:
    """A logger under vLLM's, so that its level, format and handlers apply."""
    return logging.getLogger(f"vllm.{name}")


def is_cpu() -> bool:
    """True when vLLM runs on its CPU platform in this process."""
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


# --- kv cache dtypes -------------------------------------------------------------------


def register_dtype(name: str, torch_dtype: torch.dtype) -> None:
    """Make *name* a valid ``--kv-cache-dtype`` whose cache tensors are *torch_dtype*.

    Uses ``register_kv_cache_dtype`` where vLLM has it (0.33); before that, extends the
    ``CacheDType`` literal and rebuilds its two pydantic users. Idempotent; a name vLLM
    already knows is left as it is.
    """
    cache = importlib.import_module("vllm.config.cache")
    if hasattr(cache, "register_kv_cache_dtype"):
        _register_dtype_official(cache, name, torch_dtype)
    else:
        _register_dtype_backport(cache, name, torch_dtype)


def _register_dtype_official(cache: Any, name: str, torch_dtype: torch.dtype) -> None:
    if name in cache.KV_CACHE_DTYPES:
        return
    from vllm.v1.kv_cache_interface import KVQuantMode

    class Handler:
        def torch_dtype(self) -> torch.dtype:
            return torch_dtype

        def quant_mode(self) -> KVQuantMode:
            return KVQuantMode.CUSTOM

    Handler.name = name
    cache.register_kv_cache_dtype(name)(Handler)


def _register_dtype_backport(cache: Any, name: str, torch_dtype: torch.dtype) -> None:
    literal = cache.CacheDType
    if name in literal.__args__:
        return
    from pydantic.dataclasses import rebuild_dataclass
    from vllm.config import CacheConfig, SpeculativeConfig
    from vllm.engine import arg_utils
    from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE

    # One Literal object is shared by the command line, both configs and the backend
    # selector's own import of it, so it is extended in place rather than replaced.
    literal.__args__ += (name,)
    STR_DTYPE_TO_TORCH_DTYPE.setdefault(name, torch_dtype)
    rebuild_dataclass(CacheConfig, force=True)
    rebuild_dataclass(SpeculativeConfig, force=True)
    arg_utils._compute_kwargs.cache_clear()


# --- attention backends ----------------------------------------------------------------


def override_cpu_backend(path: str) -> None:
    """Make the class at *path* the one ``CPU_ATTN`` stands for."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CPU_ATTN, path)


def on_backend_selection(choose: Callable[[str, str], str | None]) -> None:
    """Let ``choose(kv_cache_dtype, attn_type)`` name an attention layer's backend class.

    Returning None leaves the choice to vLLM. Layers without a KV-cache dtype, MLA and sparse
    layers are never asked about.
    """

    def wrap(stock: Callable[..., str]) -> Callable[..., str]:
        @functools.wraps(stock)
        def get_attn_backend_cls(cls, selected_backend, attn_selector_config, *args, **kwargs):
            config = attn_selector_config
            path = None
            if config.kv_cache_dtype is not None and not (config.use_mla or config.use_sparse):
                path = choose(config.kv_cache_dtype, config.attn_type)
            return path or stock(selected_backend, attn_selector_config, *args, **kwargs)

        return get_attn_backend_cls

    _wrap_platform_method("get_attn_backend_cls", wrap)


def on_config(hook: Callable[[Any], None]) -> None:
    """Call ``hook(vllm_config)`` at the end of every ``VllmConfig.__post_init__``.

    Runs in the user's own process, before anything is loaded or started, so that what the
    hook raises is what the user sees.
    """

    def wrap(stock: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(stock)
        def check_and_update_config(cls, vllm_config):
            stock(vllm_config)
            hook(vllm_config)

        return check_and_update_config

    _wrap_platform_method("check_and_update_config", wrap)


def _wrap_platform_method(name: str, wrap: Callable[[Any], Any]) -> None:
    """Replace classmethod *name* of the current platform by ``wrap(it)``, once."""
    from vllm.platforms import current_platform

    platform = type(current_platform)
    stock = getattr(platform, name)
    if getattr(stock, "_kvq_wrapped", False):
        return
    wrapper = wrap(stock)
    wrapper._kvq_wrapped = True
    setattr(platform, name, classmethod(wrapper))


# --- scale loading ---------------------------------------------------------------------


def is_weights_pre_processed() -> bool:
    """True while vLLM hands over weights that another process has post-processed (0.30+)."""
    utils = importlib.import_module("vllm.model_executor.utils")
    answer = getattr(utils, "is_weights_pre_processed", None)
    return answer is not None and answer()


# --- what benchmarks compare with ------------------------------------------------------


def unified_attention() -> tuple[Callable[..., None], Any]:
    """vLLM's Triton attention over paged caches, and its enumeration of quantized caches.

    Raises ImportError where vLLM, or this kernel of it (before 0.30), is not installed.
    """
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention
    from vllm.v1.kv_cache_interface import KVQuantMode

    return unified_attention, KVQuantMode
