"""What a layer of vLLM's has: its format, the layer whose cache it reads, buffers of ours."""

from __future__ import annotations

from typing import Any

import torch

from kvq_plugin.formats import SERVED, KVFormat
from kvq_plugin.serving.compat import AttentionType, get_current_vllm_config_or_none

#: Cache dtypes under which vLLM presents one of our layers; an unquantized layer's is wider.
CODE_DTYPES = (torch.uint8, torch.int8)


def layer_format(kv_cache_dtype: str | None, attn_type: str) -> KVFormat | None:
    """The format of a layer's cache; None where the layer has none of ours.

    Raises ValueError for cross attention, whose cache vLLM fills on another path.
    """
    format = SERVED.get(kv_cache_dtype)
    if format is None or attn_type in (AttentionType.ENCODER, AttentionType.ENCODER_ONLY):
        return None
    if attn_type != AttentionType.DECODER:
        raise ValueError(
            f"--kv-cache-dtype {kv_cache_dtype} was asked for a layer of type {attn_type}: "
            "kvq_plugin quantizes decoder self-attention only; use --kv-cache-dtype auto"
        )
    return format


def is_our_spec(spec: Any) -> bool:
    """Whether *spec*, of a layer's KV cache, is one that :meth:`KVQBackend.customize_spec` made."""
    content = getattr(spec, "state_content_bytes", None)
    if content is None or spec.dtype is not torch.uint8:
        return False
    rows = {row for format in SERVED.values() for row in (format, format.recent) if row}
    return content in {f.bytes_per_token(spec.head_size, spec.block_size) for f in rows}


def require_same_cache(kv_cache_dtype: str, target: str | None) -> Any:
    """The layer whose KV cache a layer reads instead of its own, or None.

    Raises ValueError when the two layers would disagree on what the bytes mean.
    """
    if target is None:
        return None
    config = get_current_vllm_config_or_none()
    if config is None:
        return None  # weights are being reloaded: the layers were built, and checked, before
    layer = config.compilation_config.static_forward_context.get(target)
    if layer is None:
        return None  # vLLM reports a bad target itself, right after this
    ours, theirs = SERVED.get(kv_cache_dtype), SERVED.get(layer.kv_cache_dtype)
    if ours is not theirs:
        raise ValueError(
            f"a layer of KV-cache dtype {kv_cache_dtype} shares the cache of {target}, which is "
            f"{layer.kv_cache_dtype}: expected the same; name both layers or neither in "
            "--kv-cache-dtype-skip-layers"
        )
    return layer


def keep_buffer(
    layer: torch.nn.Module, name: str, value: torch.Tensor, again: bool = False
) -> torch.Tensor:
    """Buffer *name* of *layer*, holding *value* from now on: the same tensor where its shape fits.

    *again* says that the buffer may be in use, by captured graphs for one: then a *value* with
    fewer dimensions is broadcast, and one that does not fit is a ValueError.
    """
    buffer = layer._buffers.get(name)
    if again and buffer is not None and value.dim() < buffer.dim():
        value = value.reshape(*value.shape, *(1,) * (buffer.dim() - value.dim()))
        value = value.expand_as(buffer)
    if buffer is not None and buffer.shape == value.shape:
        return buffer.copy_(value)
    if again:
        raise ValueError(
            f"{layer.layer_name}: the reloaded checkpoint has a {name} of shape "
            f"{tuple(value.shape)}, and the engine was started with "
            f"{'none' if buffer is None else tuple(buffer.shape)}: expected KV scales of the same "
            "or a coarser granularity, and no new zero points; start a new engine"
        )
    value = value.to(layer._k_scale.device, torch.float32, copy=True)
    # What is ours derives from the others and is made anew whenever weights are loaded.
    layer.register_buffer(name, value, persistent=not name.startswith("_kvq"))
    return value
