"""The GPU backend without a GPU: what vLLM sees of it, and what it hands to the kernels.

Device tensors are on torch's ``meta`` device where only their shapes matter: any attempt to look
at their data, which on a GPU would stall it and break graph capture, raises there. Where numbers
matter they are CPU tensors, and the reference in layout gpu-v1 stands in for the kernels, which
their own tests compare with it. In an engine: ``test_engine_modes.py``. Selection by vLLM's CUDA
and ROCm platforms: ``test_gpu_selection.py``.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from types import SimpleNamespace

import oracle
import pytest
import torch
from cases import ROWS, name_of
from gpu_engine import noted_kernels, reference_kernels
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("vllm")

from vllm.config import VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata  # noqa: E402
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout  # noqa: E402

from kvq_plugin import kernels as gpu_kernels  # noqa: E402
from kvq_plugin import ops, reference  # noqa: E402
from kvq_plugin.calls import Attend  # noqa: E402
from kvq_plugin.formats import FORMATS, FP8_E4M3, FP8_E4M3FNUZ, SERVED, fnuz  # noqa: E402
from kvq_plugin.layout import GPU_V1  # noqa: E402
from kvq_plugin.reference import StaticScale  # noqa: E402
from kvq_plugin.serving import backend as cpu  # noqa: E402
from kvq_plugin.serving import base, compat, gpu  # noqa: E402
from kvq_plugin.serving.scales import method  # noqa: E402

HEADS, QUERY_HEADS, HEAD_SIZE, BLOCK = 2, 8, 64, 16
#: Three decodes (lengths 40, 3, 70), then two prefills of 5 and 17 tokens, the first a chunk.
SEQ_LENS, QUERY_LENS = (40, 3, 70, 21, 17), (1, 1, 1, 5, 17)
TOKENS = sum(QUERY_LENS)
PADDED = TOKENS + 3


@pytest.fixture(autouse=True)
def small_workspace(monkeypatch):
    """Its size is the kernels' business, and asking them needs Triton."""
    parameters = inspect.signature(gpu_kernels.workspace_size).parameters
    assert list(parameters) == ["head_size", "device"]
    monkeypatch.setattr(gpu_kernels, "workspace_size", lambda head_size, device: 64 * head_size)


# --- classes ---------------------------------------------------------------------------


def _spec(format=None, head_size=HEAD_SIZE, **changes):
    settings = {"dtype": torch.uint8, "block_size": BLOCK} | changes
    spec = FullAttentionSpec(num_kv_heads=HEADS, head_size=head_size, **settings)
    return spec if format is None else gpu.BACKENDS[format].customize_spec(spec)


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
        spec = _spec(format, head_size, block_size=block)
        assert spec.dtype == torch.uint8
        assert spec.page_size_bytes == block * HEADS * format.bytes_per_token(head_size)
        assert spec.state_content_bytes % 4 == 0
        assert gpu.BACKENDS[format].customize_spec(spec) == spec


def test_a_spec_of_unquantized_cache_stays():
    spec = _spec(dtype=torch.bfloat16)
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


# --- metadata --------------------------------------------------------------------------


def _batch(query_lens=QUERY_LENS, seq_lens=SEQ_LENS, device="meta", blocks=None, **changes):
    """vLLM's description of a batch, device tensors on *device*."""
    starts = torch.tensor([0, *torch.tensor(query_lens).cumsum(0)], dtype=torch.int32)
    if blocks is None:
        blocks = torch.zeros(len(seq_lens), 8, dtype=torch.int32)
    fields = {
        "query_start_loc": starts.to(device),
        "query_start_loc_cpu": starts,
        "seq_lens": torch.tensor(seq_lens, dtype=torch.int32).to(device),
        "num_reqs": len(seq_lens),
        "num_actual_tokens": sum(query_lens),
        "max_query_len": max(query_lens),
        "max_seq_len": max(seq_lens),
        "block_table_tensor": blocks.to(device),
        "slot_mapping": torch.zeros(PADDED, dtype=torch.int64, device=device),
    }
    return CommonAttentionMetadata(**fields | changes)


class Layer(torch.nn.Module):
    """Of vLLM's attention: what the builder needs of it."""

    def __init__(self, device="meta", format=FORMATS["fp8"]):
        super().__init__()
        self.kv_cache, self.forwards = torch.empty(0, device=device), []
        self.impl = SimpleNamespace(
            num_heads=QUERY_HEADS, head_size=HEAD_SIZE, forward=self._note,
            kernel_format=format,
            workspace=gpu_kernels.new_workspace(HEAD_SIZE, torch.device(device)),
        )  # fmt: skip

    def _note(self, layer, query, key, value, kv_cache, metadata, output):
        assert layer is self and kv_cache is self.kv_cache and query.shape == output.shape
        self.forwards.append((query.shape[0], metadata))


