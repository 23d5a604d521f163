"""What ``kvq`` prints: progress bars and tables."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvq_plugin import evaluation_page
from kvq_plugin.evaluate import (
    BASELINE,
    FLOOR_WINDOWS,
    OWN,
    WINDOW,
    Evaluation,
    Score,
    Window,
    agreement,
    evaluate,
    floor_chunk,
    load_tokenizer,
    make_windows,
)
from kvq_plugin.inspection import check_dtypes
from kvq_plugin.tables import print_table
from kvq_plugin.tasks import tables as task_tables
from kvq_plugin.tasks.asked import Asked, Settings, positions
from kvq_plugin.texts import builtin_text, labels, naming, read_text

#: What runs the model: vLLM's engine, a process for every dtype, or transformers, in this one.
DRIVERS = ("vllm", "transformers")

#: Tokens of a prompt that greedy generations start from.
PROMPT = 128
#: The row of the unquantized engine against itself.
FLOOR = f"{BASELINE}, noise floor"


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


def counted(count: int, what: str) -> str:
    """``1 window``, ``2 windows``."""
    return f"{count} {what}" + ("" if count == 1 else "s")


def change_text(score: Score, baseline: Score) -> str:
    """``+0.07 ± 0.03``: the change in perplexity and its standard error, in percent."""
    change, error = score.change(baseline)
    return f"{change:+.2f} ± {error:.2f}"


@dataclass(frozen=True)
class Results:
    """Every engine of one ``kvq eval``.

    Attributes:
        evaluations: by dtype, in the order of the command line.
        floor: the unquantized engine against itself, or None without divergences: the first
            windows of each text, prefilled in other chunks.
        asked: the tasks.
        heads: windows of each text that *floor* ran.
        agreements: by dtype and for the floor, tokens of each greedy generation before the first
            that differs from ``auto``'s; empty without generations.
    """

    evaluations: dict[str, Evaluation]
    floor: Evaluation | None
    asked: Asked = field(default_factory=Asked)
    heads: Mapping[str, int] = field(default_factory=dict)

    @property
    def tasks(self) -> dict[str, Any]:
        """Figures of the tasks: see Asked.figures."""
        answers = {dtype: e.answers for dtype, e in self.evaluations.items()}
        floor = {FLOOR: self.floor.answers} if self.floor and self.floor.answers else {}
        return self.asked.figures(answers, BASELINE, floor)

    @property
    def agreements(self) -> dict[str, list[int]]:
        baseline = self.evaluations[BASELINE].generations
        others = {d: e for d, e in self.evaluations.items() if d != BASELINE}
        if self.floor is not None:
            others = {FLOOR: self.floor, **others}
        return {
            name: [agreement(*pair, PROMPT) for pair in zip(e.generations, baseline, strict=False)]
            for name, e in others.items()
            if e.generations
        }

    def is_at_floor(self, dtype: str, text: str) -> bool:
        """Whether *dtype* diverges no more from the unquantized engine than that from itself, on
        the windows that both ran."""
        if self.floor is None:
            return False
        own = self.evaluations[dtype].scores[text].divergence
        return own is not None and own.is_at(self.floor.scores[text].divergence)


def window_length(model: str, driver: str, drift: int) -> int:
    """Tokens of a window: WINDOW, or what *model* has positions for.

    Raises ValueError where those are too few for the *drift* generations.
    """
    limit = positions(model)
    # vLLM generates a token after each window.
    window = WINDOW if limit is None else min(WINDOW, limit - (driver == DRIVERS[0]))
    if drift and window <= PROMPT:
        raise ValueError(
            f"--drift continues prompts of {PROMPT} tokens: expected a model with positions for "
            f"more, got one with {limit}; leave it out"
        )
    return window


def run_evaluation(
    model: str,
    dtypes: Sequence[str],
    text_names: Sequence[str],
    *,
    windows: int,
    kv_memory_bytes: int = 1 << 30,
    divergence: bool = True,
    drift: int = 0,
    tasks: Settings = Settings(names=()),  # noqa: B008 (immutable)
    page: Path | None = None,
    driver: str = DRIVERS[0],
) -> Results:
    """Score every text with every dtype, ``auto`` first, and print the tables.

    *driver* is one of DRIVERS; *kv_memory_bytes* concern vLLM's engines alone. *drift*: so many
    greedy generations of every engine; those of ``auto`` are one more text. *tasks*: what every
    engine is asked. *page* is a folder to make, with the report as HTML. Raises ValueError before
    anything is run when it cannot be made, or a dtype cannot serve the model.
    """
    console = Console()
    if page is not None:
        evaluation_page.check_folder(page)
    started = datetime.now(UTC)
    tokenizer = load_tokenizer(model)
    check_dtypes(model, dtypes)
    window = window_length(model, driver, drift)
    texts = {}
    for name in text_names:
        text = read_text(name)
        with naming(name):
            texts[name] = make_windows(tokenizer, text, windows, window)
    asked = tasks.ask(model, tokenizer)
    engine = _engine(driver, model, kv_memory_bytes)
    if window < WINDOW:
        console.print(
            f"windows of {window:,} tokens, not {WINDOW:,}: the model has no room for more"
        )
    with tempfile.TemporaryDirectory(prefix="kvq-eval-") as folder, progress(console) as bars:
        results = _evaluate_all(
            engine,
            dtypes,
            texts,
            make_windows(tokenizer, builtin_text(), drift, PROMPT) if drift else [],
            window,
            asked,
            Path(folder) if divergence else None,
            bars,
        )
    scores = {dtype: e.scores for dtype, e in results.evaluations.items()}
    print_table(console, evaluation_table(model, scores, windows, driver, window))
    if results.floor is not None and len(dtypes) > 1:
        print_table(console, divergence_table(results))
    if results.agreements:
        print_table(console, drift_table(results.agreements, window))
    found = results.tasks
    if found["generated"]:
        for table in task_tables.generated_tables(found["generated"], BASELINE):
            print_table(console, table)
    if found["longbench"]:
        print_table(console, task_tables.longbench_table(found["longbench"], BASELINE))
    if page is not None:
        about = evaluation_page.about_run(
            model,
            windows=f"{windows} of {window:,} tokens of each text",
            texts=list(labels(texts).values()),
            greedy_generations=drift,
            tasks=tasks.described(),
            driver=driver,
            # Elsewhere a cache has no pool.
            **({"KV_memory": f"{kv_memory_bytes / 2**30:g} GiB"} if driver == DRIVERS[0] else {}),
            started=f"{started:%Y-%m-%d %H:%M} UTC",
            took=f"{(datetime.now(UTC) - started).total_seconds():.0f} s",
        )
        evaluation_page.write(
            page, results.evaluations, results.floor, window, about, results.agreements, found
        )
        console.print(f"written: {escape(str(page / evaluation_page.PAGE))}", soft_wrap=True)
    return results


def _engine(driver: str, model: str, kv_memory_bytes: int) -> Callable[..., Evaluation]:
    """What evaluates a dtype: :func:`kvq_plugin.evaluate.evaluate` from its second argument on."""
    if driver == DRIVERS[0]:
        return partial(evaluate, model, kv_memory_bytes=kv_memory_bytes)
    from kvq_plugin.evaluate_transformers import TransformersDriver

    return TransformersDriver(model).evaluate


def _evaluate_all(
    engine: Callable[..., Evaluation],
    dtypes: Sequence[str],
    texts: Mapping[str, Sequence[Window]],
    prompts: Sequence[Window],
    length: int,
    asked: Asked,
    folder: Path | None,
    bars: Progress,
) -> Results:
    """*prompts* are continued to *length* tokens. *folder* is for what the unquantized engine is
    compared by; None: no divergences."""

    def run(name: str, dtype: str, texts: Mapping[str, Sequence[Window]], **options) -> Evaluation:
        common = {"prompts": prompts, "length": length if prompts else 0}
        common |= {"questions": asked.questions} | options
        total = sum(map(len, texts.values())) + len(common["questions"])
        if prompts and OWN not in texts:
            total += len(prompts)
        bar = bars.add_task(name, total=total, stage="")
        return engine(dtype, texts, tick=partial(bars.advance, bar), **common)

    evaluations, floor = {BASELINE: run(BASELINE, BASELINE, texts, keep=folder)}, None
    heads: dict[str, Sequence[Window]] = {}
    if prompts:
        texts = {**texts, OWN: evaluations[BASELINE].generations}
    if folder is not None:
        heads = {text: windows[:FLOOR_WINDOWS] for text, windows in texts.items()}
        chunk = floor_chunk(next(iter(heads.values())))
        few = prompts[:FLOOR_WINDOWS]
        other = {"chunk": chunk, "prompts": few, "questions": asked.short}
        floor = run(FLOOR, BASELINE, heads, reference=folder, **other)
    for dtype in dtypes:
        if dtype != BASELINE:
            evaluations[dtype] = run(dtype, dtype, texts, reference=folder)
    return Results(evaluations, floor, asked, {text: len(of) for text, of in heads.items()})


def evaluation_table(
    model: str,
    scores: dict[str, dict[str, Score]],
    windows: int,
    driver: str = DRIVERS[0],
    length: int = WINDOW,
) -> Table:
    """A row per dtype; perplexity and change against ``auto`` per text, of so many windows of
    *length* tokens."""
    through = "the engine" if driver == DRIVERS[0] else driver
    table = Table(
        title=f"Perplexity through {through}: {escape(Path(model).name)}",
        caption=f"{counted(windows, 'window')} of {length:,} tokens; change against {BASELINE} in "
        "this run, ± its standard error",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("KV cache", no_wrap=True)
    for label in labels(scores[BASELINE]).values():
        table.add_column(escape(label), justify="right", overflow="fold")
        table.add_column("change, %", justify="right", no_wrap=True)
    for dtype, by_text in scores.items():
        cells = []
        for text, score in by_text.items():
            baseline = scores[BASELINE][text]
            change = "" if score is baseline else change_text(score, baseline)
            cells += [f"{score.perplexity:.3f}", change]
        table.add_row(dtype, *cells)
    return table


def divergence_table(results: Results) -> Table:
    """A section per text, a row per dtype; the noise floor first."""
    table = Table(
        title=f"Next-token distributions against {BASELINE}'s",
        caption="KL divergence in nats per token; TV: total variation; top-1: the same token is "
        f"the most likely. Noise floor: {BASELINE} against itself, {_heads(results.heads)} "
        "prefilled in chunks of another size. What is not above it there is not told from "
        f"{BASELINE} (marked ≤)",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
    )
    table.add_column("KV cache", no_wrap=True)
    for name in ("KL", "p50", "p99", "p99.9", "TV", "top-1"):
        table.add_column(name, justify="right", no_wrap=True)
    texts = labels(results.floor.scores)
    for text, label in texts.items():
        table.add_section()
        if len(texts) > 1:
            table.add_row(f"[bold]{escape(label)}[/bold]")
        table.add_row(FLOOR, *_divergence_cells(results.floor.scores[text]))
        for dtype, evaluation in results.evaluations.items():
            if evaluation.scores[text].divergence is not None:
                mark = "≤ " if results.is_at_floor(dtype, text) else ""
                table.add_row(mark + dtype, *_divergence_cells(evaluation.scores[text]))
    return table


def _heads(counts: Mapping[str, int]) -> str:
    """``its first 2 windows``, and of which text it is another number."""
    most = max(counts.values(), default=FLOOR_WINDOWS)
    named = labels(counts)
    fewer = [f"{count} of {named[text]}" for text, count in counts.items() if count < most]
    said = "its first window" if most == 1 else f"its first {most} windows"
    return escape(f"{said} ({', '.join(fewer)})" if fewer else said)


def _divergence_cells(score: Score) -> list[str]:
    figures = score.divergence.summary()
    names = ("kl", "kl_p50", "kl_p99", "kl_p99.9", "tv")
    return [*(f"{figures[name]:.5f}" for name in names), f"{figures['top1']:.2%}"]


def drift_table(agreements: Mapping[str, Sequence[int]], window: int = WINDOW) -> Table:
    """A row per dtype, the noise floor first: how long greedy generations, of *window* tokens with
    their prompts, stay ``auto``'s."""
    length, again = window - PROMPT, len(agreements.get(FLOOR, ()))
    floor = f" Noise floor: {BASELINE} again, "
    floor += "the first" if again == 1 else f"the first {again}, one at a time"
    table = Table(
        title=f"Greedy generations against {BASELINE}'s",
        caption=f"tokens before the first that differs, of {length:,} after prompts of {PROMPT} "
        f"tokens.{floor if again else ''}",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("KV cache", no_wrap=True)
    for name in ("median", "fewest", "all the same"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, tokens in agreements.items():
        whole = f"{sum(t == length for t in tokens)} of {len(tokens)}"
        table.add_row(name, f"{statistics.median(tokens):g}", f"{min(tokens)}", whole)
    return table
