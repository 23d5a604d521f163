"""The pages and the layers that stand for recent rows, without an engine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from kvq_plugin.formats import SERVED, get_format
from kvq_plugin.serving import backend, pages, recent

WINDOWED = [name for name, format in SERVED.items() if format.recent is not None]
SHAPE = {"num_kv_heads": 2, "head_size": 64, "dtype": torch.uint8}


def test_the_formats_that_keep_recent_rows():
    assert WINDOWED == ["int4", "k3v2"]


@pytest.mark.parametrize(
    ("name", "head_size", "block_size", "expected"),
    [
        ("int4", 64, 128, 64),
        ("int4", 128, 128, 64),
        ("int4", 64, 64, 32),
        ("int4", 64, 256, 128),
        ("k3v2", 64, 128, 32),
        ("k3v2", 128, 128, 32),
        ("k3v2", 64, 96, 96),  # cannot be halved: too large, which checks.py refuses to begin with
    ],
)
def test_blocks_of_recent_rows_fit_the_sealed_page(name, head_size, block_size, expected):
    format = get_format(name)
    page = pages.sealed_page(format, head_size, block_size)
    content = format.recent.bytes_per_token(head_size)
    assert pages.block_size_within(page, content, block_size) == expected
    assert expected * content <= page or block_size == 96


@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.parametrize("head_size", [32, 64, 96, 128, 256])
def test_the_smallest_block_holds_a_group_of_recent_rows(name, head_size):
    format = get_format(name)
    smallest = pages.min_block_size(format, head_size)
    group = 32 * format.recent.bytes_per_token(head_size)
    assert pages.sealed_page(format, head_size, smallest) >= group
    assert smallest <= 128
    assert smallest == 32 or pages.sealed_page(format, head_size, smallest - 32) < group


@pytest.mark.parametrize("name", WINDOWED)
def test_a_window_means_recent_rows(name):
    """One class serves both: it sees the spec alone."""
    format, cls = get_format(name), backend.BACKENDS[get_format(name)]
    full = cls.customize_spec(FullAttentionSpec(block_size=128, **SHAPE))
    window = SlidingWindowSpec(block_size=64, sliding_window=63, **SHAPE)
    window = cls.customize_spec(window)
    assert full.state_content_bytes == format.bytes_per_token(64, 128)
    assert window.state_content_bytes == format.recent.bytes_per_token(64)
    one = cls.customize_spec(FullAttentionSpec(block_size=1, **SHAPE))
    assert one.state_content_bytes == full.state_content_bytes  # the bytes of one token


class Layer:
    """What vLLM's Attention is to :func:`recent.prepare`, sealed by default."""

    def __init__(self, name, format, window=None, target=None) -> None:
        self.layer_name, self.kv_sharing_target_layer_name = name, target
        self.attn_backend = backend.BACKENDS[format]
        impl = self.attn_backend.get_impl_cls()
        self.impl = impl.__new__(impl)
        self.impl.kernel_format = (window and format.recent) or format
        self.window = window

    def get_kv_cache_spec(self, vllm_config):
        size = vllm_config.cache_config.block_size
        if self.window:
            return SlidingWindowSpec(block_size=size, sliding_window=self.window, **SHAPE)
        return FullAttentionSpec(block_size=size, **SHAPE)


def _run(dtype: str, drafts: int = 0) -> SimpleNamespace:
    return SimpleNamespace(
        cache_config=SimpleNamespace(cache_dtype=dtype, block_size=128, kv_cache_layout=None),
        compilation_config=SimpleNamespace(static_forward_context={}),
        num_speculative_tokens=drafts,
    )


def test_a_sealed_layer_gets_a_layer_for_its_recent_rows():
    run, layer = _run("int4", drafts=5), Layer("model.layers.3.attn", get_format("int4"))
    recent.prepare(layer, run)
    [(name, rows)] = run.compilation_config.static_forward_context.items()
    assert name == "model.layers.3.attn.recent" and layer.kvq_recent is rows
    spec = rows.get_kv_cache_spec(run)
    # A query reads up to 63 recent rows, and 5 drafts may turn out wrong.
    assert (spec.sliding_window, spec.block_size) == (68, 64)
    assert rows.get_attn_backend() is layer.attn_backend
    recent.prepare(layer, run)  # a model's layers are looked at again once it is complete
    assert layer.kvq_recent is rows


