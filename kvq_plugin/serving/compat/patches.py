"""What registration changes in vLLM: all of it, or after a failure none.

Every patch takes an ExitStack *undo*, by which it can be taken back. What the plugin hooks in
afterwards concerns its own KV caches: if it fails there, that is a ValueError for them, and nothing
but a warning for everyone else (:func:`_for_ours_alone`).
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

from kvq_plugin.mapping import NAMES
from kvq_plugin.serving import compat
from kvq_plugin.serving.compat import additions
from kvq_plugin.serving.compat.patching import put, wrap_function

_warned: set[str] = set()


@contextmanager
def _for_ours_alone(kv_cache_dtype: str | None, backend: Any = None) -> Iterator[None]:
    """Let what fails stop only those who asked for the plugin, by *kv_cache_dtype* or *backend*."""
    try:
        yield
    except ValueError:  # a refusal
        raise
    except Exception as error:
        says = f"kvq_plugin failed on vLLM {compat.vllm_version()}: {type(error).__name__}: {error}"
        if additions.is_added_backend(backend) or _is_ours(kv_cache_dtype):
            raise ValueError(
                f"--kv-cache-dtype {kv_cache_dtype}: {says}; supported are vLLM "
                f"{compat.SUPPORTED}; use --kv-cache-dtype auto"
            ) from error
        if says not in _warned:
            _warned.add(says)
            compat.get_logger(__name__).warning("%s. It steps aside.", says)


def _is_ours(kv_cache_dtype: str | None) -> bool:
    return kv_cache_dtype in NAMES if compat.is_cpu() else additions.is_own_dtype(kv_cache_dtype)


# --- attention backends ----------------------------------------------------------------


def on_backend_selection(undo: ExitStack, choose: Callable[[Any, Any], str | None]) -> None:
    """Let ``choose(selected, config)`` name an attention layer's backend class.

    *selected* is the enum entry of ``--attention-backend`` or None, *config* vLLM's
    ``AttentionSelectorConfig``. Returning None leaves the choice to vLLM, freely where *selected*
    is one that :mod:`~kvq_plugin.serving.compat.additions` added. Layers without a KV-cache dtype,
    MLA and sparse layers are never asked about.
    """

    def wrap(stock: Callable[..., str]) -> Callable[..., str]:
        def get_attn_backend_cls(cls, selected_backend, attn_selector_config, *args, **kwargs):
            config, selected = attn_selector_config, selected_backend
            path = None
            with _for_ours_alone(getattr(config, "kv_cache_dtype", None), selected):
                if config.kv_cache_dtype is not None and not (config.use_mla or config.use_sparse):
                    path = choose(selected, config)
            if path is not None:
                return path
            if additions.is_added_backend(selected):
                selected = None
            return stock(selected, config, *args, **kwargs)

        return get_attn_backend_cls

    parameters = ("selected_backend", "attn_selector_config")
    wrap_function(undo, _platform(), "get_attn_backend_cls", parameters, wrap, classmethod)


def forget_selected_backends() -> None:
    """Have vLLM ask again: it remembers a layer's backend by the layer's shape, whatever engine
    of this process the layer belongs to."""
    from vllm.v1.attention.selector import _cached_get_attn_backend

    _cached_get_attn_backend.cache_clear()


# --- configs ---------------------------------------------------------------------------


def _platform() -> type:
    from vllm.platforms import current_platform

    return type(current_platform)


def on_config(undo: ExitStack, hook: Callable[[Any], None]) -> None:
    """Call ``hook(vllm_config)`` at the end of every ``VllmConfig.__post_init__``.

    Runs in the user's own process, before anything is loaded or started, so that what the
    hook raises is what the user sees.
    """

    def wrap(stock: Callable[..., None]) -> Callable[..., None]:
        def check_and_update_config(cls, vllm_config):
            stock(vllm_config)
            with _for_ours_alone(*_asked(vllm_config)):
                hook(vllm_config)

        return check_and_update_config

    wrap_function(undo, _platform(), "check_and_update_config", ("vllm_config",), wrap, classmethod)


def _asked(vllm_config: Any) -> tuple[str | None, Any]:
    """KV-cache dtype and attention backend that *vllm_config* asks for."""
    cache = getattr(vllm_config, "cache_config", None)
    attention = getattr(vllm_config, "attention_config", None)
    return getattr(cache, "cache_dtype", None), getattr(attention, "backend", None)


def on_draft_quant_config(undo: ExitStack, hook: Callable[[Any, Any], Any]) -> None:
    """Let ``hook(quant_config, model_config)`` replace the quantization config that a draft
    model (EAGLE and its kin) makes for itself from its own checkpoint; either may be None."""
    from vllm.config import VllmConfig

    def wrap(stock: Callable[..., Any]) -> Callable[..., Any]:
        def get_quantization_config(model_config, load_config):
            config = stock(model_config, load_config)
            with _for_ours_alone(*_asked(compat.get_current_vllm_config_or_none())):
                config = hook(config, model_config)
            return config

        return get_quantization_config

    parameters = ("model_config", "load_config")
    wrap_function(undo, VllmConfig, "get_quantization_config", parameters, wrap, staticmethod)


# --- once vLLM imports them -------------------------------------------------------------


def on_model_created(undo: ExitStack, hook: Callable[[Any, Any, Any], None]) -> None:
    """Call ``hook(model, vllm_config, model_config)`` for every model vLLM has built and not
    yet loaded; *model_config* is None for the one that *vllm_config* is about.

    Models inside another one (the language model of a multimodal model) are not reported. The
    module concerned imports every attention backend, so nothing happens before vLLM needs it.
    """
    building = threading.local()

    def wrap(stock: Callable[..., Any]) -> Callable[..., Any]:
        def initialize_model(vllm_config, *args, **kwargs):
            if getattr(building, "outer", False):
                return stock(vllm_config, *args, **kwargs)
            building.outer = True
            try:
                model = stock(vllm_config, *args, **kwargs)
            finally:
                building.outer = False
            with _for_ours_alone(*_asked(vllm_config)):
                hook(model, vllm_config, kwargs.get("model_config"))
            return model

        return initialize_model

    _once_imported(
        undo, "vllm.model_executor.model_loader.utils", "initialize_model", ("vllm_config",), wrap
    )


def on_kv_cache_allocation(undo: ExitStack, surround: Callable[[list[Any]], Any]) -> None:
    """Allocate every KV cache within ``surround(specs)``, a context manager; *specs* are those of
    the cache's layers. Both of vLLM's model runners import the one function concerned."""

    def wrap(stock: Callable[..., Any]) -> Callable[..., Any]:
        def allocate_kv_cache(kv_cache_config, *args, **kwargs):
            around = nullcontext()
            with _for_ours_alone(None):  # a cache allocated in another way serves as well
                around = surround(layer_specs(kv_cache_config))
            with around:
                return stock(kv_cache_config, *args, **kwargs)

        return allocate_kv_cache

    _once_imported(undo, "vllm.v1.worker.utils", "allocate_kv_cache", ("kv_cache_config",), wrap)


def on_capacity(undo: ExitStack, hook: Callable[[Any, Any, float], float]) -> None:
    """Let ``hook(vllm_config, kv_cache_config, stated)`` say how many requests of max_model_len
    tokens fit, where vLLM *stated* a number for its log and its metrics; what is admitted does not
    depend on it."""

    def wrap(stock: Callable[..., float]) -> Callable[..., float]:
        def get_max_concurrency_for_kv_cache_config(vllm_config, kv_cache_config):
            stated = stock(vllm_config, kv_cache_config)
            with _for_ours_alone(None):
                return hook(vllm_config, kv_cache_config, stated)
            return stated

        return get_max_concurrency_for_kv_cache_config

    name = "get_max_concurrency_for_kv_cache_config"
    _once_imported(undo, "vllm.v1.core.kv_cache_utils", name, ("vllm_config",), wrap)


def on_metrics(undo: ExitStack, hook: Callable[[Any], None]) -> None:
    """Call ``hook(registry)`` with the prometheus_client registry that an API server serves as
    ``/metrics``, when it asks for it."""

    def wrap(stock: Callable[[], Any]) -> Callable[[], Any]:
        def get_prometheus_registry():
            registry = stock()
            with _for_ours_alone(None):
                hook(registry)
            return registry

        return get_prometheus_registry

    def wrap_routes(stock: Callable[[Any], None]) -> Callable[[Any], None]:
        def attach_router(app):
            stock(app)
            with _for_ours_alone(None):
                _serve_vllms_registry(app)

        return attach_router

    module = "vllm.v1.metrics.prometheus"
    _once_imported(undo, module, "get_prometheus_registry", (), wrap)
    module = "vllm.entrypoints.serve.instrumentator.metrics"
    _once_imported(undo, module, "attach_router", ("app",), wrap_routes)


def _serve_vllms_registry(app: Any) -> None:
    """Have one of several API servers answer GET /metrics from the registry that vLLM makes.

    prometheus_fastapi_instrumentator, whose route is the first, makes one of its own then, of
    prometheus_client's files alone. What it writes of them is written here in the same way. A
    registry per request, as it does: the one that vLLM gave it also has its http_* of this process.
    """
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return
    from fastapi.routing import APIRoute
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
    from starlette.responses import Response
    from vllm.v1.metrics import prometheus

    def metrics():
        content = generate_latest(prometheus.get_prometheus_registry())
        return Response(content, headers={"Content-Type": CONTENT_TYPE_LATEST})

    route = APIRoute("/metrics", metrics, response_model=None, include_in_schema=False)
    app.routes.insert(0, route)


def layer_specs(kv_cache_config: Any) -> list[Any]:
    """Specs of the layers' KV caches; one for layers that share it."""
    groups = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    return [
        spec
        for group in groups  # a group of layers with pages of different sizes has a spec for each
        for spec in getattr(group, "kv_cache_specs", {"": group}).values()
    ]


