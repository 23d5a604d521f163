"""What the attention backends of all platforms share: quantize on write, attend over codes.

vLLM asks a backend *class* how wide a page is, without any config, so each platform has one
class per format (:meth:`KVQBackend.of` makes them).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from kvq_plugin import ops
from kvq_plugin.formats import SERVED, KVFormat, get_format
from kvq_plugin.reference import StaticScale
from kvq_plugin.serving.compat import (
    AttentionBackend,
    AttentionImpl,
    AttentionType,
    CommonAttentionMetadata,
    KVCacheLayout,
    MultipleOf,
    SlidingWindowSpec,
    current_platform,
)
from kvq_plugin.serving.layers import CODE_DTYPES, keep_buffer, require_same_cache

_NO_STATICS = (None, None)


def class_path(backend: type[AttentionBackend]) -> str:
    """What vLLM imports *backend* by."""
    return ".".join(backend.full_cls_name())


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

    @classmethod
    def of(cls, batch: CommonAttentionMetadata, **more: Any) -> KVQMetadata:
        """From vLLM's description of a *batch*; *more* are fields of a subclass.

        Raises ValueError for a batch that is causal in part.
        """
        if isinstance(batch.causal, torch.Tensor):
            raise ValueError(
                "a batch mixes causal and non-causal requests, which kvq_plugin does not attend "
                "to: expected one mode per batch; use --kv-cache-dtype auto"
            )
        return cls(
            num_actual_tokens=batch.num_actual_tokens,
            max_query_len=batch.max_query_len,
            max_seq_len=batch.max_seq_len,
            block_table=batch.block_table_tensor,
            seq_lens=batch.seq_lens,
            query_start_loc=batch.query_start_loc,
            slot_mapping=batch.slot_mapping,
            causal=batch.causal,
            **more,
        )


class KVQImpl(AttentionImpl[KVQMetadata]):
    """One layer's attention over a quantized cache.

    Attributes:
        format: the row of the table the layer was asked for (set by :meth:`KVQBackend.of`).
        kernel_format: what the pages hold; *format* but for the encoding of 8-bit floats on some
            GPUs, and for layers with a sliding window of a format with recent rows: these keep all
            rows as recent ones, whose number the window bounds anyway.
    """

    format: ClassVar[KVFormat]
    backend: ClassVar[type[KVQBackend]]
    meter: Any = None  # kvq_plugin.serving.metrics.Meter, where there are metrics
    supports_pcp: bool = False
    supports_dcp: bool = False  # True by default in vLLM 0.29

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
        self.backend.require_head_size(kv_cache_dtype, head_size)
        if sinks is not None and sinks.shape[0] != num_heads:
            raise ValueError(
                f"attention sinks have {sinks.shape[0]} entries: expected one per query head, "
                f"{num_heads}"
            )
        self.kernel_format = (sliding_window and self.format.recent) or self.format
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.attn_type = attn_type
        self.logits_soft_cap = float(logits_soft_cap or 0.0)
        self.sliding_window = sliding_window or 0
        self.alibi_slopes = (
            None
            if alibi_slopes is None
            else torch.tensor(
                alibi_slopes, dtype=torch.float32, device=current_platform.device_type
            )
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

    def keep_in(self, layer: torch.nn.Module) -> None:
        """Move what the kernels read of the model itself to buffers of *layer*, as fp32.

        Buffers survive a weight reload and ``sleep(level=2)``, at the same address; attributes
        do not.
        """
        for name in ("alibi_slopes", "sinks"):
            if (value := getattr(self, name)) is not None:
                self._options[name] = keep_buffer(layer, f"_kvq_{name}", value.detach().float())
        self.alibi_slopes = self._options["alibi_slopes"]

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Take the loaded sinks as the fp32 the kernels read."""
        if self.sinks is None:
            return
        if self._options["sinks"] is None:  # the layer loads no scales, and has no such buffers
            self._options["sinks"] = torch.empty_like(self.sinks, dtype=torch.float32)
        self._options["sinks"].copy_(self.sinks.detach())

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
        recent, caches = {}, (kv_cache,)
        if self.kernel_format.recent is not None:
            _, cache, slots = layer.kvq_recent.caches()
            recent, caches = (
                {"recent_cache": cache, "recent_slot_mapping": slots},
                (kv_cache, cache),
            )
        statics = self._statics(layer)
        if self.meter is not None:
            self.meter.store(key, value, caches, slot_mapping.shape[0], statics)
        ops.store(key, value, kv_cache, slot_mapping, self.kernel_format, *statics, **recent)

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
        out = output if tokens == output.shape[0] else output[:tokens]
        recent = {}
        if self.kernel_format.recent is not None:
            theirs, cache, _ = layer.kvq_recent.caches()
            if self.meter is not None:
                self.meter.rows(m.seq_lens)
            recent = {"recent_cache": cache, "recent_block_table": theirs.block_table}
        self._attend(out, query, kv_cache, m, self._statics(layer), recent)
        return output

    def _attend(
        self,
        out: torch.Tensor,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        m: KVQMetadata,
        statics: tuple[StaticScale | None, StaticScale | None],
        recent: dict[str, torch.Tensor],
    ) -> None:
        """Call the kernels for the batch *m*; *recent*: cache and block table of recent rows."""
        raise NotImplementedError


