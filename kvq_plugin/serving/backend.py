"""The CPU attention backend.

Layers that stay unquantized (``auto``, skipped, encoder-only) keep vLLM's own kernels through
:mod:`kvq_plugin.serving.stock`.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from kvq_plugin import hugepages, ops
from kvq_plugin.formats import KVFormat
from kvq_plugin.layout import LANES, MAX_HEAD_SIZE
from kvq_plugin.serving.base import KVQBackend, KVQImpl, KVQMetadata
from kvq_plugin.serving.compat import (
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    CPUAttentionBackend,
    get_logger,
)
from kvq_plugin.serving.layers import is_our_spec


def cache_memory(specs: Iterable[Any]) -> AbstractContextManager:
    """What a KV cache for layers of *specs* is allocated within: on huge pages if one is ours."""
    if any(map(is_our_spec, specs)):
        return hugepages.HugePages(get_logger(__name__))
    return nullcontext()


class CPUBuilder(AttentionMetadataBuilder[KVQMetadata]):
    """Passes vLLM's batch description through; the kernels plan for themselves."""

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # abstract there

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> KVQMetadata:
        return KVQMetadata.of(common_attn_metadata)


class CPUImpl(KVQImpl):
    """Attention by the compiled CPU kernels."""

    def _attend(self, out, query, kv_cache, m, statics, recent) -> None:
        ops.attend(
            out,
            query,
            kv_cache,
            m.block_table,
            m.seq_lens,
            m.query_start_loc,
            self.kernel_format,
            self.scale,
            *statics,
            causal=m.causal,
            **self._options,
            **recent,
        )


class CPUBackend(KVQBackend):
    """Base of the CPU's per-format backends."""

    impl_cls = CPUImpl
    block_multiple = 32
    default_block_size = 128

    @staticmethod
    def get_name() -> str:
        return "CPU_ATTN"  # vLLM looks this up in its enum of backends

    @staticmethod
    def get_builder_cls() -> type[CPUBuilder]:
        return CPUBuilder

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return True  # tests/test_invariance.py

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        stock = CPUAttentionBackend.get_supported_head_sizes()
        return [d for d in stock if d % LANES == 0 and d <= MAX_HEAD_SIZE]


#: What the backends take, for messages.
_HEAD_SIZES = ", ".join(map(str, CPUBackend.get_supported_head_sizes()))
LIMITS = (
    "decoder layers with softmax attention, without multimodal prefixes, R-SWA, context "
    f"parallelism or KV connectors, head sizes {_HEAD_SIZES}, "
    f"blocks in multiples of {CPUBackend.block_multiple} tokens, models in bfloat16, float16 or "
    "float32"
)
KVQ_fp8_e4m3 = CPUBackend.of("fp8_e4m3")
KVQ_fp8_e5m2 = CPUBackend.of("fp8_e5m2")
KVQ_int8 = CPUBackend.of("int8")
KVQ_int8_per_token_head = CPUBackend.of("int8_per_token_head")
KVQ_fp8_per_token_head = CPUBackend.of("fp8_per_token_head")
KVQ_int4_per_token_head = CPUBackend.of("int4_per_token_head")
KVQ_k8v4 = CPUBackend.of("k8v4")
KVQ_int4 = CPUBackend.of("int4")
KVQ_k3v2 = CPUBackend.of("k3v2")
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
