"""Batches as vLLM describes them, and what the GPU backend is for them; shared by tests, nothing
here is one.

Device tensors are on torch's ``meta`` device where only their shapes matter: any attempt to look
at their data, which on a GPU would stall it and break graph capture, raises there.
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec

from kvq_plugin import kernels as gpu_kernels
from kvq_plugin.formats import FORMATS
from kvq_plugin.serving import gpu

HEADS, QUERY_HEADS, HEAD_SIZE, BLOCK = 2, 8, 64, 16
#: Three decodes (lengths 40, 3, 70), then two prefills of 5 and 17 tokens, the first a chunk.
SEQ_LENS, QUERY_LENS = (40, 3, 70, 21, 17), (1, 1, 1, 5, 17)
TOKENS = sum(QUERY_LENS)
PADDED = TOKENS + 3


def small_workspaces(monkeypatch) -> None:
    """Their size is the kernels' business, and asking them needs Triton."""
    parameters = inspect.signature(gpu_kernels.workspace_size).parameters
    assert list(parameters) == ["head_size", "device"]
    monkeypatch.setattr(gpu_kernels, "workspace_size", lambda head_size, device: 64 * head_size)


def spec_of(format=None, head_size=HEAD_SIZE, **changes):
    settings = {"dtype": torch.uint8, "block_size": BLOCK} | changes
    spec = FullAttentionSpec(num_kv_heads=HEADS, head_size=head_size, **settings)
    return spec if format is None else gpu.BACKENDS[format].customize_spec(spec)


def batch_of(query_lens=QUERY_LENS, seq_lens=SEQ_LENS, device="meta", blocks=None, **changes):
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


def builder_of(speculated=None, device="meta", format=FORMATS["fp8"], layers=None, **changes):
    speculative, suffix = None, changes.get("suffix", "")
    layers = [Layer(device, format)] if layers is None else layers
    if speculated:
        speculative = SimpleNamespace(num_speculative_tokens=speculated, parallel_drafting=False)
    config = SimpleNamespace(
        speculative_config=speculative,
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1, use_ubatching=changes.get("use_ubatching", False)
        ),
        model_config=SimpleNamespace(dtype=torch.bfloat16),
        compilation_config=SimpleNamespace(
            static_forward_context={f"layers.{i}.attn{suffix}": x for i, x in enumerate(layers)}
        ),
        use_v2_model_runner=True,
    )
    names = list(config.compilation_config.static_forward_context)
    builder = changes.get("builder", gpu.GPUBuilder)
    return builder(spec_of(format), names, config, torch.device(device))


def ranges_of(metadata):
    return [(p.begin, p.end, p.max_query_len) for p in metadata.parts]


def impl_of(module, format, **options):
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
