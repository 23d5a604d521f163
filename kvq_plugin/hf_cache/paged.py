"""K and V as a layer's ``update`` returns them: codes, for who can read them."""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING

import torch

from kvq_plugin.formats import GROUP, KVFormat

if TYPE_CHECKING:
    from kvq_plugin.hf_cache.layer import KVQLayer

logger = logging.getLogger(__name__)


@cache
def say_once(text: str) -> None:
    """Log the warning *text*, the first time in this process."""
    logger.warning(text)


def refuse_recent(format: KVFormat, what: str) -> None:
    """ValueError where one K and V for all queries, which *what* asks for, do not exist."""
    if format.recent is not None:
        raise ValueError(
            f"KVQCache: {what} cannot read {format.name}, of which a query reads the newest "
            f"{format.window} to {format.window + GROUP - 1} tokens from int8 rows and older ones "
            'from codes: load the model with attn_implementation="kvq" and use masks of padding '
            "alone, or a format without recent rows, 'int8_per_token_head' say"
        )


class _Untrained(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, leaf):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError(
            "kvq: gradients do not pass a KVQCache, which is for inference: train without a cache "
            "(use_cache=False), or with transformers' DynamicCache"
        )


def untrained(x: torch.Tensor, wanted: bool) -> torch.Tensor:
    """*x*, read from codes; where gradients are *wanted*, asking for one raises RuntimeError."""
    if not (wanted and torch.is_grad_enabled()):
        return x
    return _Untrained.apply(x, torch.empty(0, requires_grad=True))


class Paged:
    """K or V of all tokens of a layer, as its codes; a tensor only for who insists.

    Attention by ``kvq`` takes the layer and reads the pages. Any other use, whatever torch function
    or method, dequantizes all of them into ``[B, H, length, D]`` of the model's dtype first, or is
    refused: in formats with recent rows each query reads another mix of sealed and recent ones.
    """

    @classmethod
    def pair(cls, layer: KVQLayer) -> tuple[Paged, Paged]:
        """K and V of *layer*, dequantized together or not at all."""
        both: list = [None, None]
        return cls(layer, both, 0), cls(layer, both, 1)

    def __init__(self, layer: KVQLayer, both: list, which: int) -> None:
        self.layer, self._both, self._which = layer, both, which

    def is_whole_with(self, value) -> bool:
        """Whether this is K and *value* V of one layer, as its ``update`` returned them."""
        return type(value) is Paged and value.layer is self.layer and value._which > self._which

    def tensor(self) -> torch.Tensor:
        """Dequantized, and said so once. ValueError for formats with recent rows."""
        refuse_recent(
            self.layer.format,
            "attention other than 'kvq', as some models (BLOOM, say) have whatever they are loaded "
            "with,",
        )
        if self._both[self._which] is None:
            say_once(
                "kvq: attention does not read the quantized pages, so every step dequantizes all "
                'of them, which is slow: load the model with attn_implementation="kvq", which some '
                "(BLOOM, say) do not heed"
            )
            self._both[:] = self.layer.dequantize()
        return self._both[self._which]

    def to(self, *args, **kwargs):
        """As a tensor's; for the device where the pages are, nothing: Gemma 3n asks for that, of
        the layers that read another's K and V."""
        if args == (self.layer.device,) and not kwargs:
            return self
        return self.tensor().to(*args, **kwargs)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return function(*_tensors(args), **_tensors(kwargs or {}))

    def __getattr__(self, name: str):
        if "layer" not in self.__dict__:  # made without its constructor, as copy does
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    def __getitem__(self, index) -> torch.Tensor:
        return self.tensor()[index]

    def __len__(self) -> int:
        return len(self.tensor())

    def __repr__(self) -> str:
        return f"Paged({'KV'[self._which]} of {self.layer})"


def _operator(name: str):
    def apply(self: Paged, *others):
        return getattr(self.tensor(), name)(*_tensors(others))

    return apply


for _name in ("add", "sub", "mul", "truediv", "matmul", "neg", "pow"):
    for _prefix in ("", "r") if hasattr(torch.Tensor, f"__r{_name}__") else ("",):
        setattr(Paged, f"__{_prefix}{_name}__", _operator(f"__{_prefix}{_name}__"))


def _tensors(x):
    if isinstance(x, Paged):
        return x.tensor()
    if isinstance(x, (tuple, list)):
        return type(x)(_tensors(item) for item in x)
    if isinstance(x, dict):
        return {key: _tensors(item) for key, item in x.items()}
    return x
