"""The quantization method of vLLM's attention layers: placeholder -> reconcile -> buffers.

Before loading, a layer gets a placeholder for every scale a checkpoint may have; afterwards
they are reconciled into the tensors vLLM's backends read (``_k_scale`` and its kin) and the
:class:`~kvq_plugin.reference.StaticScale` pair ours reads. All of these are registered buffers
and change in place: vLLM saves and restores buffers, and nothing else, over a weight reload and
``sleep(level=2)``, and captured graphs keep their addresses.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

from kvq_plugin.formats import FP8_E4M3, SERVED, Kind, KVFormat, get_format
from kvq_plugin.mapping import MIXED
from kvq_plugin.reference import StaticScale
from kvq_plugin.serving import compat, recent
from kvq_plugin.serving.base import KVQImpl
from kvq_plugin.serving.compat import AttentionType, CompressedTensorsKVCacheMethod
from kvq_plugin.serving.layers import keep_buffer, require_same_cache
from kvq_plugin.serving.scales.declared import LIKELY_REACH
from kvq_plugin.serving.scales.keys import (
    PREDICTION,
    PREDICTION_COUNTS,
    SCALES,
    ZERO_POINTS,
    layer_number,
)
from kvq_plugin.serving.scales.load import ScaleLoad, Scales
from kvq_plugin.serving.scales.shapes import (
    ABSENT,
    HeadShard,
    ScaleReader,
    check_query,
    own_kv_heads,
)

logger = compat.init_logger(f"vllm.{__name__}")
Values = dict[str, torch.Tensor]


# Subclassed for its type alone; every method is replaced. vLLM refuses fp8_e5m2 ("not supported
# with fp8 checkpoints") for any method but this one under a config whose kv_cache_scheme is
# None, on the ground that a checkpoint with fp8 scales means e4m3. Those scales are valid for
# e5m2 too (a float's relative precision does not depend on its scale), and so we serve it.
class KVQCacheMethod(CompressedTensorsKVCacheMethod):
    """Loads the scales of one attention layer, whatever its KV-cache dtype is.

    Leaves on the layer, for ``x`` in k, v, q, prob:

    * ``_x_scale``: fp32 buffer, ``()``; for k and v also ``(H,)`` or ``(H, D)``, and ``(H,)``
      for q beside a per-head or per-channel k (H: kv heads of this rank),
    * ``_x_scale_float``: its largest value, ``_x_scale_cpu``: a copy in host memory,
    * ``kvq_key_static``, ``kvq_value_static``: the same for our kernels, over buffers of the
      layer; None unless the layer's format is static.

    Args:
        quant_config: config with ``kv_cache_scheme`` None and a ``kvq_scheme``.

    Attributes:
        load: what the layers of one model share; None before :func:`begin_load`.
        own_kv_heads: of this layer over all ranks; None where its model does not say.
    """

    load: ScaleLoad | None = None
    own_kv_heads: int | None = None

    def create_weights(self, layer: torch.nn.Module) -> None:
        """Add the placeholders: fp32 scalars, -1 (absent) for scales, 0 for zero points.

        Loading puts the checkpoint's tensor in the place of a placeholder's data, as it is.
        """
        # Here, because every attention layer passes, whichever backend it was given.
        config = compat.get_current_vllm_config_or_none()  # None while weights are reloaded
        if config is not None and layer.kv_cache_dtype == MIXED:
            from kvq_plugin.serving.pending import settle  # CPUs' alone

            settle(layer, config)
        require_same_cache(layer.kv_cache_dtype, _sharing_target(layer))
        if config is not None:
            recent.prepare(layer, config)
        if not hasattr(layer, "kvq_key_static"):
            layer.kvq_key_static = layer.kvq_value_static = None
        for name in (*SCALES, *ZERO_POINTS):
            value = ABSENT if name in SCALES else 0.0
            parameter = torch.nn.Parameter(torch.tensor(value, dtype=torch.float32), False)
            parameter.weight_loader = _weight_loader(self, layer.layer_name, name)
            # --load-format dummy writes small random numbers into whatever does not say otherwise.
            parameter.dummy_weight_value = value
            setattr(layer, name, parameter)

    def apply(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise RuntimeError(f"{type(self).__name__}.apply should not be called")

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Reconcile what was loaded; without placeholders, rebuild what derives from the buffers.

        Raises ValueError for scales that cannot be used or contradict each other, and once the
        last layer is done, for layers the checkpoint left without.
        """
        if isinstance(impl := getattr(layer, "impl", None), KVQImpl):
            impl.keep_in(layer)
        placeholders = {n: getattr(layer, n, None) for n in (*SCALES, *ZERO_POINTS)}
        for name in placeholders:
            if hasattr(layer, name):
                delattr(layer, name)
        if placeholders["k_scale"] is None:
            _refresh(layer)
            return
        load = self.load or ScaleLoad([layer.layer_name], self.quant_config.kvq_scheme)
        if compat.is_weights_pre_processed():
            _refresh(layer)  # another process did all this; only Python-side copies are missing
        elif (format := _static_format(layer)) is None:
            one = torch.tensor(1.0)
            _publish(layer, Scales(one, one, one, one), load)
        else:
            load.require_once(layer.layer_name)
            values = _reader(layer, load, self.own_kv_heads).read(placeholders, format)
            if _sharing_target(layer) is not None:
                load.readers.append((layer, values))
            elif (scales := _reconcile(layer, format, values, load)) is not None:
                _publish(layer, scales, load)
        if load.finish(layer.layer_name):
            readers, load.readers = load.readers, []
            for reader, values in readers:
                _publish(reader, _from_target(reader, values, load), load)


