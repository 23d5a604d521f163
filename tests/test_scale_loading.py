"""KV scales of real checkpoints: a tiny Llama through vLLM's own loader, without an engine."""

# ruff: noqa: F811 - fixtures are imported

from __future__ import annotations

import copy
import json
import logging
import uuid

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("vllm")

from model_loading import (  # noqa: E402, F401
    ATTENTION,
    both,
    checkpoint,
    engine_free,
    load,
)
from scale_layers import results  # noqa: E402

from kvq_plugin.mapping import MIXED  # noqa: E402
from kvq_plugin.serving import compat, unserved  # noqa: E402
from kvq_plugin.serving.scales import method  # noqa: E402

K_CHANNEL = torch.linspace(0.125, 8, 64)  # exact in bfloat16 enough to tell every channel
OFFSET = torch.arange(64.0) - 32


def mapped(layers):
    """Engine arguments of a mapping."""
    return {"additional_config": {"kvq": {"layers": layers}}}


#: Row of the table in docs/checkpoints.md and design -> (model, cache dtype, tensors under the
#: attention module, expected k, v, q and prob scales).
ROWS = {
    "AutoFP8": ("gqa", "fp8", {"kv_scale": 0.5}, [0.5, 0.5, 0.5, 1.0]),
    "compressed-tensors, tensor": (
        "gqa",
        "fp8",
        {"k_scale": [0.5], "v_scale": [0.25], "q_scale": [2.0], "k_zero_point": [0]},
        [0.5, 0.25, 2.0, 1.0],
    ),
    "compressed-tensors, attn_head": (
        "gqa",
        "fp8",
        {
            "k_scale": [[[0.5]], [[0.25]]],
            "v_scale": [[[1.0]], [[2.0]]],
            "q_scale": [[[1.0]], [[3.0]], [[4.0]], [[2.0]]],
        },
        [0.5, 2.0, 4.0, 1.0],
    ),
    "compressed-tensors, channel": (
        "gqa",
        "int8",
        {"k_scale": K_CHANNEL, "v_scale": K_CHANNEL[:, None] * 2, "v_zero_point": OFFSET[:, None]},
        [8.0, 16.0, 8.0, 1.0],
    ),
    "plain prob": (
        "gqa",
        "fp8",
        {"k_scale": 0.5, "v_scale": 0.25, "prob_scale": 0.125},
        [0.5, 0.25, 0.5, 0.125],
    ),
    "ModelOpt": (
        "gqa",
        "fp8",
        {"k_proj.k_scale": 0.5, "v_proj.v_scale": 0.25},
        [0.5, 0.25, 0.5, 1.0],
    ),
    "Quark": (
        "gqa",
        "fp8",
        {
            "k_proj.output_scale": 0.5,
            "v_proj.output_scale": 0.25,
            "q_proj.output_scale": 2.0,
            "prob_output_scale": 0.125,
        },
        [0.5, 0.25, 2.0, 0.125],
    ),
    "fused": (
        "gqa",
        "fp8",
        {"qkv_proj.k_scale": 0.5, "qkv_proj.v_scale": 0.25},
        [0.5, 0.25, 0.5, 1.0],
    ),
    "HYV3": (
        "hy_v3",
        "fp8",
        {"q.scale": 2.0, "k_cache.scale": 0.5, "v_cache.scale": 0.25},
        [0.5, 0.25, 2.0, 1.0],
    ),
    "NemotronH": (
        "nemotron_h",
        "fp8",
        {"k_proj.k_scale": 0.5, "v_proj.v_scale": 0.25},
        [0.5, 0.25, 0.5, 1.0],
    ),
    "msModelSlim": (
        "gqa",
        "int8",
        {
            "k_proj.kv_cache_scale": K_CHANNEL,
            "k_proj.kv_cache_offset": OFFSET,
            "v_proj.kv_cache_scale": K_CHANNEL * 2,
            "v_proj.kv_cache_offset": OFFSET,
        },
        [8.0, 16.0, 8.0, 1.0],
    ),
    "in place": ("gqa", "fp8", {"attn.k_scale": 0.5, "attn.v_scale": 0.25}, [0.5, 0.25, 0.5, 1.0]),
    # Through maybe_remap_kv_scale_name, which knows neither of these, and beside sinks.
    "gpt-oss, AutoFP8": ("sinks", "fp8", {"k_proj.kv_scale": 0.5}, [0.5, 0.5, 0.5, 1.0]),
    "gpt-oss, Quark": (
        "sinks",
        "fp8",
        {"k_proj.output_scale": 0.5, "v_proj.output_scale": 0.25, "prob_scale": 0.125},
        [0.5, 0.25, 0.5, 0.125],
    ),
    # An attention module whose own name is that of vLLM's layer elsewhere.
    "GPT-2": ("gpt2", "fp8", {"k_scale": 0.5, "v_scale": 0.25}, [0.5, 0.25, 0.5, 1.0]),
}
MODULES = {"gpt2": "transformer.h.{}.attn.", "nemotron_h": "backbone.layers.{}.mixer."}


