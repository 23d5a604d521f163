"""What vLLM learns from the plugin: KV-cache dtypes, and the name of an attention backend."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch

from kvq_plugin.serving import compat
from kvq_plugin.serving.compat.patching import discard, keep, put

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
    keep(undo, STR_DTYPE_TO_TORCH_DTYPE, name)
    undo.callback(cache._KV_CACHE_DTYPE_HANDLERS.pop, name, None)
    undo.callback(discard, cache.KV_CACHE_DTYPES, name)
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
    put(undo, cache.CacheDType, "__args__", cache.CacheDType.__args__ + names)
    for name in names:
        keep(undo, STR_DTYPE_TO_TORCH_DTYPE, name)
        STR_DTYPE_TO_TORCH_DTYPE.setdefault(name, torch_dtype)
    rebuild()


# --- attention backends ----------------------------------------------------------------

#: What add_backend returned, by name.
_added_backends: dict[str, Any] = {}


def added_backend(name: str) -> Any:
    """The enum entry that :func:`add_backend` gave *name*; None without."""
    return _added_backends.get(name)


def is_added_backend(entry: Any) -> bool:
    """True for an enum entry that :func:`add_backend` returned; None is none."""
    return entry is not None and entry in _added_backends.values()


def add_backend(name: str, path: str, undo: ExitStack | None = None) -> Any:
    """Make *name* a valid ``--attention-backend`` for the class at *path*; its enum entry.

    Before vLLM 0.32 there are no new names, and CUSTOM stands for the class unless another
    plugin took it first (then None). Idempotent.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    undo = undo or ExitStack()
    keep(undo, _added_backends, name)
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
        discard(enum._member_names_, name)
        type.__delattr__(enum, name)
