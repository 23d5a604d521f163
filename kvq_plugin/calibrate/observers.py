"""Observers: streaming statistics of one layer's K, V or Q, and the range they choose.

An observer sees every activation once and keeps only what its method needs: no activation is
stored. It never reduces over heads while observing, so that what the ranks of a
tensor-parallel run saw can be joined; :meth:`Observer.ranges` does that last.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch

from kvq_plugin.calibrate.settings import Settings, Strategy
from kvq_plugin.formats import Code
from kvq_plugin.reference import decode, encode

#: Weight of a new batch in a moving average, as in torch.ao's MovingAverageMinMaxObserver.
AVERAGING = 0.01
BINS = 2048
#: Shares of the full range that the MSE observer tries.
SHRINKS = tuple(1 - 0.02 * i for i in range(36))
_TINY = 2.0**-40  # half-width of a histogram that has seen zeros only


def as_tokens(x: torch.Tensor) -> torch.Tensor:
    """fp32 ``[T, H, D]`` of ``[T, H, D]`` or of a transformers cache's ``[B, H, T, D]``.

    ValueError for any other number of dimensions.
    """
    if x.dim() == 4:
        x = x.transpose(1, 2).flatten(0, 1)
    if x.dim() != 3:
        raise ValueError(
            "expected [tokens, heads, head size] or [batch, heads, tokens, head size], "
            f"got {list(x.shape)}"
        )
    return x.detach().float()


class Observer(ABC):
    """Statistics of one tensor: least and greatest value per channel, and a subclass's own.

    Attributes:
        settings: what the ranges are for.
        low, high: ``[H, D]`` fp32; +inf and -inf before the first token.
        tokens: rows seen. broken: how many of the values were NaN or infinite; rows of a batch
            with such values change nothing else.
    """

    #: Tensors with a leading head dimension that make up the state, beside low and high.
    _STATE: tuple[str, ...] = ()

    def __init__(self, settings: Settings, heads: int, head_size: int) -> None:
        self.settings = settings
        self.unit = settings.unit(head_size)
        self.low = torch.full((heads, head_size), float("inf"))
        self.high = torch.full((heads, head_size), float("-inf"))
        self.tokens = 0
        self.broken = 0

    def observe(self, x: torch.Tensor) -> None:
        """Take in one batch, ``[T, H, D]`` or ``[B, H, T, D]`` of any float dtype."""
        x = as_tokens(x)
        if x.shape[1:] != self.low.shape:
            raise ValueError(
                f"expected {list(self.low.shape)} heads and channels, got {list(x.shape[1:])}"
            )
        if not x.shape[0]:
            return
        low, high = x.amin(0), x.amax(0)  # a NaN reaches both
        if not bool((low.isfinite() & high.isfinite()).all()):
            self.broken += int((~x.isfinite()).sum())
            return
        if self.low.device != x.device:
            self._move(x.device)
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        self.tokens += x.shape[0]
        self._update(x, low, high)

    @abstractmethod
    def _update(self, x: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> None:
        """Take in a sound batch ``[T, H, D]`` and its extremes ``[H, D]``."""

    def _move(self, device: torch.device) -> None:
        for name in ("low", "high", *self._STATE):
            setattr(self, name, getattr(self, name).to(device))

    def ranges(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Low and high end of the range to represent, per unit: fp32 ``[H, D / unit]``.

        For the strategy tensor all units are equal. ValueError when nothing was observed.
        """
        if not self.tokens:
            raise ValueError("no activation was observed")
        low, high = self._ranges()
        if self.settings.strategy is Strategy.TENSOR:
            low, high = low.amin().expand_as(low), high.amax().expand_as(high)
        return low, high

    @abstractmethod
    def _ranges(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Range per unit, ``[H, D / unit]``."""

    def _per_unit(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., H, D]`` -> ``[..., H, D / unit, unit]``."""
        return x.unflatten(-1, (-1, self.unit))

    def state(self) -> dict[str, torch.Tensor]:
        """Everything :meth:`joined` needs, as tensors on the CPU."""
        state = {name: getattr(self, name).cpu() for name in ("low", "high", *self._STATE)}
        return state | {"tokens": torch.tensor(self.tokens), "broken": torch.tensor(self.broken)}

    @classmethod
    def joined(cls, settings: Settings, states: Sequence[Mapping[str, torch.Tensor]]) -> Observer:
        """One observer of all heads from the states of consecutive parts of the heads."""
        heads = sum(s["low"].shape[0] for s in states)
        whole = cls(settings, heads, states[0]["low"].shape[1])
        for name in ("low", "high", *cls._STATE):
            setattr(whole, name, torch.cat([s[name] for s in states]))
        whole.tokens = int(states[0]["tokens"])
        whole.broken = sum(int(s["broken"]) for s in states)
        return whole


class MinMax(Observer):
    """The extremes of everything seen: nothing seen in calibration is ever clipped."""

    def _update(self, x: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> None:
        pass  # low and high say it all

    def _ranges(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._per_unit(self.low).amin(-1), self._per_unit(self.high).amax(-1)


class MovingAverage(Observer):
    """Exponential moving average of each batch's extremes; a batch is one sample.

    Method and constant of torch.ao.quantization's MovingAverageMinMaxObserver.
    """

    _STATE = ("average_low", "average_high")

    def __init__(self, settings: Settings, heads: int, head_size: int) -> None:
        super().__init__(settings, heads, head_size)
        self.average_low = torch.zeros(heads, head_size // self.unit)
        self.average_high = torch.zeros(heads, head_size // self.unit)

    def _update(self, x: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> None:
        low, high = self._per_unit(low).amin(-1), self._per_unit(high).amax(-1)
        weight = 1.0 if self.tokens == x.shape[0] else AVERAGING
        self.average_low = self.average_low.lerp(low, weight)
        self.average_high = self.average_high.lerp(high, weight)

    def _ranges(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.average_low, self.average_high


class Histogram(Observer):
    """Base of observers that need the distribution: :data:`BINS` bins per unit.

    Bins divide ``[-width, width]`` evenly, and width is a power of two per unit. A value beyond
    doubles it, which merges bins in pairs: no count ever moves by less than a bin, and the
    result does not depend on the order of the batches.

    Counts are int32: enough for 2**31 / D tokens, 16 million at D = 128.
    """

    _STATE = ("counts", "width")

    def __init__(self, settings: Settings, heads: int, head_size: int) -> None:
        super().__init__(settings, heads, head_size)
        units = head_size // self.unit
        self.counts = torch.zeros(heads, units, BINS, dtype=torch.int32)
        self.width = torch.full((heads, units), _TINY)

    def _update(self, x: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> None:
        peak = self._per_unit(torch.maximum(-low, high)).amax(-1)
        if self.tokens == x.shape[0]:  # the first batch: nothing to merge
            width = torch.ldexp(torch.ones_like(peak), torch.frexp(peak).exponent)
            self.width = torch.where(peak < _TINY, _TINY, width)
        self.counts, self.width = _widened(self.counts, self.width, peak)
        heads, units = self.width.shape
        per_unit = self._per_unit(x)  # [T, H, units, unit]
        place = (
            (per_unit * (BINS / 2 / self.width)[..., None] + BINS / 2).long().clamp_(0, BINS - 1)
        )
        place += (torch.arange(heads * units, device=x.device) * BINS).view(heads, units, 1)
        seen = torch.bincount(place.flatten(), minlength=heads * units * BINS)
        self.counts += seen.view_as(self.counts)

    def _distribution(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Counts ``[H, units, BINS]`` and width ``[H, units]``; one head for strategy tensor."""
        counts, width = self.counts, self.width
        if self.settings.strategy is Strategy.TENSOR:
            # Just below the greatest width: widening goes on until it is greater.
            widest = width.amax()
            counts, width = _widened(counts, width, (widest * 0.75).expand_as(width))
            counts, width = counts.long().sum((0, 1), keepdim=True), width[:1, :1]
        return counts, width

    def _extremes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Least and greatest value, in the shape of :meth:`_distribution`'s width."""
        low, high = self._per_unit(self.low).amin(-1), self._per_unit(self.high).amax(-1)
        if self.settings.strategy is Strategy.TENSOR:
            return low.amin().view(1, 1), high.amax().view(1, 1)
        return low, high

    def _ranges(self) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = self._clipped(*self._distribution(), *self._extremes())
        return low.expand_as(self.width), high.expand_as(self.width)

    @abstractmethod
    def _clipped(
        self, counts: torch.Tensor, width: torch.Tensor, low: torch.Tensor, high: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The range to keep of ``[low, high]``; all but counts ``[H, units]``."""


def _widened(
    counts: torch.Tensor, width: torch.Tensor, peak: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """*counts* and *width* after doubling each width until it is greater than *peak*."""
    counts, width = counts.clone(), width.clone()
    quarter = BINS // 4
    while bool((grow := peak >= width).any()):
        inner = counts[grow].unflatten(-1, (-1, 2)).sum(-1, dtype=counts.dtype)
        counts[grow] = torch.nn.functional.pad(inner, (quarter, quarter))
        width[grow] *= 2
    return counts, width


class Percentile(Histogram):
    """The range that ``settings.percentile`` % of the values lie in.

    Symmetric: of their magnitudes. Asymmetric: half of the rest is cut off at either end.
    """

    def _clipped(self, counts, width, low, high):
        share = self.settings.percentile / 100
        if not self.settings.asymmetric:
            half = counts[..., BINS // 2 :] + counts[..., : BINS // 2].flip(-1)
            amax = torch.minimum(_quantile(half, share) * width, torch.maximum(-low, high))
            return -amax, amax
        tail = (1 - share) / 2
        ends = [(_quantile(counts, s) * 2 - 1) * width for s in (tail, 1 - tail)]
        return torch.maximum(ends[0], low), torch.minimum(ends[1], high)


def _quantile(counts: torch.Tensor, share: float) -> torch.Tensor:
    """Where *share* of the counts ``[..., n]`` lies below, from 0 to 1 along the bins."""
    total = counts.double().cumsum(-1)
    wanted = total[..., -1:] * share
    index = torch.searchsorted(total, wanted).clamp_(max=counts.shape[-1] - 1)
    inside = counts.gather(-1, index).double()
    before = total.gather(-1, index) - inside
    return ((index + (wanted - before) / inside.clamp(min=1)) / counts.shape[-1])[..., 0].float()


class MSE(Histogram):
    """The range, of :data:`SHRINKS` times the full one, with the least mean squared error.

    The error is that of the actual codes on the centres of the histogram's bins, as
    llm-compressor's and torchao's MSE observers search on raw values.
    """

    def _clipped(self, counts, width, low, high):
        centre = ((torch.arange(BINS, device=width.device) + 0.5) * (2 / BINS) - 1) * width[
            ..., None
        ]
        best = [torch.full_like(width, float("inf")), low, high]
        for shrink in SHRINKS:
            tried = low * shrink, high * shrink
            scale, zero = scale_and_zero(*tried, self.settings)
            error = _round_trip(centre, scale[..., None], zero[..., None], self.settings) - centre
            cost = (counts * error.square()).sum(-1)
            better = cost < best[0]
            best = [torch.where(better, *p) for p in zip((cost, *tried), best, strict=True)]
        return best[1], best[2]


def _round_trip(x, scale, zero, settings: Settings) -> torch.Tensor:
    code: Code = settings.format.key.code
    return (decode(encode(x / scale + zero, code), code) - zero) * scale


def scale_and_zero(
    low: torch.Tensor, high: torch.Tensor, settings: Settings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point (the integer code that decodes to 0) for ranges ``[low, high]``.

    Symmetric: amax / qmax, that is amax / 127 for int8 and amax / 448 for fp8, and 0; fp8's is
    rounded up to a power of two unless ``settings.exact``. Asymmetric: the range is widened to
    hold 0, as compressed-tensors does, so that the zero point is a code. Ranges of zero width get
    a scale of 0, which is not one to store.
    """
    qmax = settings.format.key.code.qmax
    if not settings.asymmetric:
        scale = torch.maximum(-low, high) / qmax
        return power_of_two(scale) if settings.rounds else scale, torch.zeros_like(low)
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    scale = (high - low) / (2 * qmax)
    steps = low / torch.where(scale > 0, scale, 1.0)
    return scale, (-qmax - steps).round().clamp(-qmax, qmax)


def power_of_two(scale: torch.Tensor) -> torch.Tensor:
    """*scale* rounded up to a power of two; 0 stays 0.

    bf16 and e4m3 have binary exponents, so that such a scale changes no mantissa: codes are as
    exact as with scale 1.0, and the range follows the data. A scale between two powers rounds
    every value anew, which costs +1.8 % of perplexity where these cost +1.3 %
    (docs/calibration.md).
    """
    mantissa, exponent = torch.frexp(scale)  # in [0.5, 1) or 0
    up = torch.ldexp(torch.ones_like(scale), exponent)
    return torch.where(mantissa > 0.5, up, scale)


_OBSERVERS: dict[str, type[Observer]] = {
    "minmax": MinMax,
    "average": MovingAverage,
    "percentile": Percentile,
    "mse": MSE,
}


def observer_class(settings: Settings) -> type[Observer]:
    """The class of ``settings.observer``."""
    return _OBSERVERS[settings.observer]


class Observers:
    """The observers of one calibration: one per (layer name, kind of tensor).

    Kinds are ``k``, ``v`` and ``q``. Nothing outlives the object; a new run makes a new one.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._all: dict[tuple[str, str], Observer] = {}

    def observe(self, layer: str, kind: str, x: torch.Tensor) -> None:
        """Hand *x* to its observer, which the first call makes."""
        key = layer, kind
        if key not in self._all:
            _, heads, head_size = as_tokens(x).shape
            settings = self.settings.of_kind(kind)
            self._all[key] = observer_class(settings)(settings, heads, head_size)
        self._all[key].observe(x)

    def broken(self) -> list[tuple[str, str, int]]:
        """(layer, kind, number of values) wherever NaN or infinity was seen, in layer order."""
        return [(*key, o.broken) for key, o in self._all.items() if o.broken]

    def items(self) -> list[tuple[tuple[str, str], Observer]]:
        """((layer, kind), observer), in the order the model runs its layers."""
        return list(self._all.items())

    def add(self, layer: str, kind: str, observer: Observer) -> None:
        """Put in an observer that was filled elsewhere."""
        self._all[layer, kind] = observer
