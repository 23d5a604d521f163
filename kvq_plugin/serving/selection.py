"""Which runs and which attention layers are the plugin's, and which are vLLM's own.

Names of KV caches that only the plugin has (``int8`` today) are the plugin's everywhere. The
others are vLLM's too, and there the platforms differ:

* GPUs: they stay vLLM's, whose kernels keep them in byte layouts of their own, unless the user
  says ``--attention-backend KVQ``.
* CPUs: vLLM has kernels for ``fp8`` and its kin alone. They are the plugin's, but for models and
  engines that the plugin has no kernels for, and under ``--attention-backend CPU_ATTN``.

What is vLLM's, the plugin does not touch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvq_plugin.formats import SERVED
from kvq_plugin.mapping import MIXED, NAMES, PLAIN
from kvq_plugin.serving import compat, mapped, platforms, unserved
from kvq_plugin.serving.compat import additions
from kvq_plugin.serving.scales.declared import declared_dtype
from kvq_plugin.serving.scales.keys import layer_number

if TYPE_CHECKING:
    import torch

#: What ``--attention-backend`` calls the plugin (vLLM 0.32 on; before, CUSTOM).
BACKEND_NAME = "KVQ"


# --- runs ------------------------------------------------------------------------------


def serves(vllm_config: Any) -> bool:
    """True when a quantized KV cache was asked for, or declared by the checkpoint, and is the
    plugin's: to serve, or to refuse where nobody has kernels for it.

    Raises ValueError for a scheme of the checkpoint that no format of ours serves.
    """
    given = vllm_config.cache_config.cache_dtype
    name = given if given in NAMES else _declared(vllm_config)
    if name is None:
        return False
    if not compat.is_cpu():
        backends = chosen_backends(vllm_config)
        return _is_named(backends) or (is_ours_alone(name) and None in backends)
    if is_ours_alone(name):
        return True
    if vllm_config.attention_config.backend is compat.AttentionBackendEnum.CPU_ATTN:
        return False
    why = unserved.reason(vllm_config)
    return why is None or (given in NAMES and not why.vllm_serves)


def is_ours_alone(kv_cache_dtype: str) -> bool:
    """True for a format of ours that vLLM itself has no kernels for on this platform."""
    if compat.is_cpu():
        return not compat.cpu_backend_has(kv_cache_dtype)
    return additions.is_own_dtype(kv_cache_dtype)


def chosen_backends(vllm_config: Any) -> tuple:
    """What the user named, for all layers and by kind of layer; None for "auto"."""
    attention = vllm_config.attention_config
    return (attention.backend, *attention.backend_per_kind.values())


def _is_named(backends: tuple) -> bool:
    own = additions.added_backend(BACKEND_NAME)
    return own is not None and own in backends


def _declared(vllm_config: Any) -> str | None:
    """Name of the format that the checkpoint's KV scheme stands for; None without a scheme."""
    try:
        return declared_dtype(vllm_config)
    except ValueError:
        if compat.is_cpu() or _is_named(chosen_backends(vllm_config)):
            raise
        return None  # vLLM's own business


# --- layers ----------------------------------------------------------------------------


def choose_on_cpu(selected: Any, config: Any) -> str | None:
    """Import path of the backend for a layer, of vLLM's ``AttentionSelectorConfig`` and the
    backend the user named; None leaves it to vLLM.

    Raises ValueError for a layer that the plugin should serve and cannot.
    """
    run = compat.get_current_vllm_config_or_none()
    if config.kv_cache_dtype not in NAMES and (
        run is None or run.cache_config.cache_dtype not in NAMES
    ):
        return None
    if run is not None and not serves(run):
        return None
    from kvq_plugin.serving import backend, base, layers, stock

    if config.kv_cache_dtype == MIXED:
        from kvq_plugin.serving.pending import PendingBackend

        return base.class_path(PendingBackend)  # until the layer has a name
    format = layers.layer_format(config.kv_cache_dtype, config.attn_type)
    if format is None:
        return base.class_path(stock.StockCPUBackend)
    return _validated(backend.BACKENDS[format], config, backend.LIMITS)


