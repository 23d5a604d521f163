"""What a cache of transformers holds, ours or its own, and how ``generate`` takes it."""

from __future__ import annotations

import torch
import transformers
from transformers.cache_utils import Cache

#: The argument of ``generate`` and of models: ``past_key_values=`` is deprecated from 5.24 on.
ARGUMENT = (
    "cache"
    if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24)
    else "past_key_values"
)


def held_bytes(cache: Cache) -> int:
    """Bytes of memory under all tensors that the layers of *cache* hold, each counted once."""
    storages: dict[int, int] = {}

    def walk(x) -> None:
        if isinstance(x, torch.Tensor) and hasattr(x, "__tensor_flatten__"):
            for name in x.__tensor_flatten__()[0]:
                walk(getattr(x, name))
        elif isinstance(x, torch.Tensor):
            storage = x.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(x, dict):
            for item in x.values():
                walk(item)
        elif isinstance(x, (tuple, list)):
            for item in x:
                walk(item)

    for layer in cache.layers:
        walk(vars(layer))
    return sum(storages.values())
