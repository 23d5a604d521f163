"""Loading of KV-cache scales: the quantization method of vLLM's attention layers.

Before loading, a layer gets a placeholder for every scale a checkpoint may have; afterwards
they are reconciled into the tensors vLLM's backends read (``_k_scale`` and its kin) and the
:class:`~kvq_plugin.reference.StaticScale` pair ours reads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kvq_plugin.formats import FORMATS, FP8_E4M3, Kind, KVFormat, get_format
from kvq_plugin.reference import StaticScale
from kvq_plugin.serving import compat
from kvq_plugin.serving.base import require_same_cache
from kvq_plugin.serving.compat import AttentionType, CompressedTensorsKVCacheMethod
from kvq_plugin.serving.scales.declared import ScaleLedger
from kvq_plugin.serving.scales.keys import SCALES, ZERO_POINTS
from kvq_plugin.serving.scales.offers import ScaleKeys
from kvq_plugin.serving.scales.shapes import ABSENT, HeadShard, ScaleReader, are_scales

logger = compat.init_logger(f"vllm.{__name__}")

_SCALE_BUFFERS = ("_k_scale", "_v_scale", "_q_scale", "_prob_scale")
_ZERO_POINT_BUFFERS = ("_k_zero_point", "_v_zero_point")
# On the CPU by name: this module may first be imported while a model is built on meta.
_ONES = (torch.tensor(1.0, device="cpu"),) * len(_SCALE_BUFFERS)


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
    * ``kvq_key_static``, ``kvq_value_static``: the same for our kernels; None unless the
      layer's format is static.

    Args:
        quant_config: config with ``kv_cache_scheme`` None and a ``kvq_ledger``
            (:class:`~kvq_plugin.serving.scales.declared.ScaleLedger`).
    """

    @property
    def kvq_keys(self) -> ScaleKeys:
        """What :func:`~kvq_plugin.serving.scales.offers.follow` recognises our layers by."""
        return self.quant_config.kvq_ledger.keys

    def create_weights(self, layer: torch.nn.Module) -> None:
        """Add the placeholders: fp32 scalars, -1 (absent) for scales, 0 for zero points.

        Loading replaces a placeholder's data by a tensor of the form the checkpoint has.
        """
        # Here, because every attention layer passes, whichever backend it was given.
        require_same_cache(layer.kv_cache_dtype, _sharing_target(layer))
        layer.kvq_key_static = layer.kvq_value_static = None
        self.quant_config.kvq_ledger.enter(layer)
        format = _static_format(layer)
        shard = None if format is None else _shard(layer)
        for name in SCALES:
            load = _scale_loader(_reader(layer, name, shard))
            _add_placeholder(layer, name, ABSENT, _noting(self.kvq_keys, layer, name, load))
        for name in ZERO_POINTS:
            reader = None if name.startswith("q") else _reader(layer, name, shard)
            load = _zero_point_loader(reader, format)
            _add_placeholder(layer, name, 0.0, _noting(self.kvq_keys, layer, name, load))

    def apply(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise RuntimeError(f"{type(self).__name__}.apply should not be called")

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Reconcile what was loaded. Does nothing for a layer without placeholders.

        Raises ValueError for scales that contradict each other, and once the last layer is
        done, for layers the checkpoint left without.
        """
        given = {name: getattr(layer, name, None) for name in (*SCALES, *ZERO_POINTS)}
        for name in given:
            if hasattr(layer, name):
                delattr(layer, name)
        ledger = self.quant_config.kvq_ledger
        if compat.is_weights_pre_processed():
            _refresh(layer)  # another process did all this; only Python-side copies are missing
        elif given["k_scale"] is None:
            return  # weights were reloaded; scales stay as they are
        elif _sharing_target(layer) is not None:
            layer.kvq_given = _Given.of(given)
        else:
            _reconcile(layer, _Given.of(given), ledger)
        _report(layer, ledger.keys.taken(layer.layer_name))
        if ledger.leave(layer):
            for name in sorted(ledger.layers):
                _take_from_target(ledger.layers[name], ledger.layers)


@dataclass(frozen=True)
class _Given:
    """What a checkpoint gave one layer; None where it gave nothing."""

    q: torch.Tensor | None
    k: torch.Tensor | None
    v: torch.Tensor | None
    prob: torch.Tensor | None
    k_zero: torch.Tensor | None
    v_zero: torch.Tensor | None

    @classmethod
    def of(cls, placeholders: dict[str, torch.Tensor]) -> _Given:
        def value(name: str, absent: float) -> torch.Tensor | None:
            t = placeholders[name].detach()
            return None if bool((t == absent).all()) else t

        return cls(
            *(value(name, ABSENT) for name in SCALES),
            *(value(name, 0.0) for name in ZERO_POINTS[1:]),
        )


# --- placeholders ----------------------------------------------------------------------


def _static_format(layer: torch.nn.Module) -> KVFormat | None:
    """The layer's format if its scales come from the checkpoint; None for dynamic formats, an
    unquantized cache, and encoder layers, which have none."""
    encoder = (AttentionType.ENCODER, AttentionType.ENCODER_ONLY)
    if layer.kv_cache_dtype not in FORMATS or getattr(layer, "attn_type", None) in encoder:
        return None
    format = get_format(layer.kv_cache_dtype)
    return None if format.is_dynamic else format


def _shard(layer: torch.nn.Module) -> HeadShard:
    rank, world = 0, 1
    if compat.model_parallel_is_initialized():
        rank = compat.get_tensor_model_parallel_rank()
        world = compat.get_tensor_model_parallel_world_size()
    if not hasattr(layer, "kvq_total_kv_heads"):
        # Kept on the layer: a weight reload creates placeholders with no config at hand.
        config = compat.get_current_vllm_config_or_none()
        model = None if config is None else config.model_config
        layer.kvq_total_kv_heads = None if model is None else model.get_total_num_kv_heads()
    return HeadShard.of(layer.num_kv_heads, layer.kvq_total_kv_heads, rank, world)


def _reader(layer: torch.nn.Module, key: str, shard: HeadShard | None) -> ScaleReader | None:
    if shard is None:
        return None
    head_size, query_group = _head_size(layer, key), 0
    if key.startswith("prob"):
        head_size = 0
    if key.startswith("q"):
        query_group = layer.num_heads * shard.ranks // shard.total  # replicas share a kv head
    return ScaleReader(layer.layer_name, key, shard, head_size, query_group)


def _head_size(layer: torch.nn.Module, key: str) -> int:
    return getattr(layer, "head_size_v", layer.head_size) if key[0] == "v" else layer.head_size


def _add_placeholder(layer: torch.nn.Module, name: str, value: float, loader: Callable) -> None:
    parameter = torch.nn.Parameter(torch.tensor(value, dtype=torch.float32), requires_grad=False)
    parameter.weight_loader = loader
    # --load-format dummy writes small random numbers into whatever does not say otherwise.
    parameter.dummy_weight_value = value
    setattr(layer, name, parameter)


def _noting(keys: ScaleKeys, layer: torch.nn.Module, name: str, load: Callable) -> Callable:
    """Weight loader *load* of parameter *name*, which tells *keys* what arrives."""
    layer_name = layer.layer_name

    def weight_loader(param: torch.nn.Parameter, loaded_weight: torch.Tensor) -> None:
        keys.take(layer_name, name, loaded_weight)
        load(param, loaded_weight)

    return weight_loader


def _scale_loader(reader: ScaleReader | None) -> Callable:
    def weight_loader(param: torch.nn.Parameter, loaded_weight: torch.Tensor) -> None:
        if reader is not None:
            _fill(param, reader.scale(loaded_weight))

    return weight_loader


def _zero_point_loader(reader: ScaleReader | None, format: KVFormat | None) -> Callable:
    def weight_loader(param: torch.nn.Parameter, loaded_weight: torch.Tensor) -> None:
        if reader is None:
            return
        value = reader.zero_point(loaded_weight)
        if format.key.code.kind is Kind.FLOAT and bool(value.any()):
            raise ValueError(
                f"{reader.layer}: {reader.key} is not zero, but {format.name} codes are "
                "symmetric: expected zeros; use a dtype without static scales, such as "
                "fp8_per_token_head"
            )
        _fill(param, value)

    return weight_loader


def _fill(param: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Make *value* the data of *param*, by ``copy_``: vLLM counts loaded elements that way."""
    if param.shape != value.shape:
        param.data = torch.empty(value.shape, dtype=torch.float32, device=param.device)
    param.data.copy_(value)


def _report(layer: torch.nn.Module, taken: dict[str, str]) -> None:
    """One line at debug level: each scale of *layer* and the key that gave it."""
    if not logger.isEnabledFor(logging.DEBUG):
        return
    parts = []
    for name in SCALES:
        value = getattr(layer, f"_{name}")
        low, high = value.min().item(), value.max().item()
        values = f"{high:.4g}" if value.dim() == 0 else f"{list(value.shape)} {low:.4g}..{high:.4g}"
        parts.append(f"{name} {values} {_origin(name, taken)}")
    parts += [f"{name} from {taken[name]}" for name in ZERO_POINTS if name in taken]
    logger.debug(
        "KV scales of %s (%s): %s", layer.layer_name, layer.kv_cache_dtype, "; ".join(parts)
    )


def _origin(name: str, taken: dict[str, str]) -> str:
    if name in taken:
        return f"from {taken[name]}"
    other = {"k_scale": "v_scale", "v_scale": "k_scale", "q_scale": "k_scale"}.get(name)
    return f"as {other}" if other in taken else "by default"


# --- reconciliation --------------------------------------------------------------------


def _reconcile(layer: torch.nn.Module, given: _Given, ledger: ScaleLedger) -> None:
    """Decide the scales of a layer that has its own KV cache, and publish them."""
    format = _static_format(layer)
    if format is None:
        _publish(layer, *_ONES)
        return
    _check_values(layer, given)
    k, v = given.k, given.v
    if k is not None and v is None and k.dim() == 0:
        v = k  # an old single kv_scale, renamed to k_scale while loading
    elif v is not None and k is None and v.dim() == 0:
        k = v
    if k is None or v is None:
        ledger.record(layer, format, given=False)
        if format.default_scale is None:  # the ledger will refuse; leave no usable scale
            return
        k = v = torch.tensor(format.default_scale)
    else:
        ledger.record(layer, format, given=True)
        if format.default_scale is None and ledger.scheme is None:
            logger.warning_once(
                "The checkpoint declares no kv_cache_scheme: taking its scales as %s ones "
                "(amax/%d).",
                format.name,
                int(format.key.code.qmax),
            )
        factor = _platform_factor(layer, format)
        k, v = k * factor, v * factor
    q, prob = _query_scales(layer, format, given, k)
    _publish(layer, k, v, q, prob, given.k_zero, given.v_zero)
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


def _check_values(layer: torch.nn.Module, given: _Given) -> None:
    """ValueError for values that came past a weight loader and are no scales."""
    for name in SCALES:
        value = getattr(given, name.removesuffix("_scale"))
        if value is not None and not are_scales(value):
            raise ValueError(
                f"{layer.layer_name}: {name} is {value.tolist()}: expected finite scales > 0, or "
                f"{ABSENT} for none; recalibrate with `kvq calibrate`"
            )


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
    layer: torch.nn.Module, format: KVFormat, given: _Given, k: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """q's and prob's scale: single floats, but for q beside a per-head or per-channel k."""
    factor = _platform_factor(layer, format)
    if given.q is None:
        logger.warning_once(
            "The checkpoint has no q scale: taking k's. This only matters for backends that "
            "quantize the query (fp8 attention)."
        )
        q = k.amax()
    elif given.q.dim() and not k.dim():
        raise ValueError(
            f"{layer.layer_name}: q_scale has {given.q.numel()} values beside a single k_scale: "
            "expected a single value; recalibrate with `kvq calibrate`"
        )
    else:
        q = given.q * factor
    prob = torch.tensor(1.0) if given.prob is None else given.prob * factor
    if prob.numel() != 1:
        raise ValueError(
            f"{layer.layer_name}: prob_scale has {prob.numel()} values: expected a single one"
        )
    return q, prob


def _sharing_target(layer: torch.nn.Module) -> str | None:
    return getattr(layer, "kv_sharing_target_layer_name", None)


def _take_from_target(layer: torch.nn.Module, layers: Any) -> None:
    """Give a layer that reads another layer's KV cache the scales that cache is written with."""
    given = layer.__dict__.pop("kvq_given", None)
    if given is None:
        return
    target = layers.get(_sharing_target(layer))
    if target is None:
        raise ValueError(
            f"{layer.layer_name} reads the KV cache of {_sharing_target(layer)}, which is not "
            "among the layers whose scales were loaded: expected an attention layer of the same "
            "model; use --kv-cache-dtype auto"
        )
    format = _static_format(layer)
    if format is None:
        _publish(layer, *_ONES)
        return
    _check_values(layer, given)
    k, v = target._k_scale, target._v_scale
    q, prob = _query_scales(layer, format, given, k)
    zero_points = (getattr(target, name, None) for name in _ZERO_POINT_BUFFERS)
    _publish(layer, k, v, q, prob, *zero_points)


# --- results ---------------------------------------------------------------------------


def _publish(
    layer: torch.nn.Module,
    k: torch.Tensor,
    v: torch.Tensor,
    q: torch.Tensor,
    prob: torch.Tensor,
    k_zero: torch.Tensor | None = None,
    v_zero: torch.Tensor | None = None,
) -> None:
    """Put final scales and zero points on *layer*, for vLLM's backends and for ours."""
    device = layer._k_scale.device
    for name, value in zip(_SCALE_BUFFERS, (k, v, q, prob), strict=True):
        buffer = getattr(layer, name)
        if buffer.shape == value.shape:
            buffer.copy_(value)
        else:
            layer.register_buffer(name, value.to(device, copy=True))
    for name, zero in zip(_ZERO_POINT_BUFFERS, (k_zero, v_zero), strict=True):
        if zero is not None:
            layer.register_buffer(name, zero.to(device, copy=True))
    _refresh(layer)


def _refresh(layer: torch.nn.Module) -> None:
    """Rebuild everything that derives from the scale and zero point buffers."""
    for name in _SCALE_BUFFERS:
        buffer = getattr(layer, name)
        setattr(layer, f"{name}_float", buffer.max().item())
        setattr(layer, f"{name}_cpu", buffer.detach().to("cpu", copy=True))
    if _static_format(layer) is None:
        return
    k_zero, v_zero = (getattr(layer, name, None) for name in _ZERO_POINT_BUFFERS)
    heads = layer.num_kv_heads
    layer.kvq_key_static = StaticScale.expand(layer._k_scale, heads, _head_size(layer, "k"), k_zero)
    layer.kvq_value_static = StaticScale.expand(
        layer._v_scale, heads, _head_size(layer, "v"), v_zero
    )
