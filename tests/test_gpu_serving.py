"""The GPU backend without a GPU: what vLLM sees of it, and what it hands to the kernels.

Tensors are on the CPU, and the reference in layout gpu-v1 stands in for the kernels, which their
own tests compare with it. What a batch is launched as, and captured: ``test_gpu_metadata.py``. In
an engine: ``test_engine_modes.py``. Selection by vLLM's CUDA and ROCm platforms:
``test_gpu_selection.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import oracle
import pytest
import torch
from cases import ROWS, name_of
from gpu_engine import reference_kernels

pytest.importorskip("vllm")

from gpu_batch import (  # noqa: E402
    BLOCK,
    HEAD_SIZE,
    HEADS,
    PADDED,
    QUERY_HEADS,
    QUERY_LENS,
    SEQ_LENS,
    TOKENS,
    batch_of,
    builder_of,
    impl_of,
    small_workspaces,
    spec_of,
)
from vllm.config import VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.v1.attention.backend import AttentionCGSupport  # noqa: E402
from vllm.v1.kv_cache_interface import KVCacheLayout  # noqa: E402

from kvq_plugin import ops, reference  # noqa: E402
from kvq_plugin.formats import FORMATS, FP8_E4M3, FP8_E4M3FNUZ, SERVED, fnuz  # noqa: E402
from kvq_plugin.layout import GPU_V1  # noqa: E402
from kvq_plugin.reference import StaticScale  # noqa: E402
from kvq_plugin.serving import backend as cpu  # noqa: E402
from kvq_plugin.serving import base, compat, gpu  # noqa: E402
from kvq_plugin.serving.scales import method  # noqa: E402


@pytest.fixture(autouse=True)
def workspaces(monkeypatch):
    small_workspaces(monkeypatch)


# --- classes ---------------------------------------------------------------------------


@pytest.mark.parametrize(("module", "formats"), [(cpu, SERVED), (gpu, SERVED)])
def test_every_format_has_a_backend_by_its_name(module, formats):
    assert list(module.BACKENDS) == list(dict.fromkeys(formats.values()))
    for format, backend in module.BACKENDS.items():
        assert backend is getattr(module, f"KVQ_{format.name}") and backend.format is format
        assert backend.get_impl_cls().format is format


@pytest.mark.parametrize("format", ROWS, ids=name_of)
@pytest.mark.parametrize("head_size", gpu.GPUBackend.get_supported_head_sizes())
def test_pages_have_the_formats_size_whatever_the_block(format, head_size):
    for block in (1, 16, 48):  # vLLM sizes with blocks of one token
        spec = spec_of(format, head_size, block_size=block)
        assert spec.dtype == torch.uint8
        assert spec.page_size_bytes == block * HEADS * format.bytes_per_token(head_size)
        assert spec.state_content_bytes % 4 == 0
        assert gpu.BACKENDS[format].customize_spec(spec) == spec


def test_a_spec_of_unquantized_cache_stays():
    spec = spec_of(dtype=torch.bfloat16)
    assert gpu.BACKENDS[ROWS[0]].customize_spec(spec) == spec


@pytest.mark.parametrize("module", [cpu, gpu])
def test_classes_are_found_by_their_path(module):
    for format, backend in module.BACKENDS.items():
        path, _, name = base.class_path(backend).rpartition(".")
        assert path == module.__name__ and getattr(module, name) is backend
        assert backend.format is format and backend.get_impl_cls().format is format
        assert backend.supported_kv_cache_layouts() == (KVCacheLayout.LBHNC,)


def test_what_the_backend_declares():
    backend = gpu.BACKENDS[FORMATS["fp8"]]
    assert compat.AttentionBackendEnum[backend.get_name()].name == "TRITON_ATTN"
    assert [d for d in range(8, 300, 8) if backend.supports_head_size(d)] == [*range(16, 257, 16)]
    blocks = (1, 16, 24, 48, 128)
    assert [n for n in blocks if backend.supports_block_size(n)] == [16, 48, 128]
    assert backend.get_preferred_block_size(16) == 16
    assert backend.supports_kv_cache_dtype("fp8_e4m3") and not backend.supports_kv_cache_dtype(
        "int8"
    )
    assert not backend.forward_includes_kv_cache_update
    builder = backend.get_builder_cls()
    assert builder.get_cudagraph_support(None, None) is AttentionCGSupport.ALWAYS


@pytest.mark.parametrize(
    ("capability", "is_cuda", "served"),
    [((7, 5), True, False), ((8, 0), True, True), ((9, 0), True, True), ((12, 0), True, True)]
    + [((9, 4), False, True), ((11, 0), False, True)],  # gfx942 and gfx1100
)
def test_oldest_gpu(monkeypatch, capability, is_cuda, served):
    from vllm.platforms.interface import DeviceCapability

    monkeypatch.setattr(compat.current_platform, "is_cuda", lambda: is_cuda)
    assert gpu.GPUBackend.supports_compute_capability(DeviceCapability(*capability)) is served


# --- attention -------------------------------------------------------------------------


@pytest.fixture
def kernels(monkeypatch):
    stand_in = reference_kernels()
    monkeypatch.setattr(base, "ops", stand_in)
    monkeypatch.setattr(gpu, "ops", stand_in)
    return stand_in


@dataclass
class Run:
    """One step of a layer on a backend: its cache and output."""

    cache: torch.Tensor
    output: torch.Tensor


def _layer(format):
    generator = torch.Generator().manual_seed(3)
    statics = [None, None]
    if not format.is_dynamic:
        scale = torch.rand(2, HEADS, HEAD_SIZE, generator=generator) / 32 + 1 / 64
        statics = [StaticScale.expand(s, HEADS, HEAD_SIZE) for s in scale]
    return SimpleNamespace(kvq_key_static=statics[0], kvq_value_static=statics[1])


@oracle.single_threaded
def _run(module, format, impl, layer, builder) -> Run:
    """Fill the caches of a batch, then one step of it, as vLLM's runner does both."""
    generator = torch.Generator().manual_seed(7)
    needed = [-(-length // BLOCK) for length in SEQ_LENS]
    total = sum(needed) + 2
    content = format.bytes_per_token(HEAD_SIZE)
    # Blocks further apart than a page, behind an offset: as a layer's slice of vLLM's buffer.
    page = BLOCK * content
    raw = torch.zeros(64 + total * (HEADS * page + 128), dtype=torch.uint8)
    cache = raw.as_strided(
        (total, HEADS, BLOCK, content), (HEADS * page + 128, page, content, 1), 64
    )
    order = torch.randperm(total, generator=generator)[: sum(needed)].split(needed)
    table = torch.zeros(len(SEQ_LENS), max(needed), dtype=torch.int32)
    for row, blocks in zip(table, order, strict=True):
        row[: len(blocks)] = blocks
    slots = [
        blocks[torch.arange(length) // BLOCK].long() * BLOCK + torch.arange(length) % BLOCK
        for blocks, length in zip(order, SEQ_LENS, strict=True)
    ]

    def rows(heads, tokens):
        return torch.randn(tokens, heads, HEAD_SIZE, generator=generator).bfloat16()

    old = torch.cat([s[:-q] for s, q in zip(slots, QUERY_LENS, strict=True)])
    new = torch.cat([s[-q:] for s, q in zip(slots, QUERY_LENS, strict=True)])
    new = torch.cat([new, torch.full((PADDED - TOKENS,), -1)])
    past = (rows(HEADS, len(old)), rows(HEADS, len(old)))
    impl.do_kv_cache_update(layer, *past, cache, old)
    key, value, query = rows(HEADS, PADDED), rows(HEADS, PADDED), rows(QUERY_HEADS, PADDED)
    impl.do_kv_cache_update(layer, key, value, cache, new)
    batch = batch_of(device="cpu", blocks=table, slot_mapping=new)
    output = torch.full_like(query, 7.0)
    assert impl.forward(layer, query, key, value, cache, None, output) is output
    got = impl.forward(layer, query, key, value, cache, builder.build(0, batch), output)
    assert got is output and bool((output[TOKENS:] == 7).all())
    assert int(raw[:64].sum()) == 0  # nothing written before the layer's own slice
    return Run(cache, output[:TOKENS].float())


FEATURES = {
    "plain": {},
    "window": {"sliding_window": 9},
    "softcap": {"logits_soft_cap": 0.5},
    "alibi": {"alibi_slopes": [2.0**-i for i in range(QUERY_HEADS)]},
    "sinks": {"sinks": torch.linspace(-1, 3, QUERY_HEADS).bfloat16()},
}


@pytest.mark.parametrize(
    ("format", "feature"),
    [(f, "plain") for f in ROWS] + [(FORMATS["int8_per_token_head"], f) for f in FEATURES],
    ids=name_of,
)
def test_a_step_means_the_same_as_on_the_cpu(monkeypatch, kernels, format, feature):
    """Through the CPU backend's compiled kernels, and through the GPU backend."""
    layer, options = _layer(format), FEATURES[feature]
    ours = _run(gpu, format, impl_of(gpu, format, **options), layer, builder_of(device="cpu"))
    (*decodes, first), (*rest, second) = kernels.launches
    assert (decodes, rest) == ([0, 3, 1], [3, TOKENS, 17]) and first is second
    monkeypatch.setattr(base, "ops", ops)
    without_layers = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context={}))
    builder = cpu.CPUBuilder(spec_of(format), [], without_layers, torch.device("cpu"))
    theirs = _run(cpu, format, impl_of(cpu, format, **options), layer, builder)
    torch.testing.assert_close(ours.output, theirs.output, rtol=2**-6, atol=2**-8)
    k, v = reference.load(
        ours.cache, format, HEAD_SIZE, layer.kvq_key_static, layer.kvq_value_static, layout=GPU_V1
    )
    k_cpu, v_cpu = reference.load(
        theirs.cache, format, HEAD_SIZE, layer.kvq_key_static, layer.kvq_value_static
    )
    assert torch.equal(k, k_cpu) and torch.equal(v, v_cpu)


def test_features_matter(kernels):
    """So that agreeing above is not agreeing on leaving them out."""
    format = FORMATS["int8_per_token_head"]
    results = {
        name: _run(
            gpu, format, impl_of(gpu, format, **options), _layer(format), builder_of(device="cpu")
        )
        for name, options in FEATURES.items()
    }
    for name, result in results.items():
        change = (result.output - results["plain"].output).abs().max()
        assert (change > 0.1) == (name != "plain"), (name, change)


def test_fused_output_quantization_is_refused():
    impl = impl_of(gpu, FORMATS["fp8"])
    with pytest.raises(NotImplementedError, match="output quantization"):
        impl.forward(None, *[None] * 4, None, torch.zeros(1), output_scale=torch.ones(1))


@pytest.mark.parametrize(("head_size", "extra"), [(272, {}), (72, {}), (64, {"use_alibi_sqrt": 1})])
def test_layers_that_cannot_be_served(head_size, extra):
    impl = gpu.BACKENDS[FORMATS["fp8"]].get_impl_cls()
    with (
        set_current_vllm_config(VllmConfig()),
        pytest.raises(ValueError, match="supported are .*use --kv-cache-dtype auto"),
    ):
        impl(8, head_size, 1.0, 2, None, None, "fp8", **extra)


# --- fnuz ------------------------------------------------------------------------------


def test_fnuz_changes_e4m3_alone():
    for format in ROWS:
        stored = fnuz(format)
        is_e4m3 = format.key.code is FP8_E4M3
        assert (stored.key.code is FP8_E4M3FNUZ) == is_e4m3 == (stored is not format)
        assert stored.name == format.name and stored.id == format.id
        assert stored.bytes_per_token(64) == format.bytes_per_token(64)


@pytest.mark.parametrize("name", ["fp8", "fp8_per_token_head", "fp8_e5m2", "int8"])
def test_on_gfx94x_bytes_are_fnuz_and_mean_the_same(monkeypatch, kernels, name):
    """Calibrated scales reach the kernels doubled where e4m3 is fnuz."""
    from scale_layers import Layer, build, give

    monkeypatch.setattr(compat.current_platform, "is_fp8_fnuz", lambda: True)
    format = FORMATS[name]
    impl = impl_of(gpu, format)
    layer = Layer(name, head_size=HEAD_SIZE, impl=impl)
    layer.head_size_v = HEAD_SIZE
    method = build(layer)
    scale = 4.5 / format.key.code.qmax  # N(0, 1) data stays under 4.5
    if not format.is_dynamic:
        give(layer, k_scale=scale, v_scale=scale)
    method.process_weights_after_loading(layer)
    if not format.is_dynamic:
        factor = 2 if name == "fp8" else 1
        assert layer.kvq_key_static.scale.unique().item() == pytest.approx(factor * scale)
    key = torch.randn(4, HEADS, HEAD_SIZE, generator=torch.Generator().manual_seed(0))
    cache = torch.zeros(1, HEADS, BLOCK, format.bytes_per_token(HEAD_SIZE), dtype=torch.uint8)
    impl.do_kv_cache_update(layer, key, key, cache, torch.arange(4))
    k, _ = reference.load(
        cache, fnuz(format), HEAD_SIZE, layer.kvq_key_static, layer.kvq_value_static, layout=GPU_V1
    )
    error = (k[0, :4] - key).norm() / key.norm()
    assert error < format.max_error


def test_gfx94x_factor_is_vllms_for_vllms_own_kernels(monkeypatch):
    monkeypatch.setattr(compat.current_platform, "is_fp8_fnuz", lambda: True)
    stock = SimpleNamespace(impl=SimpleNamespace())
    assert method._platform_factor(stock, FORMATS["fp8_e5m2"]) == 2.0
