"""What registration changes in vLLM: all of it, or after a failure none.

Every patch takes an ExitStack *undo* and puts the way back onto it before it changes anything.
What the plugin hooks in afterwards concerns its own KV caches: if it fails there, that is a
ValueError for them, and nothing but a warning for everyone else (:func:`_for_ours_alone`).
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch

from kvq_plugin.mapping import NAMES
from kvq_plugin.serving import compat

_ABSENT = object()


def _set(undo: ExitStack, owner: Any, name: str, value: Any) -> None:
    """``setattr`` on a module, class or object."""
    before = vars(owner).get(name, _ABSENT)
    if before is _ABSENT:
        undo.callback(delattr, owner, name)
    else:
        undo.callback(setattr, owner, name, before)
    setattr(owner, name, value)


def _wrap(undo: ExitStack, owner: Any, name: str, parameters: tuple[str, ...], wrap, kind) -> None:
    """Replace the function *name* of *owner* by ``kind(wrap(it))``, once.

    Raises TypeError when it does not take *parameters*, which the wrapper relies on.
    """
    stock = getattr(owner, name)
    if getattr(stock, "_kvq_wrapped", False):
        return
    found = list(inspect.signature(stock).parameters)[: len(parameters)]
    if found != list(parameters):
        raise TypeError(f"{owner.__name__}.{name} takes {found}: expected {list(parameters)}")
    wrapper = functools.wraps(stock)(wrap(stock))
    wrapper._kvq_wrapped = True
    _set(undo, owner, name, kind(wrapper))


def _keep(undo: ExitStack, mapping: dict, key: Any) -> None:
    """What *key* of *mapping* is now, or that it is absent."""
    if key in mapping:
        undo.callback(mapping.__setitem__, key, mapping[key])
    else:
        undo.callback(mapping.pop, key, None)


def _discard(values: list, value: Any) -> None:
    if value in values:
        values.remove(value)


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
        asked = backend is not None and backend in _added_backends.values()
        if asked or kv_cache_dtype in (NAMES if compat.is_cpu() else _own_dtypes):
            raise ValueError(
                f"--kv-cache-dtype {kv_cache_dtype}: {says}; supported are vLLM "
                f"{compat.SUPPORTED}; use --kv-cache-dtype auto"
            ) from error
        if says not in _warned:
            _warned.add(says)
            compat.get_logger(__name__).warning("%s. It steps aside.", says)


# --- kv cache dtypes -------------------------------------------------------------------

#: Names that vLLM did not know before they were registered here.
_own_dtypes: set[str] = set()


def is_own_dtype(name: str | None) -> bool:
    """True for a ``--kv-cache-dtype`` that this vLLM has from the plugin alone."""
    return name in _own_dtypes


def add_dtypes(undo: ExitStack, names: Iterable[str], torch_dtype: torch.dtype) -> None:
    """Make *names* valid ``--kv-cache-dtype``, whose cache tensors are *torch_dtype*.

    Uses ``register_kv_cache_dtype`` where vLLM has it (0.33); before that, extends the
    ``CacheDType`` literal and rebuilds its two pydantic users. Names vLLM already knows are
    left as they are.
    """
    known = compat.known_dtypes()
    new = tuple(name for name in names if name not in known)
    if not new:
        return
    cache = importlib.import_module("vllm.config.cache")
    undo.callback(_own_dtypes.difference_update, new)
    if hasattr(cache, "register_kv_cache_dtype"):
        for name in new:
            _add_dtype_official(undo, cache, name, torch_dtype)
    else:
        _add_dtypes_backport(undo, cache, new, torch_dtype)
    _own_dtypes.update(new)


def _add_dtype_official(undo: ExitStack, cache: Any, name: str, torch_dtype: torch.dtype) -> None:
    from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
    from vllm.v1.kv_cache_interface import KVQuantMode

    class Handler:
        def torch_dtype(self) -> torch.dtype:
            return torch_dtype

        def quant_mode(self) -> KVQuantMode:
            return KVQuantMode.CUSTOM

    Handler.name = name
    _keep(undo, STR_DTYPE_TO_TORCH_DTYPE, name)
    undo.callback(cache._KV_CACHE_DTYPE_HANDLERS.pop, name, None)
    undo.callback(_discard, cache.KV_CACHE_DTYPES, name)
    cache.register_kv_cache_dtype(name)(Handler)


def _add_dtypes_backport(
    undo: ExitStack, cache: Any, names: tuple[str, ...], torch_dtype: torch.dtype
) -> None:
    from pydantic.dataclasses import rebuild_dataclass
    from vllm.config import CacheConfig, SpeculativeConfig
    from vllm.engine import arg_utils
    from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE

    forget_arguments = arg_utils._compute_kwargs.cache_clear

    def rebuild() -> None:
        rebuild_dataclass(CacheConfig, force=True)
        rebuild_dataclass(SpeculativeConfig, force=True)
        forget_arguments()

    undo.callback(rebuild)  # after what follows has been undone
    # One Literal object is shared by the command line, both configs and the backend
    # selector's own import of it, so it is extended in place rather than replaced.
    _set(undo, cache.CacheDType, "__args__", cache.CacheDType.__args__ + names)
    for name in names:
        _keep(undo, STR_DTYPE_TO_TORCH_DTYPE, name)
        STR_DTYPE_TO_TORCH_DTYPE.setdefault(name, torch_dtype)
    rebuild()


# --- attention backends ----------------------------------------------------------------

#: What add_backend returned, by name.
_added_backends: dict[str, Any] = {}


def added_backend(name: str) -> Any:
    """The enum entry that :func:`add_backend` gave *name*; None without."""
    return _added_backends.get(name)


def add_backend(name: str, path: str, undo: ExitStack | None = None) -> Any:
    """Make *name* a valid ``--attention-backend`` for the class at *path*; its enum entry.

    Before vLLM 0.32 there are no new names, and CUSTOM stands for the class unless another
    plugin took it first (then None). Idempotent.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    undo = undo or ExitStack()
    _keep(undo, _added_backends, name)
    if not hasattr(AttentionBackendEnum, "register"):
        custom = AttentionBackendEnum.CUSTOM
        if not custom.is_overridden():
            undo.callback(custom.clear_override)
            register_backend(custom, path)
        _added_backends[name] = custom if custom.get_path() == path else None
    elif name not in AttentionBackendEnum.__members__:
        undo.callback(_remove_entry, AttentionBackendEnum, name, path)
        register_backend(name, path)
        entry = AttentionBackendEnum[name]
        # Configs are pickled to processes that know the entry only once they have loaded their
        # plugins, which is after unpickling; so unpickling adds it. Pickle looks for the method
        # on the object, and an Enum's own would only look the value up.
        entry.__reduce_ex__ = lambda protocol: (add_backend, (name, path))
        _added_backends[name] = entry
    return _added_backends[name]


