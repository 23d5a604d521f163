"""Interleaved timing, and the read bandwidth that bounds every decode kernel."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from kvq_plugin import _native

PROBE_BYTES = 512 << 20  # far beyond any last-level cache
PROBE = "read probe"


@dataclass(frozen=True)
class Timing:
    """Seconds of each repetition of one candidate."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    repeats: int,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Timing]:
    """Run every candidate once per round, *repeats* rounds after one that is not counted.

    *tick* is called after each round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for round_number in range(repeats + 1):
        for name, run in candidates.items():
            begin = time.perf_counter()
            run()
            taken = time.perf_counter() - begin
            if round_number:
                seconds[name].append(taken)
        if round_number:
            tick()
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def read_probe() -> tuple[Callable[[], object], int]:
    """A callable that reads memory once with torch's threads, and the bytes it reads."""
    _native.load()
    data = torch.ones(PROBE_BYTES, dtype=torch.uint8)
    return lambda: torch.ops.kvq.read_probe(data), PROBE_BYTES
