"""What the kernels read of a checkpoint outlives ``sleep(level=2)`` and follows a weight reload, at
the same addresses: vLLM saves and restores parameters and buffers, and nothing else."""

# ruff: noqa: F811 - fixtures are imported

from __future__ import annotations

import gc
import random
import weakref
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from engine_jobs import Batch, Job, only, run  # noqa: E402
from model_loading import ATTENTION, both, checkpoint, engine_free, load  # noqa: E402, F401
from scale_layers import HEAD_SIZE, HEADS, Layer, build, give, loaded, results  # noqa: E402
from scaled import add_scales, change, stretch_keys  # noqa: E402
from tiny_models import make  # noqa: E402

K = torch.linspace(0.125, 8, 64)
CHANNEL = {"k_scale": K, "v_scale": 2 * K, "k_zero_point": torch.arange(64.0) - 32}
SINKS = {ATTENTION.format(i) + "sinks": torch.tensor([1.0, 2.0, 3.0, 4.0]) for i in range(2)}
#: (model, cache dtype, tensors beside its weights)
MODELS = {
    "channel": ("gqa", "int8", both(CHANNEL)),
    "single": ("gqa", "fp8", both({"kv_scale": 0.5})),
    "sinks": ("sinks", "int8", both(CHANNEL) | SINKS),
    "alibi": ("alibi", "int8_per_token_head", {}),
}


def read_by_kernels(layer) -> dict[str, torch.Tensor]:
    """Every tensor of the model that an attention call gets beside the cache."""
    found = {n: layer.impl._options[n] for n in ("sinks", "alibi_slopes")}
    for kind in ("key", "value"):
        static = getattr(layer, f"kvq_{kind}_static")
        parts = {} if static is None else vars(static)
        found |= {f"{kind} {name}": tensor for name, tensor in parts.items()}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def copies(layers) -> list[dict[str, torch.Tensor]]:
    return [{n: t.clone() for n, t in read_by_kernels(layer).items()} for layer in layers]


def places(layers) -> list[dict[str, int]]:
    return [{n: t.data_ptr() for n, t in read_by_kernels(layer).items()} for layer in layers]


def same(layers, expected) -> bool:
    return all(
        found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in wanted)
        for found, wanted in zip(map(read_by_kernels, layers), expected, strict=True)
    )


class Pool:
    """In the place of vLLM's allocator, whose memory is gone after ``sleep(level=2)``: tensors
    that came into being since *before*."""

    def __init__(self, before: set[int]) -> None:
        # Without AMX vLLM's linear layers keep the address of an object of oneDNN's in a tensor.
        kept = before | {id(x.handler_tensor) for x in objects("CPUDNNLGEMMHandler")}
        self.tensors = [t for t in tensors() if id(t) not in kept and t.device.type == "cpu"]

    def suspend(self, level: int) -> None:
        for tensor in self.tensors:
            tensor.data.fill_(float("nan") if tensor.is_floating_point() else 77)

    def resume(self, tags) -> None:
        pass


def objects(kind: str) -> list:
    return [x for x in gc.get_objects() if type(x).__name__ == kind]


def tensors() -> list[torch.Tensor]:
    gc.collect()
    return [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]


@pytest.fixture
def worker(monkeypatch):
    """``worker(model, config, pool)``: as much of vLLM's GPU worker as sleeps; the CPU's ignores
    the request."""
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda: (0, 1))

    def make_worker(model, config, pool):
        return SimpleNamespace(
            model_runner=SimpleNamespace(model=model),
            vllm_config=config,
            sleep_mode_backend=pool,
            get_draft_model=lambda: None,
            _save_sleep_parameters=lambda model: None,
            _sleep_saved_parameters={},
            _sleep_saved_draft_buffers={},
            synchronize_device=lambda: None,
        )

    return make_worker


@pytest.mark.parametrize("name", MODELS)
def test_sleep_keeps_what_kernels_read(name, load, worker):
    gpu_worker = pytest.importorskip("vllm.v1.worker.gpu_worker").Worker
    before = set(map(id, tensors()))
    model, dtype, given = MODELS[name]
    model, layers, config = load(dtype, given, model=model)
    pool = Pool(before)
    expected, where = copies(layers), places(layers)
    assert all(expected)
    sleeper = worker(model, config, pool)
    gpu_worker.sleep(sleeper, 2)
    assert not same(layers, expected)
    gpu_worker.wake_up(sleeper)
    assert same(layers, expected) and places(layers) == where