def _remove_entry(enum: Any, name: str, value: str) -> None:
    if enum._member_map_.pop(name, None) is not None:
        enum._value2member_map_.pop(value, None)
        _discard(enum._member_names_, name)
        type.__delattr__(enum, name)


def on_backend_selection(undo: ExitStack, choose: Callable[[Any, Any], str | None]) -> None:
    """Let ``choose(selected, config)`` name an attention layer's backend class.

    *selected* is the enum entry of ``--attention-backend`` or None, *config* vLLM's
    ``AttentionSelectorConfig``. Returning None leaves the choice to vLLM, freely where *selected*
    is one of :func:`add_backend`. Layers without a KV-cache dtype, MLA and sparse layers are
    never asked about.
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
            if selected is not None and selected in _added_backends.values():
                selected = None
            return stock(selected, config, *args, **kwargs)

        return get_attn_backend_cls

    parameters = ("selected_backend", "attn_selector_config")
    _wrap(undo, _platform(), "get_attn_backend_cls", parameters, wrap, classmethod)


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

    _wrap(undo, _platform(), "check_and_update_config", ("vllm_config",), wrap, classmethod)


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
    _wrap(undo, VllmConfig, "get_quantization_config", parameters, wrap, staticmethod)


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

    module = "vllm.v1.metrics.prometheus"
    _once_imported(undo, module, "get_prometheus_registry", (), wrap)


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
            _wrap(later, utils, name, parameters, wrap, lambda function: function)
            # What is imported already holds the function under its own name.
            for other in [m for path, m in sys.modules.items() if path.startswith("vllm.")]:
                if getattr(other, name, None) is stock:
                    _set(later, other, name, getattr(utils, name))

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
            _wrap(ExitStack(), _platform(), name, (), wrap, classmethod)


def _is_served(kv_cache_dtype: str) -> bool:
    try:
        return compat.cpu_backend_has(kv_cache_dtype)
    except Exception:  # whatever it is that made the plugin step aside
        return False
