"""The CPU attention backend: quantize on write, attend over codes.

vLLM asks a backend *class* how wide a page is, without any config, so there is one class per
format (:func:`backend_path` names it). Layers that stay unquantized (``auto``, skipped,
encoder-only) keep vLLM's own kernels through :mod:`kvq_plugin.serving.stock`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from kvq_plugin import hugepages, ops
from kvq_plugin.formats import FORMATS, KVFormat
from kvq_plugin.layout import LANES, MAX_HEAD_SIZE
from kvq_plugin.reference import StaticScale
from kvq_plugin.serving.compat import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    CPUAttentionBackend,
    KVCacheLayout,
    MultipleOf,
)
from kvq_plugin.serving.stock import require_same_cache

#: Cache dtypes under which vLLM presents one of our layers; an unquantized layer's is wider.
_CODE_DTYPES = (torch.uint8, torch.int8)
_NO_STATICS = (None, None)


def backend_path(kv_cache_dtype: str, attn_type: str) -> str | None:
    """Import path of the backend class for a layer, or None where vLLM's choice stands.

    Raises ValueError for cross attention, whose cache vLLM fills on another path.
    """
    format = FORMATS.get(kv_cache_dtype)
    if format is None or attn_type in (AttentionType.ENCODER, AttentionType.ENCODER_ONLY):
        return None
    if attn_type != AttentionType.DECODER:
        raise ValueError(
            f"--kv-cache-dtype {kv_cache_dtype} was asked for a layer of type {attn_type}: "
            "kvq_plugin quantizes decoder self-attention only; use --kv-cache-dtype auto"
        )
    return f"{__name__}.{_class_name(format)}"


def _class_name(format: KVFormat) -> str:
    return "KVQ_" + format.name


@dataclass
class KVQMetadata:
    """One batch, as :func:`kvq_plugin.ops.attend` takes it.

    Attributes:
        num_actual_tokens: tokens without padding.
        block_table: ``[requests, blocks]`` int32; seq_lens: ``[requests]`` int32, cached and
            new tokens; query_start_loc: ``[requests + 1]`` int32.
        slot_mapping: ``[tokens]`` int64, -1 for padding.
        causal: False when every token sees its whole sequence.
    """

    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    slot_mapping: torch.Tensor
    causal: bool = True


class KVQBuilder(AttentionMetadataBuilder[KVQMetadata]):
    """Passes vLLM's batch description through; the kernels plan for themselves."""

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._layers = vllm_config.compilation_config.static_forward_context
        self._cache_is_fresh = True

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> KVQMetadata:
        if self._cache_is_fresh:
            self._cache_is_fresh = False
            caches = [self._layers[name].kv_cache for name in self.layer_names]
            for memory in {c.untyped_storage().data_ptr(): c for c in caches}.values():
                hugepages.advise(memory)
        m = common_attn_metadata
        if isinstance(m.causal, torch.Tensor):
            raise ValueError(
                "a batch mixes causal and non-causal requests, which kvq_plugin does not attend "
                "to: expected one mode per batch; use --kv-cache-dtype auto"
            )
        return KVQMetadata(
            num_actual_tokens=m.num_actual_tokens,
            max_query_len=m.max_query_len,
            max_seq_len=m.max_seq_len,
            block_table=m.block_table_tensor,
            seq_lens=m.seq_lens,
            query_start_loc=m.query_start_loc,
            slot_mapping=m.slot_mapping,
            causal=m.causal,
        )


