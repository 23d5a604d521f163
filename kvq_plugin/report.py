"""What ``kvq`` prints: progress bars and tables."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvq_plugin.evaluate import (
    BASELINE,
    WINDOW,
    Score,
    evaluate,
    load_tokenizer,
    make_windows,
    read_text,
)
from kvq_plugin.tables import print_table


def progress(console: Console) -> Progress:
    """Bars with a description, a count and the time taken."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[stage]}", style="dim"),
    )
    return Progress(*columns, console=console)


def change_text(score: Score, baseline: Score) -> str:
    """``+0.07 ± 0.03``: the change in perplexity and its standard error, in percent."""
    change, error = score.change(baseline)
    return f"{change:+.2f} ± {error:.2f}"


def run_evaluation(
    model: str,
    dtypes: Sequence[str],
    text_names: Sequence[str],
    *,
    windows: int,
    kv_memory_bytes: int,
) -> dict[str, dict[str, Score]]:
    """Score every text with every dtype, print the table, return ``scores[dtype][text]``."""
    console = Console()
    tokenizer = load_tokenizer(model)
    texts = {name: make_windows(tokenizer, read_text(name), windows) for name in text_names}
    scores = {}
    with progress(console) as bars:
        for dtype in dtypes:
            bar = bars.add_task(dtype, total=windows * len(texts), stage="")
            scores[dtype] = evaluate(
                model,
                dtype,
                texts,
                kv_memory_bytes=kv_memory_bytes,
                tick=partial(bars.advance, bar),
            )
    print_table(console, evaluation_table(model, scores, windows))
    return scores


def evaluation_table(model: str, scores: dict[str, dict[str, Score]], windows: int) -> Table:
    """A row per dtype; perplexity and change against ``auto`` per text."""
    table = Table(
        title=f"Perplexity through the engine: {Path(model).name}",
        caption=f"{windows} windows of {WINDOW:,} tokens; change against {BASELINE} in this run, "
        "± its standard error",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("KV cache", no_wrap=True)
    for text in scores[BASELINE]:
        table.add_column(Path(text).name, justify="right", overflow="fold")
        table.add_column("change, %", justify="right", no_wrap=True)
    for dtype, by_text in scores.items():
        cells = []
        for text, score in by_text.items():
            baseline = scores[BASELINE][text]
            change = "" if score is baseline else change_text(score, baseline)
            cells += [f"{score.perplexity:.3f}", change]
        table.add_row(dtype, *cells)
    return table
