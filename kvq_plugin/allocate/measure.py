"""What each format costs each layer, by one engine of its own process.

Costs are the mean KL divergence of the next-token distributions from the unquantized run's, with
that layer's KV cache quantized and no other. They go to a JSON file as they come, from which an
interrupted measurement goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from kvq_plugin.allocate.solve import Shape
from kvq_plugin.calibrate.checkpoint import Source
from kvq_plugin.disk import room_for
from kvq_plugin.evaluate import Window, cache_dtype, make_windows
from kvq_plugin.hub import checkpoint_folder
from kvq_plugin.mapping import PLAIN
from kvq_plugin.servers import EngineProcess, engine_process, run_engine
from kvq_plugin.serving.scales.declared import read_json
from kvq_plugin.texts import naming, read_text

#: Texts that every Python carries: prose about it, and a long module of it.
TEXTS = ("builtin", "code")
FORMATS = ("k3v2", "int4", "k8v4", "int8_per_token_head", PLAIN)
LENGTH = 512
#: Every so many positions of a window are compared: logits and their logarithms take longer than
#: the layers of a small model, and neighbours say nearly the same.
STRIDE = 2
#: What the model runs in while costs are measured. In bfloat16 any change at all, of one layer to
#: 3 bits or to 8, moves SmolLM2's distributions by some 1e-3 nats through rounding alone: the costs
#: of 30 layers in `k3v2` added up to .057, and all of them together cost .019.
DTYPE = "float32"
KV_MEMORY = 256 << 20
#: Parts of a weight file that tell it from a fine-tuned one of the same size, and their bytes: a
#: shard of 5 GB is not read whole.
_PARTS, _PART_BYTES = 16, 1 << 16
#: Of config.json, what changes where the model does not.
_INCIDENTAL = ("transformers_version", "_name_or_path", "_model_name_or_path")


def text_of(name: str) -> str:
    """The text called *name*: one of TEXTS, else a UTF-8 file."""
    if name == "code":
        return Path(argparse.__file__).read_text(encoding="utf-8")
    return read_text(name)


def windows_of(tokenizer, name: str, count: int, length: int, skip: int = 0) -> list[Window]:
    """*count* windows of *length* tokens of text *name*, after the first *skip* of them."""
    text = text_of(name)
    with naming(name):
        return make_windows(tokenizer, text, skip + count, length)[skip:]


def require_writable(file: Path) -> None:
    """Raise ValueError where costs cannot go to *file*: before an engine starts."""
    remedy = "name another with --cells"
    if file.exists() and not file.is_file():
        raise ValueError(f"costs would go to {file}, which is no file: {remedy}")
    if not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
        raise ValueError(
            f"costs would go to {file}, and {file.parent} is no directory that can be written "
            f"to: {remedy}"
        )


def identity(model: str) -> str:
    """A digest of the checkpoint in directory *model*: its configuration, and each weight file's
    name, size and samples of its bytes."""
    source = Source(Path(model))
    config = {key: value for key, value in source.config.items() if key not in _INCIDENTAL}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name in sorted(source.shards):
        file = source.folder / name
        size = file.stat().st_size
        digest.update(f"{name} {size}".encode())
        with file.open("rb") as weights:
            for part in range(_PARTS):
                weights.seek(part * size // _PARTS)
                digest.update(weights.read(_PART_BYTES))
    return digest.hexdigest()[:16]


class Meter:
    """A running engine, and what KV caches cost its layers. ValueError for a model whose layers
    cannot have a KV cache each.

    Attributes:
        layers: how many the model has.
        shapes: of those that may be given a format: without a sliding window.
    """

    def __init__(self, engine: EngineProcess, itemsize: int) -> None:
        self._engine = engine
        found = engine.receive()
        if isinstance(found, str):
            raise ValueError(found)
        self.layers, shapes = found
        self.shapes = [Shape(*shape, itemsize) for shape in shapes]

    def kl(self, names: Mapping[int, str]) -> float:
        """Mean divergence with the KV caches *names* in these layers, over all windows."""
        self._engine.send(dict(names))
        return statistics.fmean(self._engine.receive())


@contextmanager
def metering(
    model: str, windows: Sequence[Window], stride: int = STRIDE, dtype: str = DTYPE
) -> Iterator[Meter]:
    """An engine of *model* in *dtype*, its cache unquantized, that has seen *windows*; gone
    afterwards. A checkpoint that declares a KV cache runs in its own dtype instead: no other name
    than that dtype's keeps vLLM from following it.

    Raises ServerError with the end of the engine's log when it does not start or fails.
    """
    length = max(map(len, windows))
    cache = cache_dtype(model, PLAIN)
    options = {
        "model": model,
        "dtype": dtype if cache == PLAIN else cache,
        "kv_cache_dtype": cache,
        "kv_cache_memory_bytes": KV_MEMORY,
        "max_model_len": length + 1,
        "max_num_batched_tokens": max(2048, length + 1),  # a window is one forward pass
        "max_num_seqs": 1,
        "enable_prefix_caching": False,
        "enforce_eager": True,  # compiled layers cannot be skipped
        "worker_extension_cls": "kvq_plugin.allocate.probe.AllocateWorker",
    }
    with engine_process(__name__, "that measures layers") as engine:
        engine.send((options, list(windows), stride))
        yield Meter(engine, _itemsize(model))


def _itemsize(model: str) -> int:
    """Bytes of a value of *model* as it is served: those of its weights."""
    config = read_json(checkpoint_folder(model, only=["*.json"]) / "config.json")
    config = config.get("text_config") or config
    stated = config.get("dtype") or config.get("torch_dtype")
    return 4 if stated == "float32" else 2


def stated_shapes(source: Source) -> list[Shape]:
    """The layers as config.json has them, where it says the same of all; else none.

    Bits per value are right even where layers without a KV cache are among them.
    """
    geometry, count = source.geometry(), source.layer_count()
    kinds = (source.config.get("text_config") or source.config).get("layer_types") or ()
    if geometry is None or count is None or set(kinds) - {"full_attention"}:
        return []
    itemsize = _itemsize(str(source.folder))
    return [Shape(n, geometry.kv_heads, geometry.head_size, itemsize) for n in range(count)]


def _work(pipe: Connection) -> None:
    """The engine's process: receives its options and windows; sends the layers' shapes. Then it
    receives mappings and sends the divergences of all windows' positions."""
    options, windows, stride = pipe.recv()
    from vllm import LLM, SamplingParams

    llm = LLM(**options)
    params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)

    def seen(names: dict[int, str] | None) -> list[float]:
        found: list[float] = []
        for i, window in enumerate(windows):
            llm.collective_rpc("kvq_begin", args=(i, names))
            llm.generate({"prompt_token_ids": window}, params, use_tqdm=False)
            [part] = llm.collective_rpc("kvq_end", args=(len(window),))
            found += part
        return found

    [shapes] = llm.collective_rpc("kvq_prepare", args=(stride,))
    if not isinstance(shapes, str):
        seen(None)
    pipe.send(shapes)
    while True:
        pipe.send(seen(pipe.recv()))


