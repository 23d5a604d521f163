"""From an observer's ranges to the tensors a checkpoint stores, and what looks wrong with them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from kvq_plugin.calibrate.observers import Observer, Observers, scale_and_zero
from kvq_plugin.calibrate.settings import Settings, Strategy

#: Greatest over least scale of a layer from which on the spread is called suspicious.
WIDE_SPREAD = 1000.0
#: A channel this many times the median channel costs a shared int8 scale 4 of its 7 bits.
OUTLIER = 16.0


@dataclass(frozen=True)
class StreamScales:
    """Scales of one layer's K, V or Q.

    Attributes:
        scale: fp32 in the shape that is stored (:func:`stored_shape`).
        zero_point: int8 of the same shape, or None for symmetric codes.
        amax: greatest magnitude seen.
        suspects: what looks wrong, a phrase each.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor | None
    amax: float
    suspects: tuple[str, ...] = ()


@dataclass(frozen=True)
class LayerScales:
    """Scales of one attention layer; *name* is its name in the checkpoint, ``….self_attn``."""

    name: str
    number: int
    streams: dict[str, StreamScales] = field(default_factory=dict)


def compute(settings: Settings, observers: Observers) -> dict[str, dict[str, StreamScales]]:
    """layer name -> kind -> scales, in the order the model runs its layers.

    Raises ValueError for layers of which only K or only V was seen.
    """
    layers: dict[str, dict[str, StreamScales]] = {}
    for (layer, kind), observer in observers.items():
        layers.setdefault(layer, {})[kind] = stream_scales(settings, observer, kind)
    for layer, streams in layers.items():
        if not {"k", "v"} <= streams.keys():
            raise ValueError(
                f"{layer}: saw {', '.join(streams)} only; expected K and V of every attention layer"
            )
    return layers


def stream_scales(settings: Settings, observer: Observer, kind: str = "k") -> StreamScales:
    """Scales from what *observer* saw; a query's scales are never finer than per head."""
    settings = settings.of_kind(kind)
    low, high = observer.ranges()
    if kind == "q" and settings.strategy is not Strategy.TENSOR:
        low, high = low.amin(-1, keepdim=True), high.amax(-1, keepdim=True)
    scale, zero = scale_and_zero(low, high, settings)
    scale = _without_zeros(scale)
    head_size = observer.low.shape[1]
    return StreamScales(
        scale=_stored(scale, settings, head_size, kind),
        zero_point=_stored(zero, settings, head_size, kind).to(torch.int8)
        if settings.asymmetric
        else None,
        amax=float(torch.maximum(-observer.low, observer.high).amax()),
        suspects=tuple(suspects(observer, scale, settings)),
    )


def _without_zeros(scale: torch.Tensor) -> torch.Tensor:
    """Units that were always zero get the layer's greatest scale: whatever comes later, fits."""
    usable = scale.isfinite() & (scale > 0) & scale.reciprocal().isfinite()
    if not bool(usable.any()):
        return torch.ones_like(scale)
    return torch.where(usable, scale, scale[usable].amax())


def _stored(x: torch.Tensor, settings: Settings, head_size: int, kind: str) -> torch.Tensor:
    """``[H, units]`` in compressed-tensors' shapes, which broadcast over ``[B, H, T, D]``.

    tensor ``(1,)``, head ``(H, 1, 1)``, channel and group ``(H, 1, D)``; a query's ``(1,)`` or
    ``(H, 1, 1)``.
    """
    if settings.strategy is Strategy.TENSOR:
        return x.flatten()[:1].clone()
    if settings.strategy is Strategy.HEAD or kind == "q":
        return x[:, :1, None].clone()
    return x.repeat_interleave(head_size // x.shape[1], 1)[:, None].contiguous()


def suspects(observer: Observer, scale: torch.Tensor, settings: Settings) -> list[str]:
    """Phrases for what deserves a look: zeros, a huge spread, outlier channels."""
    found = []
    amax = torch.maximum(-observer.low, observer.high)  # [H, D]
    if dead := int((amax == 0).sum()):
        found.append(f"{dead} of {amax.numel()} channels are always zero")
    spread = float(scale.amax() / scale.amin())
    if spread > WIDE_SPREAD:
        found.append(f"scales spread {spread:,.0f}x")
    if settings.strategy is Strategy.CHANNEL:
        return found
    alive = amax[amax > 0]
    median = float(alive.median()) if alive.numel() else 0.0
    worst = amax.flatten().argmax()
    if median and float(amax.flatten()[worst]) > OUTLIER * median:
        head, channel = divmod(int(worst), amax.shape[1])
        count = int((amax > OUTLIER * median).sum())
        ratio = float(amax.flatten()[worst]) / median
        found.append(
            f"{count} outlier channel{'s' * (count > 1)}: head {head} channel {channel} is "
            f"{ratio:.0f}x the median"
        )
    return found
