"""Which format for each layer: the least sum of divergences within a budget of bytes.

A multiple-choice knapsack, solved exactly by dynamic programming over bytes: sizes are whole bytes
per token, so SmolLM2's 30 layers of up to 768 bytes are 23,040 sums, and a model of 80 layers with
8 kv heads of 128 has 0.3 million; every one is a number in a vector operation. No solver is needed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from kvq_plugin.formats import SERVED
from kvq_plugin.mapping import PLAIN, bits, bytes_per_token

_BITS = re.compile(r"(\d+(?:\.\d+)?)\s*(?:bits?)?")
_MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?i?B)", re.I)
_UNITS = {"b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_UNITS |= {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


@dataclass(frozen=True)
class Shape:
    """What decides how large a layer's KV cache is: kv heads, head size, bytes of a plain value."""

    number: int
    kv_heads: int
    head_size: int
    itemsize: int = 2

    def bytes(self, name: str) -> int:
        """Bytes per token of KV cache *name*."""
        return self.kv_heads * bytes_per_token(name, self.head_size, self.itemsize)


@dataclass(frozen=True)
class Choice:
    """A name for each layer, in order; *kl* is the sum of what they cost, *size* bytes a token."""

    names: tuple[str, ...]
    kl: float
    size: int


def parse_bits(text: str) -> float:
    """``4.0bits`` -> 4.0. ValueError otherwise."""
    match = _BITS.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"--budget {text!r}: expected bits per value, such as 4.0bits")
    return _finite(float(match[1]), "--budget", text)


def parse_memory(text: str) -> int:
    """``1GiB`` -> bytes. ValueError otherwise."""
    match = _MEMORY.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"--memory {text!r}: expected a number and a unit, such as 1GiB or 512MiB")
    return int(_finite(float(match[1]) * _UNITS[match[2].lower()], "--memory", text))


def _finite(size: float, option: str, text: str) -> float:
    """*size*, which *option* asked for by *text*. ValueError for more than a float holds."""
    if not math.isfinite(size):
        shown = text if len(text) <= 30 else f"{text[:27]}..."
        raise ValueError(f"{option} {shown} is beyond all numbers: expected less")
    return size


def average_bits(size: float, shapes: Sequence[Shape]) -> float:
    """*size* bytes per token of all layers, as bits per value of K and V."""
    values = sum(s.kv_heads * s.head_size for s in shapes)
    return bits(size, values)


def budget_bytes(asked: float, shapes: Sequence[Shape]) -> int:
    """The inverse: whole bytes per token that average to *asked* bits at most."""
    size = asked / 8 * 2 * sum(s.kv_heads * s.head_size for s in shapes) + 1e-9
    return int(_finite(size, "--budget", f"{asked:g}"))


def require_range(size: int, shapes: Sequence[Shape], formats: Sequence[str]) -> None:
    """Raise ValueError, which names the range, unless *size* bytes per token are at least what the
    smallest format takes in every layer and at most what the largest does."""
    least = sum(min(s.bytes(name) for name in formats) for s in shapes)
    most = sum(max(s.bytes(name) for name in formats) for s in shapes)
    if not least <= size <= most:
        raise ValueError(
            f"a budget of {average_bits(size, shapes):.3f} bits ({size:,} bytes a token) is "
            f"{'below the smallest' if size < least else 'above the largest'} of these formats: "
            f"expected {average_bits(least, shapes):.3f} to {average_bits(most, shapes):.3f} bits "
            f"({least:,} to {most:,} bytes a token) for {', '.join(formats)}"
        )


def require_served(shapes: Sequence[Shape], formats: Sequence[str]) -> None:
    """Raise ValueError, which names those that do, unless all *formats* serve every layer's heads,
    and there are layers."""
    if not shapes:
        raise ValueError(
            "every layer of the model has a sliding window, which bounds what its KV cache takes: "
            "expected layers that attend to everything; use --kv-cache-dtype int8_per_token_head"
        )
    steps = {name: 1 if name == PLAIN else SERVED[name].head_size_step for name in formats}
    for shape in shapes:
        unfit = [name for name in formats if shape.head_size % steps[name]]
        if unfit:
            fit = [name for name in formats if name not in unfit]
            remedy = "use --kv-cache-dtype auto"
            if len(fit) > 1:
                remedy = f"pass --formats {','.join(fit)}"
            raise ValueError(
                f"layer {shape.number} has heads of {shape.head_size}, which {', '.join(unfit)} "
                f"cannot have: expected a multiple of {max(steps[n] for n in unfit)}; {remedy}"
            )


class Allocation:
    """All budgets at once: :meth:`within` answers each.

    Args:
        shapes: the layers, in order.
        costs: for each of them, name of a format -> its divergence there.
    """

    def __init__(self, shapes: Sequence[Shape], costs: Sequence[Mapping[str, float]]) -> None:
        self.shapes, self.costs = list(shapes), [dict(cost) for cost in costs]
        self.most = sum(max(map(s.bytes, c)) for s, c in zip(shapes, costs, strict=True))
        best = torch.zeros(self.most + 1, dtype=torch.float64)  # by bytes that may be used
        self._taken: list[torch.Tensor] = []
        for shape, cost in zip(self.shapes, self.costs, strict=True):
            options = torch.full((len(cost), self.most + 1), torch.inf, dtype=torch.float64)
            for row, (name, kl) in enumerate(cost.items()):
                size = shape.bytes(name)
                options[row, size:] = best[: self.most + 1 - size] + kl
            best, taken = options.min(0)
            self._taken.append(taken.to(torch.uint8))
        self._best = best

    def within(self, size: int) -> Choice:
        """The least sum of divergences in *size* bytes per token, and the layers' names for it.

        Raises ValueError where not even the smallest formats fit.
        """
        left = min(size, self.most)
        if left < 0 or torch.isinf(self._best[left]):
            require_range(size, self.shapes, list(self.costs[0]))
        names: list[str] = []
        for shape, cost, taken in zip(
            reversed(self.shapes), reversed(self.costs), reversed(self._taken), strict=True
        ):
            names.append(list(cost)[int(taken[left])])
            left -= shape.bytes(names[-1])
        names.reverse()
        kl = sum(c[n] for c, n in zip(self.costs, names, strict=True))
        used = sum(s.bytes(n) for s, n in zip(self.shapes, names, strict=True))
        return Choice(tuple(names), kl, used)

    def frontier(self) -> list[tuple[float, float]]:
        """(bits, divergence) wherever another byte a token makes the sum smaller."""
        points, least = [], float("inf")
        for size, kl in enumerate(self._best.tolist()):
            if kl < least:
                least = kl
                points.append((average_bits(size, self.shapes), kl))
        return points
