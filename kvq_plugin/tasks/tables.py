"""The tables that ``kvq eval`` prints of tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

#: What is said of a row that the unquantized model cannot do.
UNABLE = "too hard for {}"
#: What a p below this earns: a star.
SIGNIFICANT = 0.05


def generated_tables(figures: Mapping[str, Any], baseline: str) -> list[Table]:
    """Of results.figures: right answers by task, and each KV cache beside *baseline*."""
    names = list(figures["total"])
    by_task = Table(
        title="Generated tasks: right answers",
        caption=f"* differs from {baseline} by an exact test, p < {SIGNIFICANT}, as one row in "
        "twenty does by chance",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for name in ("task", "tokens", "of"):
        by_task.add_column(name, no_wrap=True, justify="left" if name == "task" else "right")
    for name in names:
        by_task.add_column(name, justify="right", no_wrap=True)
    for row in figures["rows"]:
        count = row["caches"][baseline]["items"]
        cells = [row_cell(row, name) for name in names]
        task = row["task"] if row["able"] else f"{row['task']} ({UNABLE.format(baseline)})"
        by_task.add_row(task, f"{row['length']:,}", f"{count}", *cells)
    total = Table(
        title=f"Generated tasks: all, against {baseline}",
        caption="95 % confidence, of as many trials as contexts; lost, gained: contexts with "
        f"fewer, or more, right answers than {baseline} has; p of an even split (McNemar's exact "
        "test)",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    total.add_column("KV cache", no_wrap=True)
    for name in ("right", "of", "confidence", "lost", "gained", "p"):
        total.add_column(name, justify="right", no_wrap=True)
    for name, of in figures["total"].items():
        total.add_row(name, *total_cells(of))
    return [by_task, total]


def row_cell(row: Mapping[str, Any], name: str) -> str:
    """Right answers of a row, starred where they differ from the baseline's; "" if not asked."""
    of = row["caches"].get(name)
    if of is None:
        return ""
    star = "*" if row["able"] and of.get("p", 1) < SIGNIFICANT else ""
    return f"{star}{of['right']}"


def total_cells(of: Mapping[str, Any]) -> list[str]:
    """Right, of, confidence, lost, gained, p."""
    cells = [f"{of['right']}", f"{of['items']}", f"{of['low']:.1%} to {of['high']:.1%}"]
    return cells + (
        [f"{of['lost']}", f"{of['gained']}", f"{of['p']:.2g}"] if "p" in of else [""] * 3
    )


def longbench_table(figures: Mapping[str, Any], baseline: str) -> Table:
    """Of longbench.figures: a row per dataset."""
    table = Table(
        title="LongBench's metrics, of 100",
        caption=f"change against {baseline}, ± the standard error of the paired differences",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("dataset", no_wrap=True)
    table.add_column("of", justify="right", no_wrap=True)
    names = list(next(iter(figures.values()))["caches"])
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for dataset, found in figures.items():
        cells = [longbench_cell(found["caches"][name]) for name in names]
        table.add_row(dataset, f"{found['items']}", *cells)
    return table


def longbench_cell(of: Mapping[str, Any]) -> str:
    """``41.25 (-0.31 ± 0.20)``."""
    if "change" not in of:
        return f"{of['score']:.2f}"
    error = of["change_error"]
    spread = "" if error is None else f" ± {error:.2f}"
    return f"{of['score']:.2f} ({of['change']:+.2f}{spread})"
