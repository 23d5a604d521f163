"""The quantization config: how our scale loading reaches every attention layer.

vLLM has one quantization config per model. A checkpoint whose weights are not quantized gets
:class:`KVQConfig`; any other gets a copy of its own under a generated subclass of its class that
differs for attention layers only (:func:`wrap_quant_config`), so that weights load, and
``isinstance`` and ``get_name()`` answer, as before.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from kvq_plugin.formats import SERVED
from kvq_plugin.mapping import MIXED, NAMES
from kvq_plugin.serving import compat
from kvq_plugin.serving.compat import QuantizationConfig, register_quantization_config
from kvq_plugin.serving.mapped import run_formats, run_mapping
from kvq_plugin.serving.scales.declared import (
    KVScheme,
    declared_dtype,
    quantization_section,
    scheme_of,
)
from kvq_plugin.serving.scales.keys import IGNORED_SUFFIXES

AUTO = "auto"
logger = compat.init_logger(f"vllm.{__name__}")


class ScaleLoading:
    """Mixin of quantization configs whose attention layers load scales our way.

    Attributes:
        kvq_scheme: what the checkpoint declares about its KV cache; None when nothing.
        kv_cache_scheme: None, whatever the checkpoint says: vLLM turns any other value into
            ``fp8`` under ``--kv-cache-dtype auto``, int8 schemes included.
    """

    kvq_scheme: KVScheme | None = None
    kv_cache_scheme: Any = None

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        if isinstance(layer, compat.Attention):
            from kvq_plugin.serving.scales.method import KVQCacheMethod

            return KVQCacheMethod(self)
        return super().get_quant_method(layer, prefix)


@register_quantization_config("kvq")
class KVQConfig(ScaleLoading, QuantizationConfig):
    """Unquantized weights, KV scales from the checkpoint.

    Used for ``--quantization kvq``, for ``quantization_config: {"quant_method": "kvq",
    "kv_cache_scheme": {...}}`` in config.json, and for any unquantized checkpoint served with
    one of our KV-cache dtypes.
    """

    _ignore_unexpected_suffixes = (
        *QuantizationConfig._ignore_unexpected_suffixes,
        *IGNORED_SUFFIXES,
    )

    def __init__(self, scheme: KVScheme | None = None) -> None:
        super().__init__()
        self.kvq_scheme = scheme

    def get_name(self) -> str:
        return "kvq"

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> KVQConfig:
        return cls(KVScheme.from_section(config))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        if isinstance(layer, compat.LinearBase):
            return compat.UnquantizedLinearMethod()
        if isinstance(layer, compat.Attention):
            return super().get_quant_method(layer, prefix)
        return None


@functools.cache
def _scale_loading_class(base: type) -> type:
    """Subclass of config class *base* with our scale loading; one per base."""
    attributes = {
        "__reduce__": _reduce_wrapped,
        "_ignore_unexpected_suffixes": (*base._ignore_unexpected_suffixes, *IGNORED_SUFFIXES),
    }
    return type(f"KVQ{base.__name__}", (ScaleLoading, base), attributes)


def _reduce_wrapped(self: Any) -> tuple:
    # Worker processes get the config pickled, and a generated class has no import path.
    _, _, base, *_ = type(self).__mro__
    return _new_wrapped, (base,), self.__dict__.copy()


def _new_wrapped(base: type) -> Any:
    cls = _scale_loading_class(base)
    return cls.__new__(cls)


# --- wrapping --------------------------------------------------------------------------


def resolve_cache_dtype(vllm_config: Any) -> None:
    """Under ``--kv-cache-dtype auto``, take the dtype that the checkpoint declares."""
    cache = vllm_config.cache_config
    if cache.cache_dtype == AUTO and (dtype := declared_dtype(vllm_config)) is not None:
        cache.cache_dtype = dtype
        logger.info("KV cache dtype %s, as the checkpoint declares", dtype)


def wrap_quant_config(vllm_config: Any) -> None:
    """Give *vllm_config* a quantization config that loads KV scales our way. Idempotent.

    Applies when the cache dtype is one of ours, and when the checkpoint declares KV scales
    that an unquantized cache is to ignore. Raises ValueError when the checkpoint's scales
    were made for another code than the one asked for.
    """
    if vllm_config.model_config is None:
        return
    resolve_cache_dtype(vllm_config)
    asked = vllm_config.cache_config.cache_dtype
    scheme = scheme_of(vllm_config.quant_config, vllm_config.model_config)
    formats = run_formats(vllm_config)
    for format in formats if scheme is not None else ():
        scheme.check(format, asked)
    if asked not in NAMES and (scheme is None or not _is_unquantized(asked)):
        return
    if any(not format.is_dynamic for format in formats):
        _leave_uncalibrated_layers(vllm_config)
    vllm_config.quant_config = _with_scale_loading(vllm_config.quant_config, scheme)


def wrap_draft_config(config: Any, model_config: Any, asked: str) -> Any:
    """*config*, which a draft model made for itself, loading KV scales our way: the KV cache in
    force is *asked*, one of ours. Raises ValueError as :func:`wrap_quant_config` does."""
    scheme = scheme_of(config, model_config)
    if scheme is not None and asked in SERVED:
        scheme.check(SERVED[asked], asked)
    return _with_scale_loading(config, scheme)


def _with_scale_loading(config: Any, scheme: KVScheme | None) -> Any:
    if config is None:
        return KVQConfig(scheme)
    if isinstance(config, ScaleLoading):
        return config
    wrapped = _new_wrapped(type(config))
    vars(wrapped).update(vars(config), kv_cache_scheme=None, kvq_scheme=scheme)
    return wrapped


def _leave_uncalibrated_layers(vllm_config: Any) -> None:
    """Skip the layers that ``kvq calibrate --ignore`` left without scales, as it noted down."""
    section = quantization_section(vllm_config.model_config.hf_config)
    cache = vllm_config.cache_config
    noted = map(str, section.get("kv_cache_skip_layers", []))
    if cache.cache_dtype == MIXED:  # whose other layers take no scales
        mapping = run_mapping(vllm_config)
        noted = [n for n in noted if not _is_dynamic(mapping.name(int(n)))]
    missing = [n for n in noted if n not in cache.kv_cache_dtype_skip_layers]
    if missing:
        cache.kv_cache_dtype_skip_layers = [*cache.kv_cache_dtype_skip_layers, *missing]
        logger.info("Layers %s keep an unquantized KV cache: not calibrated", ", ".join(missing))


def _is_dynamic(name: str) -> bool:
    """True for a KV cache that takes no scales from a checkpoint."""
    return name == AUTO or SERVED[name].is_dynamic


def _is_unquantized(cache_dtype: str) -> bool:
    """True for names of torch dtypes, as vLLM calls caches it does not quantize."""
    return isinstance(getattr(torch, cache_dtype, None), torch.dtype)
