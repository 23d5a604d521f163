"""What ``kvq allocate`` leaves: a checkpoint with the mapping, the figures, a table and a plot."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from kvq_plugin.allocate.solve import Allocation, Choice, average_bits
from kvq_plugin.calibrate.checkpoint import CONFIG, Source
from kvq_plugin.calibrate.output import FIGURES, PLOT, Target, copy_rest, put, write_json
from kvq_plugin.mapping import LAYERS, MIXED, PLAIN, SECTION, SLIDING, compact, ranges

#: Of layers with a sliding window, whose rows the window bounds whatever they take.
SLIDING_NAME = "int8_per_token_head"


@dataclass(frozen=True)
class Found:
    """One allocation.

    Attributes:
        allocation, choice: the solved problem and its answer.
        uniform: divergence of each format in all layers, as measured.
        measured: divergence of the choice in all layers at once, by the same engine and windows.
        verified: divergence through a served engine, by text; empty where it was not asked for.
        total_layers: of the model, those with a sliding window included.
    """

    allocation: Allocation
    choice: Choice
    uniform: Mapping[str, float]
    measured: float
    verified: Mapping[str, float]
    total_layers: int

    @property
    def bits(self) -> float:
        """Bits per value of K and V, averaged over the layers that were allocated."""
        return average_bits(self.choice.size, self.allocation.shapes)

    def uniform_bits(self, name: str) -> float:
        """Bits per value with format *name* in all of those layers."""
        shapes = self.allocation.shapes
        return average_bits(sum(s.bytes(name) for s in shapes), shapes)

    @property
    def best_uniform(self) -> str | None:
        """The format that costs least of those that take no more bytes; None where none does."""
        fitting = [n for n in self.uniform if self.uniform_bits(n) <= self.bits + 1e-9]
        return min(fitting, key=lambda n: self.uniform[n], default=None)

    def mapping(self) -> dict[str, str]:
        """The mapping of the checkpoint."""
        numbered = {
            s.number: n for s, n in zip(self.allocation.shapes, self.choice.names, strict=True)
        }
        if len(numbered) == self.total_layers:
            return compact(self.choice.names)
        names = {str(number): name for number, name in numbered.items()}
        return names | {SLIDING: SLIDING_NAME}

    def figures(self) -> dict[str, Any]:
        """All of it as JSON takes it."""
        shapes, costs = self.allocation.shapes, self.allocation.costs
        return {
            "mapping": self.mapping(),
            "bits": self.bits,
            "bytes_per_token": self.choice.size,
            "kl": {
                "predicted": self.choice.kl,
                "measured": self.measured,
                "served": dict(self.verified),
            },
            "uniform": {
                name: {"bits": self.uniform_bits(name), "kl": kl}
                for name, kl in self.uniform.items()
            },
            "frontier": self.allocation.frontier(),
            "sensitivity": {str(s.number): c for s, c in zip(shapes, costs, strict=True)},
        }


def require_free(target: Target, source: Source) -> None:
    """ValueError when the output cannot be written there: before minutes of measuring."""
    target.check(source, "kvq allocate", FIGURES)


def write(source: Source, target: Target, mapping: Mapping[str, str], found: Found | None) -> None:
    """Write *source* with *mapping* to *target*, and the figures and plot of *found*."""
    with target.being_written("kvq allocate", FIGURES) as folder:
        others = (file.name for file in source.folder.glob("*.safetensors"))
        for name in sorted({*source.shards, *others}):  # shards may lie in folders below
            put(source.folder / name, folder / name, None, target)
        config = copy.deepcopy(source.config)
        config[SECTION] = {**(config.get(SECTION) or {}), LAYERS: dict(mapping)}
        write_json(folder / CONFIG, config)
        if found is not None:
            write_json(folder / FIGURES, found.figures())
            plot(found, folder / PLOT)
        copy_rest(source, folder, (FIGURES, PLOT))  # of an earlier mapping


def table(found: Found) -> Table:
    """A row per layer: what each format costs there, the chosen one marked."""
    shapes, costs = found.allocation.shapes, found.allocation.costs
    names = [name for name in costs[0] if name != PLAIN]
    out = Table(title="KL by layer, 1e-5 nats", box=box.SIMPLE_HEAD, pad_edge=False)
    out.add_column("layer", justify="right")
    for name in names:
        out.add_column(name, justify="right", no_wrap=True)
    out.add_column("chosen", no_wrap=True)
    for shape, cost, chosen in zip(shapes, costs, found.choice.names, strict=True):
        cells = [f"{1e5 * cost[name]:.1f}" for name in names]
        out.add_row(str(shape.number), *cells, chosen)
    return out


def summary(found: Found) -> list[str]:
    """What was found, in sentences."""
    lines = [
        f"{MIXED}: {found.bits:.3f} bits a value, {found.choice.size:,} bytes a token: "
        + "; ".join(f"{n} in {r}" for n, r in _by_format(found).items()),
        f"KL: {found.choice.kl:.5f} predicted, {found.measured:.5f} measured with all layers "
        f"quantized ({_off(found.choice.kl, found.measured)})",
    ]
    if (best := found.best_uniform) is not None:
        lines.append(
            f"Best format for all layers in no more bits: {best} ({found.uniform_bits(best):.3f} "
            f"bits), KL {found.uniform[best]:.5f}: the mapping's is "
            f"{found.measured / max(found.uniform[best], 1e-12):.2f}x"
        )
    for text, kl in found.verified.items():
        lines.append(f"KL {kl:.5f} through a served engine, on {text}, not used for allocating")
    return lines


def _by_format(found: Found) -> dict[str, str]:
    numbers: dict[str, list[int]] = {}
    for shape, name in zip(found.allocation.shapes, found.choice.names, strict=True):
        numbers.setdefault(name, []).append(shape.number)
    return {name: ranges(of) for name, of in numbers.items()}


def _off(predicted: float, measured: float) -> str:
    return "nothing to compare" if not measured else f"{100 * (predicted / measured - 1):+.0f} %"


def plot(found: Found, file: Path) -> None:
    """Sensitivity per layer above the frontier, as PNG. Does nothing without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(9, 8), layout="constrained")
    shapes, costs = found.allocation.shapes, found.allocation.costs
    numbers = [shape.number for shape in shapes]
    for name in costs[0]:
        if name != PLAIN:
            above.plot(numbers, [cost[name] for cost in costs], marker=".", label=name)
    above.set(xlabel="layer", ylabel="KL of that layer alone, nats", yscale="log")
    points: Sequence[tuple[float, float]] = [p for p in found.allocation.frontier() if p[1] > 0]
    below.step(*zip(*points, strict=True), where="post", label="mappings, predicted")
    for name, kl in found.uniform.items():
        if kl > 0:
            below.plot(found.uniform_bits(name), kl, "s", label=f"{name} in all layers")
    below.plot(found.bits, found.measured, "*", markersize=14, label="this mapping, measured")
    below.set(xlabel="bits per value of K and V", ylabel="KL, nats", yscale="log")
    for axis in (above, below):
        axis.grid(alpha=0.3)
        axis.legend()
    try:
        figure.savefig(file, dpi=120, format="png")
    finally:
        pyplot.close(figure)