@pytest.mark.parametrize("row", ROWS)
def test_load_every_row(row, load, reports, monkeypatch):
    name, dtype, scales, expected = ROWS[row]
    if name == "nemotron_h":  # hybrids are refused; what such a checkpoint says is still read
        monkeypatch.setattr(unserved, "reason", lambda vllm_config: None)
    module = MODULES.get(name, ATTENTION)
    tensors = both(scales, module)
    if name == "sinks":
        sinks = checkpoint_sinks = torch.tensor([1.0, 2.0, 3.0, 4.0])
        tensors |= {module.format(i) + "sinks": checkpoint_sinks for i in range(2)}
    model, layers, _ = load(dtype, tensors, model=name)
    assert results(layers[0]) == expected
    assert results(layers[1])[:2] == [2 * e for e in expected[:2]]
    for layer, report, i in zip(layers, reports, range(2), strict=True):
        assert layer.layer_name in report and dtype in report
        for key in scales:
            assert module.format(i) + key in report
    if dtype == "int8":
        assert torch.equal(layers[0].kvq_key_static.scale, K_CHANNEL.view(2, 32))
        assert torch.equal(layers[0].kvq_value_static.zero_point, OFFSET.view(2, 32))
    if name == "sinks":
        assert torch.equal(model.model.layers[0].attn.sinks.float(), sinks)


@pytest.fixture
def reports(monkeypatch):
    """Lines the loader reports at debug level, one per layer."""
    logger = compat.init_logger(f"kvq.test.{uuid.uuid4()}")
    logger.setLevel(logging.DEBUG)
    lines, handler = [], logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addFilter(lambda record: record.levelno == logging.DEBUG)
    logger.addHandler(handler)
    monkeypatch.setattr(method, "logger", logger)
    return lines


def test_report_says_where_a_scale_that_was_not_given_comes_from(load, reports):
    load("fp8", both({"kv_scale": 0.5}))
    assert f"k_scale 0.5 from {ATTENTION.format(0)}kv_scale" in reports[0]
    assert f"v_scale 0.5 from {ATTENTION.format(0)}kv_scale" in reports[0]
    assert "q_scale 0.5 as k_scale" in reports[0] and "prob_scale 1 by default" in reports[0]


@pytest.mark.parametrize("name", ["gqa", "sinks"])
@pytest.mark.parametrize(
    "extra", [ATTENTION.format(7) + "k_scale", ATTENTION.format(2) + "v_proj.output_scale"]
)
def test_load_refuses_scales_of_layers_the_model_lacks(name, extra, load):
    tensors = both({"k_scale": 0.5, "v_scale": 0.5})
    with pytest.raises((ValueError, KeyError), match=extra.replace(".", r"\.")) as error:
        load("fp8", {**tensors, extra: 0.5}, model=name)
    assert error.type is ValueError and "does not have" in str(error.value)


def test_load_ignores_extra_scales_where_none_are_used(load):
    load("int8_per_token_head", both({"k_scale": 0.5}) | {ATTENTION.format(7) + "k_scale": 0.5})


def test_load_refuses_a_scale_given_twice(load):
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.attn.*twice.*k_proj\.k_scale"):
        load("fp8", both({"k_scale": 0.5, "v_scale": 0.5, "k_proj.k_scale": 0.25}))