def _builder(speculated=None, device="meta", format=FORMATS["fp8"], layers=(), **changes):
    speculative, suffix = None, changes.get("suffix", "")
    if speculated:
        speculative = SimpleNamespace(num_speculative_tokens=speculated, parallel_drafting=False)
    config = SimpleNamespace(
        speculative_config=speculative,
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1, use_ubatching=changes.get("use_ubatching", False)
        ),
        model_config=SimpleNamespace(
            dtype=torch.bfloat16, enable_sleep_mode=changes.get("enable_sleep_mode", False)
        ),
        compilation_config=SimpleNamespace(
            static_forward_context={f"layers.{i}.attn{suffix}": x for i, x in enumerate(layers)}
        ),
        use_v2_model_runner=True,
    )
    names = [f"layers.{i}.attn{suffix}" for i in range(max(1, len(layers)))]
    return gpu.GPUBuilder(_spec(format), names, config, torch.device(device))


def _ranges(metadata):
    return [(p.begin, p.end, p.max_query_len) for p in metadata.parts]


def test_recent_rows_have_no_workspace_of_their_own():
    """Nor are they captured for: vLLM's builder of their group knows none of our layers."""
    recent = SimpleNamespace(kv_cache=None)
    builder = _builder(format=SERVED["int4"], layers=[recent], suffix=".recent")
    assert builder.build(0, _batch()).workspace is None
    builder.build_for_cudagraph_capture(_batch())


