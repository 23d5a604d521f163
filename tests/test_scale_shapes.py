"""Which shapes and values a scale may have, and which part of it a rank keeps (points 7, 8)."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm")

from scale_layers import HEAD_SIZE, HEADS, Layer, build, give, loaded, results  # noqa: E402

from kvq_plugin.serving import compat  # noqa: E402
from kvq_plugin.serving.scales.shapes import HeadShard, ScaleReader, own_kv_heads  # noqa: E402


@pytest.fixture
def ranks(monkeypatch):
    """``ranks(rank, world)``: pretend to be one tensor-parallel rank."""

    def pretend(rank, world):
        for name, value in (
            ("model_parallel_is_initialized", True),
            ("get_tensor_model_parallel_rank", rank),
            ("get_tensor_model_parallel_world_size", world),
        ):
            monkeypatch.setattr(compat, name, lambda value=value: value)

    return pretend


# --- point 7: tensor parallelism -------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "world", "owners"),
    [
        (4, 1, [(0, 4)]),
        (4, 2, [(0, 2), (2, 4)]),
        (4, 4, [(0, 1), (1, 2), (2, 3), (3, 4)]),
        (2, 4, [(0, 1), (0, 1), (1, 2), (1, 2)]),
        (1, 4, [(0, 1)] * 4),
    ],
)
def test_7_scales_are_sharded_and_replicated(total, world, owners, ranks):
    channel = torch.rand(total, HEAD_SIZE) + 0.1
    head = torch.rand(total) + 0.1
    query = torch.rand(total * 8) + 0.1  # 8 query heads per kv head
    per_head = query.view(total, -1).amax(1)
    for rank, (first, last) in enumerate(owners):
        ranks(rank, world)
        count = last - first
        layer = loaded(
            layer=Layer("int8", heads=count, num_heads=total * 8 // world),
            total_kv_heads=total,
            k_scale=channel.reshape(-1),
            v_scale=head.view(-1, 1, 1),
            k_zero_point=torch.arange(total).view(-1, 1, 1),
            q_scale=query.view(-1, 1, 1),
        )
        assert torch.equal(layer.kvq_key_static.scale, channel[first:last])
        assert torch.equal(layer.kvq_value_static.scale[:, 0], head[first:last])
        assert torch.equal(layer._v_scale, head[first:last])
        if layer.kvq_key_static.zero_point is not None:
            zeros = layer.kvq_key_static.zero_point[:, 0]
            assert zeros.tolist() == list(range(first, last))
        assert torch.equal(layer._q_scale, per_head[first:last])


@pytest.mark.parametrize("shape", [(), (1,)])
def test_7_tensor_scales_are_the_same_on_every_rank(shape, ranks):
    for rank in range(2):
        ranks(rank, 2)
        layer = loaded(total_kv_heads=4, k_scale=torch.full(shape, 0.5), v_scale=0.25)
        assert results(layer)[:2] == [0.5, 0.25]


def test_7_a_layer_with_its_own_number_of_heads(ranks):
    ranks(1, 2)  # the model says 8, this layer has 2 on each of 2 ranks
    k = torch.tensor([1.0, 2.0, 3.0, 4.0])
    layer = loaded("int8", total_kv_heads=8, k_scale=k, v_scale=1.0)
    assert layer._k_scale.tolist() == [3.0, 4.0]


def test_7_a_layer_with_fewer_heads_than_ranks_where_the_model_has_more(ranks):
    """Gemma 4's global layers: 4 kv heads, twice each on 8 ranks; 16 elsewhere."""
    k = torch.tensor([1.0, 2.0, 3.0, 4.0])
    for rank in range(8):
        ranks(rank, 8)
        layer = Layer("int8", heads=1, num_heads=1)
        method = build(layer, total_kv_heads=16)
        method.own_kv_heads = 4
        give(layer, k_scale=k, v_scale=1.0)
        method.process_weights_after_loading(layer)
        assert layer._k_scale.tolist() == [k[rank // 2]]
    assert HeadShard.of(2, 16, 3, 8, own_total=4) == HeadShard(16, 6, 2, 8)  # 4 cannot be


def test_7_modules_say_how_many_heads_their_layers_have():
    outer = torch.nn.Module()
    outer.attn, outer.total_num_kv_heads = Layer(name="layers.3.self_attn.attn"), 4
    model = torch.nn.ModuleList([outer, Layer(name="layers.0.attn")])
    assert own_kv_heads(model) == {"layers.3.self_attn.attn": 4}


def test_7_a_shard_needs_all_heads(ranks):
    ranks(0, 2)
    with pytest.raises(ValueError, match=r"k_scale of shape \(2,\).*\(4,\)"):
        loaded("int8", total_kv_heads=4, k_scale=torch.ones(2), v_scale=1.0)


# --- point 8: shapes and values --------------------------------------------------------

FORMS = {
    "tensor": [(), (1,)],
    "head": [(HEADS,), (HEADS, 1), (HEADS, 1, 1)],
    "channel": [
        (HEADS * HEAD_SIZE,),
        (HEADS * HEAD_SIZE, 1),
        (1, HEADS * HEAD_SIZE),
        (HEADS, HEAD_SIZE),
        (HEADS, 1, HEAD_SIZE),
    ],
}
CANONICAL = {"tensor": (), "head": (HEADS,), "channel": (HEADS, HEAD_SIZE)}


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("form", "shape"), [(form, shape) for form, shapes in FORMS.items() for shape in shapes]
)
def test_8_every_published_shape_loads(form, shape, storage):
    elements = torch.Size(shape).numel()
    scale = ((torch.arange(elements) + 1) / 64).to(storage).reshape(shape)
    layer = loaded("int8", k_scale=scale, v_scale=scale)
    assert layer._k_scale.shape == CANONICAL[form] and layer._k_scale.dtype == torch.float32
    assert torch.equal(layer._k_scale.flatten(), scale.float().flatten())
    expected = scale.float().reshape(CANONICAL[form])
    expected = expected[:, None] if form == "head" else expected
    assert torch.equal(layer.kvq_key_static.scale, expected.expand(HEADS, HEAD_SIZE))


@pytest.mark.parametrize(
    ("shape", "canonical"),
    [
        ((1,), ()),
        ((1, 1), (1,)),
        ((1, 1, 1), (1,)),
        ((HEAD_SIZE,), (1, HEAD_SIZE)),
        ((1, HEAD_SIZE), (1, HEAD_SIZE)),
        ((HEAD_SIZE, 1), (1, HEAD_SIZE)),
        ((1, 1, HEAD_SIZE), (1, HEAD_SIZE)),
    ],
)
def test_8_shapes_of_a_single_head_are_not_ambiguous(shape, canonical):
    reader = ScaleReader("layer", HeadShard.of(1, 1, 0, 1), HEAD_SIZE, HEAD_SIZE, 1)
    assert reader.scale("k_scale", torch.rand(shape) + 1).shape == canonical


def test_8_as_many_heads_as_channels_reads_a_vector_per_head():
    shard = HeadShard.of(HEAD_SIZE, HEAD_SIZE, 0, 1)
    reader = ScaleReader("layer", shard, HEAD_SIZE, HEAD_SIZE, HEAD_SIZE)
    assert reader.scale("k_scale", torch.ones(HEAD_SIZE)).shape == (HEAD_SIZE,)
    square = torch.ones(HEAD_SIZE, HEAD_SIZE)
    assert reader.scale("k_scale", square).shape == (HEAD_SIZE, HEAD_SIZE)


@pytest.mark.parametrize("key", ["k_scale", "v_scale", "q_scale", "k_zero_point"])
@pytest.mark.parametrize("shape", [(3,), (HEAD_SIZE,), (HEAD_SIZE, HEADS), (2, 2), (1, 2), (0,)])
@pytest.mark.parametrize("dtype", ["fp8", "int8"])
def test_8_wrong_shapes_name_layer_key_and_shapes(dtype, shape, key):
    layer = Layer(dtype, name="model.layers.7.self_attn.attn")
    with pytest.raises(ValueError) as error:
        loaded(layer=layer, **{key: torch.ones(shape)})
    for part in ("model.layers.7.self_attn.attn", key, str(shape), "accepted shapes", "(1,)"):
        assert part in str(error.value)


@pytest.mark.parametrize("bad", [0.0, -0.5, -2.0, float("nan"), float("inf"), -float("inf"), 1e-45])
@pytest.mark.parametrize("key", ["k_scale", "v_scale", "q_scale", "prob_scale"])
@pytest.mark.parametrize("dtype", ["fp8", "int8"])
def test_8_bad_values_are_refused(dtype, key, bad):
    layer = Layer(dtype, name="model.layers.7.self_attn.attn")
    with pytest.raises(ValueError, match=f"model.layers.7.self_attn.attn.*{key}"):
        loaded(layer=layer, **{key: bad})


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan")])
def test_8_one_bad_channel_is_enough(bad):
    scale = torch.ones(HEADS, HEAD_SIZE)
    scale[1, 5] = bad
    with pytest.raises(ValueError, match=r"k_scale of shape \(2, 32\)"):
        loaded("int8", k_scale=scale)


def test_8_values_that_bypass_the_loader_are_checked_too():
    layer = Layer("fp8")
    method = build(layer)
    layer.k_scale.data.fill_(0.0)
    layer.v_scale.data.fill_(1.0)
    with pytest.raises(ValueError, match="layers.0.attn: cannot use k_scale .*1 zero"):
        method.process_weights_after_loading(layer)


# --- zero points -----------------------------------------------------------------------


def test_zero_points_reach_the_int8_statics():
    zero = torch.arange(-32, 32).view(HEADS, HEAD_SIZE)
    layer = loaded("int8", k_scale=0.5, v_scale=0.5, k_zero_point=zero.to(torch.int8),
                   v_zero_point=torch.zeros(1), q_zero_point=torch.tensor([5]))  # fmt: skip
    assert torch.equal(layer.kvq_key_static.zero_point, zero.float())
    assert layer.kvq_value_static.zero_point is None


@pytest.mark.parametrize("bad", [0.5, 128.0, -129.0, float("nan")])
def test_zero_points_must_be_codes(bad):
    with pytest.raises(ValueError, match="k_zero_point.*integer codes"):
        loaded("int8", k_zero_point=bad)


def test_fp8_takes_no_zero_points_but_zero():
    both = {"k_scale": 0.5, "v_scale": 0.5}
    layer = loaded("fp8", k_zero_point=torch.zeros(1, dtype=torch.float8_e4m3fn), **both)
    assert layer.kvq_key_static.zero_point is None
    with pytest.raises(ValueError, match="v_zero_point is not zero"):
        loaded("fp8", v_zero_point=[1], **both)


def test_value_head_size_may_differ():
    layer = Layer("int8")
    layer.head_size_v = 16
    v = torch.rand(HEADS * 16) + 0.1
    layer = loaded(layer=layer, k_scale=torch.ones(HEADS * HEAD_SIZE), v_scale=v)
    assert layer.kvq_value_static.scale.shape == (HEADS, 16)
