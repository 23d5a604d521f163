"""The quantization config: wrapping, schemes, names, and how vLLM picks it up."""

from __future__ import annotations

import copy
import json
import pickle
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from kvq_plugin import serving  # noqa: E402
from kvq_plugin.formats import SERVED, Kind  # noqa: E402
from kvq_plugin.serving import compat, selection  # noqa: E402
from kvq_plugin.serving.scales import keys  # noqa: E402
from kvq_plugin.serving.scales.config import (  # noqa: E402
    KVQConfig,
    ScaleLoading,
    resolve_cache_dtype,
    wrap_quant_config,
)
from kvq_plugin.serving.scales.declared import KVScheme  # noqa: E402

INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False}
FLOAT8 = {**INT8, "type": "float", "strategy": "tensor"}
NONE = {"quant_method": "none"}

#: Checkpoints' quantization_config by weight quantization, without a KV scheme.
WEIGHTS = {
    "compressed-tensors": {"format": "dense", "config_groups": {}, "ignore": []},
    "fp8": {"activation_scheme": "dynamic"},
    "gptq": {"bits": 4, "group_size": 32, "sym": True, "desc_act": False, "lm_head": False},
    "awq": {"bits": 4, "group_size": 32, "zero_point": True},
    "modelopt": {"quantization": {"quant_algo": "FP8"}},
}


def stock(name, **extra):
    """vLLM's own config for a checkpoint of weight quantization *name*."""
    from vllm.model_executor.layers.quantization import get_quantization_config

    declared = {"quant_method": name, **copy.deepcopy(WEIGHTS[name]), **extra}
    return get_quantization_config(name).from_config(declared), declared


def engine(cache_dtype, quant=None, declared=None, holder="hf_config"):
    """The parts of a VllmConfig that wrapping reads."""
    inner = SimpleNamespace()
    hf_config = inner if holder == "hf_config" else SimpleNamespace(text_config=inner)
    if declared is not None:
        inner.quantization_config = declared
    return SimpleNamespace(
        cache_config=SimpleNamespace(cache_dtype=cache_dtype),
        model_config=SimpleNamespace(hf_config=hf_config),
        quant_config=quant,
    )


def attention():
    """An ``Attention`` nobody has initialised: enough for ``isinstance``."""
    return compat.Attention.__new__(compat.Attention)


# --- which config ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", sorted(SERVED))
def test_unquantized_checkpoint_gets_our_config(dtype):
    config = engine(dtype)
    wrap_quant_config(config)
    assert type(config.quant_config) is KVQConfig and config.cache_config.cache_dtype == dtype
    first = config.quant_config
    wrap_quant_config(config)
    assert config.quant_config is first


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
@pytest.mark.parametrize("name", [None, *WEIGHTS])
def test_unquantized_cache_is_left_to_vllm(name, dtype):
    quant, declared = (None, None) if name is None else stock(name)
    config = engine(dtype, quant, declared)
    wrap_quant_config(config)
    assert config.quant_config is quant and not isinstance(quant, ScaleLoading)


def test_a_config_without_a_model_is_left_alone():
    config = engine("fp8")
    config.model_config = None
    wrap_quant_config(config)
    assert config.quant_config is None


@pytest.mark.parametrize("name", WEIGHTS)
def test_quantized_weights_keep_their_config(name):
    quant, declared = stock(name)
    config = engine("int8_per_token_head", quant, declared)
    wrap_quant_config(config)
    wrapped = config.quant_config
    assert isinstance(wrapped, type(quant)) and wrapped.get_name() == quant.get_name()
    assert wrapped.kv_cache_scheme is None
    changed = {"kv_cache_scheme": None, "kvq_scheme": None}
    assert vars(wrapped) == vars(quant) | changed
    assert type(wrapped.get_quant_method(attention(), "a")).__name__ == "KVQCacheMethod"
    wrap_quant_config(config)
    assert config.quant_config is wrapped


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_wrapped_configs_travel(name, duplicate):
    quant, declared = stock(name)
    config = engine("fp8", quant, {**declared, "kv_cache_scheme": FLOAT8})
    wrap_quant_config(config)
    twin = duplicate(config.quant_config)
    assert type(twin) is type(config.quant_config)
    assert twin.get_name() == quant.get_name()
    assert twin.kvq_scheme == KVScheme("float", 8, every_layer=name != "modelopt")
    assert vars(twin).keys() == vars(config.quant_config).keys()


