"""Registration in a vLLM that lacks one of the names it needs; the script of a process of its own.

    python without_names.py names MODEL     # each name in turn, before registration
    python without_names.py modules MODEL   # each module of the plugin's, after it
    python without_names.py nowhere MODEL   # where vLLM finds no device, then where it does

prints JSON. A name is put back before vLLM makes a config, since vLLM needs most of them itself:
what is seen then is what registration left behind.
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

#: What vLLM 0.32 corrupts memory with on CPUs, what only the plugin has, and what vLLM serves.
CORRUPTING, OWN, STOCK = "int8_per_token_head", "int8", "fp8"


@contextmanager
def warnings() -> Iterator[list[str]]:
    """What vLLM and the plugin warn of meanwhile."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())
    logging.getLogger("vllm").addHandler(handler)
    try:
        yield found
    finally:
        logging.getLogger("vllm").removeHandler(handler)


def message(call: Callable, *args, **kwargs) -> str | None:
    """Of the ValueError that ``call(...)`` raises, on one line; None when it raises none."""
    try:
        call(*args, **kwargs)
    except ValueError as error:
        return " ".join(str(error).split())
    return None


def config(model: str, kv_cache_dtype: str):
    """The config of an engine, as far as the user's own process makes it."""
    from vllm.engine.arg_utils import EngineArgs

    arguments = {"skip_tokenizer_init": True, "max_model_len": 512}
    return EngineArgs(
        model=model, kv_cache_dtype=kv_cache_dtype, **arguments
    ).create_engine_config()


def state() -> dict:
    """Everything of vLLM's that registration changes."""
    from vllm.config import VllmConfig, cache
    from vllm.model_executor.layers import quantization
    from vllm.model_executor.model_loader import utils
    from vllm.platforms import current_platform
    from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
    from vllm.v1.attention.backends import registry

    platform = vars(type(current_platform))
    return {
        "dtypes": cache.CacheDType.__args__,
        "more dtypes": list(getattr(cache, "KV_CACHE_DTYPES", ())),
        "torch dtypes": dict(STR_DTYPE_TO_TORCH_DTYPE),
        "backends": list(registry.AttentionBackendEnum.__members__),
        "overrides": dict(registry._ATTN_OVERRIDES),
        "draft": vars(VllmConfig)["get_quantization_config"],
        "models": utils.initialize_model,
        "quantization": list(quantization.QUANTIZATION_METHODS),
        "selection": platform.get("get_attn_backend_cls"),
        "config": platform.get("check_and_update_config"),
    }


def hide(undo: ExitStack, place: str, name: str) -> None:
    """Take *name* away from "module" or "module:Class", as if vLLM did not have it."""
    module, _, cls = place.partition(":")
    owner = importlib.import_module(module)
    if (module, name) == ("vllm.platforms", "current_platform"):  # made on demand
        absent = mock.Mock(side_effect=ImportError(name))
        undo.enter_context(mock.patch.object(owner, "__getattr__", absent))
        return
    if cls:
        owner = getattr(owner, cls)
    for base in getattr(owner, "__mro__", (owner,)):
        for names in (vars(base).get("__annotations__", {}), vars(base).get("_member_map_", {})):
            if name in names:
                undo.enter_context(mock.patch.dict(names))
                del names[name]
        if name in vars(base):
            undo.callback(type.__setattr__ if cls else setattr, base, name, vars(base)[name])
            (type.__delattr__ if cls else delattr)(base, name)


def without_names(model: str) -> dict:
    from kvq_plugin import serving
    from kvq_plugin.serving.compat import required

    for place, _ in required.wanted():  # as in a process that has served for a while
        if place not in required.GPU_MODULES:
            importlib.import_module(place.partition(":")[0])
    wanted = [(p, n) for p, n in required.wanted() if p not in required.GPU_MODULES]
    [platform] = [p for p in required.PLATFORM_CLASSES if ".cpu:" in p]
    wanted += [(platform, name) for name in required.ATTRIBUTES[platform]]
    if not hasattr(importlib.import_module("vllm.config.cache"), "register_kv_cache_dtype"):
        wanted += [(p, n) for p, names in required.UNTIL_0_32.items() for n in names]
    before, found = state(), {}
    for place, name in wanted:
        result = found[f"{place}.{name}"] = {}
        serving._registered = False
        with ExitStack() as undo, warnings() as warned:
            hide(undo, place, name)
            serving.register()
        result["warned"] = warned
        left = {key for key, value in state().items() if value != before[key]}
        result["left"] = sorted(left - {"config", "selection"})
        result["refused"] = message(_select, model, CORRUPTING)
        result["own"] = message(config, model, OWN)
        for dtype in ("auto", STOCK):
            made = config(model, dtype)
            result[dtype] = [made.cache_config.cache_dtype, type(made.quant_config).__name__]
        _unpatch(before)
    return found


def _unpatch(before: dict) -> None:
    from vllm.platforms import current_platform

    for key, name in (("config", "check_and_update_config"), ("selection", "get_attn_backend_cls")):
        setattr(type(current_platform), name, before[key])


def without_modules(model: str) -> dict:
    from kvq_plugin import serving

    serving.register()
    modules = ("backend", "base", "checks", "layers", "selection", "scales.config", "stock")
    found = {}
    for module in (f"kvq_plugin.serving.{m}" for m in modules):
        result = found[module] = {}
        parent, _, own = module.rpartition(".")
        with warnings() as warned, ExitStack() as undo:
            importlib.import_module(module)
            undo.callback(sys.modules.__setitem__, module, sys.modules[module])
            undo.callback(setattr, sys.modules[parent], own, sys.modules[module])
            sys.modules[module] = None
            delattr(sys.modules[parent], own)
            result["refused"] = message(_select, model, CORRUPTING)
            result["auto"] = _select(model, "auto")
        result["warned"] = warned
    return found


def _select(model: str, kv_cache_dtype: str) -> str:
    """Path of the backend of a layer of the engine, whose config is made first."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.v1.attention.selector import get_attn_backend

    from kvq_plugin.serving.compat import patches

    patches.forget_selected_backends()
    with set_current_vllm_config(config(model, kv_cache_dtype)):
        backend = get_attn_backend(64, torch.bfloat16, kv_cache_dtype)
    return ".".join(backend.full_cls_name())


def nowhere(model: str) -> dict:
    import vllm.platforms
    from vllm.config import CacheConfig
    from vllm.engine.arg_utils import get_kwargs
    from vllm.platforms.interface import UnspecifiedPlatform

    from kvq_plugin import serving

    own = vllm.platforms.current_platform
    vllm.platforms._current_platform = UnspecifiedPlatform()
    serving.register()
    found = {
        # vLLM's parser itself cannot be made without a device.
        "choices": get_kwargs(CacheConfig)["cache_dtype"].get("choices", [OWN]),
        "accepted": CacheConfig(cache_dtype=OWN).cache_dtype,
        "registered": serving._registered,
    }
    vllm.platforms._current_platform = own
    serving.register()
    return found | {"then": serving._registered, "selected": _select(model, CORRUPTING)}


def _main(what: str, model: str) -> None:
    call = {"names": without_names, "modules": without_modules, "nowhere": nowhere}[what]
    print(json.dumps(call(model)))


if __name__ == "__main__":
    _main(*sys.argv[1:])