def begin_load(model: torch.nn.Module, vllm_config: Any, model_config: Any) -> None:
    """Give the attention layers of a freshly built *model* a :class:`ScaleLoad` in common, and
    make ``model.load_weights`` hand it the scales that it reads.

    A model whose attention layers are not ours is left as it is. Scales of layers that live
    elsewhere may go unused: on other pipeline ranks, in the multi-token-prediction layers
    behind the model's own, and all of a target's that a draft model reads past.
    """
    modules = model.modules()
    layers = [m for m in modules if isinstance(getattr(m, "quant_method", None), KVQCacheMethod)]
    if not layers:
        return
    target = vllm_config.model_config
    model_config = target if model_config is None else model_config
    whole = model_config is target and vllm_config.parallel_config.pipeline_parallel_size == 1
    count = target.get_total_num_hidden_layers()
    beyond = range(count, count + _prediction_layers(target))
    load = ScaleLoad(
        [layer.layer_name for layer in layers],
        layers[0].quant_method.quant_config.kvq_scheme,
        model_config.get_total_num_kv_heads(),
        lambda key: not whole or layer_number(key) in beyond or key.startswith(PREDICTION),
    )
    own = own_kv_heads(model)
    for layer in layers:
        layer.quant_method.load = load
        layer.quant_method.own_kv_heads = own.get(layer.layer_name)
    stock = model.load_weights

    @functools.wraps(stock)
    def load_weights(weights, *args, **kwargs):
        waiting = any(hasattr(layer, SCALES[0]) for layer in layers)
        return stock(load.rename(weights, waiting), *args, **kwargs)

    model.load_weights = load_weights


def _prediction_layers(model_config: Any) -> int:
    """Layers for multi-token prediction that checkpoints carry after the model's own."""
    config = model_config.hf_config
    config = getattr(config, "text_config", None) or config
    return max(int(getattr(config, name, None) or 0) for name in PREDICTION_COUNTS)


# --- placeholders ----------------------------------------------------------------------


def _weight_loader(method: KVQCacheMethod, layer_name: str, name: str) -> Callable:
    # Must not refer to the layer: vLLM keeps it in a dictionary weakly keyed by that layer.
    def weight_loader(param: torch.nn.Parameter, loaded_weight: torch.Tensor) -> None:
        if method.load is not None:
            method.load.take(layer_name, name, loaded_weight)
        if param.shape != loaded_weight.shape:
            param.data = torch.empty(loaded_weight.shape, dtype=torch.float32, device=param.device)
        param.data.copy_(loaded_weight)  # vLLM counts loaded elements by copy_

    return weight_loader


