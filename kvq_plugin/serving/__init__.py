"""The vLLM side of the plugin. Importing this package does not import vLLM."""

from __future__ import annotations

import importlib
import logging
from contextlib import ExitStack

_registered = False


def register() -> None:
    """Entry point ``vllm.general_plugins: kvq``; vLLM calls it in each of its processes.

    Adds our KV-cache dtypes, our attention backend and the loading of their scales, or, when this
    vLLM is not as expected, nothing: an exception from here would stop every ``vllm serve``. Then
    one warning says why. Does nothing when called again.
    """
    global _registered
    if _registered:
        return
    try:
        _registered = _register()
    except Exception as error:
        _registered = True
        _step_aside(error)


def _register() -> bool:
    """True when all is done, False when a later call has to go on. Changes nothing if it raises."""
    from kvq_plugin.mapping import NAMES
    from kvq_plugin.serving import compat, selection
    from kvq_plugin.serving.compat import additions, patches, required

    on_cpu, on_gpu, undecided = compat.is_cpu(), compat.is_gpu(), compat.is_unspecified()
    if not (on_cpu or on_gpu or undecided):
        compat.get_logger(__name__).info(
            "kvq_plugin has kernels for vLLM's CPU, CUDA and ROCm platforms only; KV caches here "
            "stay vLLM's own"
        )
        return True
    if lacking := required.missing():
        raise AttributeError(f"it lacks {', '.join(lacking)}")
    import torch

    with ExitStack() as undo:
        additions.add_dtypes(undo, NAMES, torch.uint8)
        if not on_cpu:
            additions.add_backend(
                selection.BACKEND_NAME, f"{__name__}.stock_triton.StockTritonBackend", undo
            )
        if not undecided:
            choose = selection.choose_on_cpu if on_cpu else selection.choose_on_gpu
            patches.on_backend_selection(undo, choose)
            patches.on_config(undo, _on_config)
            patches.on_draft_quant_config(undo, _on_draft_quant_config)
            patches.on_model_created(undo, _on_model_created)
            patches.on_capacity(undo, _capacity)
            patches.on_metrics(undo, _on_metrics)
            if on_cpu:
                patches.on_kv_cache_allocation(undo, _cache_memory)
            # Registers the quantization method, which vLLM looks up before any config exists;
            # last, since that cannot be taken back.
            importlib.import_module(f"{__name__}.scales.config")
        undo.pop_all()
    return not undecided


def _step_aside(error: Exception) -> None:
    """Say that the plugin could not register, and refuse what vLLM alone would do wrong."""
    reason, found = f"{type(error).__name__}: {error}", "this version"
    try:
        from kvq_plugin.serving import compat
        from kvq_plugin.serving.compat import patches

        found = f"{compat.vllm_version()}, supported are {compat.SUPPORTED}"
        patches.refuse_on_cpu(reason)
    except Exception as another:
        reason += f"; then {type(another).__name__}: {another}"
    logging.getLogger(f"vllm.{__name__}").warning(
        "kvq_plugin does not fit vLLM (%s) and steps aside: %s. vLLM works as without the plugin; "
        "KV caches of the plugin's are refused.",
        found,
        reason,
    )


def _on_draft_quant_config(quant_config, model_config):
    from kvq_plugin.mapping import NAMES
    from kvq_plugin.serving import compat, selection
    from kvq_plugin.serving.scales.config import wrap_draft_config

    run = compat.get_current_vllm_config_or_none()
    asked = run and run.cache_config.cache_dtype
    if asked not in NAMES or model_config is None or not selection.serves(run):
        return quant_config
    return wrap_draft_config(quant_config, model_config, asked)


def _cache_memory(specs):
    from kvq_plugin.serving.backend import cache_memory

    return cache_memory(specs)


def _capacity(vllm_config, kv_cache_config, stated):
    from kvq_plugin.serving.pages import capacity

    return capacity(vllm_config, kv_cache_config, stated)


def _on_metrics(registry) -> None:
    from kvq_plugin.serving import metrics

    metrics.add_to(registry)


def _on_model_created(model, vllm_config, model_config) -> None:
    from kvq_plugin.mapping import MIXED
    from kvq_plugin.serving import compat, metrics
    from kvq_plugin.serving.recent import prepare
    from kvq_plugin.serving.scales.method import begin_load
    from kvq_plugin.serving.selection import require_own_backends, require_told

    require_told(model, vllm_config)
    # Layers of a model that gives them no quantization config are not settled yet.
    layers = [m for m in model.modules() if isinstance(m, compat.Attention)]
    for layer in layers:
        if layer.kv_cache_dtype == MIXED:
            from kvq_plugin.serving.pending import settle

            settle(layer, vllm_config)
    require_own_backends(model, vllm_config)
    for layer in layers:
        prepare(layer, vllm_config)
    begin_load(model, vllm_config, model_config)
    metrics.attach(model, vllm_config)


def _on_config(vllm_config) -> None:
    from kvq_plugin.serving import checks, defaults
    from kvq_plugin.serving.compat import patches
    from kvq_plugin.serving.mapped import settle_layout
    from kvq_plugin.serving.metrics import make_folder
    from kvq_plugin.serving.scales.config import wrap_quant_config
    from kvq_plugin.serving.selection import serves

    cache = vllm_config.cache_config
    patches.forget_selected_backends()
    defaults.settle_draft_blocks(vllm_config)
    checks.check(vllm_config)
    if not serves(vllm_config):
        return
    asked = cache.cache_dtype
    wrap_quant_config(vllm_config)
    if cache.cache_dtype != asked:  # "auto", and the checkpoint itself asks for a format
        checks.check(vllm_config)
    defaults.settle_drafts(vllm_config)
    defaults.settle_blocks(vllm_config)
    make_folder()
    settle_layout(vllm_config)