class KVQBackend(AttentionBackend):
    """Base of the backends; a platform adds what its kernels take, :meth:`of` the format.

    Attributes:
        format: one row of the table; impl_cls: its implementation, or the base of them all.
        block_multiple: blocks hold a multiple of so many tokens; default_block_size: what a
            message about them suggests.
    """

    format: ClassVar[KVFormat]
    impl_cls: ClassVar[type[KVQImpl]]
    block_multiple: ClassVar[int]
    default_block_size: ClassVar[int]
    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [
        torch.float16,
        torch.bfloat16,
        torch.float32,
    ]

    @classmethod
    def of(cls, dtype: str) -> type[KVQBackend]:
        """The subclass for cache dtype *dtype*: ``KVQ_`` and the dtype, and to be assigned to that
        name in the module of *cls*, from where vLLM imports it."""
        name = f"KVQ_{dtype}"
        common = {"format": get_format(dtype), "__module__": cls.__module__}
        impl = type(name + "Impl", (cls.impl_cls,), {**common, "backend": cls})
        return type(name, (cls,), {**common, "impl_cls": impl})

    @classmethod
    def get_impl_cls(cls) -> type[KVQImpl]:
        return cls.impl_cls

    @classmethod
    def get_supported_kernel_block_sizes(cls, kv_cache_spec=None) -> list[Any]:
        return [MultipleOf(cls.block_multiple)]

    @classmethod
    def elsewhere(cls, kv_cache_dtype: str) -> str:
        """What a message suggests beside ``--kv-cache-dtype auto``, if anything."""
        return ""

    @classmethod
    def require_head_size(cls, kv_cache_dtype: str, head_size: int) -> None:
        """Raise ValueError when there are no kernels for *head_size* on this platform."""
        if not cls.supports_head_size(head_size):
            sizes = ", ".join(map(str, cls.get_supported_head_sizes()))
            raise ValueError(
                f"--kv-cache-dtype {kv_cache_dtype} was asked for head size {head_size}: supported "
                f"are {sizes}; use --kv-cache-dtype auto{cls.elsewhere(kv_cache_dtype)}"
            )

    @classmethod
    def lacking(cls, format: KVFormat, head_size: int) -> str | None:
        """Why *format* cannot be served on this machine at *head_size*, if it cannot."""
        return None

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)  # one (block, head) is one contiguous page

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: str | None) -> bool:
        return SERVED.get(kv_cache_dtype) is cls.format

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_non_causal(cls) -> bool:
        return cls.format.recent is None

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
        if spec.state_content_bytes is not None or spec.dtype not in CODE_DTYPES:
            return spec
        if spec.head_size_v != spec.head_size:
            raise ValueError(
                f"--kv-cache-dtype {cls.format.name} was asked for a layer whose K and V head "
                f"sizes differ ({spec.head_size} and {spec.head_size_v}): expected equal ones; "
                "use --kv-cache-dtype auto"
            )
        rows = cls.format
        if rows.recent is not None and isinstance(spec, SlidingWindowSpec):
            rows = rows.recent  # see KVQImpl.kernel_format
        # vLLM asks for blocks of one token where it wants the bytes of one.
        tokens = spec.block_size if spec.block_size > 1 else cls.default_block_size
        content = rows.bytes_per_token(spec.head_size, tokens)
        return replace(spec, dtype=torch.uint8, state_content_bytes=content)