@pytest.mark.parametrize("name", [n for n in MODELS if n != "alibi"])
def test_reload_changes_in_place_what_kernels_read(name, load, checkpoint):
    reload = pytest.importorskip("vllm.model_executor.model_loader.reload")
    feature, dtype, given = MODELS[name]
    model, layers, config = load(dtype, given, model=feature)
    where = places(layers)
    # vLLM's reload does not reach the sinks of this model ("Failed to load weights").
    changes = {"scale": lambda x: x / 2, "zero_point": lambda x: x + 1, "sinks": lambda x: x}
    new = {k: next(f for end, f in changes.items() if k.endswith(end))(x) for k, x in given.items()}
    weights = checkpoint(feature)[0] | new
    reload.initialize_layerwise_reload(model)
    model.load_weights(iter(weights.items()))
    reload.finalize_layerwise_reload(model, config.model_config)
    assert places(layers) == where
    reloaded = copies(layers)
    _, layers, _ = load(dtype, new, model=feature)
    assert same(layers, reloaded)


def test_new_sinks_are_followed_in_place(load):
    model, layers, config = load("int8_per_token_head", SINKS, model="sinks")
    where = places(layers)
    for layer, block in zip(layers, model.model.layers, strict=True):
        block.attn.sinks.data += 1
        layer.process_weights_after_loading(config.model_config.dtype)  # as a reload ends
        assert layer.impl._options["sinks"].tolist() == [2.0, 3.0, 4.0, 5.0]
    assert places(layers) == where


def test_a_model_that_is_given_up_is_freed(load):
    """vLLM keeps placeholders in a dictionary weakly keyed by their layer, forever if they, or
    what they refer to, hold it."""
    model, layers, config = load("int8", both(CHANNEL))
    layer = weakref.ref(layers[0])
    del model, layers, config
    gc.collect()
    assert layer() is None


def test_buffers_that_were_written_to_are_followed():
    """Whoever writes to the scale buffers processes the layer again, without placeholders."""
    layer = Layer("int8")
    method = build(layer)
    give(layer, k_scale=torch.rand(HEADS, HEAD_SIZE) + 1, v_scale=0.5)
    method.process_weights_after_loading(layer)
    static = layer.kvq_key_static.scale
    layer._k_scale.fill_(2.0)
    method.process_weights_after_loading(layer)
    assert results(layer)[0] == 2.0 and layer._k_scale_cpu.eq(2.0).all()
    assert layer.kvq_key_static.scale is static and static.eq(2.0).all()
    assert layer.kvq_key_static.inverse.eq(0.5).all()


def again(layer, **tensors):
    """Load *tensors* into a layer that is in use."""
    method = build(layer)
    give(layer, **tensors)
    method.process_weights_after_loading(layer)


def test_reload_with_coarser_scales_is_broadcast():
    layer = loaded("int8", k_scale=torch.rand(HEADS, HEAD_SIZE) + 1, v_scale=torch.ones(HEADS),
                   k_zero_point=[3])  # fmt: skip
    static = layer.kvq_key_static
    again(layer, k_scale=torch.tensor([2.0, 3.0]), v_scale=0.5)
    assert layer.kvq_key_static.scale is static.scale
    assert static.scale[:, 5].tolist() == [2.0, 3.0] and layer._v_scale.tolist() == [0.5, 0.5]
    assert not layer.kvq_key_static.zero_point.any()


@pytest.mark.parametrize(
    "new", [{"k_scale": torch.ones(HEADS, HEAD_SIZE)}, {"k_scale": 0.5, "k_zero_point": 3}]
)
def test_reload_with_what_there_is_no_room_for_is_refused(new):
    layer = loaded("int8", k_scale=torch.ones(HEADS), v_scale=0.5)
    with pytest.raises(ValueError, match="layers.0.attn.*reloaded.*_k_.*start a new engine"):
        again(layer, v_scale=0.5, **new)


# --- a whole engine --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_engine_reloads_as_if_started_anew(tmp_path):
    random.seed(1)
    prompts = [[random.randrange(3, 500) for _ in range(n)] for n in (33, 150)]
    sampling = {"prompt_logprobs": 0, "max_tokens": 4}
    base = make(tmp_path, "gqa")
    # Another function, and keys that scales of the first model would clip to a 64th.
    heads = {f"model.layers.{i}.self_attn.o_proj.weight": torch.randn(128, 128).bfloat16() / 10
             for i in range(2)}  # fmt: skip
    other = change(stretch_keys(base, tmp_path / "wide", 64.0), tmp_path / "other", heads)
    one, two = (
        add_scales(model, tmp_path / name, prompts, "int", [("channel", "channel")])
        for name, model in (("one", base), ("two", other))
    )
    reloading = [Batch(prompts, sampling), Batch(prompts, sampling, reload_from=str(two))]
    results = only(
        run([Job({"model": str(one)}, reloading), Job({"model": str(two)}, reloading[:1])])
    )
    (before, after), (fresh,) = (result.batches for result in results)
    moved = [
        (i, x - y)
        for a, b in zip(after, fresh, strict=True)
        for i, (x, y) in enumerate(zip(a.prompt_logprobs, b.prompt_logprobs, strict=True))
        if x != y
    ]
    assert not moved and after == fresh and before != fresh
