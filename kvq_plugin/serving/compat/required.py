"""The names that the plugin needs of vLLM beside :data:`kvq_plugin.serving.compat.NAMES`, and which
of all of them this vLLM lacks."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from kvq_plugin.serving import compat

#: Of the modules in compat.NAMES, those that only one kind of platform needs.
CPU_MODULES = ("vllm.v1.attention.backends.cpu_attn",)
GPU_MODULES = ("vllm.v1.attention.backends.triton_attn", "vllm.v1.attention.backends.utils")

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
    "vllm.distributed.parallel_state:GroupCoordinator": ("rank_in_group",),
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
    "vllm.entrypoints.serve.instrumentator.metrics": ("attach_router",),
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
    "vllm.entrypoints.serve.instrumentator.metrics",
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


def missing() -> list[str]:
    """Names that the plugin needs on this platform and this vLLM lacks.

    Looked up in modules that are loaded, and in the source of the others: importing them takes
    seconds, which only runs of ours may cost. What is patched is looked up by the patches.
    """
    elsewhere = GPU_MODULES if compat.is_cpu() else CPU_MODULES
    return [
        f"{place}.{name}"
        for place, name in wanted()
        if place not in elsewhere and not has(*place.partition(":")[::2], name)
    ]


def wanted() -> Iterator[tuple[str, str]]:
    """(place as in ATTRIBUTES, name) of all that serving needs."""
    for name, module in compat.NAMES.items():
        if name not in compat.BENCHMARK_NAMES:
            yield module, name
    for place, attributes in ATTRIBUTES.items():
        if place not in (*PLATFORM_CLASSES, *OPTIONAL_PLACES):
            yield from ((place, name) for name in attributes)


def has(module: str, cls: str, name: str) -> bool:
    """Whether *module*, or its class *cls* unless that is empty, has *name*."""
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