def test_our_config_travels():
    twin = pickle.loads(pickle.dumps(KVQConfig(KVScheme("int", 8))))
    assert type(twin) is KVQConfig and twin.kvq_scheme == KVScheme("int", 8)


def test_our_config_leaves_linear_layers_unquantized():
    from vllm.model_executor.layers.linear import ReplicatedLinear, UnquantizedLinearMethod

    config = KVQConfig()
    linear = ReplicatedLinear.__new__(ReplicatedLinear)
    assert isinstance(config.get_quant_method(linear, "l"), UnquantizedLinearMethod)
    assert type(config.get_quant_method(attention(), "a")).__name__ == "KVQCacheMethod"
    assert config.get_quant_method(torch.nn.Identity(), "x") is None
    assert config.get_config_filenames() == [] and config.get_min_capability() == 0


# --- draft models ----------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, *WEIGHTS])
@pytest.mark.parametrize("dtype", ["auto", "fp8"])
def test_a_draft_model_loads_scales_our_way_too(name, dtype, monkeypatch):
    """EAGLE models make a quantization config of their own, from their own checkpoint."""
    quant, declared = (None, None) if name is None else stock(name)
    around, own = engine(dtype), engine(dtype, quant, declared)
    monkeypatch.setattr(compat, "get_current_vllm_config_or_none", lambda: around)
    monkeypatch.setattr(selection, "serves", lambda vllm_config: True)  # test_whose_cache.py
    wrapped = serving._on_draft_quant_config
    config = wrapped(quant, own.model_config)
    if dtype == "auto":
        assert config is quant
        return
    assert wrapped(quant, None) is quant
    assert isinstance(config, ScaleLoading) and (quant is None or isinstance(config, type(quant)))
    assert wrapped(config, own.model_config) is config
    other = engine(dtype, None, {**NONE, "kv_cache_scheme": INT8})
    with pytest.raises(ValueError, match="another code"):
        wrapped(None, other.model_config)


# --- schemes ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, *WEIGHTS])
@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [
        (INT8, "int8"),
        ({**INT8, "dynamic": True}, "int8_per_token_head"),
        ({}, "auto"),
        (FLOAT8, "fp8"),
        ({**FLOAT8, "strategy": "attn_head"}, "fp8"),
        ({**FLOAT8, "dynamic": True}, "fp8"),
    ],
)
def test_auto_follows_the_declared_scheme(name, scheme, dtype):
    quant, declared = (None, dict(NONE)) if name is None else stock(name)
    config = engine("auto", quant, {**declared, "kv_cache_scheme": scheme or None})
    wrap_quant_config(config)
    assert config.cache_config.cache_dtype == dtype
    assert isinstance(config.quant_config, ScaleLoading) == bool(scheme)


def test_scheme_of_a_text_model_inside_another():
    config = engine("auto", None, {**NONE, "kv_cache_scheme": INT8}, holder="text_config")
    resolve_cache_dtype(config)
    assert config.cache_config.cache_dtype == "int8"


def test_compressed_tensors_scheme_is_taken_from_its_config():
    quant, _ = stock("compressed-tensors", kv_cache_scheme=INT8)
    assert quant.kv_cache_scheme == INT8
    config = engine("auto", quant)
    wrap_quant_config(config)
    assert config.cache_config.cache_dtype == "int8"
    assert config.quant_config.kv_cache_scheme is None
    assert config.quant_config.kvq_scheme == KVScheme("int", 8)


def test_explicit_unquantized_cache_wins_over_a_scheme_vllm_would_reject():
    quant, declared = stock("compressed-tensors", kv_cache_scheme=INT8)
    config = engine("bfloat16", quant, declared)
    wrap_quant_config(config)
    assert config.cache_config.cache_dtype == "bfloat16"
    assert type(config.quant_config.get_quant_method(attention(), "a")).__name__ == (
        "KVQCacheMethod"
    )


