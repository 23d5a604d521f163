"""One layer's pages, and what transformers sees of them."""

from __future__ import annotations

import logging
from functools import cache

import torch
from transformers.cache_utils import CacheLayerMixin

from kvq_plugin import hugepages, ops, reference
from kvq_plugin.formats import GROUP, KVFormat
from kvq_plugin.hf_cache.table import BlockTable, Place, Step
from kvq_plugin.layout import MAX_HEAD_SIZES
from kvq_plugin.reference import StaticScale

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


class Paged:
    """K or V of all tokens of a layer, as its codes; a tensor only for who insists.

    Attention by ``kvq`` takes the layer and reads the pages. Any other use, whatever torch function
    or method, dequantizes all of them into ``[B, H, length, D]`` of the model's dtype first, or is
    refused: in formats with recent rows each query reads another mix of sealed and recent ones.
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
        """Dequantized, and said so once. ValueError for formats with recent rows."""
        refuse_recent(self.layer.format, "attention other than 'kvq'")
        if self._both[self._which] is None:
            say_once(
                "kvq: attention does not read the quantized pages, so every step dequantizes all "
                'of them, which is slow: load the model with attn_implementation="kvq"'
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

    Of formats with recent rows ``pool`` holds the sealed ones and ``recent``, a pool in blocks of
    ``GROUP`` tokens, the others; both are written by the one store of :meth:`commit`.
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
        self.recent: torch.Tensor | None = None
        self.length = 0
        self.last: Step | None = None
        self._pending: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the pages."""
        return sum(pool.numel() for pool in (self.pool, self.recent) if pool is not None)

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
        if self.pool.device != self.device:
            self.prefetch()
        self.pool, recent = _fitted(self.pool, step.pages), {}
        if step.recent is not None:
            self.recent = _fitted(self.recent, step.recent)
            recent = {"recent_cache": self.recent, "recent_slot_mapping": step.recent.slots}
        slots = step.pages.slots
        ops.store(rows(key), rows(value), self.pool, slots, self.format, *self._static, **recent)
        return None if refused else step

    def attend(self, query: torch.Tensor, step: Step, scale: float, **options) -> torch.Tensor:
        """Attention of ``query [B, heads, T, D]`` over the pages -> ``[B, T, heads, D]``.

        *options* are those of :func:`kvq_plugin.ops.attend`. Rows of masked queries are zeros.
        """
        batch, heads, new, size = query.shape
        flat = rows(query)
        asked = flat if step.rows is None else flat[step.rows]
        if step.recent is not None:
            options |= {"recent_cache": self.recent, "recent_block_table": step.recent.table}
        out = torch.empty((len(asked), heads, size), dtype=query.dtype, device=query.device)
        ops.attend(
            out,
            asked,
            self.pool,
            step.pages.table,
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
        Of formats with recent rows, as the last token's query reads them.

        Raises ValueError before the layer has seen its first batch.
        """
        if not self.is_initialized:
            raise ValueError("KVQLayer.dequantize: the layer has not seen any tokens yet")
        self.commit()
        if not self.length:
            empty = self.pool.new_empty((self._batch, self._heads, 0, self._size), dtype=self.dtype)
            return empty, empty
        kept, counts = self.table.kept, self.table.counts(self.length)
        both = []
        for x in self._loaded(counts):
            x = x.to(self.dtype)
            if kept is not None:
                there = torch.arange(x.shape[1], device=x.device) < counts[:, None]
                full = x.new_zeros((self._batch, self.length, *x.shape[2:]))
                full[kept[:, : self.length]] = x[there]
                x = full
            both.append(x[:, : self.length].transpose(1, 2).contiguous())
        return both[0], both[1]

    def _loaded(self, counts: torch.Tensor) -> list[torch.Tensor]:
        """K and V of every token, ``[B, tokens, H, D]`` fp32 and then anything: *counts* ``[B]``
        are tokens."""
        layout, size = ops.page_layout(self.pool.device), self._size
        table = self.table.pages.table
        used, where = table.unique(return_inverse=True)
        pages = self.pool[used.long()]
        if self.format.recent is None:
            loaded = reference.load(pages, self.format, size, *self._static, layout=layout)
            return [x[where].flatten(1, 2) for x in loaded]
        *old, first_k, first_v = reference.load_sealed(pages, self.format, size, layout=layout)
        # Blocks that were let go of are read as if they were the first: all their rows are sealed.
        recent_table = self.table.recent.table.clamp(min=0).long()
        new = reference.load(self.recent, self.format.recent, size, layout=layout)
        limits = [self.format.sealed_before(count - 1) for count in counts.tolist()]
        limits = torch.tensor(limits, device=table.device)[:, None]
        tokens = int(counts.max())
        is_old = torch.arange(tokens, device=table.device) < limits
        mixed = []
        for sealed, first, recent in zip(old, (first_k, first_v), new, strict=True):
            sealed = sealed[where].flatten(1, 2)[:, :tokens].clone()
            sealed[:, 0] = first[where[:, 0]]
            recent = recent[recent_table].flatten(1, 2)[:, :tokens]
            mixed.append(torch.where(is_old[..., None, None], sealed, recent))
        return mixed

    @property
    def _batch(self) -> int:
        return self.table.batch

    # --- transformers' protocol ----------------------------------------------------------

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take on the shape of ``[B, H, T, D]``; ValueError for what pages cannot hold."""
        batch, heads, _, size = key_states.shape
        device = key_states.device
        largest = MAX_HEAD_SIZES[ops.page_layout(device)]
        step = self.format.head_size_step
        if key_states.shape != value_states.shape or size % step or not 0 < size <= largest:
            raise ValueError(
                f"KVQCache: K {list(key_states.shape)} and V {list(value_states.shape)} on "
                f"{device.type}: {self.format.name} takes one shape, with a head size that is a "
                f"multiple of {step} up to {largest}; use transformers' DynamicCache for this model"
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
        self.pool = self._new_pool(self.format, self.table.block_size)
        if self.format.recent is not None:
            self.recent = self._new_pool(self.format.recent, GROUP)
        self._static = tuple(
            self._expand(self._scales.get(name), stream) for name, stream in self._streams()
        )
        self.is_initialized = True

    def _new_pool(self, format: KVFormat, block_size: int) -> torch.Tensor:
        """Without blocks yet: ``[0, H, block_size, C]`` uint8."""
        content = format.bytes_per_token(self._size, block_size)
        shape = (0, self._heads, block_size, content)
        return torch.empty(shape, dtype=torch.uint8, device=self.device)

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
        """Forget the last ``-tokens_to_remove`` positions. ValueError for a positive number, and,
        in formats with recent rows, for more than ``SPARE`` and than the last update brought."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"KVQCache.crop({tokens_to_remove}): expected minus the number of tokens to remove"
            )
        if tokens_to_remove and self.length:
            self.commit()
            length = max(0, self.length + tokens_to_remove)
            if self._changes == self.table.changes:
                self.table.check_crop(length)
            self.length = length
            self._changes += 1
            if self.table.is_news(self._changes):
                self.table.crop(length)

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
            self._to(torch.device("cpu"))

    def prefetch(self) -> None:
        """Move the pages back to the model's device."""
        if self.is_initialized:
            self._to(self.device)

    def _to(self, device: torch.device) -> None:
        self.pool = self.pool.to(device, non_blocking=True)
        if self.recent is not None:
            self.recent = self.recent.to(device, non_blocking=True)


def _fitted(pool: torch.Tensor, place: Place) -> torch.Tensor:
    """*pool* with the blocks that *place* asks for."""
    if place.moved is not None:
        pool = pool[place.moved]
    if place.count > len(pool):
        larger = pool.new_empty((place.count, *pool.shape[1:]))
        if pool.device.type == "cpu" and hugepages.enabled():
            hugepages.ask(larger)
        larger[: len(pool)] = pool
        pool = larger
    if place.copies is not None:
        source, target = place.copies
        pool[target] = pool[source]
    return pool


def rows(x: torch.Tensor) -> torch.Tensor:
    """``[B, H, T, D]`` -> ``[B * T, H, D]``; a view for one new token, and where strides allow."""
    batch, heads, new, size = x.shape
    if new == 1:
        return x[:, :, 0]
    return x.transpose(1, 2).reshape(batch * new, heads, size)
