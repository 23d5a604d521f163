"""The scale-loading method: the design's eight points, on a light layer.

Shapes, shards and zero points: ``test_scale_shapes.py``; real checkpoints through vLLM's own
loader: ``test_scale_loading.py``.
"""

from __future__ import annotations

import logging
import uuid
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from scale_layers import (  # noqa: E402
    HEAD_SIZE,
    HEADS,
    QUERY_HEADS,
    Layer,
    build,
    give,
    loaded,
    results,
)

from kvq_plugin.formats import FORMATS  # noqa: E402
from kvq_plugin.serving import compat  # noqa: E402
from kvq_plugin.serving.scales import keys, method  # noqa: E402
from kvq_plugin.serving.scales.declared import KVScheme  # noqa: E402

FP8 = sorted(n for n, f in FORMATS.items() if not f.is_dynamic and f.default_scale is not None)
PER_TOKEN = sorted(n for n, f in FORMATS.items() if f.is_dynamic)
INT8_STATIC = sorted(n for n, f in FORMATS.items() if not f.is_dynamic and not f.default_scale)


@pytest.fixture
def warnings(monkeypatch):
    """Messages warned, each once, by a fresh logger (vLLM remembers them per logger)."""
    logger = compat.init_logger(f"kvq.test.{uuid.uuid4()}")
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger.addHandler(handler)
    monkeypatch.setattr(method, "logger", logger)
    return messages


@pytest.fixture
def fnuz(monkeypatch):
    monkeypatch.setattr(compat.current_platform, "is_fp8_fnuz", lambda: True)


# --- point 1: an unquantized cache -----------------------------------------------------


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
def test_1_unquantized_cache_ignores_the_checkpoint(dtype):
    layer = loaded(dtype, k_scale=0.5, v_scale=torch.full((7, 9), -3.0), k_zero_point=4)
    assert results(layer) == [1.0, 1.0, 1.0, 1.0]
    assert layer.kvq_key_static is None and layer.kvq_value_static is None


@pytest.mark.parametrize("attn_type", ["encoder", "encoder_only"])
def test_1_encoder_layers_have_no_cache_to_scale(attn_type):
    layer = loaded(layer=Layer("int8", attn_type=attn_type))
    assert results(layer)[:2] == [1.0, 1.0] and layer.kvq_key_static is None


# --- point 2: both, none, one ----------------------------------------------------------


@pytest.mark.parametrize("dtype", [*FP8, *INT8_STATIC])
def test_2_both_scales_are_used(dtype):
    layer = loaded(dtype, k_scale=0.5, v_scale=torch.tensor([0.25], dtype=torch.bfloat16))
    assert results(layer)[:2] == [0.5, 0.25]
    assert layer.kvq_key_static.scale.eq(0.5).all() and layer.kvq_value_static.scale.eq(0.25).all()


@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize("explicit", [False, True])
def test_2_without_scales_fp8_takes_its_default(dtype, explicit):
    layer = loaded(dtype, **({"k_scale": -1.0, "v_scale": [-1.0]} if explicit else {}))
    assert results(layer) == [1.0, 1.0, 1.0, 1.0]
    assert layer.kvq_key_static.scale.shape == (HEADS, HEAD_SIZE)


@pytest.mark.parametrize("dtype", INT8_STATIC)
def test_2_without_scales_static_int8_is_refused(dtype):
    layer = Layer(dtype)
    method = build(layer)
    with pytest.raises(ValueError, match="kvq calibrate.*int8_per_token_head"):
        method.process_weights_after_loading(layer)
    assert layer.kvq_key_static is None


@pytest.mark.parametrize(("only", "lacks"), [("k_scale", "v_scale"), ("v_scale", "k_scale")])
@pytest.mark.parametrize("shape", [(), (HEADS,), (HEADS, HEAD_SIZE)])
@pytest.mark.parametrize("dtype", ["fp8", "int8"])
def test_2_a_lone_scale_is_refused(dtype, shape, only, lacks):
    """AutoFP8's single kv_scale is loaded as both (test_scale_loading.py); nothing else is."""
    with pytest.raises(ValueError, match=rf"layers\.0\.attn \(no {lacks}\).*kvq calibrate"):
        loaded(dtype, **{only: torch.full(shape, 0.75)})


# --- point 3: fnuz ---------------------------------------------------------------------


def test_3_fnuz_doubles_loaded_fp8_scales(fnuz):
    layer = loaded("fp8", k_scale=0.5, v_scale=0.25, q_scale=3.0, prob_scale=0.125)
    assert results(layer) == [1.0, 0.5, 6.0, 0.25]
    assert layer.kvq_value_static.scale.eq(0.5).all()


