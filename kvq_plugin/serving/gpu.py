"""The attention backend for CUDA and ROCm: the kernels of :mod:`kvq_plugin.kernels`.

vLLM needs to find the backend's name in its enum: that is ``TRITON_ATTN``, however it was selected.
Layers that stay unquantized keep whichever of vLLM's backends it would choose without the plugin.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch

from kvq_plugin import kernels, ops
from kvq_plugin.formats import GROUP, KVFormat, fnuz
from kvq_plugin.kernels import Workspace, new_workspace
from kvq_plugin.layout import GPU_V1, LANES, MAX_HEAD_SIZES
from kvq_plugin.serving.base import KVQBackend, KVQImpl, KVQMetadata
from kvq_plugin.serving.compat import (
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    current_platform,
    split_decodes_and_prefills,
)
from kvq_plugin.serving.compat.additions import is_own_dtype
from kvq_plugin.serving.pages import BLOCK_SIZE, SUFFIX

#: Compute capability of the oldest NVIDIA GPUs the kernels are compiled for.
MIN_CAPABILITY = (8, 0)
#: The same, and all else, for messages.
LIMITS = (
    "decoder layers without MLA, multimodal prefixes, R-SWA, context parallelism, KV connectors or "
    f"batch invariance, head sizes in multiples of {LANES} up to {MAX_HEAD_SIZES[GPU_V1]}, blocks "
    f"in multiples of {LANES} tokens, models in bfloat16, float16 or float32, and NVIDIA GPUs from "
    "compute capability {}.{} on".format(*MIN_CAPABILITY)
)


@dataclass
class Part:
    """Neighbouring requests of a batch that one launch attends to.

    Attributes:
        begin, end: the requests.
        block_table, seq_lens, query_start_loc: theirs, views of the batch's; rows of
            query_start_loc still count from the batch's first token.
        max_query_len: bound on their query lengths.
    """

    begin: int
    end: int
    max_query_len: int
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor


@dataclass(kw_only=True)
class GPUMetadata(KVQMetadata):
    """A batch and how it is launched.

    Attributes:
        parts: one, or the decodes and then the rest: a decode reads its whole context with few
            rows and is split over the GPU, which a prefill of many rows is not.
        workspace: memory of the kernels.
    """

    parts: tuple[Part, ...] = ()
    workspace: Workspace | None = None

    def split(self, *parts: tuple[int, int, int]) -> GPUMetadata:
        """Itself with *parts* of (first request, one past the last, bound on query lengths)."""
        self.parts = tuple(
            Part(
                begin,
                end,
                max_query_len,
                self.block_table[begin:end],
                self.seq_lens[begin:end],
                self.query_start_loc[begin : end + 1],
            )
            for begin, end, max_query_len in parts
        )
        return self


class GPUBuilder(AttentionMetadataBuilder[GPUMetadata]):
    """Describes a batch without asking the device anything.

    A captured graph keeps the host's numbers and reads the tensors anew at every replay. vLLM
    captures with bounds that hold for every replay (max_seq_len is the model's longest context,
    max_query_len all tokens of a graph for mixed batches), so the kernels' grids do as well.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS
    # All tensors are vLLM's persistent ones, so there is nothing to update between drafts.
    supports_draft_decode_metadata_update = True

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        # vLLM's V1 model runner would give all microbatches of a step the first one's lengths.
        self.supports_update_block_table = not vllm_config.parallel_config.use_ubatching
        self._captured: set[tuple[int, ...]] = set()
        self._layers, self._workspace = [], None
        # Recent rows are attended to with the sealed ones, in whose workspace that is.
        if all(name.endswith(SUFFIX) for name in layer_names):
            return
        context = vllm_config.compilation_config.static_forward_context
        self._layers = [context[name] for name in layer_names]
        # One for all batches: attention of microbatches is on one stream, one after the other.
        self._workspace = self._layers[0].impl.workspace
        # A buffer, so that it outlives sleep(level=2) as scales do.
        counters = self._workspace.counters
        self._layers[0].register_buffer("_kvq_counters", counters, persistent=False)

    def _describe(self, batch: CommonAttentionMetadata) -> GPUMetadata:
        return GPUMetadata.of(batch, workspace=self._workspace)

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> GPUMetadata:
        """One launch for all: where decodes end is not the same at every replay."""
        batch = common_attn_metadata
        metadata = self._describe(batch).split((0, batch.num_reqs, batch.max_query_len))
        bounds = (batch.num_actual_tokens, batch.num_reqs, batch.max_query_len, batch.max_seq_len)
        if bounds not in self._captured:
            self._captured.add(bounds)
            self._launch(metadata)
        return metadata

    def _launch(self, m: GPUMetadata) -> None:
        """Attention of every layer once, the output thrown away: a kernel is compiled or loaded at
        its first launch, which must not be in a capture. The batches that vLLM warms up with are
        no longer than their queries, and may have decodes apart: other kernels serve them."""
        for layer in self._layers:
            impl = layer.impl
            like = {"dtype": self.vllm_config.model_config.dtype, "device": self.device}
            query, out = (
                torch.zeros(m.num_actual_tokens, impl.num_heads, impl.head_size, **like)
                for _ in "qo"
            )
            if impl.kernel_format.recent is None:
                impl.forward(layer, query, None, None, layer.kv_cache, m, out)
                continue
            # Their block table is in the forward context, and there is none yet.
            cache = layer.kvq_recent.kv_cache
            blocks = -(-m.max_seq_len // cache.shape[2])
            table = m.block_table.new_zeros(m.block_table.shape[0], blocks)
            recent = {"recent_cache": cache, "recent_block_table": table}
            impl._attend(out, query, layer.kv_cache, m, impl._statics(layer), recent)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> GPUMetadata:
        batch, bound = common_attn_metadata, self.reorder_batch_threshold
        decodes, rest, _, _ = split_decodes_and_prefills(batch, decode_threshold=bound)
        metadata = self._describe(batch)
        if not decodes or not rest:
            return metadata.split((0, batch.num_reqs, batch.max_query_len))
        # The bound rather than the longest of these decodes: with adaptive verification the
        # device alone knows how long each is.
        return metadata.split((0, decodes, bound), (decodes, batch.num_reqs, batch.max_query_len))

    def update_block_table(
        self, metadata: GPUMetadata, blk_table: torch.Tensor, slot_mapping: torch.Tensor
    ) -> GPUMetadata:
        """*metadata* for another KV cache group of the same batch."""
        changed = copy(metadata)  # vLLM's classes around ours keep more in it
        changed.block_table, changed.slot_mapping = blk_table, slot_mapping
        return changed.split(*((p.begin, p.end, p.max_query_len) for p in metadata.parts))

    def update_draft_decode_metadata(self, metadata: GPUMetadata) -> None:
        """Nothing to do: the tensors *metadata* names are the ones vLLM updates."""


#: By head size.
_WORKSPACES: WeakValueDictionary[int, Workspace] = WeakValueDictionary()


def _workspace(head_size: int) -> Workspace:
    """That of all layers of *head_size*, enough for any batch: a captured graph keeps its address.
    Reserved while weights are loaded, so that vLLM counts it before it sizes the cache."""
    if (found := _WORKSPACES.get(head_size)) is None:
        found = new_workspace(head_size, torch.device(current_platform.device_type))
        _WORKSPACES[head_size] = found
    return found


class GPUImpl(KVQImpl):
    """Attention by the Triton or CUDA C++ kernels, whichever ops.attend chooses."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if current_platform.is_fp8_fnuz():
            self.kernel_format = fnuz(self.format)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        super().process_weights_after_loading(act_dtype)
        self.workspace = _workspace(self.head_size)

    def _attend(self, out, query, kv_cache, m, statics, recent) -> None:
        table = recent.get("recent_block_table")
        for part in m.parts:
            if table is not None:
                recent["recent_block_table"] = table[part.begin : part.end]
            ops.attend(
                out,
                query,
                kv_cache,
                part.block_table,
                part.seq_lens,
                part.query_start_loc,
                self.kernel_format,
                self.scale,
                *statics,
                causal=m.causal,
                **self._options,
                **recent,
                max_query_len=part.max_query_len,
                max_seq_len=m.max_seq_len,
                workspace=m.workspace,
            )


class GPUBackend(KVQBackend):
    """Base of the GPUs' per-format backends."""

    impl_cls = GPUImpl
    block_multiple = LANES
    default_block_size = LANES

    @classmethod
    def of(cls, dtype: str) -> type[KVQBackend]:
        backend = super().of(dtype)
        if backend.format.recent is not None:
            backend.block_multiple, backend.default_block_size = GROUP, BLOCK_SIZE
        return backend

    @classmethod
    def lacking(cls, format: KVFormat, head_size: int) -> str | None:
        return None if format.recent is None else kernels.refusal(format, head_size, BLOCK_SIZE)

    @staticmethod
    def get_name() -> str:
        return "TRITON_ATTN"  # vLLM looks this up in its enum of backends

    @classmethod
    def elsewhere(cls, kv_cache_dtype: str) -> str:
        if is_own_dtype(kv_cache_dtype):
            return ""
        return ", or drop --attention-backend, which leaves this KV cache to vLLM's own backends"

    @staticmethod
    def get_builder_cls() -> type[GPUBuilder]:
        return GPUBuilder

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(range(LANES, MAX_HEAD_SIZES[GPU_V1] + 1, LANES))

    @classmethod
    def supports_compute_capability(cls, capability) -> bool:
        # ROCm's numbers are those of its architectures, all of which Triton compiles for.
        return not current_platform.is_cuda() or tuple(capability) >= MIN_CAPABILITY


KVQ_fp8_e4m3 = GPUBackend.of("fp8_e4m3")
KVQ_fp8_e5m2 = GPUBackend.of("fp8_e5m2")
KVQ_int8 = GPUBackend.of("int8")
KVQ_int8_per_token_head = GPUBackend.of("int8_per_token_head")
KVQ_fp8_per_token_head = GPUBackend.of("fp8_per_token_head")
KVQ_int4_per_token_head = GPUBackend.of("int4_per_token_head")
KVQ_k8v4 = GPUBackend.of("k8v4")
KVQ_int4 = GPUBackend.of("int4")
KVQ_k3v2 = GPUBackend.of("k3v2")
BACKENDS: dict[KVFormat, type[KVQBackend]] = {
    backend.format: backend
    for backend in (
        KVQ_fp8_e4m3,
        KVQ_fp8_e5m2,
        KVQ_int8,
        KVQ_int8_per_token_head,
        KVQ_fp8_per_token_head,
        KVQ_int4_per_token_head,
        KVQ_k8v4,
        KVQ_int4,
        KVQ_k3v2,
    )
}