class KVQImpl(AttentionImpl[KVQMetadata]):
    """One layer's attention over a quantized cache of ``format`` (set by the subclass)."""

    format: ClassVar[KVFormat]

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise ValueError(
                f"the model asks its attention for {', '.join(sorted(unknown))}, which kvq_plugin "
                "does not implement: supported are alibi_slopes, sliding_window, "
                "logits_soft_cap and sinks; use --kv-cache-dtype auto"
            )
        if head_size not in KVQBackend.get_supported_head_sizes():
            raise ValueError(unsupported_head_size(kv_cache_dtype, head_size))
        if sinks is not None and sinks.shape[0] != num_heads:
            raise ValueError(
                f"attention sinks have {sinks.shape[0]} entries: expected one per query head, "
                f"{num_heads}"
            )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.attn_type = attn_type
        self.logits_soft_cap = float(logits_soft_cap or 0.0)
        self.sliding_window = sliding_window or 0
        self.alibi_slopes = (
            None if alibi_slopes is None else torch.tensor(alibi_slopes, dtype=torch.float32)
        )
        self.sinks = sinks
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self._scale_owner = require_same_cache(kv_cache_dtype, kv_sharing_target_layer_name)
        self._options = {
            "window": self.sliding_window,
            "softcap": self.logits_soft_cap,
            "alibi_slopes": self.alibi_slopes,
            "sinks": None,  # weights are not loaded yet
        }

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Take the loaded sinks as the fp32 the kernels read."""
        if self.sinks is not None:
            self._options["sinks"] = self.sinks.detach().float().contiguous()

    def _statics(self, layer: Any) -> tuple[StaticScale | None, StaticScale | None]:
        """Scales of the cache this layer reads; they belong to the layer that writes it."""
        if self.format.is_dynamic:
            return _NO_STATICS
        owner = self._scale_owner or layer
        return owner.kvq_key_static, owner.kvq_value_static

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Quantize ``key``, ``value [T, H, D]`` into ``kv_cache [B, H, N, C]`` uint8."""
        ops.store(key, value, kv_cache, slot_mapping, self.format, *self._statics(layer))

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: KVQMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend ``query [T, heads, D]`` to the cache, into ``output`` of the same shape.

        ``attn_metadata`` is None while vLLM measures memory: output is returned as it came.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError(
                "fused output quantization is not implemented by kvq_plugin's attention"
            )
        m = attn_metadata
        if m is None:
            return output
        tokens = m.num_actual_tokens
        if tokens != query.shape[0]:
            query = query[:tokens]
        ops.attend(
            output if tokens == output.shape[0] else output[:tokens],
            query,
            kv_cache,
            m.block_table,
            m.seq_lens,
            m.query_start_loc,
            self.format,
            self.scale,
            *self._statics(layer),
            causal=m.causal,
            **self._options,
        )
        return output


def unsupported_head_size(kv_cache_dtype: str, head_size: int) -> str:
    """The message refusing *head_size*."""
    sizes = ", ".join(map(str, KVQBackend.get_supported_head_sizes()))
    return (
        f"--kv-cache-dtype {kv_cache_dtype} was asked for head size {head_size}: supported are "
        f"{sizes}; use --kv-cache-dtype auto"
    )


class KVQBackend(AttentionBackend):
    """Base of the per-format backends; ``format`` is what a subclass adds."""

    format: ClassVar[KVFormat]
    impl_cls: ClassVar[type[KVQImpl]]
    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [
        torch.float16,
        torch.bfloat16,
        torch.float32,
    ]

    @staticmethod
    def get_name() -> str:
        return "CPU_ATTN"  # vLLM looks this up in its enum of backends

    @classmethod
    def get_impl_cls(cls) -> type[KVQImpl]:
        return cls.impl_cls

    @staticmethod
    def get_builder_cls() -> type[KVQBuilder]:
        return KVQBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None) -> list[Any]:
        return [MultipleOf(32)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        stock = CPUAttentionBackend.get_supported_head_sizes()
        return [d for d in stock if d % LANES == 0 and d <= MAX_HEAD_SIZE]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)  # one (block, head) is one contiguous page

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: str | None) -> bool:
        return FORMATS.get(kv_cache_dtype) is cls.format

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_non_causal(cls) -> bool:
        return True

    @classmethod
    def supports_per_head_quant_scales(cls) -> bool:
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False

    @classmethod
    def customize_spec(cls, spec):
        """*spec* with our bytes per token and kv head; a spec of unquantized cache unchanged.

        Raises ValueError when V's head size differs from K's.
        """
        if spec.state_content_bytes is not None or spec.dtype not in _CODE_DTYPES:
            return spec
        if spec.head_size_v != spec.head_size:
            raise ValueError(
                f"--kv-cache-dtype {cls.format.name} was asked for a layer whose K and V head "
                f"sizes differ ({spec.head_size} and {spec.head_size_v}): expected equal ones; "
                "use --kv-cache-dtype auto"
            )
        return replace(
            spec,
            dtype=torch.uint8,
            state_content_bytes=cls.format.bytes_per_token(spec.head_size),
        )


def _per_format_backend(format: KVFormat) -> type[KVQBackend]:
    name = _class_name(format)
    common = {"format": format, "__module__": __name__}
    impl = type(name + "Impl", (KVQImpl,), common)
    return type(name, (KVQBackend,), {**common, "impl_cls": impl})


for _format in dict.fromkeys(FORMATS.values()):
    _backend = _per_format_backend(_format)
    globals()[_backend.__name__] = _backend
