"""What to calibrate for, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from kvq_plugin.formats import FORMATS, Kind, KVFormat, get_format

#: What ``--scheme`` takes: the formats whose scales come from a checkpoint, one name per code.
SCHEMES = ("int8", "fp8")
OBSERVERS = ("minmax", "average", "percentile", "mse")
#: Of the magnitudes that the percentile observer's range covers, in percent.
PERCENTILE = 99.99
DRIVERS = ("engine", "hf")
DTYPES = ("auto", "bfloat16", "float16", "float32")


class Strategy(Enum):
    """Which elements of a layer's K (or V) share one scale."""

    TENSOR = "tensor"
    HEAD = "head"
    CHANNEL = "channel"
    GROUP = "group"  # neighbouring channels of one head; stored as equal channels

    @property
    def compressed_tensors(self) -> str:
        """The strategy's name in compressed-tensors' schema, by the shape it is stored in."""
        return {"tensor": "tensor", "head": "attn_head"}.get(self.value, "channel")


#: Observer of least perplexity on SmolLM2 calibrated on the built-in text, over two other texts
#: (docs/calibration.md). A scale for many channels gains by clipping the largest; a channel's own
#: does not. For fp8 none matters, and minmax lets nothing saturate.
BEST = {
    Strategy.TENSOR: "mse",
    Strategy.HEAD: "mse",
    Strategy.CHANNEL: "minmax",
    Strategy.GROUP: "minmax",
}


@dataclass(frozen=True)
class Settings:
    """One calibration.

    Attributes:
        scheme: the code the scales are for, one of :data:`SCHEMES`.
        strategy: which elements share a scale; ``group_size`` channels for ``GROUP``, else None.
        observer: one of :data:`OBSERVERS`; None takes the strategy's :data:`BEST`, and says so in
            the attribute.
        percentile: of the magnitudes that the ``percentile`` observer's range covers, in percent;
            None takes :data:`PERCENTILE` for that observer, and stays None for others.
        asymmetric: integer zero points, for integer codes.
        exact: for fp8, scales of amax / 448 as they are, not rounded up to a power of two.
        q_scale, prob_scale: also write scales of the query, and of the softmax's probabilities.
        ignore: numbers of layers that get no scales and stay unquantized.

    Raises ValueError for what cannot be combined.
    """

    scheme: str = "int8"
    strategy: Strategy = Strategy.CHANNEL
    group_size: int | None = None
    observer: str | None = None
    percentile: float | None = None
    asymmetric: bool = False
    exact: bool = False
    q_scale: bool = False
    prob_scale: bool = False
    ignore: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES or FORMATS[self.scheme].is_dynamic:
            raise ValueError(f"scheme {self.scheme!r}: expected one of {', '.join(SCHEMES)}")
        if self.observer is None:
            best = "minmax" if self.is_float else BEST[self.strategy]
            object.__setattr__(self, "observer", best)
        if self.observer not in OBSERVERS:
            raise ValueError(f"observer {self.observer!r}: expected one of {', '.join(OBSERVERS)}")
        if self.exact and not self.is_float:
            raise ValueError(
                f"--exact-scales was asked for {self.scheme}, whose scales are never rounded: drop "
                "it, or use --scheme fp8"
            )
        if self.asymmetric and self.is_float:
            raise ValueError(
                f"asymmetric scales were asked for {self.scheme}, whose codes are floats and have "
                "no zero point: drop --asymmetric, or use --scheme int8"
            )
        if (self.group_size is None) is (self.strategy is Strategy.GROUP):
            raise ValueError(
                "the strategy group needs --group-size, and no other strategy takes it: "
                f"got strategy {self.strategy.value} and group size {self.group_size}"
            )
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group size {self.group_size}: expected at least one channel")
        self._check_percentile()
        if any(layer < 0 for layer in self.ignore):
            raise ValueError(f"ignored layers {sorted(self.ignore)}: expected numbers from 0 on")

    def _check_percentile(self) -> None:
        if self.observer == "percentile" and self.percentile is None:
            object.__setattr__(self, "percentile", PERCENTILE)
        if self.percentile is None:
            return
        if self.observer != "percentile":
            raise ValueError(
                f"percentile {self.percentile:g} was asked for, and the observer {self.observer} "
                "has none: add --observer percentile, or drop --percentile"
            )
        if not 50 < self.percentile <= 100:
            raise ValueError(f"percentile {self.percentile:g}: expected more than 50, up to 100")

    @property
    def format(self) -> KVFormat:
        """The format that serves the result."""
        return get_format(self.scheme)

    @property
    def is_float(self) -> bool:
        """Whether codes are floats."""
        return self.format.key.code.kind is Kind.FLOAT

    @property
    def rounds(self) -> bool:
        """Whether scales are rounded up to powers of two."""
        return self.is_float and not self.exact

    def of_kind(self, kind: str) -> Settings:
        """These for a tensor of *kind* k, v, q or prob: only caches have zero points, so that
        scales of the other two are symmetric whatever K's are."""
        return self if kind in ("k", "v") else replace(self, asymmetric=False)

    def unit(self, head_size: int) -> int:
        """Channels of one head that share a scale. ValueError if they do not divide it."""
        if self.strategy is Strategy.CHANNEL:
            return 1
        if self.strategy is not Strategy.GROUP:
            return head_size
        if head_size % self.group_size:
            raise ValueError(
                f"group size {self.group_size} does not divide the head size {head_size}: use a "
                "divisor, or --strategy channel"
            )
        return self.group_size

    def kv_cache_scheme(self) -> dict:
        """``kv_cache_scheme`` in compressed-tensors' schema (QuantizationArgs)."""
        code = self.format.key.code
        return {
            "num_bits": code.bits,
            "type": "float" if self.is_float else "int",
            "strategy": self.strategy.compressed_tensors,
            "symmetric": not self.asymmetric,
            "dynamic": False,
        }
