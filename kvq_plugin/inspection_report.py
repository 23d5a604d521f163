"""What ``kvq inspect`` prints and plots."""

from __future__ import annotations

import os
from itertools import takewhile
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from kvq_plugin.disk import room_for
from kvq_plugin.formats import SERVED, KVFormat
from kvq_plugin.inspection import (
    Checkpoint,
    Layer,
    automatic,
    mixed,
    read,
    scales_format,
    verdict,
)
from kvq_plugin.mapping import MIXED, bits, bytes_per_token, compact
from kvq_plugin.serving.scales.declared import LIKELY_REACH
from kvq_plugin.tables import print_table

#: A scale this many times the layer's median is one channel (or head) running away: the others
#: would be left with a tenth of the codes if it set the scale for all.
OUTLIER = 10.0


def run(path: str, plot: Path | None = None, console: Console | None = None) -> None:
    """Print the report on the checkpoint at *path*, and write *plot* (PNG) when given.

    Raises ValueError when serving would refuse the scales, after printing everything.
    """
    console = console or Console()
    if plot is not None:
        _check_plot(plot)
    checkpoint = read(path)
    if plot is not None and not checkpoint.layers:
        raise ValueError(f"{path} has no KV scales to plot; `kvq calibrate` adds them")
    _summary(checkpoint, console)
    if checkpoint.layers:
        print_table(console, scales_table(checkpoint))
    if checkpoint.mapping is not None:
        print_table(console, mapping_table(checkpoint))
    print_table(console, dtypes_table(checkpoint))
    for problem in checkpoint.problems:
        console.print(f"[red]problem:[/] {problem}", soft_wrap=True, highlight=False)
    if plot is not None:
        _plot(checkpoint, plot)
        console.print(f"plot: {plot}")
    if checkpoint.problems:
        raise ValueError(
            f"{len(checkpoint.problems)} problem(s) with the KV scales of {path}, listed above"
        )


def _check_plot(file: Path) -> None:
    """ValueError when no plot can be written to *file*: before the report."""
    if file.suffix.lower() != ".png":
        raise ValueError(f"--plot {file}: expected a name that ends in .png")
    folder = file.resolve().parent
    if file.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        what = "it is a directory" if file.is_dir() else f"{folder} is no directory to write to"
        raise ValueError(f"--plot {file}: expected a file to write, and {what}: name another")


def _summary(checkpoint: Checkpoint, console: Console) -> None:
    g, scheme = checkpoint.geometry, checkpoint.scheme
    keys = sum(len(set(layer.keys.values())) for layer in checkpoint.layers)
    spelt = f", spelt as by {', '.join(checkpoint.origins)}" if checkpoint.origins else ""
    lines = {
        "checkpoint": checkpoint.folder,
        "attention": f"{g.heads} query heads, {g.kv_heads} kv heads, head size {g.head_size}",
        "weights": checkpoint.weights or "not quantized",
        "KV scheme": scheme or "none declared",
        "KV scales": f"{keys} tensors in {len(checkpoint.layers)} layers{spelt}"
        if keys
        else "none",
    }
    for name, value in lines.items():
        console.print(f"{name:<11} {value}", highlight=False, markup=False, soft_wrap=True)