@dataclass
class Sensitivities:
    """The file of measured costs.

    Attributes:
        file: JSON; what: settings that the costs depend on, as the file has them.
        cells: number of a layer -> name of a format -> its cost in nats.
        uniform: name of a format -> the cost of all layers having it.
    """

    file: Path
    what: dict
    cells: dict[int, dict[str, float]] = field(default_factory=dict)
    uniform: dict[str, float] = field(default_factory=dict)

    @classmethod
    def resume(cls, file: Path, model: str, windows: Sequence[Window], stride: int, dtype: str):
        """What *file* has of this measurement, of the checkpoint in directory *model*, or an empty
        one.

        Raises ValueError where the file is another measurement's.
        """
        digest = hashlib.sha256(json.dumps([list(w) for w in windows]).encode()).hexdigest()[:16]
        what = {
            "model": Path(model).name,
            "checkpoint": identity(model),
            "windows": len(windows),
            "tokens": digest,
            "stride": stride,
            "dtype": dtype,
        }
        if not file.is_file():
            return cls(file, what)
        content = read_json(file)
        if content.get("what") != what:
            raise ValueError(
                f"{file} was measured with {content.get('what')}: expected {what}; remove it, or "
                "name another with --cells"
            )
        cells = {int(n): dict(row) for n, row in content["cells"].items()}
        return cls(file, what, cells, dict(content["uniform"]))

    def save(self) -> None:
        content = {"what": self.what, "cells": self.cells, "uniform": self.uniform}
        scratch = self.file.with_name(self.file.name + ".part")
        try:
            with room_for(self.file, "name another with --cells"):
                scratch.write_text(json.dumps(content, indent=1) + "\n")
                scratch.rename(self.file)
        finally:
            scratch.unlink(missing_ok=True)

    def measure(
        self, meter: Meter, formats: Sequence[str], tick: Callable[[], None] = lambda: None
    ) -> None:
        """Fill in what is missing of *formats*, layer by layer; *tick* after each cost."""
        numbers = [shape.number for shape in meter.shapes]
        for name in formats:
            if name == PLAIN:
                self.uniform[name] = 0.0
            elif name not in self.uniform:
                self.uniform[name] = meter.kl(dict.fromkeys(numbers, name))
                self.save()
            tick()
            for number in numbers:
                row = self.cells.setdefault(number, {})
                if name == PLAIN:
                    row[name] = 0.0
                elif name not in row:
                    row[name] = meter.kl({number: name})
                    self.save()
                tick()

    def costs(self, formats: Sequence[str]) -> list[dict[str, float]]:
        """Of each layer in order, the costs of *formats*."""
        return [{name: row[name] for name in formats} for _, row in sorted(self.cells.items())]


if __name__ == "__main__":
    run_engine(_work)
