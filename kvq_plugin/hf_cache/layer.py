"""One layer's pages, and what transformers sees of them."""

from __future__ import annotations

import logging
from functools import cache

import torch
from transformers.cache_utils import CacheLayerMixin

from kvq_plugin import hugepages, ops, reference
from kvq_plugin.formats import KVFormat
from kvq_plugin.hf_cache.table import BlockTable, Step
from kvq_plugin.layout import LANES, MAX_HEAD_SIZES
from kvq_plugin.reference import StaticScale

logger = logging.getLogger(__name__)


@cache
def say_once(text: str) -> None:
    """Log the warning *text*, the first time in this process."""
    logger.warning(text)


class Paged:
    """K or V of all tokens of a layer, as its codes; a tensor only for who insists.

    Attention by ``kvq`` takes the layer and reads the pages. Any other use, whatever torch function
    or method, dequantizes all of them into ``[B, H, length, D]`` of the model's dtype first.
    """

    __slots__ = ("layer", "_both", "_which")

    @classmethod
    def pair(cls, layer: KVQLayer) -> tuple[Paged, Paged]:
        """K and V of *layer*, dequantized together or not at all."""
        both: list = [None, None]
        return cls(layer, both, 0), cls(layer, both, 1)

    def __init__(self, layer: KVQLayer, both: list, which: int) -> None:
        self.layer, self._both, self._which = layer, both, which

    def tensor(self) -> torch.Tensor:
        """Dequantized, and said so once."""
        if self._both[self._which] is None:
            say_once(
                "kvq: attention does not read the quantized pages, so every step dequantizes all "
                'of them, which is slow: load the model with attn_implementation="kvq"'
            )
            self._both[:] = self.layer.dequantize()
        return self._both[self._which]

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return function(*_tensors(args), **_tensors(kwargs or {}))

    def __getattr__(self, name: str):
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


