"""Exact statistics of right and wrong answers."""

from __future__ import annotations

import math

#: Standard normal quantile of a two-sided interval of 95 %.
_Z = 1.959963984540054


def wilson(right: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % confidence interval of the share that *right* of *count* estimates; *right* may
    be a sum of shares."""
    if not 0 <= right <= count or count == 0:
        raise ValueError(f"expected 0 to N right answers of N > 0, got {right} of {count}")
    share, spread = right / count, _Z * _Z / count
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided p of McNemar's exact test: how likely a split of the pairs that differ is at least
    as uneven as *lost* to *gained* where neither is favoured. 1 where no pair differs."""
    count = lost + gained
    tail = sum(math.comb(count, k) for k in range(min(lost, gained) + 1))
    return min(1.0, 2 * tail / 2**count)