def test_a_layer_that_reads_anothers_cache_reads_its_recent_rows():
    run, layer = _run("int4"), Layer("a", get_format("int4"))
    run.compilation_config.static_forward_context["a"] = layer
    reader = Layer("b", get_format("int4"), target="a")
    for each in (layer, reader):
        recent.prepare(each, run)
    assert reader.kvq_recent is layer.kvq_recent
    assert "b.recent" not in run.compilation_config.static_forward_context


def test_other_layers_leave_the_page_to_the_sealed_ones():
    """A sliding window's rows are int8, and so are a draft model's, which has a run of its own."""
    run = _run("int4")
    window = Layer("a", get_format("int4"), window=512)
    recent.prepare(window, run)
    assert window.kvq_recent is None and not run.compilation_config.static_forward_context
    assert window.get_kv_cache_spec(run).block_size == 64
    recent.prepare(Layer("b", get_format("int4")), run)
    drafting = _run("int8_per_token_head")
    drafting.compilation_config = run.compilation_config
    draft = Layer("c", get_format("int8_per_token_head"))
    recent.prepare(draft, drafting)
    assert draft.get_kv_cache_spec(drafting).block_size == 64


@pytest.mark.parametrize("dtype", ["auto", "int8_per_token_head", "k8v4"])
def test_runs_without_recent_rows_are_left_alone(dtype):
    run, layer = _run(dtype), Layer("a", get_format("int8_per_token_head"))
    recent.prepare(layer, run)
    assert not run.compilation_config.static_forward_context
    assert layer.get_kv_cache_spec(run).block_size == 128


# --- capacity --------------------------------------------------------------------------


def _stated(dtype: str, longest: int, memory: int, batch: int = 4096, layers: int = 30):
    """(requests that fit as vLLM says, as we do), for a model of SmolLM2's shape."""
    kv = {"num_kv_heads": 3, "head_size": 64}
    run = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=longest),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=batch),
        max_in_flight_tokens=batch,
        num_speculative_tokens=0,
    )
    format = SERVED.get(dtype)
    if format is None:
        spec = FullAttentionSpec(block_size=128, dtype=torch.bfloat16, **kv)
        specs = {"layers.0": spec}
    else:
        cls = backend.BACKENDS[format]
        full = FullAttentionSpec(block_size=128, dtype=torch.uint8, **kv)
        specs = {"layers.0": cls.customize_spec(full)}
        if format.recent is not None:
            page = pages.sealed_page(format, 64, 128)
            size = pages.block_size_within(page, format.recent.bytes_per_token(64), 128)
            window = SlidingWindowSpec(
                block_size=size,
                dtype=torch.uint8,
                sliding_window=pages.window(format, 0),
                **kv,
            )
            specs["layers.0.recent"] = cls.customize_spec(window)
    specs = kv_cache_utils.unify_kv_cache_spec_page_size(specs)
    groups = [
        SimpleNamespace(layer_names=[name] * layers, kv_cache_spec=spec, host_resident=False)
        for name, spec in specs.items()
    ]
    page = {spec.page_size_bytes for spec in specs.values()}
    assert len(page) == 1
    cache = SimpleNamespace(kv_cache_groups=groups, num_blocks=memory // (page.pop() * layers))
    stated = kv_cache_utils.get_max_concurrency_for_kv_cache_config
    stated = getattr(stated, "__wrapped__", stated)(run, cache)
    return stated, pages.capacity(run, cache, stated)


@pytest.mark.parametrize(
    ("dtype", "longest", "ratio"),
    [("int4", 8192, 2.8), ("int4", 2048, 2.5), ("k3v2", 8192, 4.2)],
)
def test_tokens_that_fit_with_vllms_defaults(dtype, longest, ratio):
    """In one GiB. vLLM itself says 1.6 times as many as unquantized at 8,192 tokens, since it
    counts a batch of new tokens for every request."""
    _, plain = _stated("auto", longest, 1 << 30)
    stated, ours = _stated(dtype, longest, 1 << 30)
    print(f"{dtype} at {longest}: vLLM {stated / plain:.2f}x, ours {ours / plain:.2f}x")
    assert stated / plain < ratio < ours / plain


@pytest.mark.parametrize("dtype", ["auto", "int8_per_token_head", "k8v4"])
def test_without_recent_rows_vllms_number_stands(dtype):
    stated, ours = _stated(dtype, 8192, 1 << 30)
    assert ours == stated


def test_a_pool_for_one_request_holds_one():
    """vLLM starts as long as one request fits with all of a batch beside it."""
    block = 3 * pages.sealed_page(get_format("int4"), 64, 128) * 30
    stated, ours = _stated("int4", 8192, (64 + 66) * block)
    assert stated == 1 and ours == 1