class KVQLayer(CacheLayerMixin):
    """A full-attention layer whose K and V are pages of *format*, written once and never again.

    ``update`` only takes the new rows in; they are quantized when something asks for the layer, by
    ``kvq`` attention with the attention mask at hand, so that padding is not stored. ``pool`` is
    ``[blocks, H, block_size, C]`` uint8, the ``cache`` of :mod:`kvq_plugin.ops`; *table* says whose
    blocks are whose, and layers of one cache share it. *scales* maps ``k`` and ``v`` to static
    scales as :func:`kvq_plugin.hf_cache.scales.read` gives them.

    A format that keeps recent tokens as they came would hold them beside ``pool``; :meth:`commit`
    is where they would move into it.
    """

    is_sliding = False
    is_croppable = True

    def __init__(
        self, format: KVFormat, table: BlockTable, scales: dict[str, tuple] | None = None
    ) -> None:
        super().__init__()
        self.format, self.table = format, table
        self._scales = scales or {}
        self._static: tuple[StaticScale | None, StaticScale | None] = (None, None)
        self._changes = 0
        self._empty()

    def __repr__(self) -> str:
        return f"KVQLayer({self.format.name}, {self.length} tokens)"

    def _empty(self) -> None:
        self.is_initialized = False
        self.pool: torch.Tensor | None = None
        self.length = 0
        self.last: Step | None = None
        self._pending: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the pages."""
        return 0 if self.pool is None else self.pool.numel()

    # --- what attention asks for ---------------------------------------------------------

    def commit(self, mask: torch.Tensor | None = None) -> Step | None:
        """Store the rows taken in, and return the step attention needs.

        *mask*: bool ``[B, length]``, False for positions that are no tokens; None: all new ones
        are. Returns None, and stores all new rows, where pages cannot honour the mask.
        """
        if self._pending is None:
            same = mask is None or self.table.agrees(self.length, mask)
            return self.last if same else None
        key, value = self._pending
        new = key.shape[2]
        step = refused = None
        if mask is None or mask.shape[1] == self.length:
            step = self.table.step(self._changes, self.length - new, new, mask)
        if step is None:
            refused = True
            step = self.table.step(self._changes, self.length - new, new, None)
        self._pending, self.last = None, step
        self._fit(step.blocks)
        if step.copies is not None:
            source, target = step.copies
            self.pool[target] = self.pool[source]
        ops.store(rows(key), rows(value), self.pool, step.slots, self.format, *self._static)
        return None if refused else step

    def attend(self, query: torch.Tensor, step: Step, scale: float, **options) -> torch.Tensor:
        """Attention of ``query [B, heads, T, D]`` over the pages -> ``[B, T, heads, D]``.

        *options* are those of :func:`kvq_plugin.ops.attend`. Rows of masked queries are zeros.
        """
        batch, heads, new, size = query.shape
        flat = rows(query)
        asked = flat if step.rows is None else flat[step.rows]
        out = torch.empty((len(asked), heads, size), dtype=query.dtype, device=query.device)
        ops.attend(
            out,
            asked,
            self.pool,
            step.table,
            step.lengths,
            step.starts,
            self.format,
            scale,
            *self._static,
            max_query_len=new,
            max_seq_len=step.longest,
            **options,
        )
        if step.rows is not None:
            out = torch.zeros_like(flat).index_copy_(0, step.rows, out)
        return out.view(batch, new, heads, size)

    def dequantize(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V ``[B, H, length, D]`` as the pages have them; zeros where nothing was stored.

        Raises ValueError before the layer has seen its first batch.
        """
        if not self.is_initialized:
            raise ValueError("KVQLayer.dequantize: the layer has not seen any tokens yet")
        self.commit()
        if not self.length:
            empty = self.pool.new_empty((self._batch, self._heads, 0, self._size), dtype=self.dtype)
            return empty, empty
        table, kept = self.table.table, self.table.kept
        layout = ops.page_layout(self.pool.device)
        used, where = table.unique(return_inverse=True)
        counts = self.table.counts(self.length)
        both = []
        for x in reference.load(
            self.pool[used.long()], self.format, self._size, *self._static, layout=layout
        ):
            x = x.to(self.dtype)[where].flatten(1, 2)  # [B, tokens, H, D]
            if kept is not None:
                there = torch.arange(x.shape[1], device=x.device) < counts[:, None]
                full = x.new_zeros((self._batch, self.length, *x.shape[2:]))
                full[kept[:, : self.length]] = x[there]
                x = full
            both.append(x[:, : self.length].transpose(1, 2).contiguous())
        return both[0], both[1]

    def _fit(self, blocks: int) -> None:
        """A pool of *blocks* at least, on the model's device."""
        have = len(self.pool)
        if self.pool.device != self.device:
            self.prefetch()
        if blocks <= have:
            return
        pool = self.pool.new_empty((blocks, *self.pool.shape[1:]))
        if pool.device.type == "cpu" and hugepages.enabled():
            hugepages.ask(pool)
        pool[:have] = self.pool
        self.pool = pool

    @property
    def _batch(self) -> int:
        return len(self.table.table)

    # --- transformers' protocol ----------------------------------------------------------

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take on the shape of ``[B, H, T, D]``; ValueError for what pages cannot hold."""
        batch, heads, _, size = key_states.shape
        device = key_states.device
        largest = MAX_HEAD_SIZES[ops.page_layout(device)]
        if key_states.shape != value_states.shape or size % LANES or not 0 < size <= largest:
            raise ValueError(
                f"KVQCache: K {list(key_states.shape)} and V {list(value_states.shape)} on "
                f"{device.type}: expected one shape, with a head size that is a multiple of "
                f"{LANES} up to {largest}; use transformers' DynamicCache for this model"
            )
        self.dtype, self.device = key_states.dtype, device
        self._heads, self._size = heads, size
        self.table = self.table.on(device)
        self.table.is_news(self._changes)
        self.table.start(batch, device)
        if batch != self._batch:
            raise ValueError(
                f"KVQCache: a batch of {batch} for a cache of {self._batch} sequences; reset() it, "
                "or make another"
            )
        content = self.format.bytes_per_token(size)
        self.pool = torch.empty(
            (0, heads, self.table.block_size, content), dtype=torch.uint8, device=device
        )
        self._static = tuple(
            self._expand(self._scales.get(name), stream) for name, stream in self._streams()
        )
        self.is_initialized = True

    def _streams(self):
        return (("k", self.format.key), ("v", self.format.value))

    def _expand(self, static: tuple | None, stream) -> StaticScale | None:
        if stream.is_dynamic:
            return None
        scale, zero_point = (
            x if x is None else torch.as_tensor(x, dtype=torch.float32, device=self.device)
            for x in static or (self.format.default_scale, None)
        )
        return StaticScale.expand(scale, self._heads, self._size, zero_point)

    def update(self, key_states, value_states, *args, **kwargs):
        """Take ``[B, H, T, D]`` in; returns all of K and V, as :class:`Paged`."""
        if self._pending is not None:
            self.commit()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._pending = key_states, value_states
        self.length += key_states.shape[2]
        return Paged.pair(self)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` positions. ValueError for a positive number."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"KVQCache.crop({tokens_to_remove}): expected minus the number of tokens to remove"
            )
        if tokens_to_remove and self.length:
            self.commit()
            self.length = max(0, self.length + tokens_to_remove)
            self._changes += 1
            self.table.is_news(self._changes)

    def reset(self) -> None:
        """Forget everything; the next update may be another batch."""
        self._changes += 1
        if self.table.is_news(self._changes):
            self.table.clear()
        self._empty()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Sequence ``i`` becomes what sequence ``beam_idx[i]`` was. No page moves."""
        self._change(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence becomes *repeats* of them, which share their pages."""
        self._change(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the sequences *indices*, which may be a mask, in that order."""
        self._change(lambda rows: rows[indices.to(rows.device)])

    def _change(self, select) -> None:
        if self._pending is not None:
            self.commit()
        self._changes += 1
        if self.table.is_news(self._changes):
            self.table.select(select)

    def offload(self) -> None:
        """Move the pages to CPU memory, until :meth:`prefetch` or the next use."""
        if self.is_initialized:
            self.commit()
            self.pool = self.pool.to("cpu", non_blocking=True)

    def prefetch(self) -> None:
        """Move the pages back to the model's device."""
        if self.is_initialized:
            self.pool = self.pool.to(self.device, non_blocking=True)


def rows(x: torch.Tensor) -> torch.Tensor:
    """``[B, H, T, D]`` -> ``[B * T, H, D]``; a view for one new token, and where strides allow."""
    batch, heads, new, size = x.shape
    if new == 1:
        return x[:, :, 0]
    return x.transpose(1, 2).reshape(batch * new, heads, size)