@pytest.mark.parametrize("indexed", [None, 0, 1])
def test_load_refuses_a_scale_in_two_files(indexed, load, tmp_path):
    """The last one would win, whichever file an index names."""
    scales = both({"k_scale": 0.5, "v_scale": 0.5})
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    key = ATTENTION.format(0) + "k_scale"
    save_file({key: torch.tensor(0.25)}, tmp_path / names[1], {"format": "pt"})

    def shards(written):  # what load wrote in one file becomes the first of two
        (tmp_path / "model.safetensors").rename(tmp_path / names[0])
        if indexed is not None:
            places = dict.fromkeys(written, names[0]) | {key: names[indexed]}
            places |= {"unused": names[1]}
            index = tmp_path / "model.safetensors.index.json"
            index.write_text(json.dumps({"weight_map": places}))

    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.attn.*k_scale twice.*two of its"):
        load("fp8", scales, prepare=shards)


@pytest.mark.parametrize("dtype", ["int8_per_token_head", "int4"])
def test_load_ignores_scales_given_twice_where_none_are_used(dtype, load):
    load(dtype, both({"k_scale": 0.5, "v_scale": 0.5, "k_proj.k_scale": 0.25}))


@pytest.mark.parametrize("dtype", ["int8_per_token_head", "int4", "fp8", MIXED, "auto"])
def test_layers_that_were_not_told_are_no_silent_fallback(dtype, load):
    """vLLM's Falcon makes its layers without a cache configuration."""
    if dtype == "auto":
        load(dtype, {}, model="falcon")
        return
    more = mapped({"0": "auto", "1": "int4"}) if dtype == MIXED else {}
    layer = "h.1" if dtype == MIXED else "h.0"
    with pytest.raises(ValueError, match=f"{dtype} was asked for FalconForCausalLM.*{layer}.*auto"):
        load(dtype, {}, model="falcon", **more)


@pytest.mark.parametrize("dtype", ["int4", "k3v2", "k8v4", "int8_per_token_head"])
def test_recent_rows_of_a_prefix_lm_are_refused(dtype, load):
    """HRM-Text, to whose layers vLLM gives a backend around ours that attends in both directions:
    engines started, and ended with their first request."""
    if dtype in ("k8v4", "int8_per_token_head"):
        _, layers, _ = load(dtype, {}, model="prefix_lm")
        assert {layer.kv_cache_dtype for layer in layers} == {dtype}
        return
    with pytest.raises(ValueError, match=f"{dtype} was asked for .*directions.*use .*int8_per"):
        load(dtype, {}, model="prefix_lm")


@pytest.mark.parametrize(
    "model, layers, found",
    [
        ("gqa", {"0": "auto", "1": "int4"}, ["auto", "int4"]),
        ("falcon", {"default": "auto"}, ["auto"] * 2),
        ("window_and_full_layers", {"sliding": "auto", "default": "fp8"}, ["auto", "fp8"]),
        # Layers 2 and 3 read the caches of 0 and 1, whatever the mapping has for them.
        ("kv_sharing", {"0-1": "auto", "2-3": "int4"}, ["auto"] * 4),
    ],
)
def test_layers_of_a_mapping_may_stay_unquantized(model, layers, found, load):
    _, made, _ = load(MIXED, {}, model=model, **mapped(layers))
    assert [layer.kv_cache_dtype for layer in made] == found


def test_load_without_scales(load):
    assert results(load("fp8_e5m2", {})[1][0]) == [1.0, 1.0, 1.0, 1.0]


def test_load_e5m2_with_scales(load):
    # vLLM refuses this dtype for any other quantization method.
    assert results(load("fp8_e5m2", both({"kv_scale": 0.5}))[1][0])[0] == 0.5


