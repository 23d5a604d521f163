"""What a query reads of a format with recent rows, as transformers' own cache would hold it."""

from __future__ import annotations

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from kvq_plugin import ops, reference
from kvq_plugin.formats import GROUP, get_format


def as_read(key, value, format, block_size: int, position: int | None = None):
    """K and V ``[T, H, D]`` as the query at *position*, by default the last, reads them: fp32."""
    tokens, heads, size = key.shape
    caches = []
    for f, block in ((format, block_size), (format.recent, GROUP)):
        shape = (-(-tokens // block), heads, block, f.bytes_per_token(size, block))
        caches.append(torch.zeros(shape, dtype=torch.uint8))
    slots = torch.arange(tokens)
    ops.store(
        key, value, caches[0], slots, format, recent_cache=caches[1], recent_slot_mapping=slots
    )
    sealed = reference.load_sealed(caches[0], format, size)
    recent = reference.load(caches[1], format.recent, size)
    limit = format.sealed_before(tokens - 1 if position is None else position)
    both = []
    for codes, first, rows in zip(sealed[:2], sealed[2:], recent, strict=True):
        x = torch.cat([codes.flatten(0, 1)[:limit], rows.flatten(0, 1)[limit:tokens]])
        if limit:
            x[0] = first[0]
        both.append(x)
    return both


class RecentCache(DynamicCache):
    """For one token at a time: ``update`` gives what its query reads. K and V stay as they came.

    ``mask``, bool ``[B, length]``, says which positions are tokens; what is newer than it is.
    """

    def __init__(self, config, format: str, block_size: int) -> None:
        super().__init__(config=config)
        self.format, self.block_size, self.mask = get_format(format), block_size, None

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        key, value = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if type(self.layers[layer_idx]) is not DynamicLayer:
            return key, value
        assert key_states.shape[2] == 1, "the oracle reads one token at a time"
        return self.read(key, value)

    def read(self, key, value):
        """``[B, H, length, D]`` as the newest tokens' queries read them; zeros for no tokens."""
        out = torch.zeros_like(key), torch.zeros_like(value)
        for row in range(len(key)):
            kept = torch.ones(key.shape[2], dtype=torch.bool)
            if self.mask is not None:
                mask = self.mask[row if len(self.mask) == len(key) else 0]
                kept[: len(mask)] = mask[: len(kept)]
            if not bool(kept.any()):
                continue
            rows = (x[row].transpose(0, 1)[kept] for x in (key, value))
            for x, read in zip(out, as_read(*rows, self.format, self.block_size), strict=True):
                x[row, :, kept] = read.transpose(0, 1).to(x.dtype)
        return out