def test_what_is_captured_with_recent_rows_is_launched_without_their_block_table():
    """vLLM has set no forward context yet: whatever table, as long as it is one of that shape."""
    format, seen = SERVED["int4"], []
    layer = Layer(format=format)
    layer.kvq_recent = SimpleNamespace(kv_cache=torch.empty(4, HEADS, 64, 136, device="meta"))
    layer.impl._statics = lambda layer: (None, None)
    layer.impl._attend = lambda *args: seen.append(args)
    builder = _builder(format=format, layers=[layer])
    builder.build_for_cudagraph_capture(_batch(max_query_len=TOKENS, max_seq_len=4096))
    [(out, query, cache, metadata, statics, recent)] = seen
    assert query.shape == (TOKENS, QUERY_HEADS, HEAD_SIZE) and metadata.max_seq_len == 4096
    assert recent["recent_cache"] is layer.kvq_recent.kv_cache and layer.forwards == []
    assert recent["recent_block_table"].shape == (5, 4096 // 64)


def test_calls_with_recent_rows_reach_the_kernels_without_a_look_at_the_device(monkeypatch):
    """On tensors whose data nobody can look at, as while a graph is captured."""
    format, calls = SERVED["int4"], []
    for name in ("store", "attend"):
        monkeypatch.setattr(gpu_kernels, name, calls.append)
    like = {"device": "meta", "dtype": torch.uint8}
    caches = [
        torch.empty(4, HEADS, 128, f.bytes_per_token(HEAD_SIZE, 128), **like)
        for f in (format, format.recent)
    ]
    rows = torch.empty(3, HEADS, HEAD_SIZE, device="meta")
    slots, table = (torch.empty(3, 2, device="meta", dtype=t) for t in (torch.int64, torch.int32))
    slots, lengths = slots[:, 0].contiguous(), table[:, 0].contiguous()
    query, starts = rows.repeat(1, 4, 1), torch.empty(4, device="meta", dtype=torch.int32)
    recent = {"recent_cache": caches[1], "recent_slot_mapping": slots}
    ops.store(rows, rows, caches[0], slots, format, **recent)
    recent = {"recent_cache": caches[1], "recent_block_table": table}
    ops.attend(
        torch.empty_like(query), query, caches[0], table, lengths, starts, format, 1.0, **recent
    )
    assert calls[0].recent_slot_mapping is slots and calls[1].recent_block_table is table
    with pytest.raises(ValueError, match="it needs recent_cache and recent_slot_mapping"):
        ops.store(rows, rows, caches[0], slots, format)


def test_looking_at_a_device_tensor_raises_here():
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.zeros(1, device="meta").item()
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.zeros(1, device="meta").cpu().tolist()


def test_decodes_are_launched_apart_from_the_rest():
    metadata = _builder().build(0, _batch())
    assert _ranges(metadata) == [(0, 3, 1), (3, 5, 17)]
    decodes, rest = metadata.parts
    assert decodes.seq_lens.shape == (3,) and decodes.query_start_loc.shape == (4,)
    assert rest.block_table.shape == (2, 8) and rest.query_start_loc.shape == (3,)
    assert metadata.max_seq_len == 70


@pytest.mark.parametrize(
    ("query_lens", "speculated", "ranges"),
    [
        ((1, 1, 1), None, [(0, 3, 1)]),
        ((4, 5), None, [(0, 2, 5)]),
        ((4, 4, 2), 3, [(0, 3, 4)]),
        # The bound, not the longest of these: the device may have dealt drafts otherwise.
        ((2, 3, 9), 3, [(0, 2, 4), (2, 3, 9)]),
        ((2, 3, 9), None, [(0, 3, 9)]),
    ],
)
def test_parts_of_a_batch(query_lens, speculated, ranges):
    batch = _batch(query_lens, tuple(q + 8 for q in query_lens))
    assert _ranges(_builder(speculated).build(0, batch)) == ranges


def test_capture_is_one_launch_with_the_bounds_of_every_replay():
    batch = _batch(max_query_len=TOKENS, max_seq_len=4096)
    metadata = _builder().build_for_cudagraph_capture(batch)
    assert _ranges(metadata) == [(0, 5, TOKENS)] and metadata.max_seq_len == 4096
    assert metadata.parts[0].seq_lens.data_ptr() == batch.seq_lens.data_ptr()


def test_what_is_captured_is_launched_once_before():
    """With the captured bounds, and in one launch, whatever vLLM warmed up with."""
    layers = [Layer(), Layer()]
    builder = _builder(layers=layers)
    batch = _batch(max_query_len=TOKENS, max_seq_len=4096)
    builder.build(0, batch)
    assert layers[0].forwards == []
    captured = [builder.build_for_cudagraph_capture(batch) for _ in range(2)]
    for layer in layers:  # once: vLLM asks again for idle steps of a replica
        [(rows, metadata)] = layer.forwards
        assert rows == TOKENS and _ranges(metadata) == _ranges(captured[0])
        assert metadata.max_seq_len == 4096
    builder.build_for_cudagraph_capture(_batch(max_query_len=TOKENS, max_seq_len=8192))
    assert len(layers[0].forwards) == 2


@pytest.mark.parametrize(
    ("query_lens", "most"), [((1, 1, 1, 1), 1), ((1, 1, 1, 61), 64)], ids=["decode", "mixed"]
)
def test_no_kernel_is_new_to_a_capture(monkeypatch, query_lens, most):
    """Of graphs of decodes (FULL_AND_PIECEWISE) and of whole steps (FULL). In PIECEWISE, attention
    is not captured. vLLM's own warm-up has other launches: short contexts, decodes apart."""
    launches = noted_kernels(monkeypatch, "triton")
    monkeypatch.setattr(gpu, "ops", SimpleNamespace(
        attend=lambda *args, **options: gpu_kernels.attend(Attend(*args, **options))))  # fmt: skip
    monkeypatch.setattr(gpu, "_WORKSPACES", gpu.WeakValueDictionary())
    monkeypatch.setattr(gpu_kernels, "workspace_size", lambda head_size, device: 1 << 24)
    impl = _impl(gpu, FORMATS["int8_per_token_head"])
    layer = torch.nn.Module()
    content = impl.format.bytes_per_token(HEAD_SIZE)
    layer.impl, layer.kv_cache = impl, torch.zeros(8, HEADS, BLOCK, content, dtype=torch.uint8)
    builder = _builder(device="cpu", format=impl.format, layers=[layer])
    batch = _batch(query_lens, query_lens, device="cpu", max_query_len=most)

    def noted() -> set:
        kernels = {(name, *sorted(kwargs.items())) for name, _, kwargs in launches}
        launches.clear()
        return kernels

    def forward(metadata) -> set:
        rows = torch.zeros(sum(query_lens), QUERY_HEADS, HEAD_SIZE, dtype=torch.bfloat16)
        impl.forward(layer, rows, None, None, layer.kv_cache, metadata, rows.clone())
        return noted()

    warm = forward(builder.build(0, batch))
    batch.max_seq_len = 131072
    metadata = builder.build_for_cudagraph_capture(batch)
    before = noted()
    captured = forward(metadata)
    assert captured <= before and captured - warm


class _Allocations(TorchDispatchMode):
    """Operators that make new memory, while it is entered."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        aliases = any(r.alias_info for r in func._schema.returns)
        if not aliases and isinstance(out, torch.Tensor) and out.device.type == "meta":
            self.made.append(func)
        return out


def test_capture_and_update_allocate_nothing_on_the_device():
    builder, batch = _builder(), _batch()
    with _Allocations() as allocations:
        metadata = builder.build_for_cudagraph_capture(batch)
        builder.update_draft_decode_metadata(metadata)
        builder.update_block_table(builder.build(0, batch), batch.block_table_tensor, None)
    assert allocations.made == []
    with _Allocations() as allocations:
        _ = batch.seq_lens + 1
    assert len(allocations.made) == 1  # the check itself notices


def test_workspace_is_reserved_once_and_shared_by_all_batches():
    layers = [Layer(), Layer()]
    builder, other = _builder(layers=layers), _builder(layers=layers)
    first, second = builder.build(0, _batch()), builder.build_for_cudagraph_capture(_batch())
    assert first.workspace is second.workspace is layers[0].impl.workspace
    assert other.build(0, _batch()).workspace is first.workspace
    # vLLM keeps the buffers of layers through sleep(level=2).
    buffers = dict(layers[0].named_buffers())
    assert any(b is first.workspace.counters for b in buffers.values())
    assert not layers[0].state_dict()


def test_batches_beside_each_other_have_workspaces_of_their_own():
    layers = [Layer()]
    found = [_builder(layers=layers, use_ubatching=True).build(0, _batch()).workspace for _ in "ab"]
    assert len({id(w.counters) for w in (*found, layers[0].impl.workspace)}) == 3
    with pytest.raises(ValueError, match="drop --enable-dbo or --enable-sleep-mode"):
        _builder(layers=layers, use_ubatching=True, enable_sleep_mode=True)


def test_the_workspace_is_made_while_weights_are_loaded(monkeypatch):
    """Before vLLM measures what is left for the cache; for all layers of a head size."""
    monkeypatch.setattr(gpu, "_WORKSPACES", gpu.WeakValueDictionary())
    one, two = (_impl(gpu, format) for format in (ROWS[0], ROWS[3]))
    assert one.workspace is two.workspace
    assert one.workspace.scratch.numel() == 64 * HEAD_SIZE
    assert not one.workspace.counters.any()
    del one, two
    assert not gpu._WORKSPACES  # it goes with the engine


def test_block_table_of_another_group():
    builder = _builder()
    other = torch.ones(5, 3, dtype=torch.int32, device="meta")
    before = builder.build(0, _batch())
    after = builder.update_block_table(before, other, torch.ones(9, device="meta"))
    assert [p.block_table.shape for p in after.parts] == [(3, 3), (2, 3)]
    assert _ranges(after) == _ranges(before) and after.slot_mapping.shape == (9,)
    assert before.parts[0].block_table.shape == (3, 8)  # the cached one is not changed


def test_a_batch_causal_in_part_is_refused():
    with pytest.raises(ValueError, match="mixes causal and non-causal"):
        _builder().build(0, _batch(causal=torch.ones(5, dtype=torch.bool)))


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


def _impl(module, format, **options):
    settings = {"alibi_slopes": None, "sliding_window": None, "logits_soft_cap": None} | options
    sinks = settings.pop("sinks", None)
    with set_current_vllm_config(VllmConfig()):
        impl = module.BACKENDS[format].get_impl_cls()(
            QUERY_HEADS,
            HEAD_SIZE,
            0.125,
            HEADS,
            settings["alibi_slopes"],
            settings["sliding_window"],
            format.name,
            settings["logits_soft_cap"],
            sinks=sinks,
        )
    impl.process_weights_after_loading(torch.bfloat16)
    return impl


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
    batch = _batch(device="cpu", blocks=table, slot_mapping=new)
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
    ours = _run(gpu, format, _impl(gpu, format, **options), layer, _builder(device="cpu"))
    (*decodes, first), (*rest, second) = kernels.launches
    assert (decodes, rest) == ([0, 3, 1], [3, TOKENS, 17]) and first is second
    monkeypatch.setattr(base, "ops", ops)
    without_layers = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context={}))
    builder = cpu.CPUBuilder(_spec(format), [], without_layers, torch.device("cpu"))
    theirs = _run(cpu, format, _impl(cpu, format, **options), layer, builder)
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
            gpu, format, _impl(gpu, format, **options), _layer(format), _builder(device="cpu")
        )
        for name, options in FEATURES.items()
    }
    for name, result in results.items():
        change = (result.output - results["plain"].output).abs().max()
        assert (change > 0.1) == (name != "plain"), (name, change)


def test_fused_output_quantization_is_refused():
    impl = _impl(gpu, FORMATS["fp8"])
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
    impl = _impl(gpu, format)
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
