"""The vLLM driver: the serving engine runs the samples over an unquantized cache.

It works for whatever vLLM serves, quantized weights and tensor parallelism included, because
it looks at K and V where the cache would be written. The engine lives in a process of its own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from kvq_plugin.calibrate.checkpoint import Source
from kvq_plugin.calibrate.names import checkpoint_names, probes
from kvq_plugin.calibrate.observers import Observers, observer_class
from kvq_plugin.calibrate.settings import Settings
from kvq_plugin.servers import engine_process, run_engine
from kvq_plugin.serving.scales.keys import layer_number

Tick = Callable[[], None]
NOTHING_LEFT = (
    "--ignore names every attention layer, and nothing is left to calibrate: expected fewer layers"
)


@dataclass(frozen=True)
class Load:
    """How to run the model.

    Attributes:
        dtype: of activations, as vLLM's ``--dtype``.
        tensor_parallel: ranks.
        kv_memory_bytes: memory of the unquantized KV cache; one sample must fit.
        trust_remote_code: whether code of the checkpoint may run.
    """

    dtype: str = "auto"
    tensor_parallel: int = 1
    kv_memory_bytes: int = 1 << 29
    trust_remote_code: bool = False


def observe(
    source: Source,
    settings: Settings,
    load: Load,
    windows: Sequence[list[int]],
    tick: Tick = lambda: None,
) -> Observers:
    """Run *windows* through an engine; what its attention layers wrote, by checkpoint name.

    *tick* is called after the engine's start and after each window. Raises ServerError with the
    end of the engine's log when it fails, and ValueError for NaN or infinite activations.
    """
    message = {
        "options": _options(source, load, max(map(len, windows))),
        "settings": settings,
        "probes": probes(source.tensor_names()),
        "windows": list(windows),
    }
    with tempfile.TemporaryDirectory(prefix="kvq-statistics-") as folder:
        with engine_process(__name__, "that calibrates", load.tensor_parallel) as engine:
            engine.send(message | {"folder": folder})
            modules, loaded = engine.receive()
            tick()
            names = checkpoint_names(modules, loaded)
            check_ignored(settings, modules)
            for number in range(1, len(windows) + 1):
                if broken := engine.receive():
                    raise ValueError(broken_message(names, broken, number))
                tick()
            engine.receive()  # statistics are written
        return _gathered(settings, Path(folder), names)


def _options(source: Source, load: Load, length: int) -> dict[str, Any]:
    options: dict[str, Any] = {
        "model": str(source.folder),
        "dtype": load.dtype,
        "tensor_parallel_size": load.tensor_parallel,
        "trust_remote_code": load.trust_remote_code,
        "kv_cache_memory_bytes": load.kv_memory_bytes,
        "kv_cache_dtype": "auto",
        "skip_tokenizer_init": True,  # samples are tokens
        "max_model_len": length + 1,
        "max_num_batched_tokens": length + 1,  # a sample in one piece: one batch of statistics
        "max_num_seqs": 1,
        "enable_prefix_caching": False,  # a cached token would not be observed again
        "enforce_eager": True,
        "worker_extension_cls": "kvq_plugin.calibrate.worker.ObservingWorker",
    }
    unquantized = source.unquantized_dtype
    if unquantized != options["kv_cache_dtype"]:
        # "auto" would quantize the cache as the checkpoint's present scales say.
        if load.dtype == "float32":
            raise ValueError(
                "the checkpoint already has KV scales, and vLLM can only set them aside in "
                "bfloat16 or float16, not float32: use --dtype bfloat16, or --driver hf"
            )
        dtype = load.dtype if load.dtype != "auto" else unquantized
        options |= {"dtype": dtype, "kv_cache_dtype": dtype}
    return options


def check_ignored(settings: Settings, modules: Sequence[str]) -> None:
    """ValueError when ``settings.ignore`` names layers without attention, or leaves none, and
    where there are none."""
    if not modules:
        raise ValueError(
            "found no attention layer that writes K and V to a cache: expected some; models whose "
            "attention is all latent (MLA), linear or an encoder's have nothing to calibrate"
        )
    numbers = {layer_number(module) for module in modules}
    if None in numbers:
        unnumbered = next(m for m in modules if layer_number(m) is None)
        raise ValueError(f"{unnumbered}: expected a layer number in the module's name")
    unknown = settings.ignore - numbers
    if unknown:
        raise ValueError(
            f"--ignore names layers {sorted(unknown)}, and the attention layers are "
            f"{', '.join(map(str, sorted(numbers)))}"
        )
    if not numbers - settings.ignore:
        raise ValueError(NOTHING_LEFT)


def broken_message(
    names: dict[str, str], broken: Sequence[tuple[str, str, int]], window: int
) -> str:
    """What to say about NaN or infinite activations; *broken* in layer order."""
    layer, kind, count = broken[0]
    more = len({b[0] for b in broken}) - 1
    return (
        f"layer {layer_number(layer)} ({names.get(layer, layer)}): {count:,} values of "
        f"{kind.upper()} are NaN or infinite in sample {window}"
        + (f", and {more} later layers have such values too" if more else "")
        + ": nothing was written. Expected finite activations: check the checkpoint, or use "
        "--dtype bfloat16 or float32 if float16 overflows"
    )


def _gathered(settings: Settings, folder: Path, names: dict[str, str]) -> Observers:
    """Join what the workers wrote to *folder*: parts of the heads of every layer."""
    parts: dict[tuple[str, str], dict[int, dict[str, torch.Tensor]]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        states: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
        for key, tensor in load_file(file).items():
            layer, kind, statistic = key.split("|")
            states.setdefault((layer, kind), {})[statistic] = tensor
        for key, state in states.items():
            # Ranks that hold the same heads saw the same values.
            parts.setdefault(key, {})[int(state["first_head"])] = state
    observers = Observers(settings)
    for layer, kind in sorted(parts, key=lambda key: (layer_number(key[0]), key)):
        found = parts[layer, kind]
        states = [found[first] for first in sorted(found)]
        joined = observer_class(settings).joined(settings.of_kind(kind), states)
        observers.add(names[layer], kind, joined)
    return observers


# --- in the engine's process -----------------------------------------------------------


def _work(pipe: Connection) -> None:
    """Receives what to run; sends the layers, then an answer per window and one at the end."""
    job = pipe.recv()
    from vllm import LLM

    llm = LLM(**job["options"])
    pipe.send(_attach(llm, job))
    for window in job["windows"]:
        _read(llm, window)
        pipe.send([entry for rank in llm.collective_rpc("kvq_broken") for entry in rank])
    llm.collective_rpc("kvq_save", args=(job["folder"],))
    pipe.send(None)


def _attach(llm: Any, job: dict[str, Any]) -> tuple[list[str], dict[str, str | None]]:
    """Attach the observers; names of the attention layers, and of the probes once loaded."""
    from kvq_plugin.calibrate.worker import packed

    modules = llm.collective_rpc("kvq_attach", args=(packed(job["settings"]),))
    loaded = llm.collective_rpc("kvq_load_names", args=(job["probes"],))[0]
    everywhere = list(dict.fromkeys(name for names in modules for name in names))
    return everywhere, dict(zip(job["probes"], loaded, strict=True))


def _read(llm: Any, window: list[int]) -> None:
    """Prefill *window*."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
    llm.generate({"prompt_token_ids": window}, params, use_tqdm=False)


if __name__ == "__main__":
    run_engine(_work)
