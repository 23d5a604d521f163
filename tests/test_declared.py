"""What a checkpoint declares about its KV cache, and baselines that ignore it."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import pytest
import torch
from engine_jobs import Batch, Job, only, run
from safetensors.torch import load_file
from scaled import change
from tiny_models import make

from kvq_plugin import evaluate, inspection
from kvq_plugin.calibrate.checkpoint import Source
from kvq_plugin.calibrate.engine import Load
from kvq_plugin.calibrate.output import SCALES, Target, with_scheme
from kvq_plugin.calibrate.run import calibrate
from kvq_plugin.calibrate.settings import Settings
from kvq_plugin.serving.scales.declared import KVScheme, declared_scheme, unquantized_dtype

FP8 = {"num_bits": 8, "type": "float", "dynamic": False}
ALGORITHM = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}
#: name -> (quantization section, what it declares)
SECTIONS = {
    "nothing": ({"quant_method": "fp8"}, None),
    "empty": ({"quant_method": "compressed-tensors", "kv_cache_scheme": None}, None),
    "compressed-tensors": ({"kv_cache_scheme": FP8}, KVScheme("float", 8)),
    "defaults": ({"kv_cache_scheme": {"strategy": "tensor"}}, KVScheme("int", 8)),
    "modelopt": (
        {"quant_method": "modelopt", "kv_cache_scheme": FP8},
        KVScheme("float", 8, every_layer=False),
    ),
    "modelopt's algorithm": (ALGORITHM, KVScheme("float", 8, every_layer=False)),
    "modelopt's file": (
        {"producer": {"name": "modelopt"}, "quantization": ALGORITHM},
        KVScheme("float", 8, every_layer=False),
    ),
    "modelopt, nvfp4": ({"kv_cache_quant_algo": "nvfp4"}, KVScheme("float", 4, every_layer=False)),
    "modelopt, weights alone": ({"quantization": {"quant_algo": "FP8"}}, None),
    "modelopt, null": ({"quantization": {"kv_cache_quant_algo": None}}, None),
}


@pytest.mark.parametrize("name", SECTIONS)
@pytest.mark.parametrize("where", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("as_object", [False, True])
def test_declared_schemes(name, where, nested, as_object):
    section, expected = SECTIONS[name]
    config = {where: section}
    config = (
        {"text_config": SimpleNamespace(**config) if as_object else config} if nested else config
    )
    config = SimpleNamespace(**config) if as_object else config
    assert declared_scheme(config) == expected
    assert unquantized_dtype(config) == ("auto" if expected is None else "bfloat16")


def test_modelopts_file_counts_where_the_configuration_says_nothing(tmp_path):
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": ALGORITHM}))
    assert declared_scheme({}, tmp_path) == KVScheme("float", 8, every_layer=False)
    assert declared_scheme({"quantization_config": {"quant_method": "fp8"}}, tmp_path) is None


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"dtype": "float16"}, "float16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"text_config": {"dtype": "float16"}}, "float16"),
        ({"dtype": torch.float16}, "float16"),
        ({"dtype": torch.bfloat16}, "bfloat16"),
        ({"dtype": "float32"}, "bfloat16"),
    ],
)
def test_an_unquantized_cache_has_the_models_dtype(config, expected):
    assert unquantized_dtype(config | {"quantization_config": {"kv_cache_scheme": FP8}}) == expected


# --- ModelOpt, through the engine ------------------------------------------------------

random.seed(1)
SAMPLES = [[random.randrange(3, 500) for _ in range(100)] for _ in range(2)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny model, and the same as ModelOpt exports it with an fp8 KV cache, declared in either
    file. None of its weights is quantized: on CPUs vLLM lacks operators for those that are."""
    folder = tmp_path_factory.mktemp("modelopt")
    plain = make(folder, "gqa")
    scales = {
        f"model.layers.{i}.self_attn.{x}_proj.{x}_scale": torch.tensor(4.0)
        for i in range(2)
        for x in "kv"
    }
    quantization = ALGORITHM | {"exclude_modules": ["model*", "lm_head"]}
    section = {"quant_method": "modelopt", "quantization": quantization}
    found = {"plain": plain, "config.json": change(plain, folder / "config", scales, section)}
    found["hf_quant_config.json"] = change(plain, folder / "sidecar", scales)
    sidecar = {"producer": {"name": "modelopt", "version": "0.29"}, "quantization": quantization}
    (folder / "sidecar" / "hf_quant_config.json").write_text(json.dumps(sidecar))
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_baseline_of_a_modelopt_checkpoint_is_unquantized(models):
    batch = Batch(SAMPLES, {"prompt_logprobs": 0, "max_tokens": 1})
    baseline = {n: evaluate.cache_dtype(str(m), evaluate.BASELINE) for n, m in models.items()}
    jobs = {n: Job({"model": str(m), "kv_cache_dtype": baseline[n]}, [batch])
            for n, m in models.items()}  # fmt: skip
    jobs["auto"] = Job({"model": str(models["config.json"])}, [batch])
    results = dict(zip(jobs, only(run(list(jobs.values()))), strict=True))
    scored = {name: [o.prompt_logprobs for o in r.batches[0]] for name, r in results.items()}
    assert scored["config.json"] == scored["hf_quant_config.json"] == scored["plain"]
    assert scored["auto"] != scored["plain"]  # which quantizes, as the checkpoint asks


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_calibration_observes_what_is_not_quantized(models, tmp_path):
    load = Load(kv_memory_bytes=64 << 20)
    written = []
    for name in ("plain", "config.json"):
        source, target = Source.find(str(models[name])), Target(tmp_path / name)
        calibrate(source, target, Settings(), SAMPLES, load)
        written.append(load_file(target.folder / SCALES))
    plain, modelopt = written
    assert plain.keys() == modelopt.keys()
    assert all(torch.equal(scale, modelopt[name]) for name, scale in plain.items())
    checkpoint = inspection.read(tmp_path / "config.json")
    assert checkpoint.scheme.type == "int" and not checkpoint.problems


def test_new_scales_replace_what_modelopt_declared(models):
    config = with_scheme(Source.find(str(models["config.json"])), Settings().kv_cache_scheme(), [])
    assert "kv_cache_quant_algo" not in json.dumps(config)
    assert config["quantization_config"]["quantization"]["quant_algo"] == "FP8"
    assert declared_scheme(config).dtype() == "int8"
