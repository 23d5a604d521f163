"""Calibrated checkpoints of tiny models, made by either driver and served by the engine."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_jobs import Batch, Job, only, run
from safetensors.torch import load_file, save_file
from tiny_models import make

from kvq_plugin.calibrate.checkpoint import Source
from kvq_plugin.calibrate.engine import Load
from kvq_plugin.calibrate.output import SCALES, Target
from kvq_plugin.calibrate.run import calibrate
from kvq_plugin.calibrate.settings import Settings, Strategy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

random.seed(1)
SAMPLES = [[random.randrange(3, 500) for _ in range(200)] for _ in range(4)]
PROMPTS = [[random.randrange(3, 500) for _ in range(n)] for n in (33, 150)]
BATCH = Batch(PROMPTS, {"prompt_logprobs": 0, "max_tokens": 4})
#: What an outlier channel is larger by. A power of two: scaling by it rounds nothing.
FACTOR = 64.0
#: name -> (feature of tiny_models, stressed, settings)
SERVED = {
    "channel": ("gqa", False, Settings()),
    "asymmetric": ("gqa", False, Settings(asymmetric=True)),
    "group": ("gqa", False, Settings(strategy=Strategy.GROUP, group_size=8, asymmetric=True)),
    "ignore": ("gqa", False, Settings(ignore=frozenset([0]))),
    "fp8": ("gqa", False, Settings("fp8", Strategy.HEAD, prob_scale=True)),
    "stressed_tensor": ("gqa", True, Settings(strategy=Strategy.TENSOR)),
    "stressed_channel": ("gqa", True, Settings()),
    # Modules whose names differ from the checkpoint's; softcap and sinks with zero points.
    "alibi": ("alibi", False, Settings()),
    "softcap": ("softcap", False, Settings(asymmetric=True)),
    "sinks": ("sinks", False, Settings(asymmetric=True)),
}
#: Root mean square of log-probability differences to the unquantized cache, in nats. Measured:
#: int8 0.006 to 0.03; taking a feature away moves them by 0.4 and more.
MAX_CHANGE = 0.05


def stress(model: Path, out: Path) -> Path:
    """Copy *model* to *out* with outlier channels in K and V that change none of its outputs.

    In every kv head a pair of K's channels that the rotary embedding turns together grows by
    FACTOR and the query's shrink; a channel of V grows and the output projection's columns
    shrink (the transformation of SmoothQuant, arXiv:2211.10438, the other way round).
    """
    tensors = load_file(model / "model.safetensors")
    heads, kv_heads, size = 4, 2, 32
    pair, channel = (3, 3 + size // 2), 5
    for layer in range(2):
        prefix = f"model.layers.{layer}.self_attn."
        weight = {x: tensors[f"{prefix}{x}_proj.weight"] for x in ("q", "k", "v", "o")}
        for head in range(heads):
            for i in pair:
                weight["q"][head * size + i] /= FACTOR
            weight["o"][:, head * size + channel] /= FACTOR
        for head in range(kv_heads):
            for i in pair:
                weight["k"][head * size + i] *= FACTOR
            weight["v"][head * size + channel] *= FACTOR
    out.mkdir()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text((model / "config.json").read_text())
    return out


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    models = {feature: make(folder, feature) for feature in {s[0] for s in SERVED.values()}}
    models["stressed"] = stress(models["gqa"], folder / "stressed")
    return models


def model_of(name: str) -> str:
    feature, stressed, _ = SERVED[name]
    return "stressed" if stressed else feature


@pytest.fixture(scope="module")
def logprobs(models, tmp_path_factory) -> dict[str, list[float]]:
    """Of every token, for each model's unquantized cache and each of SERVED."""
    folder = tmp_path_factory.mktemp("calibrated")
    jobs = {name: Job({"model": str(path), "kv_cache_dtype": "auto"}, [BATCH])
            for name, path in models.items()}  # fmt: skip
    for name, (_, _, settings) in SERVED.items():
        source = Source.find(str(models[model_of(name)]))
        calibrate(source, Target(folder / name), settings, SAMPLES, driver="hf")
        # "auto" takes the dtype from the checkpoint.
        jobs[f"{name} calibrated"] = Job({"model": str(folder / name)}, [BATCH])
    results = only(run(list(jobs.values())))
    return {
        name: [p for output in result.batches[0] for p in output.prompt_logprobs]
        for name, result in zip(jobs, results, strict=True)
    }


def change(a: list[float], b: list[float]) -> float:
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a))


@pytest.mark.parametrize("name", [n for n in SERVED if n != "stressed_tensor"])
def test_calibrated_cache_is_close_to_unquantized(logprobs, name):
    moved = change(logprobs[f"{name} calibrated"], logprobs[model_of(name)])
    assert 0 < moved < (0.15 if SERVED[name][2].scheme == "fp8" else MAX_CHANGE)


def test_stress_changes_no_output_of_the_unquantized_model(logprobs):
    assert change(logprobs["stressed"], logprobs["gqa"]) < 1e-5


def test_outlier_channels_hurt_a_scale_per_tensor_only(logprobs):
    per_tensor = change(logprobs["stressed_tensor calibrated"], logprobs["stressed"])
    per_channel = change(logprobs["stressed_channel calibrated"], logprobs["stressed"])
    untouched = change(logprobs["channel calibrated"], logprobs["gqa"])
    assert per_tensor > 5 * per_channel
    # Scales take the factor in whole, so codes and outputs are the same to the bit.
    assert per_channel == pytest.approx(untouched, rel=1e-3)


def test_an_ignored_layer_keeps_its_precision(logprobs):
    ignored = change(logprobs["ignore calibrated"], logprobs["gqa"])
    assert ignored < 0.9 * change(logprobs["channel calibrated"], logprobs["gqa"])


@pytest.mark.parametrize(
    ("feature", "ranks"),
    [("gqa", 1), ("gqa", 2), ("mqa", 2)],  # mqa: both ranks hold its one kv head
)
def test_both_drivers_see_the_same(models, tmp_path, monkeypatch, feature, ranks):
    if ranks > 1:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    source = Source.find(str(models.get(feature) or make(tmp_path, feature)))
    load = Load(dtype="float32", tensor_parallel=ranks, kv_memory_bytes=64 << 20)
    calibrate(source, Target(tmp_path / "engine"), Settings(q_scale=True), SAMPLES, load)
    by_engine = load_file(tmp_path / "engine" / SCALES)
    load = replace(load, tensor_parallel=1)
    calibrate(source, Target(tmp_path / "hf"), Settings(), SAMPLES, load, driver="hf")
    for name, scale in load_file(tmp_path / "hf" / SCALES).items():
        assert torch.allclose(by_engine.pop(name), scale, rtol=1e-3), name
    assert {(n.rsplit(".", 1)[1], tuple(t.shape)) for n, t in by_engine.items()} == {
        ("q_scale", (4, 1, 1))
    }
