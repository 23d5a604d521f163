"""KV scales of real checkpoints: a tiny Llama through vLLM's own loader, without an engine."""

from __future__ import annotations

import copy
import json
import os
import pickle

import pytest
import torch

pytest.importorskip("vllm")

from scale_layers import results  # noqa: E402

MODEL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 128,
    "max_position_embeddings": 256,
}
ATTENTION = "model.layers.{}.self_attn."


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Weights and config.json of a tiny random Llama."""
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**MODEL)).to(torch.bfloat16).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    return load_file(folder / "model.safetensors"), config


@pytest.fixture(scope="module")
def engine_free(tmp_path_factory):
    """vLLM's process groups for one rank, without an engine; the environment is put back."""
    from vllm import distributed
    from vllm.config import VllmConfig, set_current_vllm_config

    from kvq_plugin.serving import register

    environment = dict(os.environ)
    register()
    with pytest.MonkeyPatch.context() as patch, set_current_vllm_config(VllmConfig()):
        # vLLM's CPU worker does the same: torch has no allocator to empty without a device.
        patch.setattr(torch.accelerator, "empty_cache", lambda: None)
        store = tmp_path_factory.mktemp("groups") / "store"
        distributed.init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
        distributed.initialize_model_parallel(1, 1)
        yield
        distributed.destroy_model_parallel()
        distributed.destroy_distributed_environment()
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def load(llama, engine_free, tmp_path):
    """``load(dtype, tensors, **engine_args)`` -> (model, its attention layers, vllm_config)."""
    from safetensors.torch import save_file
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    def run(dtype, tensors, quantization=None, **engine_args):
        weights, config = llama[0], dict(llama[1])
        if quantization is not None:
            config["quantization_config"] = quantization
        (tmp_path / "config.json").write_text(json.dumps(config))
        tensors = {k: torch.as_tensor(v).contiguous().clone() for k, v in tensors.items()}
        save_file({**weights, **tensors}, tmp_path / "model.safetensors", {"format": "pt"})
        vllm_config = EngineArgs(
            model=str(tmp_path),
            skip_tokenizer_init=True,
            kv_cache_dtype=dtype,
            max_model_len=128,
            enforce_eager=True,
            dtype="bfloat16",
            **engine_args,
        ).create_engine_config()
        vllm_config = pickle.loads(pickle.dumps(vllm_config))  # as workers receive it
        with set_current_vllm_config(vllm_config):
            model = get_model(vllm_config=vllm_config)
        layers = vllm_config.compilation_config.static_forward_context
        assert list(layers) == [ATTENTION.format(i) + "attn" for i in range(2)]
        return model, list(layers.values()), vllm_config

    return run


def both(suffixes):
    """*suffixes* -> value, in both layers; layer 1's values are doubled."""
    return {
        ATTENTION.format(i) + name: torch.as_tensor(value) * (1 + i)
        for i in range(2)
        for name, value in suffixes.items()
    }


SPELLINGS = {
    "AutoFP8": ({"kv_scale": 0.5}, [0.5, 0.5, 0.5, 1.0]),
    "compressed-tensors": (
        {"k_scale": [0.5], "v_scale": [0.25], "q_scale": [2.0], "k_zero_point": [0]},
        [0.5, 0.25, 2.0, 1.0],
    ),
    "plain prob": ({"k_scale": 0.5, "v_scale": 0.25, "prob_scale": 0.125}, [0.5, 0.25, 0.5, 0.125]),
    "ModelOpt": ({"k_proj.k_scale": 0.5, "v_proj.v_scale": 0.25}, [0.5, 0.25, 0.5, 1.0]),
    "Quark": (
        {
            "k_proj.output_scale": 0.5,
            "v_proj.output_scale": 0.25,
            "q_proj.output_scale": 2.0,
            "prob_output_scale": 0.125,
        },
        [0.5, 0.25, 2.0, 0.125],
    ),
    "fused": ({"qkv_proj.k_scale": 0.5, "qkv_proj.v_scale": 0.25}, [0.5, 0.25, 0.5, 1.0]),
    "HYV3": (
        {"q.scale": 2.0, "k_cache.scale": 0.5, "v_cache.scale": 0.25},
        [0.5, 0.25, 2.0, 1.0],
    ),
    "in place": ({"attn.k_scale": 0.5, "attn.v_scale": 0.25}, [0.5, 0.25, 0.5, 1.0]),
}


@pytest.mark.parametrize("origin", SPELLINGS)
def test_load_every_spelling(origin, load):
    tensors, expected = SPELLINGS[origin]
    _, layers, _ = load("fp8", both(tensors))
    assert results(layers[0]) == expected
    assert results(layers[1])[:2] == [2 * e for e in expected[:2]]


def test_load_ascend_int8_per_channel(load):
    k = torch.rand(64) + 0.1
    tensors = {"k_proj.kv_cache_scale": k, "v_proj.kv_cache_scale": k + 1}
    tensors |= {"k_proj.kv_cache_offset": torch.arange(64.0) - 32}
    tensors = {ATTENTION.format(i) + n: t for i in range(2) for n, t in tensors.items()}
    _, layers, _ = load("int8", tensors)
    for layer in layers:
        assert torch.equal(layer.kvq_key_static.scale, k.view(2, 32))
        assert torch.equal(layer.kvq_key_static.zero_point.flatten(), torch.arange(64.0) - 32)
        assert torch.equal(layer.kvq_value_static.scale, k.view(2, 32) + 1)


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


def test_load_quantized_weights_with_a_kv_scheme(load, llama):
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
    for name, weight in llama[0].items():
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


def test_load_again_into_the_same_model(load):
    """A weight reload replaces the scales in place."""
    reload = pytest.importorskip("vllm.model_executor.model_loader.reload")
    model, layers, config = load("fp8", both({"k_scale": 0.5, "v_scale": 0.5}))
    buffer = layers[0]._k_scale
    reload.initialize_layerwise_reload(model)
    model.load_weights(iter(both({"k_scale": [0.75], "v_scale": [0.125]}).items()))
    reload.finalize_layerwise_reload(model, config.model_config)
    assert layers[0]._k_scale is buffer and results(layers[0])[:2] == [0.75, 0.125]
    assert layers[1].kvq_value_static.scale.eq(0.25).all()
