"""``attn_implementation="kvq"``: attention that reads the pages of a KVQCache.

The mask function gives a full-attention layer the padding alone, ``[B, length]``: causality is
known. Layers that are not ours, windows say, and masks that are more than padding get what
transformers' own attention needs, and it. Models that would not call this attention get a mask
for their own.
"""

from __future__ import annotations

import inspect
import re
import sys
from functools import cache

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    causal_mask_function,
    eager_mask,
    prepare_padding_mask,
    sdpa_mask,
)

from kvq_plugin.hf_cache.paged import Paged, refuse_recent, say_once, untrained

NAME = "kvq"


def register() -> None:
    """Make ``attn_implementation="kvq"`` known to transformers."""
    # No graph: where pages lie is for Python to say. Traced into, it was compiled anew up to
    # Dynamo's limit, and compiling and generating took 2.5 times as long (46 and 18 s).
    opaque = torch.compiler.disable(
        attention,
        reason='attention by "kvq" reads pages and is no graph: compile without fullgraph=True',
    )
    AttentionInterface.register(NAME, opaque)
    AttentionMaskInterface.register(NAME, mask)


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    config: PreTrainedConfig | None = None,
    **kwargs,
) -> torch.Tensor | None:
    """None for causal attention over all tokens, bool ``[B, kv_length]`` for padding besides, and
    transformers' ``[B, 1, q_length, kv_length]`` for everything else: bool, or for models with
    attention of their own what they add to scores."""
    if config is not None and not asks(type(config.get_text_config(decoder=True))):
        return eager_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask,
            **kwargs,
        )  # fmt: skip
    # Else a static cache, with places for tokens to come: neither ours nor described by padding.
    whole = type(q_offset) is int and kv_length == q_offset + q_length
    if whole and mask_function is causal_mask_function and allow_is_causal_skip:
        padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
        return None if padding is None or padding.all() else padding[:, :kv_length]
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip and whole,
        **kwargs,
    )


@torch.compiler.assume_constant_result
def asks(config: type[PreTrainedConfig]) -> bool:
    """:func:`_asks`, which Dynamo does not trace."""
    return _asks(config)


@cache
def _asks(config: type[PreTrainedConfig]) -> bool:
    """Whether models of this configuration call the attention that they are loaded with.

    Of those that do not (BLOOM, XGLM, 20 of transformers 5.24's), ``from_pretrained`` takes any
    ``attn_implementation``, and asks for its masks alone. Told by source, as transformers does
    itself where an implementation is changed later, but class by class: GIT's vision calls it, and
    its text does not. A model that cannot be told counts as one that does not.
    """
    for base in config.__mro__[: config.__mro__.index(PreTrainedConfig)]:
        module = sys.modules.get(base.__module__.replace("configuration_", "modeling_"))
        found = [x for x in vars(module).values() if isinstance(x, type)] if module else []
        found = [source(x) for x in found if issubclass(x, torch.nn.Module)]
        # What takes K first; MLA's is k_pass, kv_nope and the like.
        found = [text for text in found if re.search(r"\.update\(\s*(cur|k(?!wargs))", text)]
        if found:
            return all("get_interface(" in text for text in found)
    return False


def source(of: type) -> str:
    """The text of a class; empty where there is none."""
    try:
        return inspect.getsource(of)
    except (OSError, TypeError):
        return ""


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor | Paged,
    value: torch.Tensor | Paged,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """``query [B, heads, T, D]`` -> ``[B, T, heads, D]``; no attention weights.

    Reads the pages where ``key`` and ``value`` are the :class:`Paged` of one layer. Raises
    ValueError for dropout over them, for queries that are not those of the tokens that the layer
    took in, and for a mask that shows what was hidden when it came.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    padding = attention_mask is None or attention_mask.dim() == 2
    whole = type(key) is Paged and key.is_whole_with(value)
    if whole:
        key.layer.check_queries(query.shape[2])
    if whole and padding and position_bias is None:
        if dropout:
            raise ValueError(
                f"attention by {NAME!r} has no dropout, got {dropout}: it is for inference; call "
                "model.eval(), or train with another attention implementation"
            )
        step = key.layer.commit(key.layer.table.shown(key.layer.length, attention_mask))
        if step is not None:
            out = key.layer.attend(
                query,
                step,
                query.shape[-1] ** -0.5 if scaling is None else scaling,
                causal=causal,
                window=sliding_window or 0,
                softcap=softcap or 0.0,
                sinks=None if s_aux is None else s_aux.detach().float().contiguous(),
            )
            return untrained(out, query.requires_grad or key.layer.wants_gradient), None
    if whole:
        refuse_recent(key.layer.format, "an attention mask that is more than padding")
        say_once(
            "kvq: this attention mask is more than padding on tokens that the cache has seen, so "
            "the pages are dequantized for it"
        )
        key.layer.table.check_shown(key.layer.length, attention_mask)
        key, value = key.layer.dequantize()
    # DiffLlama's attention hands on another V than it was given.
    key, value = (x.tensor() if type(x) is Paged else x for x in (key, value))
    if padding:
        attention_mask = _whole_mask(attention_mask, query, key, causal)
    options = {
        "scaling": scaling,
        "dropout": dropout,
        "sliding_window": sliding_window,
        "softcap": softcap,
        "s_aux": s_aux,
        "is_causal": is_causal,
        "position_bias": position_bias,
        **kwargs,
    }
    options = {name: x for name, x in options.items() if x is not None}
    if softcap is None and s_aux is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return _eager(module, query, key, value, attention_mask, options)


def _whole_mask(padding, query, key, causal: bool) -> torch.Tensor | None:
    """What :func:`mask` left out, for attention that needs it: None or ``[B, 1, T, length]``."""
    new, length = query.shape[2], key.shape[2]
    if not causal and padding is None:
        return None
    if not causal:
        return padding[:, None, None]
    return sdpa_mask(
        batch_size=len(query),
        q_length=new,
        kv_length=length,
        q_offset=length - new,
        attention_mask=padding,
        device=query.device,
    )


def _eager(module, query, key, value, mask, options) -> tuple[torch.Tensor, None]:
    """The model's own attention in plain torch, which knows its softcap and sinks."""
    forward = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if forward is None:
        raise ValueError(
            f"{type(module).__name__} has softcap or sinks on a layer that KVQCache does not keep, "
            f"and no attention in plain torch: attention by {NAME!r} cannot serve it; load the "
            'model with attn_implementation="eager"'
        )
    if mask is None and query.shape[2] > 1:
        mask = sdpa_mask(
            len(query), query.shape[2], key.shape[2], allow_is_causal_skip=False,
            device=query.device,
        )  # fmt: skip
    if mask is not None and mask.dtype == torch.bool:
        least = torch.finfo(query.dtype).min
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill_(
            ~mask, least
        )
    out, _ = forward(module, query, key, value, mask, **options)
    return out, None
