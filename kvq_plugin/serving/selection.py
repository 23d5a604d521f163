"""Which backend serves an attention layer, and whether a run is the plugin's to serve at all.

On GPUs vLLM has its own kernels for most of our dtype names (``fp8``, ``int8_per_token_head``
and others), in byte layouts of its own. One rule decides: these names mean the plugin's cache,
unless the user names one of vLLM's backends with ``--attention-backend``; then nothing of the
plugin touches the run. ``TRITON_ATTN`` is the name under which the plugin runs, so it is ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvq_plugin.formats import FORMATS
from kvq_plugin.serving import compat

if TYPE_CHECKING:
    from kvq_plugin.serving.base import KVQBackend

#: What ``--attention-backend`` calls the plugin (vLLM 0.32 on; before, CUSTOM).
BACKEND_NAME = "KVQ"
_OURS = f"{BACKEND_NAME} (CUSTOM before vLLM 0.32) and TRITON_ATTN"


def platform_backend() -> type[KVQBackend]:
    """Base class of the backends of the platform vLLM runs on, which knows its limits."""
    if compat.is_cpu():
        from kvq_plugin.serving.backend import CPUBackend

        return CPUBackend
    from kvq_plugin.serving.gpu import GPUBackend

    return GPUBackend


def serves(vllm_config: Any) -> bool:
    """False when the user named backends of vLLM's for all layers; on CPUs there is no choice."""
    if compat.is_cpu():
        return True
    attention = vllm_config.attention_config
    chosen = (attention.backend, *attention.backend_per_kind.values())
    return any(_is_ours(backend) for backend in chosen)


def _is_ours(backend: Any) -> bool:
    """True when *backend*, an entry of vLLM's enum or None for "auto", leads to the plugin."""
    if backend is None or backend is compat.AttentionBackendEnum.TRITON_ATTN:
        return True
    return backend is compat.added_backend(BACKEND_NAME)


def choose_on_cpu(selected: Any, config: Any) -> str | None:
    """Import path of the backend for a layer; None leaves it to vLLM."""
    from kvq_plugin.serving.backend import backend_path

    return backend_path(config.kv_cache_dtype, config.attn_type)


def choose_on_gpu(selected: Any, config: Any) -> str | None:
    """As :func:`choose_on_cpu`, of an ``AttentionSelectorConfig`` and the backend the user named.

    Raises ValueError for a layer that the plugin should serve and cannot.
    """
    if config.kv_cache_dtype not in FORMATS:
        return None
    if not _is_ours(selected):
        _leave_to_vllm(selected, config.kv_cache_dtype)
        return None
    from kvq_plugin.serving import base, gpu
    from kvq_plugin.serving.stock_triton import StockTritonBackend

    format = base.layer_format(config.kv_cache_dtype, config.attn_type)
    backend = StockTritonBackend if format is None else gpu.BACKENDS[format]
    reasons = backend.validate_configuration(
        device_capability=compat.current_platform.get_device_capability(),
        **config._asdict(),
    )
    if reasons:
        raise ValueError(
            f"--kv-cache-dtype {config.kv_cache_dtype} was asked for an attention layer that "
            f"kvq_plugin's GPU kernels do not serve: {', '.join(reasons)}. Supported are "
            f"{gpu.LIMITS}; use --kv-cache-dtype auto{gpu.GPUBackend.elsewhere}"
        )
    return base.class_path(backend)


def _leave_to_vllm(selected: Any, kv_cache_dtype: str) -> None:
    """Say that the layer is vLLM's own; ValueError when vLLM does not know the dtype."""
    try:
        known = selected.get_class().supports_kv_cache_dtype(kv_cache_dtype)
    except (ImportError, OSError):
        return  # vLLM reports a backend that is not installed itself, right after this
    if not known:
        raise ValueError(
            f"--kv-cache-dtype {kv_cache_dtype} was asked together with --attention-backend "
            f"{selected.name}, which has no such KV cache: supported is {kv_cache_dtype} by "
            f"{_OURS}; drop --attention-backend, or use --kv-cache-dtype auto"
        )
    compat.init_logger(f"vllm.{__name__}").warning_once(
        "KV caches of dtype %s are vLLM's own here, not kvq_plugin's, because the attention "
        "backend %s was chosen.",
        kv_cache_dtype,
        selected.name,
    )
