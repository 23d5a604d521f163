"""``kvq bench attention`` and ``kvq bench store``: kernels alone, a row per shape and candidate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kvq_plugin import _native
from kvq_plugin.bench import cases
from kvq_plugin.bench.cases import Candidate, Shape
from kvq_plugin.bench.timing import PROBE, interleave, read_probe

BASELINE = "stock bf16"


@dataclass(frozen=True)
class Row:
    """One candidate on one shape.

    Attributes:
        milliseconds: median; gigabytes_per_second: cache bytes over it; share: of the read
            bandwidth measured in the same run; tokens: KV tokens per second, in millions;
            ratio: tokens per second against stock bf16; against_fp8: against stock fp8.
    """

    shape: str
    threads: int
    isa: str
    candidate: str
    milliseconds: float
    gigabytes_per_second: float
    share: float
    tokens: float
    ratio: float
    against_fp8: float


#: What a benchmark sets up, the shapes it does by default, and the tokens a run handles.
KINDS: dict[str, tuple[Callable, Sequence[Shape], Callable[[Shape], int]]] = {
    "attention": (cases.attention, cases.ATTENTION_SHAPES, lambda s: s.tokens),
    "store": (cases.store, cases.STORE_SHAPES, lambda s: s.batch * s.new),
}


def run(
    kind: str,
    names: Sequence[str],
    threads: int,
    repeats: int,
    stage: Callable[[str], None] = lambda text: None,
    tick: Callable[[], None] = lambda: None,
) -> list[Row]:
    """Measure every default shape of *kind* with *threads* threads."""
    prepare, shapes, tokens_of = KINDS[kind]
    torch.set_num_threads(threads)
    rows = []
    for shape in shapes:
        stage(str(shape))
        made: dict[str, Candidate] = prepare(shape, list(names))
        probe, size = read_probe()
        candidates = {PROBE: probe} | {name: c.run for name, c in made.items()}
        timings = interleave(candidates, repeats, tick)
        seconds = {name: timing.median for name, timing in timings.items()}
        bandwidth = size / seconds[PROBE]
        tokens = tokens_of(shape)
        for name, candidate in made.items():
            speed = candidate.bytes / seconds[name]
            rows.append(
                Row(
                    shape=str(shape),
                    threads=threads,
                    isa=_native.isa(),
                    candidate=name,
                    milliseconds=1e3 * seconds[name],
                    gigabytes_per_second=speed / 1e9,
                    share=speed / bandwidth,
                    tokens=tokens / seconds[name] / 1e6,
                    ratio=seconds[BASELINE] / seconds[name],
                    against_fp8=seconds["stock fp8"] / seconds[name],
                )
            )
    return rows
