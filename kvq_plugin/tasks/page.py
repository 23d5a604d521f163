"""What the report page shows of tasks: a heat map and tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from kvq_plugin.tasks.tables import UNABLE, longbench_cell, row_cell, total_cells

PLOT = "tasks.png"
CAPTION = (
    "Right answers by task, length and where in the context the answer stands (0 its beginning, 1 "
    "its end). Hatched: the unquantized model has fewer than half, so the cell tells nothing of a "
    "KV cache."
)


def heat_map(figures: Mapping[str, Any]):
    """A matplotlib figure of results.figures: a panel per task, a row per KV cache, a column per
    length and depth."""
    from matplotlib import pyplot
    from matplotlib.patches import Rectangle

    names = list(figures["total"])
    tasks: dict[str, list] = {}
    for row in figures["rows"]:
        tasks.setdefault(row["task"], []).extend((row["length"], cell) for cell in row["cells"])
    widest = max(map(len, tasks.values()))
    size = (3 + 0.62 * widest, len(tasks) * (1.25 + 0.32 * len(names)))
    figure, axes = pyplot.subplots(len(tasks), squeeze=False, figsize=size, layout="constrained")
    for axis, (task, cells) in zip(axes[:, 0], tasks.items(), strict=True):
        # NaN: not asked.
        shares = [
            [cell["right"].get(name, float("nan")) / cell["items"] for _, cell in cells]
            for name in names
        ]
        drawn = axis.imshow(shares, vmin=0, vmax=1, cmap="RdYlGn", alpha=0.7, aspect="auto")
        for x, (_, cell) in enumerate(cells):
            for y, name in enumerate(names):
                if name in cell["right"]:
                    text = f"{cell['right'][name]}/{cell['items']}"
                    axis.text(x, y, text, ha="center", va="center", fontsize=7)
            if not cell["able"]:
                box = {"facecolor": "white", "alpha": 0.6, "hatch": "////", "edgecolor": "#888"}
                axis.add_patch(Rectangle((x - 0.5, -0.5), 1, len(names), linewidth=0, **box))
        axis.set_title(task, loc="left", fontsize=9)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set_xticks(range(len(cells)), [_column(*cell) for cell in cells], fontsize=7)
        axis.set_xlim(-0.5, widest - 0.5)
    figure.colorbar(drawn, ax=list(axes[:, 0]), shrink=0.5, label="share of right answers")
    return figure


def _column(length: int, cell: Mapping[str, Any]) -> str:
    return f"{length:,}" + ("" if cell["depth"] is None else f"\n{cell['depth']:g}")


def html(figures: Mapping[str, Any], baseline: str) -> list[str]:
    """Sections of the page for Asked.figures: [] where nothing was asked."""
    parts = []
    if generated := figures["generated"]:
        names = list(generated["total"])
        rows = [
            [row["task"], f"{row['length']:,}", f"{row['caches'][baseline]['items']}"]
            + [row_cell(row, name) for name in names]
            + ["" if row["able"] else UNABLE.format(baseline)]
            for row in generated["rows"]
        ]
        parts += [
            "<h2>Generated tasks</h2>",
            _table(["task", "tokens", "of", *names, ""], rows),
            f'<p class="note">Right answers; * differs from {escape(baseline)} by an exact test at '
            "p &lt; 0.05, which one row in twenty does by chance.</p>",
            _table(
                ["KV cache", "right", "of", "95 % confidence", "lost", "gained", "p"],
                ([name, *total_cells(of)] for name, of in generated["total"].items()),
            ),
            '<p class="note">Confidence is that of as many trials as there are contexts. Lost and '
            "gained: contexts in which a KV cache has fewer, or more, right answers than "
            f"{escape(baseline)}; p of an even split (McNemar's exact test).</p>",
        ]
    if found := figures["longbench"]:
        names = list(next(iter(found.values()))["caches"])
        rows = [
            [dataset, f"{of['items']}", *(longbench_cell(of["caches"][name]) for name in names)]
            for dataset, of in found.items()
        ]
        parts += [
            "<h2>LongBench</h2>",
            _table(["dataset", "of", *names], rows),
            f'<p class="note">Of 100, by LongBench\'s metrics; change against {escape(baseline)} ± '
            "the standard error of the paired differences.</p>",
        ]
    return parts


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return f"<table>\n<thead>{line(headings, 'th')}</thead>\n<tbody>\n{body}\n</tbody>\n</table>"