@pytest.mark.parametrize("key", ["k_scale", "attn.v_scale", "q_scale"])
def test_load_dynamic_format_ignores_scales(key, load):
    _, layers, _ = load("int8_per_token_head", both({key: torch.ones(3, 7)}))
    assert results(layers[0]) == [1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("dtype", ["fp8", "int8"])
def test_load_skipped_layers_stay_unscaled(dtype, load):
    _, layers, _ = load(dtype, both({"kv_scale": 0.5}), kv_cache_dtype_skip_layers=["0"])
    assert results(layers[0]) == [1.0, 1.0, 1.0, 1.0] and layers[0].kvq_key_static is None
    assert results(layers[1])[:2] == [1.0, 1.0] and layers[1].kvq_key_static is not None


def test_load_lists_missing_layers(load):
    with pytest.raises(ValueError, match="model.layers.1.self_attn.attn"):
        load("fp8", {ATTENTION.format(0) + "k_scale": 0.5, ATTENTION.format(0) + "v_scale": 0.5})


def test_load_bad_scale_names_its_layer(load):
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.attn: cannot use k_scale"):
        load("fp8", {ATTENTION.format(1) + "k_scale": torch.ones(5)})


def test_load_dummy(load):
    assert results(load("fp8", {}, load_format="dummy")[1][1]) == [1.0, 1.0, 1.0, 1.0]


INT8_CHANNEL = {
    "quant_method": "compressed-tensors",
    "format": "dense",
    "config_groups": {},
    "kv_cache_scheme": {
        "num_bits": 8,
        "type": "int",
        "strategy": "channel",
        "symmetric": True,
        "dynamic": False,
    },
}


@pytest.mark.parametrize("dtype", ["auto", "int8"])
@pytest.mark.parametrize("method", ["compressed-tensors", "kvq"])
def test_load_declared_int8_per_channel(method, dtype, load):
    k, v = torch.rand(2, 64) + 0.1
    tensors = {"k_scale": k.view(-1, 1), "v_scale": v.view(2, 1, 32)}
    tensors = {ATTENTION.format(i) + n: t for i in range(2) for n, t in tensors.items()}
    _, layers, config = load(dtype, tensors, INT8_CHANNEL | {"quant_method": method})
    assert config.cache_config.cache_dtype == layers[0].kv_cache_dtype == "int8"
    assert config.quant_config.get_name() == method
    assert torch.equal(layers[1].kvq_key_static.scale, k.view(2, 32))
    assert torch.equal(layers[1].kvq_value_static.scale, v.view(2, 32))


def test_load_unquantized_cache_of_a_checkpoint_with_int8_scales(load):
    _, layers, _ = load("bfloat16", both({"kv_scale": 0.5}), INT8_CHANNEL)
    assert results(layers[0]) == [1.0, 1.0, 1.0, 1.0]


def test_load_quantized_weights_with_a_kv_scheme(load, checkpoint):
    """compressed-tensors W8A8 beside int8 attn_head scales: both load."""
    quantization = copy.deepcopy(INT8_CHANNEL)
    quantization["format"] = "int-quantized"
    quantization["kv_cache_scheme"]["strategy"] = "attn_head"
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}
    quantization["config_groups"] = {
        "group_0": {
            "targets": ["Linear"],
            "weights": weights | {"strategy": "channel"},
            "input_activations": weights | {"strategy": "token", "dynamic": True},
        }
    }
    quantization["ignore"] = ["lm_head"]
    tensors = {}
    for name, weight in checkpoint("gqa")[0].items():
        if "_proj.weight" in name:
            scale = weight.float().abs().amax(1, keepdim=True) / 127
            tensors[name] = (weight.float() / scale).round().to(torch.int8)
            tensors[name + "_scale"] = scale
    heads = torch.tensor([0.5, 0.25]).view(2, 1, 1)
    for i in range(2):
        prefix = ATTENTION.format(i)
        tensors |= {prefix + "k_scale": heads, prefix + "v_scale": 2 * heads}
    model, layers, config = load("int8", tensors, quantization)
    linear = model.model.layers[0].self_attn.qkv_proj
    assert type(linear.quant_method).__name__ == "CompressedTensorsLinearMethod"
    assert type(config.quant_config).__mro__[2].__name__ == "CompressedTensorsConfig"
    assert layers[0]._k_scale.tolist() == [0.5, 0.25]
    assert layers[0]._v_scale.tolist() == [1.0, 0.5]
