"""``kvq calibrate``: from a checkpoint and some text to a checkpoint with KV scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console

from kvq_plugin.calibrate import engine
from kvq_plugin.calibrate.checkpoint import Source
from kvq_plugin.calibrate.data import read_texts, sample_windows
from kvq_plugin.calibrate.engine import Load, Tick
from kvq_plugin.calibrate.observers import Observers, scale_and_zero
from kvq_plugin.calibrate.output import Target, drops_mapping, left_out, with_scheme, write
from kvq_plugin.calibrate.scales import LayerScales, compute
from kvq_plugin.calibrate.settings import DRIVERS, Settings, Strategy
from kvq_plugin.calibrate.table import scale_table
from kvq_plugin.evaluate import load_tokenizer
from kvq_plugin.report import progress
from kvq_plugin.serving.scales.keys import layer_number
from kvq_plugin.tables import print_table
from kvq_plugin.texts import BUILTIN_TEXT

#: Fewer tokens than this in all, or in the longest sample, are warned of: ranges of so few say
#: little about other text, and every sample of one token is at the first position.
_FEW_TOKENS, _SHORT_WINDOW = 1000, 16


@dataclass(frozen=True)
class Samples:
    """What the model reads: *count* windows of *length* tokens, drawn from *data* by *seed*."""

    data: Sequence[str] = (BUILTIN_TEXT,)
    count: int = 32
    length: int = 2048
    seed: int = 0


@dataclass(frozen=True)
class Job:
    """Everything ``kvq calibrate`` was asked for."""

    model: str
    target: Target
    settings: Settings = field(default_factory=Settings)
    samples: Samples = field(default_factory=Samples)
    load: Load = field(default_factory=Load)
    driver: str = "engine"


def run(job: Job, console: Console | None = None) -> list[LayerScales]:
    """Calibrate, write the checkpoint, print the table and how to serve it.

    Raises ValueError, OSError or ServerError, after which nothing is left at the target.
    """
    console = console or Console()
    _require_driver(job.driver, job.settings, job.load)
    source = Source.find(job.model)
    job.target.check(source)
    _require_fitting(job.settings, source)
    with_scheme(source, job.settings.kv_cache_scheme(), [])  # refuses early what it refuses
    windows = _windows(job, source)
    with progress(console) as bars:
        bar = bars.add_task("calibrating", total=1 + len(windows), stage="loading the model")

        def tick() -> None:
            bars.update(bar, advance=1, stage="running the samples")

        layers = calibrate(source, job.target, job.settings, windows, job.load, job.driver, tick)
        bars.update(bar, stage="")
    print_table(console, scale_table(job.settings, layers))
    for line in _how_to_serve(job, source) + _few_tokens(windows):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    return layers


def calibrate(
    source: Source,
    target: Target,
    settings: Settings,
    windows: Sequence[list[int]],
    load: Load | None = None,
    driver: str = "engine",
    tick: Tick = lambda: None,
) -> list[LayerScales]:
    """Run *windows* of token ids, write *target*, return the scales layer by layer.

    *tick* is called once the model is loaded and after every window.
    """
    load = load or Load()
    _require_driver(driver, settings, load)
    observers = _observe(source, settings, windows, load, driver, tick)
    layers = [
        LayerScales(name, layer_number(name), streams)
        for name, streams in compute(settings, observers).items()
    ]
    layers.sort(key=lambda layer: layer.number)
    write(
        source,
        target,
        tensors(settings, layers),
        settings.kv_cache_scheme(),
        sorted(settings.ignore),
        _provenance(settings, windows, driver),
    )
    return layers


def _require_driver(driver: str, settings: Settings, load: Load) -> None:
    """Raise ValueError for what only the engine driver has, and for no driver."""
    if driver not in DRIVERS:
        raise ValueError(f"driver {driver!r}: expected one of {', '.join(DRIVERS)}")
    if driver == "engine":
        return
    if settings.q_scale:
        raise ValueError(
            "q scales were asked for: transformers' cache never sees the query; use "
            "--driver engine, or drop --q-scale"
        )
    if load.tensor_parallel > 1:
        raise ValueError(
            f"--tensor-parallel-size {load.tensor_parallel} was asked for: the hf driver runs on "
            "one rank; use --driver engine"
        )


def _require_fitting(settings: Settings, source: Source) -> None:
    """Raise ValueError where config.json alone says that *settings* are not for the model."""
    if geometry := source.geometry():
        settings.unit(geometry.head_size)
    count = source.layer_count()
    beyond = sorted(n for n in settings.ignore if count is not None and n >= count)
    if beyond:
        raise ValueError(
            f"--ignore names {', '.join(map(str, beyond))}: the model has {count} layers, expected "
            f"numbers from 0 to {count - 1}"
        )
    if count is not None and len(settings.ignore) == count:
        raise ValueError(engine.NOTHING_LEFT)


def _observe(source, settings, windows, load, driver, tick) -> Observers:
    if driver == "engine":
        return engine.observe(source, settings, load, windows, tick)
    from kvq_plugin.calibrate import hf  # imports transformers

    return hf.observe(source, settings, load, windows, tick)


def _windows(job: Job, source: Source) -> list[list[int]]:
    samples = job.samples
    source.require_length(samples.length, next_token=job.driver == "engine")
    tokenizer = load_tokenizer(str(source.folder))
    texts = read_texts(samples.data, tokenizer)
    return sample_windows(tokenizer, texts, samples.count, samples.length, samples.seed)


def tensors(settings: Settings, layers: Sequence[LayerScales]) -> dict[str, torch.Tensor]:
    """Every tensor to add to the checkpoint, by name."""
    found = {}
    for layer in layers:
        for kind, stream in layer.streams.items():
            found[f"{layer.name}.{kind}_scale"] = stream.scale
            if stream.zero_point is not None:
                found[f"{layer.name}.{kind}_zero_point"] = stream.zero_point
        if settings.prob_scale:
            # Probabilities reach 1 whatever the data (a first token attends to itself alone).
            # Quark's name, for which vLLM has a rule of its own; `prob_scale` it does not know.
            symmetric = settings.of_kind("prob")
            scale, _ = scale_and_zero(torch.zeros(1), torch.ones(1), symmetric)
            found[f"{layer.name}.prob_output_scale"] = scale
    return found


def _provenance(settings: Settings, windows: Sequence[list[int]], driver: str) -> dict[str, str]:
    """How the scales came about, for the header of their file."""
    facts = {
        "observer": settings.observer,
        "strategy": settings.strategy.value,
        "samples": f"{len(windows)} x {max(map(len, windows))} tokens",
        "driver": driver,
    }
    if settings.observer == "percentile":
        facts["percentile"] = f"{settings.percentile:g}"
    if settings.rounds:
        facts["scales"] = "powers of two"
    if settings.strategy is Strategy.GROUP:
        facts["group_size"] = str(settings.group_size)
    return {f"kvq_{name}": value for name, value in facts.items()}


def _few_tokens(windows: Sequence[list[int]]) -> list[str]:
    """A warning where the scales come from less than attention and channels show themselves in."""
    total, longest = sum(map(len, windows)), max(map(len, windows))
    if total >= _FEW_TOKENS and longest >= _SHORT_WINDOW:
        return []
    return [
        f"Warning: the scales are of {total:,} tokens only, in samples of {longest}: other text "
        f"may saturate them. Expected {_FEW_TOKENS:,} tokens or more, in samples of "
        f"{_SHORT_WINDOW} or more: raise --length or --samples."
    ]


def _how_to_serve(job: Job, source: Source) -> list[str]:
    out = Path(job.target.folder)
    lines = [f"Wrote {out}. Serve it with:", f"    vllm serve {out}"]
    if job.settings.ignore:
        skipped = ", ".join(map(str, sorted(job.settings.ignore)))
        lines.append(f"Layers {skipped} keep an unquantized cache.")
    if drops_mapping(source.config):
        lines.append(
            "The model's mapping of layers to KV caches, none of which takes scales, was left out "
            "of its config.json, so that `auto` takes the scales."
        )
    if left := left_out(source):
        lines.append(f"Folders with other weights were left out: {', '.join(left)}.")
    return lines
