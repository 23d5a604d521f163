"""The command line of ``kvq allocate``, and its run from the first check to the last line."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from rich.console import Console

from kvq_plugin.allocate import measure, output
from kvq_plugin.allocate.solve import (
    Allocation,
    Shape,
    budget_bytes,
    parse_bits,
    parse_memory,
    require_range,
    require_served,
)
from kvq_plugin.calibrate.checkpoint import Source
from kvq_plugin.calibrate.output import Target, left_out
from kvq_plugin.evaluate import BASELINE, evaluate, load_tokenizer
from kvq_plugin.formats import SERVED
from kvq_plugin.mapping import MIXED, PLAIN
from kvq_plugin.report import progress
from kvq_plugin.tables import print_table


def add(command: argparse.ArgumentParser) -> None:
    """Add the arguments to *command*."""
    command.add_argument("model", help="directory or hub name")
    command.add_argument("-o", "--output", type=Path, required=True, help="directory to write")
    command.add_argument("--force", action="store_true", help="replace an earlier output")
    command.add_argument("--copy", action="store_true", help="copy the weights, never link them")
    budget = command.add_argument_group("budget: bits, or tokens in so much memory")
    budget.add_argument("--budget", metavar="BITS", help="bits per value of K and V, 4.0bits")
    budget.add_argument("--tokens", type=int, help="tokens that are to fit, recent rows aside")
    budget.add_argument("--memory", metavar="SIZE", help="in this much KV cache, 1GiB")
    measured = command.add_argument_group("measuring")
    measured.add_argument(
        "--formats",
        default=",".join(measure.FORMATS),
        help="what a layer may have (%(default)s): KV caches without scales of a checkpoint",
    )
    measured.add_argument(
        "--text",
        nargs="+",
        default=list(measure.TEXTS),
        metavar="FILE",
        help="UTF-8 files; by default the reference that Python carries, and code of its library",
    )
    for name, default, what in (
        ("windows", 1, "windows of each text"),
        ("length", measure.LENGTH, "tokens of a window"),
        ("stride", measure.STRIDE, "every so many positions of a window are compared"),
    ):
        measured.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{what} (%(default)s)"
        )
    measured.add_argument(
        "--dtype",
        default=measure.DTYPE,
        choices=("float32", "bfloat16", "float16"),
        help="what the model runs in meanwhile: 16 bits take less memory, and round (%(default)s)",
    )
    measured.add_argument(
        "--cells", type=Path, metavar="FILE", help="measured costs, to go on from (OUT.cells.json)"
    )
    measured.add_argument(
        "--no-verify",
        dest="verify",
        action="store_false",
        help="no run through a served engine at the end",
    )


def formats_of(text: str) -> tuple[str, ...]:
    """``"int4,k8v4"`` -> the names; ValueError for one that needs a checkpoint's scales."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    fitting = [PLAIN, *(n for n, f in SERVED.items() if f.is_dynamic)]
    for name in names:
        if name not in fitting:
            raise ValueError(
                f"--formats names {name!r}: expected KV caches that compute their own scales, "
                f"{', '.join(fitting)}"
            )
    if len(names) < 2:
        raise ValueError(
            f"--formats names {len(names)} KV cache: expected two or more to choose from"
        )
    return names


def require_budget(options: argparse.Namespace) -> None:
    """Raise ValueError unless a budget is given in one of the two ways."""
    if (options.budget is None) == (options.tokens is None and options.memory is None):
        raise ValueError("expected --budget BITS, or --tokens N with --memory SIZE, and not both")
    if options.budget is not None:
        parse_bits(options.budget)
        return
    if options.tokens is None or options.memory is None or options.tokens < 1:
        raise ValueError(
            "--tokens and --memory go together: expected --tokens 100000 --memory 1GiB"
        )
    parse_memory(options.memory)


def size_of(options: argparse.Namespace, shapes: list[Shape]) -> int:
    """The budget, which :func:`require_budget` let pass, in bytes per token."""
    if options.budget is not None:
        return budget_bytes(parse_bits(options.budget), shapes)
    return parse_memory(options.memory) // options.tokens


def run(options: argparse.Namespace) -> None:
    """Measure, choose, write, verify."""
    console = Console()
    require_budget(options)
    source, target = Source.find(options.model), Target(options.output, options.force, options.copy)
    output.require_free(target, source)
    formats = formats_of(options.formats)
    stated = measure.stated_shapes(source)
    if stated:
        require_served(stated, formats)
    if options.budget is not None and stated:  # bits out of range: now, not after an engine started
        require_range(size_of(options, stated), stated, formats)
    count, length = options.windows, options.length
    if min(count, length - 1, options.stride) < 1:
        raise ValueError("--windows, --length and --stride: expected positive numbers")
    source.require_length(length)
    file = options.cells or target.folder.with_name(target.folder.name + ".cells.json")
    measure.require_writable(file)
    tokenizer, model = load_tokenizer(str(source.folder)), str(source.folder)
    windows, unseen = [], {}
    for text in options.text:
        both = measure.windows_of(tokenizer, text, count + 1, length)
        windows += both[:count]
        unseen[text] = both[count:]
    known = measure.Sensitivities.resume(file, model, windows, options.stride, options.dtype)
    with progress(console) as bars:
        bar = bars.add_task("measuring layers", total=None, stage="an engine starts")
        with measure.metering(model, windows, options.stride, options.dtype) as meter:
            require_served(meter.shapes, formats)
            size = size_of(options, meter.shapes)
            require_range(size, meter.shapes, formats)
            bars.update(bar, total=len(formats) * (len(meter.shapes) + 1), stage=file.name)
            known.measure(meter, formats, lambda: bars.advance(bar))
            allocation = Allocation(meter.shapes, known.costs(formats))
            choice = allocation.within(size)
            numbers, layers = [shape.number for shape in meter.shapes], meter.layers
            measured = meter.kl(dict(zip(numbers, choice.names, strict=True)))
    uniform = {name: known.uniform[name] for name in formats}
    found = output.Found(allocation, choice, uniform, measured, {}, layers)
    verified = _verify(console, source, target, found, unseen) if options.verify else {}
    found = output.Found(allocation, choice, uniform, measured, verified, layers)
    output.write(source, target, found.mapping(), found)
    print_table(console, output.table(found))
    for line in output.summary(found):
        console.print(line, highlight=False, soft_wrap=True)
    if left := left_out(source):
        console.print(
            f"Folders with other weights were left out: {', '.join(left)}",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )
    console.print(
        f"vllm serve {target.folder}    # as {output.FIGURES} there says; costs in {file}",
        highlight=False,
        soft_wrap=True,
    )


def _verify(console: Console, source: Source, target: Target, found, unseen) -> dict[str, float]:
    """Divergence by text through an engine that serves the mapping, on windows not used yet."""
    with tempfile.TemporaryDirectory(prefix=".kvq-", dir=target.folder.resolve().parent) as scratch:
        mapped = Target(Path(scratch, "mapped"), False, False)
        output.write(source, mapped, found.mapping(), None)
        kept = Path(scratch, "kept")
        kept.mkdir()
        with progress(console) as bars:
            total = 2 * sum(map(len, unseen.values()))
            bar = bars.add_task("verifying", total=total, stage="two engines")
            tick = lambda: bars.advance(bar)  # noqa: E731
            evaluate(str(source.folder), BASELINE, unseen, keep=kept, tick=tick)
            result = evaluate(str(mapped.folder), MIXED, unseen, reference=kept, tick=tick)
    return {text: statistics.fmean(s.divergence.kl) for text, s in result.scores.items()}