def choose_on_gpu(selected: Any, config: Any) -> str | None:
    """As :func:`choose_on_cpu`."""
    name = config.kv_cache_dtype
    if name not in SERVED:
        return None
    if not _is_named((selected,)):
        if not is_ours_alone(name):
            return None
        if selected is not None:
            _require_known(selected, name)
            return None
    from kvq_plugin.serving import gpu, layers
    from kvq_plugin.serving.stock_triton import StockTritonBackend

    format = layers.layer_format(name, config.attn_type)
    backend = StockTritonBackend if format is None else gpu.BACKENDS[format]
    return _validated(backend, config, gpu.LIMITS)


def _validated(backend: Any, config: Any, limits: str) -> str:
    """Import path of *backend*; ValueError when it does not take the layer *config*."""
    from kvq_plugin.serving import base

    reasons = backend.validate_configuration(
        device_capability=compat.current_platform.get_device_capability(), **config._asdict()
    )
    if reasons:
        name = config.kv_cache_dtype
        raise ValueError(
            f"--kv-cache-dtype {name} was asked for an attention layer that kvq_plugin does not "
            f"serve: {', '.join(reasons)}. Supported are {limits}; use --kv-cache-dtype auto"
            f"{platforms.backend_class().elsewhere(name)}"
        )
    return base.class_path(backend)


def _require_known(selected: Any, kv_cache_dtype: str) -> None:
    """ValueError when the backend that the user named does not know a dtype of ours alone."""
    try:
        known = selected.get_class().supports_kv_cache_dtype(kv_cache_dtype)
    except (ImportError, OSError):
        return  # vLLM reports a backend that is not installed itself, right after this
    if not known:
        raise ValueError(
            f"--kv-cache-dtype {kv_cache_dtype} was asked together with --attention-backend "
            f"{selected.name}, which has no such KV cache: supported is {kv_cache_dtype} by "
            f"{BACKEND_NAME} (CUSTOM before vLLM 0.32); drop --attention-backend, or, where it is "
            "vLLM that wants it for this model, use --kv-cache-dtype auto"
        )


def require_own_backends(model: torch.nn.Module, vllm_config: Any) -> None:
    """Raise ValueError when the model itself gave a layer, whose cache we should quantize, a
    backend of vLLM's: it would write that cache in a layout of its own, if at all."""
    if not serves(vllm_config):
        return
    from kvq_plugin.serving import base, layers

    for layer in (m for m in model.modules() if isinstance(m, compat.Attention)):
        name = layer.kv_cache_dtype
        if name not in NAMES or not is_ours_alone(name):
            continue
        if name != MIXED and layers.layer_format(name, layer.attn_type) is None:
            continue
        if not issubclass(layer.attn_backend, base.KVQBackend):
            raise ValueError(
                f"--kv-cache-dtype {name} was asked for {layer.layer_name}, which the model itself "
                f"gives vLLM's {layer.attn_backend.get_name()}: kvq_plugin does not serve it; use "
                "--kv-cache-dtype auto"
            )


def require_told(model: torch.nn.Module, vllm_config: Any) -> None:
    """Raise ValueError when the model's code did not tell a layer which KV cache was asked for, so
    that it would stay unquantized without a word: vLLM's Falcon with rotary positions or alibi.

    Layers that are to be unquantized, by the user's word or a mapping's, are what they look like;
    those that read another's cache are as that one is.
    """
    if not serves(vllm_config):
        return
    cache = vllm_config.cache_config
    mapping = mapped.run_mapping(vllm_config) if cache.cache_dtype == MIXED else None
    skipped = cache.kv_cache_dtype_skip_layers or ()
    for layer in (m for m in model.modules() if isinstance(m, compat.Attention)):
        if layer.kv_cache_dtype != PLAIN or layer.attn_type != compat.AttentionType.DECODER:
            continue
        if layer.kv_sharing_target_layer_name is not None:
            continue
        windowed = layer.sliding_window is not None and "sliding_window" in skipped
        if windowed or str(layer_number(layer.layer_name)) in skipped:
            continue
        if mapping is not None and mapped.layer_name(mapping, layer) == PLAIN:
            continue
        raise ValueError(
            f"--kv-cache-dtype {cache.cache_dtype} was asked for {type(model).__name__}, whose "
            f"code in vLLM makes {layer.layer_name} without a cache configuration, so that its KV "
            "cache stays unquantized: supported are models that pass it on; use --kv-cache-dtype "
            "auto"
        )