def test_3_fnuz_doubles_a_single_scale_once(fnuz):
    single = torch.tensor(0.5)  # as kv_scale is loaded
    assert results(loaded("fp8", k_scale=single, v_scale=single)) == [1.0, 1.0, 1.0, 1.0]


def test_3_fnuz_doubles_every_channel(fnuz):
    k = torch.rand(HEADS, HEAD_SIZE) + 0.1
    layer = loaded("fp8", k_scale=k, v_scale=k)
    assert torch.equal(layer._k_scale, 2 * k)


def test_3_fnuz_leaves_defaults_alone(fnuz):
    assert results(loaded("fp8")) == [1.0, 1.0, 1.0, 1.0]


def test_3_fnuz_leaves_int8_alone(fnuz):
    layer = loaded("int8", k_scale=0.5, v_scale=0.25, q_scale=3.0, prob_scale=0.125)
    assert results(layer) == [0.5, 0.25, 3.0, 0.125]


# --- point 4: q and prob ---------------------------------------------------------------


def test_4_absent_q_takes_k_and_absent_prob_is_one(warnings):
    first, second = Layer(name="layers.0.attn"), Layer(name="layers.1.attn")
    method = build(first, second)
    for layer in (first, second):
        give(layer, k_scale=0.5, v_scale=0.25)
        method.process_weights_after_loading(layer)
    assert results(second) == [0.5, 0.25, 0.5, 1.0]
    assert sum("no q scale" in m for m in warnings) == 1


def test_4_absent_q_beside_channel_scales_is_their_largest():
    k = torch.rand(HEADS, HEAD_SIZE) + 0.1
    layer = loaded("int8", k_scale=k, v_scale=k)
    assert layer._q_scale.shape == () and layer._q_scale_float == k.max().item()


def test_4_q_per_query_head_is_reduced_within_each_group():
    q = torch.arange(1.0, QUERY_HEADS + 1)
    k = torch.tensor([0.5, 0.25])
    layer = loaded("fp8", q_scale=q.view(-1, 1, 1), k_scale=k, v_scale=k)
    assert layer._q_scale.tolist() == [3.0, 6.0] and layer._q_scale_float == 6.0


def test_4_q_must_be_single_beside_a_single_k():
    with pytest.raises(ValueError, match=r"layers\.0\.attn: q_scale has 2 values"):
        loaded("fp8", q_scale=torch.ones(QUERY_HEADS, 1, 1), k_scale=0.5, v_scale=0.5)


def test_4_prob_must_be_single():
    with pytest.raises(ValueError, match=r"prob_scale of shape \(2,\).*accepted shapes are"):
        loaded("fp8", k_scale=0.5, v_scale=0.5, prob_scale=[0.5, 0.5])


# --- point 5: warnings, per-token formats ----------------------------------------------


@pytest.mark.parametrize("dtype", [*FP8, *INT8_STATIC])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_5_scales_of_no_model_are_said(dtype, scale, warnings):
    """Of a channel, too, where it is the largest; small ones beside others may be dead channels."""
    scheme = KVScheme("int" if dtype in INT8_STATIC else "float", 8)
    sound = torch.full((HEADS, HEAD_SIZE), 0.1)
    odd = sound.clone()
    odd[1, 3] = scale
    loaded(dtype, scheme, k_scale=scale, v_scale=odd)
    said = [m for m in warnings if "largest code" in m]
    assert ["k_scale" in m for m in said] == ([True] if scale < 1 else [True, False])
    assert all(m.startswith("layers.0.attn: ") for m in said)
    warnings.clear()
    loaded(dtype, scheme, k_scale=sound, v_scale=0.1)
    assert not [m for m in warnings if "largest code" in m]


@pytest.mark.parametrize("dtype", FP8)
def test_5_unit_scales_warn_once_for_e4m3_only(dtype, warnings):
    layers = [Layer(dtype, name=f"layers.{i}.attn") for i in range(3)]
    method = build(*layers)
    for layer in layers:
        method.process_weights_after_loading(layer)
    expected = "e5m2" not in dtype  # which reaches 57344 and needs no scale
    assert sum("scale 1.0" in m for m in warnings) == expected


def test_5_uncalibrated_query_warns_where_the_backend_quantizes_it(warnings):
    given = {"k_scale": 0.5, "v_scale": 0.25, "q_scale": 0.5}
    ours = SimpleNamespace(supports_quant_query_input=False)
    loaded(layer=Layer("fp8", impl=ours), **given)
    assert not warnings
    flash = SimpleNamespace(supports_quant_query_input=True)
    for _ in range(2):
        loaded(layer=Layer("fp8", impl=flash), **given)
    assert len(warnings) == 1 and "prob_scale" in warnings[0]
    loaded(layer=Layer("fp8", impl=flash), prob_scale=0.125, **given)
    assert len(warnings) == 1