def scales_table(checkpoint: Checkpoint) -> Table:
    """A row per layer: granularity and range of K's and V's scales, q, prob, remarks."""
    table = Table(title="KV scales", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("layer", justify="right")
    for name in ("K", "V"):
        table.add_column(name, no_wrap=True)
        for column in ("min", "median", "max"):
            table.add_column(column, justify="right", no_wrap=True)
    table.add_column("q", justify="right")
    table.add_column("prob", justify="right")
    table.add_column("remarks")
    format = scales_format(checkpoint.scheme) or SERVED["int8"]  # whose codes reach least far
    for layer in checkpoint.layers:
        number = layer.owner if layer.number is None else str(layer.number)
        cells = [*_cells(layer.values.get("k_scale")), *_cells(layer.values.get("v_scale"))]
        single = [_largest(layer, name) for name in ("q_scale", "prob_scale")]
        table.add_row(number, *cells, *single, remarks(layer, format))
    return table


def remarks(layer: Layer, format: KVFormat) -> str:
    """What stands out in a layer's scales for codes of *format*: defaults, outliers, what no
    model's numbers are like, zero points."""
    found = []
    codes = {"K": format.key.code, "V": format.value.code}
    for name, code in codes.items():
        value = layer.values.get(f"{name.lower()}_scale")
        if value is None:
            found.append(f"no {name}")
        elif value.dim() == 0 and value.item() == 1:
            found.append(f"{name} is 1: uncalibrated?")
        else:
            if outliers := int((value > OUTLIER * value.median()).sum()):
                found.append(f"{name}: {outliers} beyond {OUTLIER:g}x the median")
            reach = value.max().item() * code.qmax
            if not LIKELY_REACH[0] < reach < LIKELY_REACH[1]:
                found.append(f"{name}: largest code stands for {reach:.3g}: of another model?")
        if f"{name.lower()}_zero_point" in layer.values:
            found.append(f"{name} asymmetric")
    return "; ".join(found)


def _cells(value: torch.Tensor | None) -> list[str]:
    if value is None:
        return ["-", "", "", ""]
    form = ("tensor", "head", "channel")[value.dim()]
    return [form, *(f"{x.item():.4g}" for x in (value.min(), value.median(), value.max()))]


def _largest(layer: Layer, name: str) -> str:
    value = layer.values.get(name)
    return "-" if value is None else f"{value.max().item():.4g}"


def mapping_table(checkpoint: Checkpoint) -> Table:
    """A row per run of layers with one KV cache: bytes per token and bits; then all of them."""
    names = checkpoint.mapping
    shapes = [checkpoint.geometry_of(number) for number in range(len(names))]
    table = Table(title="KV cache of each layer", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("layers", justify="right")
    table.add_column("KV cache", no_wrap=True)
    table.add_column("cost", justify="right", no_wrap=True)
    table.add_column("bits", justify="right")

    def cells(begin: int, end: int) -> tuple[str, str]:
        held = list(zip(names[begin:end], shapes[begin:end], strict=True))
        size = sum(g.kv_heads * bytes_per_token(name, g.head_size) for name, g in held)
        values = sum(g.kv_heads * g.head_size for _, g in held)
        return f"{size:,} bytes a token", f"{bits(size, values):.3f}"

    begin = 0
    for layers, name in compact(names).items():
        end = begin + sum(1 for _ in takewhile(lambda n, x=name: n == x, names[begin:]))
        table.add_row(layers, name, *cells(begin, end))
        begin = end
    table.add_section()
    table.add_row("all", MIXED, *cells(0, len(names)))
    return table


def dtypes_table(checkpoint: Checkpoint) -> Table:
    """A row per ``--kv-cache-dtype``: whether it serves this checkpoint, and with which scales."""
    table = Table(title="What each KV cache does with them", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("--kv-cache-dtype", no_wrap=True)
    table.add_column("serves", justify="center")
    table.add_column("scales")
    rows = {"auto": automatic(checkpoint)}
    if checkpoint.mapping is not None:
        rows[MIXED] = mixed(checkpoint)
    rows |= {name: verdict(checkpoint, name, format) for name, format in SERVED.items()}
    for name, (serves, how) in rows.items():
        table.add_row(name, "yes" if serves else "no", how)
    return table


def _plot(checkpoint: Checkpoint, file: Path) -> None:
    """Scales over layers, K above V: median, and the range over heads or channels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, axes = pyplot.subplots(2, 1, sharex=True, figsize=(9, 6), layout="constrained")
    for axis, name in zip(axes, "kv", strict=True):
        layers = [x for x in checkpoint.layers if x.values.get(f"{name}_scale") is not None]
        values = [layer.values.get(f"{name}_scale") for layer in layers]
        x = [i if layer.number is None else layer.number for i, layer in enumerate(layers)]
        low, middle, high = (
            [pick(v).item() for v in values] for pick in (torch.min, torch.median, torch.max)
        )
        axis.fill_between(x, low, high, alpha=0.3, label="range over heads or channels")
        axis.plot(x, middle, marker=".", label="median")
        axis.set_ylabel(f"{name.upper()} scale")
        axis.grid(alpha=0.3)
        if values:
            axis.set_yscale("log")
            axis.legend()
    axes[-1].set_xlabel("layer")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(f"KV scales of {checkpoint.folder.name}")
    scratch = file.with_name(f".{file.name}.part")
    try:
        with room_for(f"the plot {file}", "name another file with --plot"):
            figure.savefig(scratch, dpi=120, format="png")
            scratch.rename(file)
    finally:
        pyplot.close(figure)
        scratch.unlink(missing_ok=True)