@pytest.mark.parametrize("dtype", sorted(SERVED))
@pytest.mark.parametrize("scheme", [INT8, FLOAT8])
def test_scales_for_another_code_are_refused(scheme, dtype):
    format = SERVED[dtype]
    same = (format.key.code.kind is Kind.FLOAT) == (scheme["type"] == "float")
    config = engine(dtype, None, {**NONE, "kv_cache_scheme": scheme})
    if format.is_dynamic or same:
        wrap_quant_config(config)
        assert isinstance(config.quant_config, KVQConfig)
        return
    with pytest.raises(ValueError, match=f"--kv-cache-dtype {dtype}.*type={scheme['type']}.*auto"):
        wrap_quant_config(config)
    assert config.quant_config is None


def test_modelopt_fp8_scales_are_refused_for_int8():
    quantization = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}
    quant, declared = stock("modelopt", quantization=quantization)
    with pytest.raises(ValueError, match="type=float"):
        wrap_quant_config(engine("int8", quant, declared))
    config = engine("fp8", quant, declared)
    wrap_quant_config(config)
    assert not config.quant_config.kvq_scheme.is_complete


@pytest.mark.parametrize("scheme", [{**INT8, "num_bits": 4}, {**FLOAT8, "num_bits": 4}])
def test_schemes_without_a_format(scheme):
    declared = {**NONE, "kv_cache_scheme": scheme}
    for dtype in ("auto", "int8", "fp8"):
        with pytest.raises(ValueError, match="num_bits=4.*int8_per_token_head"):
            wrap_quant_config(engine(dtype, None, declared))
    config = engine("int8_per_token_head", None, declared)
    wrap_quant_config(config)  # takes nothing from the checkpoint
    assert isinstance(config.quant_config, KVQConfig)


# --- names -----------------------------------------------------------------------------

L = "model.layers.3."
MAPPED = {
    "self_attn.kv_scale": "self_attn.attn.k_scale",
    "self_attn.q_scale": "self_attn.attn.q_scale",
    "self_attn.k_scale": "self_attn.attn.k_scale",
    "self_attn.v_scale": "self_attn.attn.v_scale",
    "self_attn.prob_scale": "self_attn.attn.prob_scale",
    "self_attn.k_zero_point": "self_attn.attn.k_zero_point",
    "self_attn.v_zero_point": "self_attn.attn.v_zero_point",
    "self_attn.k_proj.k_scale": "self_attn.attn.k_scale",
    "self_attn.v_proj.v_scale": "self_attn.attn.v_scale",
    "self_attn.q_proj.output_scale": "self_attn.attn.q_scale",
    "self_attn.k_proj.output_scale": "self_attn.attn.k_scale",
    "self_attn.v_proj.output_scale": "self_attn.attn.v_scale",
    "self_attn.prob_output_scale": "self_attn.attn.prob_scale",
    "self_attn.qkv_proj.k_scale": "self_attn.attn.k_scale",
    "self_attn.qkv_proj.v_scale": "self_attn.attn.v_scale",
    "self_attn.qkqkv_proj.v_scale": "self_attn.attn.v_scale",
    "mixer.k_proj.k_scale": "mixer.attn.k_scale",
    "mixer.v_proj.v_scale": "mixer.attn.v_scale",
    "self_attn.q.scale": "self_attn.attn.q_scale",
    "self_attn.k_cache.scale": "self_attn.attn.k_scale",
    "self_attn.v_cache.scale": "self_attn.attn.v_scale",
    "self_attn.k_proj.kv_cache_scale": "self_attn.attn.k_scale",
    "self_attn.v_proj.kv_cache_scale": "self_attn.attn.v_scale",
    "self_attn.k_proj.kv_cache_offset": "self_attn.attn.k_zero_point",
    "self_attn.v_proj.kv_cache_offset": "self_attn.attn.v_zero_point",
}
UNTOUCHED = (
    "self_attn.k_proj.weight",
    "self_attn.k_proj.weight_scale",
    "self_attn.k_proj.input_scale",
    "self_attn.o_proj.output_scale",
    "self_attn.sinks",
    "mlp.down_proj.weight_zero_point",
    "self_attn.q_norm.scale",
)


LAYERS = [L + "self_attn.attn", L + "mixer.attn"]