@pytest.mark.parametrize("dtype", PER_TOKEN)
def test_5_per_token_formats_take_no_static_scales(dtype, warnings):
    layer = loaded(dtype, k_scale=0.5, v_scale=torch.zeros(3, 5), q_scale=2.0)
    assert results(layer) == [1.0, 1.0, 1.0, 1.0] and not warnings
    assert layer.kvq_key_static is None and layer.kvq_value_static is None


def test_5_int8_scales_of_unknown_origin_warn_once(warnings):
    loaded("int8", k_scale=0.5, v_scale=0.5, q_scale=0.5)
    assert [m for m in warnings if "amax/127" in m]
    warnings.clear()
    loaded("int8", KVScheme("int", 8), k_scale=0.5, v_scale=0.5, q_scale=0.5)
    assert not warnings


# --- point 6: results, placeholders, second call ---------------------------------------


def test_6_results_are_fp32_buffers_with_float_and_host_copies():
    layer = loaded("fp8", k_scale=0.5, v_scale=0.25, q_scale=3.0, prob_scale=0.125)
    buffers = dict(layer.named_buffers())
    for x, value in (("k", 0.5), ("v", 0.25), ("q", 3.0), ("prob", 0.125)):
        assert buffers[f"_{x}_scale"].dtype == torch.float32
        assert getattr(layer, f"_{x}_scale_float") == value
        assert getattr(layer, f"_{x}_scale_cpu").item() == value


def test_6_float_copy_of_channel_scales_is_the_largest():
    k = torch.rand(HEADS, HEAD_SIZE) + 0.1
    layer = loaded("fp8", k_scale=k, v_scale=torch.tensor([0.5, 0.25]))
    assert torch.equal(layer._k_scale, k) and torch.equal(layer._k_scale_cpu, k)
    assert results(layer)[:2] == [k.max().item(), 0.5]
    assert torch.equal(layer.kvq_key_static.scale, k)
    assert torch.equal(layer.kvq_value_static.scale[:, 3], torch.tensor([0.5, 0.25]))


@pytest.mark.parametrize("dtype", ["auto", "fp8", "int8_per_token_head"])
def test_6_placeholders_go_and_a_second_call_changes_nothing(dtype):
    layer = Layer(dtype)
    method = build(layer)
    assert {n for n, _ in layer.named_parameters()} == {*keys.SCALES, *keys.ZERO_POINTS}
    assert layer.k_scale.dtype == torch.float32 and layer.k_scale.item() == -1.0
    give(layer, k_scale=0.5, v_scale=0.25)
    method.process_weights_after_loading(layer)
    before = results(layer), layer.kvq_key_static
    assert not dict(layer.named_parameters())
    method.process_weights_after_loading(layer)
    assert (results(layer), layer.kvq_key_static) == before


def test_6_apply_raises():
    with pytest.raises(RuntimeError, match="should not be called"):
        build().apply(Layer(), torch.ones(1))


def test_6_pre_processed_weights_keep_their_buffers():
    source = loaded("int8", k_scale=torch.rand(HEADS, HEAD_SIZE) + 1, v_scale=0.5,
                    k_zero_point=[3])  # fmt: skip
    layer = Layer("int8")
    method = build(layer)
    for name, buffer in source.named_buffers():
        layer.register_buffer(name, buffer)
    utils = pytest.importorskip("vllm.model_executor.utils")
    with utils.weights_already_processed():
        method.process_weights_after_loading(layer)
    assert not dict(layer.named_parameters()) and results(layer) == results(source)
    assert torch.equal(layer.kvq_key_static.scale, source.kvq_key_static.scale)
    assert layer.kvq_key_static.zero_point.eq(3).all()


def test_6_dummy_weights_count_as_absent():
    from vllm.model_executor.model_loader.weight_utils import initialize_single_dummy_weight

    layer = Layer("fp8")
    method = build(layer)
    for parameter in layer.parameters():
        initialize_single_dummy_weight(parameter)
    method.process_weights_after_loading(layer)
    assert results(layer) == [1.0, 1.0, 1.0, 1.0]


# --- point 8: layers without scales ----------------------------------------------------


def run(layers, method, given):
    for layer in layers:
        if layer.layer_name in given:
            give(layer, k_scale=0.5, v_scale=0.5)
    for layer in layers:
        method.process_weights_after_loading(layer)


