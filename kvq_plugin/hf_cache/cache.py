"""KVQCache: transformers' ``Cache`` whose full-attention layers are quantized pages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from kvq_plugin.formats import get_format
from kvq_plugin.hf_cache import options
from kvq_plugin.hf_cache import scales as static_scales
from kvq_plugin.hf_cache.layer import KVQLayer
from kvq_plugin.hf_cache.table import BlockTable

#: Models whose state is no K and V, though a DynamicCache has layers for them as for others;
#: they take past_key_values without a word, and would run with a cache that stays empty.
RECURRENT = ("rwkv", "xlstm")
#: Tokens a block: vLLM's on CPUs, and what a sequence may leave unused.
BLOCK_SIZE = 128


class KVQCache(Cache):
    """A cache of *format*, any name of the format table, for the model of *config*.

    Layers with full attention keep pages of *format*, the bytes that vLLM's layers keep. Sliding
    windows, linear attention and everything else stay transformers' own layers.

    Args:
        config: the model's configuration.
        format: ``int8_per_token_head``, ``int4``, ``fp8``, ...
        scales: for ``int8`` and ``fp8``, a calibrated checkpoint (directory or hub name), or layer
            number -> ``k_scale``, ``v_scale`` and zero points; by default those of the directory
            the model was loaded from.
        block_size: tokens a block, a multiple of 16, of 32 in formats with recent rows.

    Raises ValueError for an unknown format, a model without a full-attention layer, missing scales;
    at the first token for scales that are wrong and K and V that pages cannot hold.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        format: str,
        *,
        scales: str | Path | Mapping[int, Mapping[str, torch.Tensor]] | None = None,
        block_size: int = BLOCK_SIZE,
    ) -> None:
        if not isinstance(config, PreTrainedConfig):
            raise ValueError(f"KVQCache of {type(config).__name__}: expected model.config")
        self.format = get_format(format)
        step = self.format.block_size_step
        if type(block_size) is not int or block_size <= 0 or block_size % step:
            raise ValueError(f"block_size={block_size!r}: expected a multiple of {step}")
        text = config.get_text_config(decoder=True)
        if text.model_type in RECURRENT:
            raise ValueError(
                f"{text.model_type} models keep a recurrent state and no K and V, so there is "
                "nothing to quantize: expected a model with attention; leave the cache out"
            )
        layers = DynamicCache(config=config).layers
        ours = [i for i, layer in enumerate(layers) if type(layer) is DynamicLayer]
        if not ours:
            raise ValueError(
                f"no layer of this {config.model_type} model has full attention and a cache of its "
                "own, so there is nothing to quantize: use transformers' DynamicCache"
            )
        model = getattr(config, "_name_or_path", None)
        found = static_scales.read(self.format, scales, model, ours)
        table = BlockTable(block_size, self.format)
        is_shared = bool(getattr(text, "num_kv_shared_layers", None))
        for i in ours:
            layers[i] = KVQLayer(self.format, table, found.get(i), is_shared, i)
        super().__init__(layers=layers)

    @classmethod
    def like(
        cls,
        config: PreTrainedConfig,
        *,
        backend: str,
        nbits: int | None = None,
        axis_key: int | None = None,
        axis_value: int | None = None,
        q_group_size: int | None = None,
        residual_length: int | None = None,
        scales: str | Path | Mapping[int, Mapping[str, torch.Tensor]] | None = None,
    ) -> KVQCache:
        """The cache for the options of transformers' ``QuantizedCache``.

        ``nbits`` 8 and 4 (the default) are ``int8_per_token_head`` and ``int4_per_token_head``, the
        backend ``fp8`` is ``fp8_per_token_head``, and axis 0 with *scales* and 8 bits is ``int8``.
        ``q_group_size`` may be the head size or more, ``residual_length`` 0. Raises ValueError
        naming the option that has no equivalent, and what to pass instead.
        """
        if not isinstance(config, PreTrainedConfig):
            raise ValueError(f"KVQCache of {type(config).__name__}: expected model.config")
        name = options.format_like(
            _largest_head(config.get_text_config(decoder=True)),
            backend=backend,
            nbits=nbits,
            axis_key=axis_key,
            axis_value=axis_value,
            q_group_size=q_group_size,
            residual_length=residual_length,
            has_scales=scales is not None,
        )
        return cls(config, name, scales=scales)

    def __repr__(self) -> str:
        return f"KVQCache({self.format.name}, layers={self.layers})"

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, KVQLayer))


def _largest_head(text: PreTrainedConfig) -> int | None:
    """The largest head size of any layer; None where *text* states none, as without attention."""
    each = getattr(text, "per_layer_config", None) or ()
    layers = [*(each.values() if isinstance(each, Mapping) else each)] or [text]
    sizes = [
        getattr(of, "head_dim", None) or of.hidden_size // of.num_attention_heads
        for of in layers
        if getattr(of, "num_attention_heads", None)
    ]
    return max(sizes, default=None)