def _once_imported(
    undo: ExitStack, module: str, name: str, parameters: tuple[str, ...], wrap
) -> None:
    """Wrap function *name* of *module* in all of vLLM's modules that hold it."""
    import wrapt

    undone: list[bool] = []  # a hook of wrapt cannot be taken back
    later = undo.enter_context(ExitStack())
    later.callback(undone.append, True)

    def patch(utils: Any) -> None:
        if undone:
            return
        with _for_ours_alone(None):
            stock = getattr(utils, name)
            wrap_function(later, utils, name, parameters, wrap, lambda function: function)
            # What is imported already holds the function under its own name.
            for other in [m for path, m in sys.modules.items() if path.startswith("vllm.")]:
                if getattr(other, name, None) is stock:
                    put(later, other, name, getattr(utils, name))

    wrapt.register_post_import_hook(patch, module)


# --- without the plugin ----------------------------------------------------------------


def refuse_on_cpu(reason: str) -> None:
    """Refuse the KV caches that vLLM's CPU platform takes and has no kernels for.

    The one thing left of a plugin that could not register: before 0.33 vLLM writes past the end
    of such a cache. *reason* is for the message.
    """
    if not compat.is_cpu():
        return  # elsewhere vLLM asks its backends

    def refuse(kv_cache_dtype: str | None) -> None:
        if kv_cache_dtype not in (None, *compat.UNQUANTIZED) and not _is_served(kv_cache_dtype):
            raise ValueError(
                f"--kv-cache-dtype {kv_cache_dtype} is not implemented by vLLM's CPU platform, and "
                f"kvq_plugin has stepped aside: {reason}; use --kv-cache-dtype auto"
            )

    def wrap_config(stock):
        def check_and_update_config(cls, vllm_config):
            refuse(_asked(vllm_config)[0])
            stock(vllm_config)

        return check_and_update_config

    def wrap_selection(stock):
        def get_attn_backend_cls(cls, selected_backend, attn_selector_config, *args, **kwargs):
            refuse(getattr(attn_selector_config, "kv_cache_dtype", None))
            return stock(selected_backend, attn_selector_config, *args, **kwargs)

        return get_attn_backend_cls

    # Either stops it; the first in the user's own process, before anything is loaded.
    for name, wrap in (
        ("check_and_update_config", wrap_config),
        ("get_attn_backend_cls", wrap_selection),
    ):
        if hasattr(_platform(), name):
            wrap_function(ExitStack(), _platform(), name, (), wrap, classmethod)


def _is_served(kv_cache_dtype: str) -> bool:
    try:
        return compat.cpu_backend_has(kv_cache_dtype)
    except Exception:  # whatever it is that made the plugin step aside
        return False