@pytest.mark.parametrize("dtype", ["fp8", "int8"])
@pytest.mark.parametrize("scheme", [None, KVScheme("float", 8), KVScheme("int", 8)])
def test_8_all_layers_without_scales_are_listed(dtype, scheme):
    layers = [Layer(dtype, name=f"model.layers.{i}.attn") for i in range(5)]
    method = build(*layers, scheme=scheme)
    with pytest.raises(ValueError) as error:
        run(layers, method, {"model.layers.0.attn", "model.layers.3.attn"})
    message = str(error.value)
    for i in range(5):
        assert (f"model.layers.{i}.attn" in message) == (i in (1, 2, 4))
    assert "kvq calibrate" in message and "int8_per_token_head" in message


@pytest.mark.parametrize("dtype", ["fp8", "int8"])
def test_8_a_declared_scheme_without_any_scale_is_refused(dtype):
    layers = [Layer(dtype, name=f"layers.{i}.attn") for i in range(2)]
    with pytest.raises(ValueError, match="layers.0.attn, layers.1.attn"):
        run(layers, build(*layers, scheme=KVScheme("int", 8)), set())


@pytest.mark.parametrize(
    "scheme", [KVScheme("float", 8, dynamic=True), KVScheme("float", 8, every_layer=False)]
)
def test_8_schemes_that_promise_no_scales_leave_fp8_its_default(scheme):
    layers = [Layer("fp8", name=f"layers.{i}.attn") for i in range(2)]
    run(layers, build(*layers, scheme=scheme), set())
    assert results(layers[1])[:2] == [1.0, 1.0]


def test_8_layers_that_need_no_scales_are_not_missed():
    skipped = Layer("auto", name="layers.0.attn")
    dynamic = Layer("int8_per_token_head", name="layers.1.attn")
    encoder = Layer("int8", name="encoder.attn", attn_type="encoder_only")
    static = Layer("int8", name="layers.2.attn")
    layers = [static, skipped, dynamic, encoder]
    run(layers, build(*layers, scheme=KVScheme("int", 8)), {"layers.2.attn"})
    assert results(static)[:2] == [0.5, 0.5] and results(skipped)[:2] == [1.0, 1.0]


def test_8_a_model_that_failed_to_build_is_forgotten():
    method = build()
    method.create_weights(Layer("int8", name="lost"))
    layer = Layer("int8")
    method.create_weights(layer)
    with pytest.raises(ValueError, match="kvq calibrate"):
        method.process_weights_after_loading(layer)


def test_8_a_second_model_of_the_same_config_starts_afresh():
    first, second = Layer("fp8", name="layers.0.attn"), Layer("fp8", name="draft.0.attn")
    method = build(first)
    run([first], method, {"layers.0.attn"})
    method.create_weights(second)
    method.process_weights_after_loading(second)
    assert results(second)[:2] == [1.0, 1.0]


# --- layers that share another's cache -------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("own", [{}, {"k_scale": 9.0, "v_scale": 9.0, "q_scale": 2.0}])
def test_shared_cache_takes_the_targets_scales(order, own):
    k = torch.rand(HEADS, HEAD_SIZE) + 0.1
    target = Layer("int8", name="layers.0.attn")
    reader = Layer("int8", name="layers.1.attn", kv_sharing_target_layer_name="layers.0.attn")
    method = build(target, reader, scheme=KVScheme("int", 8))
    give(target, k_scale=k, v_scale=0.5, k_zero_point=[3])
    give(reader, **own)
    for i in order:
        method.process_weights_after_loading((target, reader)[i])
    for x in ("_k_scale", "_v_scale", "_k_zero_point"):
        assert torch.equal(getattr(reader, x), getattr(target, x))
    assert torch.equal(reader.kvq_key_static.scale, k)
    assert reader.kvq_key_static.zero_point.eq(3).all()
    assert results(reader)[2] == own.get("q_scale", k.max().item())


@pytest.mark.parametrize("dtype", ["auto", "int8_per_token_head"])
def test_shared_cache_without_static_scales(dtype):
    target = Layer(dtype, name="layers.0.attn")
    reader = Layer(dtype, name="layers.1.attn", kv_sharing_target_layer_name="layers.0.attn")
    run([target, reader], build(target, reader), set())
    assert results(reader) == [1.0, 1.0, 1.0, 1.0]


def test_shared_cache_of_an_unknown_layer_is_refused():
    reader = Layer("fp8", kv_sharing_target_layer_name="elsewhere")
    with pytest.raises(ValueError, match="layers.0.attn reads the KV cache of elsewhere"):
        build(reader).process_weights_after_loading(reader)