def _static_format(layer: torch.nn.Module) -> KVFormat | None:
    """The layer's format if its scales come from the checkpoint; None for dynamic formats, an
    unquantized cache, and encoder layers, which have none."""
    encoder = (AttentionType.ENCODER, AttentionType.ENCODER_ONLY)
    if layer.kv_cache_dtype not in SERVED or getattr(layer, "attn_type", None) in encoder:
        return None
    format = get_format(layer.kv_cache_dtype)
    return None if format.is_dynamic else format


def _reader(layer: torch.nn.Module, load: ScaleLoad, own_kv_heads: int | None) -> ScaleReader:
    rank, world = 0, 1
    if compat.model_parallel_is_initialized():
        rank = compat.get_tensor_model_parallel_rank()
        world = compat.get_tensor_model_parallel_world_size()
    return ScaleReader(
        layer.layer_name,
        HeadShard.of(layer.num_kv_heads, load.total_kv_heads, rank, world, own_kv_heads),
        layer.head_size,
        getattr(layer, "head_size_v", layer.head_size),
        layer.num_heads * world,
    )


# --- reconcile -------------------------------------------------------------------------


def _reconcile(
    layer: torch.nn.Module, format: KVFormat, values: Values, load: ScaleLoad
) -> Scales | None:
    """The scales of a layer that has its own KV cache; None where the load will refuse it."""
    if load.has_both(layer.layer_name, format, values):
        if format.default_scale is None and load.scheme is None:
            logger.warning_once(
                "The checkpoint declares no kv_cache_scheme: taking its scales as %s ones "
                "(amax/%d).",
                format.name,
                int(format.key.code.qmax),
            )
        factor = _platform_factor(layer, format)
        k, v = values["k_scale"] * factor, values["v_scale"] * factor
        _warn_of_reach(layer, "k_scale", k.max().item() * format.key.code.qmax)
        _warn_of_reach(layer, "v_scale", v.max().item() * format.value.code.qmax)
    elif format.default_scale is None:
        return None
    else:
        k = v = torch.tensor(format.default_scale)
    q, prob = _query_scales(layer, format, values, k)
    if format.key.code is FP8_E4M3 and bool((k == 1).all() and (v == 1).all()):
        logger.warning_once(
            "Using KV cache scale 1.0 for fp8_e4m3: values beyond 448 saturate. If the "
            "checkpoint should have scales, check its k_scale and v_scale; `kvq calibrate` "
            "adds them."
        )
    if (
        format.key.code.kind is Kind.FLOAT
        and _quantizes_query(layer)
        and bool((q == 1).all() or prob == 1)
    ):
        logger.warning_once(
            "Using an uncalibrated q_scale and/or prob_scale with fp8 attention, which may cost "
            "accuracy: the checkpoint has none for them."
        )
    return Scales(k, v, q, prob, values.get("k_zero_point"), values.get("v_zero_point"))


def _warn_of_reach(layer: torch.nn.Module, name: str, reach: float) -> None:
    """Say so when *reach*, what *name*'s largest code stands for, can be meant for no model."""
    if not LIKELY_REACH[0] < reach < LIKELY_REACH[1]:
        logger.warning_once(
            "%s: with the checkpoint's %s the largest code stands for %.3g, where models have a "
            "few units to a few hundred: larger numbers saturate, those below half a step become "
            "0. Check the checkpoint's scales (`kvq inspect`), or run `kvq calibrate`.",
            layer.layer_name,
            name,
            reach,
        )


def _from_target(layer: torch.nn.Module, values: Values, load: ScaleLoad) -> Scales:
    """The scales of a layer that reads another layer's KV cache: those it is written with."""
    target = load.scales.get(_sharing_target(layer))
    if target is None:
        raise ValueError(
            f"{layer.layer_name} reads the KV cache of {_sharing_target(layer)}, which is not "
            "among the layers whose scales were loaded: expected an attention layer of the same "
            "model; use --kv-cache-dtype auto"
        )
    q, prob = _query_scales(layer, _static_format(layer), values, target.k)
    return Scales(target.k, target.v, q, prob, target.k_zero, target.v_zero)


def _platform_factor(layer: torch.nn.Module, format: KVFormat) -> float:
    """2 where an fp8 code's value is half of what e4m3fn means by the same byte (ROCm gfx94x).

    vLLM's own kernels read every float8 that way there, ours e4m3 alone.
    """
    if format.key.code.kind is not Kind.FLOAT or not compat.current_platform.is_fp8_fnuz():
        return 1.0
    stored = getattr(getattr(layer, "impl", None), "kernel_format", None)
    return 1.0 if stored is not None and stored.key.code is format.key.code else 2.0


