"""How far next-token distributions are from the unquantized cache's, token by token.

What :mod:`kvq_plugin.logits` computes inside an engine, and the figures made of it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which *percent* of *values* lie, between two of them by proportion."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


@dataclass(frozen=True)
class Divergence:
    """Next-token distributions against the reference's, an entry per scored token of a text.

    Attributes:
        kl: sum of p log(p / q) in nats, p being the reference's distribution.
        tv: total variation, half the sum of |p - q|: 0 to 1.
        same: whether both find the same token most likely.
    """

    kl: tuple[float, ...]
    tv: tuple[float, ...]
    same: tuple[bool, ...]

    @property
    def mean(self) -> float:
        """Mean KL divergence in nats per token."""
        return statistics.fmean(self.kl)

    @property
    def error(self) -> float:
        """Standard error of :attr:`mean`."""
        return statistics.stdev(self.kl) / math.sqrt(len(self.kl))

    @property
    def top1(self) -> float:
        """Part of the tokens for which both find the same token most likely."""
        return statistics.fmean(self.same)

    def is_at(self, floor: Divergence) -> bool:
        """Whether it is no larger than *floor*, measured on the first of the same tokens, there.

        The rest of the text may be easier or harder, which says nothing of either.
        """
        return statistics.fmean(self.kl[: len(floor.kl)]) <= floor.mean

    def summary(self) -> dict[str, float]:
        """The figures of tables and reports; ``kl`` in nats per token."""
        tails = {f"kl_p{p:g}": percentile(self.kl, p) for p in (50, 99, 99.9)}
        return {
            "kl": self.mean,
            "kl_error": self.error,
            **tails,
            "tv": statistics.fmean(self.tv),
            "top1": self.top1,
        }
