"""What ``kvq bench`` prints and writes: a table, a CSV and a plot."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from tempfile import TemporaryFile

from rich import box
from rich.console import Console
from rich.table import Table

from kvq_plugin.bench import engine, kernels, serve
from kvq_plugin.bench.kernels import Row
from kvq_plugin.disk import room_for
from kvq_plugin.report import counted, progress
from kvq_plugin.tables import print_table


def check_folder(out: Path | None) -> None:
    """Make the folder *out* for CSVs and plots, before anything is measured.

    Raises ValueError when nothing can be written there.
    """
    if out is None:
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=out).close()
    except OSError as error:
        raise ValueError(f"{out} is not writable, name another folder: {error}") from None


@contextmanager
def _replacing(path: Path):
    """A temporary file beside *path* that takes its place when the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        with room_for(path, "name another --out"):
            yield temporary
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _drawn(path: Path, columns: int, width: float, height: float):
    """A figure of *width* x *height* inches and its axes side by side; written to *path* when the
    block succeeds."""
    from matplotlib import use

    use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, columns, figsize=(width, height), layout="constrained", squeeze=False
    )
    try:
        yield figure, axes[0]
        with _replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=150)
    finally:
        pyplot.close(figure)


def write_csv(path: Path, rows: Sequence) -> None:
    """All rows of one dataclass, a column per field."""
    with _replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(rows[0])])
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in asdict(row).items()}
            for row in rows
        )


def write_plot(path: Path, kind: str, rows: Sequence[Row]) -> None:
    """Tokens per second against stock bf16, a group of bars per shape."""
    shapes = list(dict.fromkeys(row.shape for row in rows))
    names = list(dict.fromkeys(row.candidate for row in rows))
    width = 0.8 / len(names)
    with _drawn(path, 1, 2.2 * len(shapes) + 2, 4.5) as (_, [axes]):
        for i, name in enumerate(names):
            ratios = [row.ratio for row in rows if row.candidate == name]
            axes.bar([s + i * width for s in range(len(shapes))], ratios, width, label=name)
        axes.axhline(1.0, color="black", linewidth=0.8)
        labels = [shape.replace(", ", "\n") for shape in shapes]
        axes.set_xticks([s + 0.4 - width / 2 for s in range(len(shapes))], labels, fontsize=8)
        axes.set_ylabel("tokens per second, stock bf16 = 1")
        axes.set_title(f"{kind}, {rows[0].threads} threads, {rows[0].isa}")
        axes.legend(fontsize=8, ncols=2)


