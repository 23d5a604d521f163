"""Where the newest rows of a layer live in stock vLLM: in a layer beside it, that only vLLM sees.

A format with recent rows (:attr:`~kvq_plugin.formats.KVFormat.recent`) has two caches a layer. The
second one belongs to ``<layer>.recent``, which vLLM takes for a layer with a sliding window: it
allocates, frees, prefix-caches and preempts those rows by itself. Block tables and slots of both
are in the forward context under their names, and blocks of both are multiples of GROUP tokens, so
which tokens complete a group can be told from the slots alone.

What they cost and how many tokens fit beside them is in :mod:`kvq_plugin.serving.pages`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from kvq_plugin.formats import KVFormat
from kvq_plugin.serving import base, compat
from kvq_plugin.serving.layers import CODE_DTYPES
from kvq_plugin.serving.mapped import PACKED_LAYOUT, run_formats
from kvq_plugin.serving.pages import (
    SUFFIX,
    block_size_within,
    recent_block_size,
    sealed_page,
    window,
)


class RecentRows(compat.AttentionLayerBase):
    """The recent rows of one attention layer, as a layer of vLLM's.

    Attributes:
        name: what vLLM knows it by.
        format: of the layer, whose ``recent`` these rows have.
        run: formats of the run; blocks of all recent rows have the size that suits each of them,
            so that one block table serves all.
        kv_cache: ``[B, H, N, C]`` uint8, bound by vLLM.
    """

    def __init__(self, layer: torch.nn.Module, run: Sequence[KVFormat]) -> None:
        self.name = layer.layer_name + SUFFIX
        self.kv_cache = torch.tensor([])
        self._layer_spec = layer.get_kv_cache_spec
        self.format = layer.impl.kernel_format
        self.run = run
        self._backend = layer.attn_backend
        # Looked up once: compat imports a name's module each time, and steps ask twice a layer.
        self._context = compat.get_attention_context

    def get_attn_backend(self) -> type[base.KVQBackend]:
        return self._backend  # which tells recent rows from sealed ones by the spec's window

    def get_kv_cache_spec(self, vllm_config: Any) -> Any:
        """The layer's own spec, but for a window; vLLM has the backend add the bytes per token."""
        spec = self._layer_spec(vllm_config)
        return compat.SlidingWindowSpec(
            block_size=recent_block_size(self.run, spec.head_size, spec.block_size),
            num_kv_heads=spec.num_kv_heads,
            head_size=spec.head_size,
            head_size_v=spec.head_size_v,
            dtype=spec.dtype,
            kv_quant_mode=spec.kv_quant_mode,
            sliding_window=window(self.format, vllm_config.num_speculative_tokens),
        )

    def caches(self) -> tuple[Any, torch.Tensor, torch.Tensor | None]:
        """This step's metadata, the cache and the slots; the first and last None while vLLM
        measures memory."""
        metadata, _, cache, slots = self._context(self.name)
        return metadata, cache, slots


def prepare(layer: torch.nn.Module, vllm_config: Any) -> None:
    """Give an attention layer that vLLM has just built what a run of a format with recent rows
    needs: its recent rows (of its own, or those of the layer whose cache it reads), or, if it
    keeps none, blocks that leave the page size to those that do.

    Sets ``layer.kvq_recent``: a :class:`RecentRows` or None. Does nothing when called again.
    """
    if hasattr(layer, "kvq_recent"):
        return
    layer.kvq_recent = None
    layers = vllm_config.compilation_config.static_forward_context
    run = run_formats(vllm_config)
    if not any(format.recent for format in run):  # but the layers may be a draft model's
        run = next((x.run for x in layers.values() if isinstance(x, RecentRows)), ())
    if not run:
        return
    if getattr(layer, "kv_sharing_target_layer_name", None) is not None:
        target = layers.get(layer.kv_sharing_target_layer_name)
        layer.kvq_recent = getattr(target, "kvq_recent", None)
    elif is_sealed(layer):
        _require_causal(layer, vllm_config)
        recent = RecentRows(layer, run)
        layers[recent.name] = recent
        layer.kvq_recent = recent
    elif vllm_config.cache_config.kv_cache_layout != PACKED_LAYOUT:  # where pages need not be equal
        [format] = run
        layer.get_kv_cache_spec = _narrow(layer.get_kv_cache_spec, format)


def is_sealed(layer: torch.nn.Module) -> bool:
    """Whether *layer*'s cache holds sealed rows: then it has recent ones beside them."""
    impl = getattr(layer, "impl", None)
    return isinstance(impl, base.KVQImpl) and impl.kernel_format.recent is not None


def _require_causal(layer: torch.nn.Module, vllm_config: Any) -> None:
    """Raise ValueError for a layer that sees tokens to come: recent rows serve queries that do not,
    and nothing asks before the first request. Its spec alone tells (vLLM 0.29 on)."""
    if getattr(layer.get_kv_cache_spec(vllm_config), "non_causal", False):
        raise ValueError(
            f"--kv-cache-dtype {layer.kv_cache_dtype} was asked for {layer.layer_name}, which "
            "attends in both directions, as a prefix LM does: supported are layers with causal "
            "attention; use --kv-cache-dtype int8_per_token_head"
        )


def _narrow(stock: Callable[[Any], Any], run: KVFormat) -> Callable[[Any], Any]:
    def get_kv_cache_spec(vllm_config: Any) -> Any:
        spec = stock(vllm_config)
        if spec is None:
            return None
        full = vllm_config.cache_config.block_size
        page = sealed_page(run, spec.head_size, full)
        if spec.dtype in CODE_DTYPES:
            content = run.recent.bytes_per_token(spec.head_size)
        else:
            content = (spec.head_size + spec.head_size_v) * spec.dtype.itemsize
        block_size = block_size_within(page, content, full)
        return replace(spec, block_size=block_size, page_size_padded=None)

    return get_kv_cache_spec