@pytest.mark.parametrize("key", [*MAPPED, *UNTOUCHED])
def test_scale_names(key):
    found = keys.parse(L + key)
    if key in UNTOUCHED:
        assert found is None
        return
    assert {*found.parameters} <= {*keys.SCALES, *keys.ZERO_POINTS}
    for layers in ([], LAYERS):
        target, *more = found.targets(layers)
        assert target == L + MAPPED[key]
        # One scale for K and V, the only one of its kind, is loaded as both.
        assert more == ([L + MAPPED["self_attn.v_scale"]] if "kv_scale" in key else [])
        assert keys.parse(target).targets(layers) == [target]
        inner = target.removeprefix("model.")  # an inner module reads its own part
        assert keys.parse(inner).targets(layers) == [inner]


def test_scale_names_follow_the_models_own_modules():
    found = keys.parse("transformer.h.0.attn.k_scale")
    assert found.targets(["transformer.h.0.attn.attn"]) == ["transformer.h.0.attn.attn.k_scale"]
    again = keys.parse("transformer.h.0.attn.attn.k_scale")
    assert again.targets(["transformer.h.0.attn.attn"]) == [again.key]


@pytest.mark.parametrize("name", [None, *WEIGHTS])
def test_vllm_leaves_renamed_scales_alone(name):
    """Stacked projections and the config's own mapper come after us."""
    from vllm.model_executor.models.utils import WeightsMapper

    quant, declared = (None, None) if name is None else stock(name)
    config = engine("fp8", quant, declared)
    wrap_quant_config(config)
    stacked = WeightsMapper(orig_to_new_stacked={".k_proj": (".qkv_proj", "k")})
    mapper = stacked | config.quant_config.get_cache_scale_mapper()
    for target in MAPPED.values():
        assert mapper.map_name(L + target) == L + target


@pytest.mark.parametrize("name", WEIGHTS)
def test_scales_without_a_parameter_are_ignored(name):
    quant, declared = stock(name)
    config = engine("fp8", quant, declared)
    wrap_quant_config(config)
    for owner in (config.quant_config, KVQConfig()):
        for suffix in (".k_scale", ".v_zero_point", ".prob_scale"):
            assert suffix in owner._ignore_unexpected_suffixes


@pytest.mark.parametrize("weights", ["fp8_per_tensor", "fp8_per_channel"])
def test_online_fp8_weights_keep_their_config(weights):
    """Config only: of these, vLLM 0.32's CPU build serves one per channel (test_interop.py); per
    tensor it lacks an operator (``_C::static_scaled_fp8_quant() expected at most 0
    argument(s)``), with this plugin or without."""
    from vllm.config.quantization import resolve_quantization_config
    from vllm.model_executor.layers.quantization.online.base import OnlineQuantizationConfig

    quant = OnlineQuantizationConfig(args=resolve_quantization_config(weights, None))
    config = engine("int8_per_token_head", quant)
    wrap_quant_config(config)
    wrapped = pickle.loads(pickle.dumps(config.quant_config))
    assert isinstance(wrapped, OnlineQuantizationConfig) and wrapped.args == quant.args
    assert type(wrapped.get_quant_method(attention(), "a")).__name__ == "KVQCacheMethod"


# --- as vLLM picks it up ---------------------------------------------------------------


def test_the_method_is_registered():
    from vllm.model_executor.layers.quantization import (
        QUANTIZATION_METHODS,
        get_quantization_config,
    )

    assert "kvq" in QUANTIZATION_METHODS and get_quantization_config("kvq") is KVQConfig


@pytest.mark.parametrize(
    ("quantization", "arguments", "expected"),
    [
        ({"quant_method": "kvq", "kv_cache_scheme": INT8}, {}, KVScheme("int", 8)),
        ({"quant_method": "kvq"}, {}, None),
        (None, {"quantization": "kvq"}, None),
    ],
)
def test_vllm_builds_our_config(quantization, arguments, expected, tmp_path):
    from vllm.config import LoadConfig, ModelConfig
    from vllm.model_executor.model_loader.weight_utils import get_quant_config

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 64,
    }
    if quantization is not None:
        config["quantization_config"] = quantization
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = ModelConfig(
        model=str(tmp_path), skip_tokenizer_init=True, dtype="bfloat16", **arguments
    )
    assert model.quantization == "kvq"
    built = get_quant_config(model, LoadConfig())
    assert type(built) is KVQConfig and built.kvq_scheme == expected