def kernel_table(kind: str, rows: Sequence[Row], repeats: int) -> Table:
    """A section per shape."""
    table = Table(
        title=f"{kind}: {rows[0].threads} threads, {rows[0].isa}",
        caption=f"medians of {counted(repeats, 'interleaved run')}; GB/s of cache bytes and "
        "their share of the read bandwidth in the same run; speed-ups in KV tokens per second",
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    for name in ("ms", "GB/s", "share", "Mtok/s", "vs bf16", "vs fp8"):
        table.add_column(name, justify="right", no_wrap=True)
    shape = None
    for row in rows:
        if row.shape != shape:
            table.add_section()
            table.add_row(f"[bold]{row.shape}[/bold]")
            shape = row.shape
        table.add_row(
            row.candidate,
            f"{row.milliseconds:.2f}",
            f"{row.gigabytes_per_second:.1f}",
            f"{row.share:.0%}",
            f"{row.tokens:.2f}",
            f"{row.ratio:.2f}x",
            f"{row.against_fp8:.2f}x",
        )
    return table


def run_kernels(
    kind: str, names: Sequence[str], threads: int, repeats: int, out: Path | None
) -> list[Row]:
    """Measure, print, and with *out* write ``out/<kind>.csv`` and ``out/<kind>.png``."""
    check_folder(out)
    console = Console()
    with progress(console) as bars:
        total = repeats * len(kernels.KINDS[kind][1])
        bar = bars.add_task(kind, total=total, stage="")
        rows = kernels.run(
            kind,
            names,
            threads,
            repeats,
            stage=lambda text: bars.update(bar, stage=text),
            tick=lambda: bars.advance(bar),
        )
    print_table(console, kernel_table(kind, rows, repeats))
    if out is not None:
        write_csv(out / f"{kind}.csv", rows)
        write_plot(out / f"{kind}.png", kind, rows)
        console.print(f"written: {out / kind}.csv and .png")
    return rows


def _engine_title(load: engine.Load) -> str:
    how = "eager" if load.eager else "compiled"
    return f"decode step, {len(load.prompts)} streams at {len(load.prompts[0]):,} tokens, {how}"


def write_engine_plot(path: Path, load: engine.Load, steps: Sequence[engine.Step]) -> None:
    """Every step of every engine in the order they were timed, and a line at its median."""
    with _drawn(path, 1, 8, 4.5) as (_, [axes]):
        for i, (name, median) in enumerate(engine.medians(steps).items()):
            mine = [step.milliseconds for step in steps if step.engine == name]
            axes.plot(mine, ".", color=f"C{i}", label=f"{name}, {median:.1f} ms")
            axes.axhline(median, color=f"C{i}", linewidth=0.8)
        axes.set_xlabel(f"step, in bursts of {engine.BURST - 1}")
        axes.set_ylabel("ms")
        axes.set_ylim(bottom=0)
        axes.set_title(_engine_title(load))
        axes.legend(fontsize=8)


def run_engines(
    load: engine.Load, engines: Sequence[engine.Engine], out: Path | None
) -> dict[str, float]:
    """Measure and print the median decode step of each engine, and with *out* write
    ``out/engine.csv`` (every step) and ``out/engine.png``; returns milliseconds."""
    check_folder(out)
    console = Console()
    with progress(console) as bars:
        bar = bars.add_task("engine", total=len(engines) + load.bursts, stage="")
        steps = engine.decode_steps(
            load,
            engines,
            stage=lambda text: bars.update(bar, stage=text),
            tick=lambda: bars.advance(bar),
        )
    medians = engine.medians(steps)
    baseline = medians[engines[0].name]
    table = Table(
        title=_engine_title(load),
        caption=f"medians of {len(steps) // len(engines)} steps in interleaved bursts",
        box=box.SIMPLE_HEAD,
    )
    for name in ("engine", "median step", f"speed vs {engines[0].name}"):
        table.add_column(name, no_wrap=True)
    for name, milliseconds in medians.items():
        table.add_row(name, f"{milliseconds:.1f} ms", f"{baseline / milliseconds:.2f}x")
    print_table(console, table)
    if out is not None:
        write_csv(out / "engine.csv", steps)
        write_engine_plot(out / "engine.png", load, steps)
        console.print(f"written: {out}/engine.csv and .png")
    return medians


# --- serve -----------------------------------------------------------------------------

#: Column of the rows of bench.serve -> what a panel of the plot shows of its medians.
SERVE_PLOTS = {
    "output_tokens_per_second": "output tokens per second",
    "first_token_ms": "ms to the first token, median",
    "inter_token_ms": "ms between tokens, median",
}


def serve_table(load: serve.Load, middle: Sequence[serve.Row]) -> Table:
    """A row per engine with its medians *middle*, each against the first."""
    table = Table(
        title=f"vllm bench serve: {load.requests} requests of {load.input} tokens in and "
        f"{load.output} out at once, {load.kv_memory_bytes / 2**20:g} MiB of KV cache, "
        f"{'eager' if load.eager else 'compiled'}",
        caption=f"medians of {counted(load.rounds, 'interleaved round')}",
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    table.add_column("", no_wrap=True)
    for name in ("tokens fit", "requests/s", "output tok/s", "", "first token", "between tokens",
                 "p99", "preemptions"):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)
    baseline = middle[0].output_tokens_per_second
    for row in middle:
        table.add_row(
            row.engine,
            f"{row.kv_tokens:,}",
            f"{row.requests_per_second:.2f}",
            f"{row.output_tokens_per_second:.0f}",
            f"{row.output_tokens_per_second / baseline:.2f}x",
            f"{row.first_token_ms / 1e3:.1f} s",
            f"{row.inter_token_ms:.0f} ms",
            f"{row.inter_token_p99_ms:.0f} ms",
            f"{row.preemptions:.0f}",
        )
    return table


def write_serve_plot(path: Path, load: serve.Load, rows: Sequence[serve.Row]) -> None:
    """A panel per figure: a bar per engine for the median, a dot per round."""
    middle = serve.medians(rows)
    names = [row.engine for row in middle]
    with _drawn(path, len(SERVE_PLOTS), 4.2 * len(SERVE_PLOTS), 4.2) as (figure, panels):
        for axes, (column, title) in zip(panels, SERVE_PLOTS.items(), strict=True):
            medians, all_rounds = ([getattr(row, column) for row in r] for r in (middle, rows))
            axes.bar(names, medians, color="C0", alpha=0.6)
            axes.plot([row.engine for row in rows], all_rounds, "k.", markersize=4)
            axes.set_title(title, fontsize=10)
            axes.tick_params(axis="x", rotation=40, labelsize=8)
            axes.set_ylim(bottom=0)
        figure.suptitle(
            f"{load.requests} requests of {load.input} tokens in and {load.output} out at once, "
            f"{load.kv_memory_bytes / 2**20:g} MiB of KV cache"
        )


def run_serve(
    load: serve.Load, engines: Sequence[engine.Engine], out: Path | None
) -> list[serve.Row]:
    """Measure, print, and with *out* write ``out/serve.csv`` (every round) and ``out/serve.png``;
    returns the rows of all rounds."""
    check_folder(out)
    console = Console()
    with progress(console) as bars:
        bar = bars.add_task("serve", total=len(engines) * (1 + load.rounds), stage="")
        rows = serve.run(
            load,
            engines,
            stage=lambda text: bars.update(bar, stage=text),
            tick=lambda: bars.advance(bar),
        )
    print_table(console, serve_table(load, serve.medians(rows)))
    if out is not None:
        write_csv(out / "serve.csv", rows)
        write_serve_plot(out / "serve.png", load, rows)
        console.print(f"written: {out}/serve.csv and .png")
    return rows


# --- generate --------------------------------------------------------------------------

#: Column of the rows of bench.generate -> what the two plots show, as the original work's did.
GENERATE_PLOTS = {"mebibytes": "MiB of cache", "milliseconds": "ms per new token"}


def generate_table(rows: Sequence, reasons: Mapping[str, str], bursts: int) -> Table:
    """A section per context and batch size; who is missing, and why, in the caption."""
    lines = [
        f"medians over {counted(bursts, 'interleaved burst')}; the most memory each cache held"
    ]
    lines += [f"{name}: not measured, {why}" for name, why in reasons.items()]
    table = Table(title="generate with transformers", caption="\n".join(lines), box=box.SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for name in ("MiB", "memory", "ms per token", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    section = None
    for row in rows:
        if (row.context, row.batch) != section:
            section = row.context, row.batch
            table.add_section()
            table.add_row(f"[bold]{row.context:,} tokens, batch {row.batch}[/bold]")
        table.add_row(
            row.candidate,
            f"{row.mebibytes:.1f}",
            f"{row.memory_ratio:.2f}x",
            f"{row.milliseconds:.1f}",
            f"{row.ratio:.2f}x",
        )
    return table


def write_generate_plot(path: Path, column: str, rows: Sequence) -> None:
    """*column* against context, a line per candidate and a panel per batch size."""
    batches = list(dict.fromkeys(row.batch for row in rows))
    with _drawn(path, len(batches), 5.5 * len(batches), 4.5) as (_, panels):
        for axes, batch in zip(panels, batches, strict=True):
            for name in dict.fromkeys(row.candidate for row in rows):
                mine = [row for row in rows if (row.batch, row.candidate) == (batch, name)]
                axes.plot(
                    [r.context for r in mine], [getattr(r, column) for r in mine], "o-", label=name
                )
            axes.set_xlabel("tokens of context")
            axes.set_ylabel(GENERATE_PLOTS[column])
            axes.set_ylim(bottom=0)
            axes.set_title(f"batch {batch}")
        panels[0].legend(fontsize=8)


def run_generate(
    model: str,
    prompt: Sequence[int],
    contexts: Sequence[int],
    batches: Sequence[int],
    dtypes: Sequence[str],
    bursts: int,
    out: Path | None,
) -> list:
    """Measure, print, and with *out* write ``generate.csv``, ``generate-memory.png`` and
    ``generate-latency.png``; returns the rows."""
    check_folder(out)
    from kvq_plugin.bench import generate

    chosen = generate.candidates(dtypes)
    present = sum(map(generate.installed, chosen))
    console = Console()
    with progress(console) as bars:
        total = len(contexts) * len(batches) * bursts * present
        bar = bars.add_task("generate", total=total, stage="")
        rows, reasons = generate.run(
            model,
            prompt,
            contexts,
            batches,
            chosen,
            bursts,
            stage=lambda text: bars.update(bar, stage=text),
            tick=lambda: bars.advance(bar),
        )
    print_table(console, generate_table(rows, reasons, bursts))
    if out is not None:
        write_csv(out / "generate.csv", rows)
        for column, name in zip(GENERATE_PLOTS, ("memory", "latency"), strict=True):
            write_generate_plot(out / f"generate-{name}.png", column, rows)
        console.print(f"written: {out}/generate.csv, generate-memory.png, generate-latency.png")
    return rows
