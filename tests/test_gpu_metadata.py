"""What the GPU backend launches a batch as, and what of it may be captured: nothing looks at the
device, nothing is allocated, and no kernel is new to a graph.

Device tensors are on torch's ``meta`` device (``gpu_batch.py``).
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from cases import ROWS
from gpu_engine import noted_kernels
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("vllm")

from gpu_batch import (  # noqa: E402
    BLOCK,
    HEAD_SIZE,
    HEADS,
    QUERY_HEADS,
    TOKENS,
    Layer,
    batch_of,
    builder_of,
    impl_of,
    ranges_of,
    small_workspaces,
)
from vllm.v1.attention.backends.utils import create_fast_prefill_custom_backend  # noqa: E402
from vllm.v1.worker.gpu_model_runner import GPUModelRunner  # noqa: E402
from vllm.v1.worker.ubatch_utils import UBatchSlice  # noqa: E402
from vllm.v1.worker.utils import AttentionGroup  # noqa: E402

from kvq_plugin import kernels as gpu_kernels  # noqa: E402
from kvq_plugin import ops  # noqa: E402
from kvq_plugin.calls import Attend  # noqa: E402
from kvq_plugin.formats import FORMATS, SERVED  # noqa: E402
from kvq_plugin.serving import gpu  # noqa: E402


@pytest.fixture(autouse=True)
def workspaces(monkeypatch):
    small_workspaces(monkeypatch)


def test_recent_rows_have_no_workspace_of_their_own():
    """Nor are they captured for: vLLM's builder of their group knows none of our layers."""
    recent = SimpleNamespace(kv_cache=None)
    builder = builder_of(format=SERVED["int4"], layers=[recent], suffix=".recent")
    assert builder.build(0, batch_of()).workspace is None
    builder.build_for_cudagraph_capture(batch_of())


def test_what_is_captured_with_recent_rows_is_launched_without_their_block_table():
    """vLLM has set no forward context yet: whatever table, as long as it is one of that shape."""
    format, seen = SERVED["int4"], []
    layer = Layer(format=format)
    layer.kvq_recent = SimpleNamespace(kv_cache=torch.empty(4, HEADS, 64, 136, device="meta"))
    layer.impl._statics = lambda layer: (None, None)
    layer.impl._attend = lambda *args: seen.append(args)
    builder = builder_of(format=format, layers=[layer])
    builder.build_for_cudagraph_capture(batch_of(max_query_len=TOKENS, max_seq_len=4096))
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
    metadata = builder_of().build(0, batch_of())
    assert ranges_of(metadata) == [(0, 3, 1), (3, 5, 17)]
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
    batch = batch_of(query_lens, tuple(q + 8 for q in query_lens))
    assert ranges_of(builder_of(speculated).build(0, batch)) == ranges


def test_capture_is_one_launch_with_the_bounds_of_every_replay():
    batch = batch_of(max_query_len=TOKENS, max_seq_len=4096)
    metadata = builder_of().build_for_cudagraph_capture(batch)
    assert ranges_of(metadata) == [(0, 5, TOKENS)] and metadata.max_seq_len == 4096
    assert metadata.parts[0].seq_lens.data_ptr() == batch.seq_lens.data_ptr()


def test_what_is_captured_is_launched_once_before():
    """With the captured bounds, and in one launch, whatever vLLM warmed up with."""
    layers = [Layer(), Layer()]
    builder = builder_of(layers=layers)
    batch = batch_of(max_query_len=TOKENS, max_seq_len=4096)
    builder.build(0, batch)
    assert layers[0].forwards == []
    captured = [builder.build_for_cudagraph_capture(batch) for _ in range(2)]
    for layer in layers:  # once: vLLM asks again for idle steps of a replica
        [(rows, metadata)] = layer.forwards
        assert rows == TOKENS and ranges_of(metadata) == ranges_of(captured[0])
        assert metadata.max_seq_len == 4096
    builder.build_for_cudagraph_capture(batch_of(max_query_len=TOKENS, max_seq_len=8192))
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
    impl = impl_of(gpu, FORMATS["int8_per_token_head"])
    layer = torch.nn.Module()
    content = impl.format.bytes_per_token(HEAD_SIZE)
    layer.impl, layer.kv_cache = impl, torch.zeros(8, HEADS, BLOCK, content, dtype=torch.uint8)
    builder = builder_of(device="cpu", format=impl.format, layers=[layer])
    batch = batch_of(query_lens, query_lens, device="cpu", max_query_len=most)

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
    builder, batch = builder_of(), batch_of()
    builder.build_for_cudagraph_capture(batch)  # launches what is to be captured
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
    builder, other = builder_of(layers=layers), builder_of(layers=layers)
    first, second = builder.build(0, batch_of()), builder.build_for_cudagraph_capture(batch_of())
    assert first.workspace is second.workspace is layers[0].impl.workspace
    assert other.build(0, batch_of()).workspace is first.workspace
    # vLLM keeps the buffers of layers through sleep(level=2).
    buffers = dict(layers[0].named_buffers())
    assert any(b is first.workspace.counters for b in buffers.values())
    assert not layers[0].state_dict()