def _quantizes_query(layer: torch.nn.Module) -> bool:
    """Whether the layer's backend does fp8 attention. Ours never does; unknown counts as yes."""
    return getattr(getattr(layer, "impl", None), "supports_quant_query_input", True)


def _query_scales(
    layer: torch.nn.Module, format: KVFormat, values: Values, k: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """q's and prob's scale: single floats, but for q beside a per-head or per-channel k."""
    factor = _platform_factor(layer, format)
    if "q_scale" not in values:
        logger.warning_once(
            "The checkpoint has no q scale: taking k's. This only matters for backends that "
            "quantize the query (fp8 attention)."
        )
        q = k.amax()
    else:
        check_query(layer.layer_name, values["q_scale"], k)
        q = values["q_scale"] * factor
    prob = values["prob_scale"] * factor if "prob_scale" in values else torch.tensor(1.0)
    return q, prob


def _sharing_target(layer: torch.nn.Module) -> str | None:
    return getattr(layer, "kv_sharing_target_layer_name", None)


# --- buffers ---------------------------------------------------------------------------


def _publish(layer: torch.nn.Module, scales: Scales, load: ScaleLoad) -> None:
    """Put final scales and zero points on *layer*, for vLLM's backends and for ours.

    Raises ValueError when a reload needs buffers of another form than the first load made.
    """
    load.scales[layer.layer_name] = scales
    again = layer.kvq_key_static is not None
    for name in SCALES:
        value = getattr(scales, name.removesuffix("_scale"))
        keep_buffer(layer, f"_{name}", value, again)
    for kind, zero in (("k", scales.k_zero), ("v", scales.v_zero)):
        name = f"_{kind}_zero_point"
        if zero is None and hasattr(layer, name):
            zero = torch.tensor(0.0)
        if zero is not None:
            keep_buffer(layer, name, zero, again)
    _refresh(layer)
    _report(layer, load.taken(layer.layer_name))


def _refresh(layer: torch.nn.Module) -> None:
    """Bring everything that derives from the scale and zero point buffers up to date."""
    for name in SCALES:
        buffer = getattr(layer, f"_{name}")
        setattr(layer, f"_{name}_float", buffer.max().item())
        setattr(layer, f"_{name}_cpu", buffer.detach().to("cpu", copy=True))
    if _static_format(layer) is None:
        return
    again = layer.kvq_key_static is not None
    sizes = {"key": layer.head_size, "value": getattr(layer, "head_size_v", layer.head_size)}
    for kind, head_size in sizes.items():
        scale, zero = (getattr(layer, f"_{kind[0]}_{x}", None) for x in ("scale", "zero_point"))
        full = StaticScale.expand(scale, layer.num_kv_heads, head_size, zero)
        kept = {}
        for part in ("scale", "inverse", "zero_point"):
            name, value = f"_kvq_{kind}_{part}", getattr(full, part)
            if value is None and hasattr(layer, name):
                value = torch.zeros_like(full.scale)
            kept[part] = None if value is None else keep_buffer(layer, name, value, again)
        setattr(layer, f"kvq_{kind}_static", StaticScale(**kept))


def _report(layer: torch.nn.Module, taken: dict[str, str]) -> None:
    """One line at debug level: each scale of *layer* and the key that gave it."""
    if not logger.isEnabledFor(logging.DEBUG):
        return
    parts = []
    for name in SCALES:
        value = getattr(layer, f"_{name}")
        low, high = value.min().item(), value.max().item()
        values = f"{high:.4g}" if value.dim() == 0 else f"{list(value.shape)} {low:.4g}..{high:.4g}"
        default = "as k_scale" if name == "q_scale" and "k_scale" in taken else "by default"
        parts.append(f"{name} {values} {f'from {taken[name]}' if name in taken else default}")
    parts += [f"{name} from {taken[name]}" for name in ZERO_POINTS if name in taken]
    logger.debug(
        "KV scales of %s (%s): %s", layer.layer_name, layer.kv_cache_dtype, "; ".join(parts)
    )