def test_each_microbatch_has_its_own_lengths_and_all_one_workspace():
    """As vLLM's V1 model runner, which has a step's microbatches by default, describes them."""
    layers = [Layer("cpu")]
    builders = [builder_of(layers=layers, device="cpu", use_ubatching=True) for _ in "ab"]
    spec, batch = builders[0].kv_cache_spec, batch_of(device="cpu")
    lengths = batch.seq_lens
    group = AttentionGroup(gpu.BACKENDS[FORMATS["fp8"]], ["layer"], spec, 0)
    group.metadata_builders = builders
    tables = SimpleNamespace(get_device_tensor=lambda n: batch.block_table_tensor[:n])
    runner = SimpleNamespace(
        kv_cache_config=SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec)]),
        attn_groups=[[group]],
        query_start_loc=SimpleNamespace(gpu=batch.query_start_loc, cpu=batch.query_start_loc_cpu),
        seq_lens=lengths, optimistic_seq_lens_cpu=lengths, positions=torch.arange(TOKENS),
        input_batch=SimpleNamespace(
            block_table=[tables], num_computed_tokens_cpu_tensor=lengths,
            num_prompt_tokens_cpu_tensor=lengths,
        ),
        is_mm_prefix_lm=False, model_config=SimpleNamespace(rswa_window=None),
        cache_config=SimpleNamespace(use_replayssm=False), dcp_world_size=1,
        speculative_config=None, _get_encoder_seq_lens=lambda *args, **options: (None, None),
    )  # fmt: skip
    slices = [UBatchSlice(slice(0, 3), slice(0, 3)), UBatchSlice(slice(3, 5), slice(3, TOKENS))]
    found, _ = GPUModelRunner._build_attention_metadata(
        runner, TOKENS, 5, 17, ubatch_slices=slices, slot_mappings={0: batch.slot_mapping}
    )
    first, second = (of["layer"] for of in found)
    assert first.seq_lens.tolist() == [40, 3, 70] and ranges_of(first) == [(0, 3, 1)]
    assert second.seq_lens.tolist() == [21, 17] and ranges_of(second) == [(0, 2, 17)]
    assert second.query_start_loc.tolist() == [0, 5, TOKENS - 3]
    assert first.workspace is second.workspace is layers[0].impl.workspace


def test_the_workspace_is_made_while_weights_are_loaded(monkeypatch):
    """Before vLLM measures what is left for the cache; for all layers of a head size."""
    monkeypatch.setattr(gpu, "_WORKSPACES", gpu.WeakValueDictionary())
    one, two = (impl_of(gpu, format) for format in (ROWS[0], ROWS[3]))
    assert one.workspace is two.workspace
    assert one.workspace.scratch.numel() == 64 * HEAD_SIZE
    assert not one.workspace.counters.any()
    del one, two
    assert not gpu._WORKSPACES  # it goes with the engine


def test_block_table_of_another_group():
    builder = builder_of()
    other = torch.ones(5, 3, dtype=torch.int32, device="meta")
    before = builder.build(0, batch_of())
    after = builder.update_block_table(before, other, torch.ones(9, device="meta"))
    assert [p.block_table.shape for p in after.parts] == [(3, 3), (2, 3)]
    assert ranges_of(after) == ranges_of(before) and after.slot_mapping.shape == (9,)
    assert before.parts[0].block_table.shape == (3, 8)  # the cached one is not changed


def test_block_table_of_another_group_in_a_class_of_vllms_around_ours():
    """Of layers that read another's cache, with --kv-sharing-fast-prefill."""
    backend = create_fast_prefill_custom_backend("FastPrefill", gpu.BACKENDS[FORMATS["fp8"]])
    builder = builder_of(builder=backend.get_builder_cls())
    before = builder.build(0, batch_of())
    after = builder.update_block_table(before, torch.ones(5, 3, device="meta"), None)
    assert type(after) is type(before) is not gpu.GPUMetadata
    assert after.parts[0].block_table.shape == (3, 3) and after.logits_indices_padded is None


def test_a_batch_causal_in_part_is_refused():
    with pytest.raises(ValueError, match="mixes causal and non-causal"):
        builder_of().build(0, batch_of(causal=torch.ones(5, dtype=torch.bool)))
