"""One layer's pages, and what transformers sees of them."""

from __future__ import annotations

import torch
from transformers.cache_utils import CacheLayerMixin

from kvq_plugin import hugepages, ops, reference
from kvq_plugin.formats import GROUP, KVFormat
from kvq_plugin.hf_cache import scales as static_scales
from kvq_plugin.hf_cache.paged import Paged, untrained
from kvq_plugin.hf_cache.table import WIDE, BlockTable, Place, Step
from kvq_plugin.layout import MAX_HEAD_SIZES
from kvq_plugin.reference import StaticScale


class KVQLayer(CacheLayerMixin):
    """A full-attention layer whose K and V are pages of *format*, written once and never again.

    ``update`` only takes the new rows in; they are quantized when something asks for the layer, by
    ``kvq`` attention with the attention mask at hand, so that padding is not stored. ``pool`` is
    ``[blocks, H, block_size, C]`` uint8, the ``cache`` of :mod:`kvq_plugin.ops`; *table* says whose
    blocks are whose, and layers of one cache share it. *scales* maps ``k`` and ``v`` to static
    scales as :func:`kvq_plugin.hf_cache.scales.read` gives them. *is_shared*: other layers may read
    this one's K and V, later in the same forward pass. *number* is the layer's, for messages.

    Of formats with recent rows ``pool`` holds the sealed ones and ``recent``, a pool in blocks of
    ``GROUP`` tokens, the others; both are written by the one store of :meth:`commit`.
    """

    is_sliding = False
    is_croppable = True

    def __init__(
        self,
        format: KVFormat,
        table: BlockTable,
        scales: dict[str, tuple] | None = None,
        is_shared: bool = False,
        number: int = 0,
    ) -> None:
        super().__init__()
        self._number = number
        self.format, self.table, self.is_shared = format, table, is_shared
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
        self._after: torch.Tensor | None = None
        self._pending: tuple[torch.Tensor, torch.Tensor] | None = None
        self._new = 0  # positions of the last update
        self.wants_gradient = False

    @property
    def nbytes(self) -> int:
        """Bytes of the pages."""
        return sum(pool.numel() for pool in (self.pool, self.recent) if pool is not None)

    # --- what attention asks for ---------------------------------------------------------

    def check_queries(self, count: int) -> None:
        """ValueError unless *count* positions of queries are those of the last update."""
        if count != self._new:
            raise ValueError(
                f"KVQCache: {count} positions of queries for {self._new} new ones of K and V: each "
                "token's query attends to the tokens up to it, which cross attention does not; use "
                "EncoderDecoderCache(KVQCache(...), DynamicCache(config=...))"
            )

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
        if self.pool.device != self.device:
            self.prefetch()
        self.settle()
        self._pending, self.last = None, step
        self.pool, recent = _fitted(self.pool, step.pages), {}
        if step.recent is not None:
            self.recent, self._after = _fitted(self.recent, step.recent), step.recent.after
            recent = {"recent_cache": self.recent, "recent_slot_mapping": step.recent.slots}
        slots = step.pages.slots
        ops.store(rows(key), rows(value), self.pool, slots, self.format, *self._static, **recent)
        return None if refused else step

    def settle(self) -> None:
        """Let go of recent rows that none but the last step's queries read."""
        if self._after is not None:
            self.recent, self._after = self.recent[self._after], None

    def attend(self, query: torch.Tensor, step: Step, scale: float, **options) -> torch.Tensor:
        """Attention of ``query [B, heads, T, D]`` over the pages -> ``[B, T, heads, D]``.

        *options* are those of :func:`kvq_plugin.ops.attend`. Rows of masked queries are zeros.
        """
        batch, heads, new, size = query.shape
        flat = rows(query)
        asked = flat if step.rows is None else flat[step.rows]
        if step.recent is not None:
            if step.recent.after is not None and self._after is None:
                raise ValueError(
                    "KVQCache: attention reads K and V of a layer twice in one forward pass of "
                    f"more than {WIDE} tokens, whose {self.format.name} rows are gone by then: "
                    f"pass prefill_chunk_size={WIDE} to generate, or use 'int8_per_token_head'"
                )
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
        if not self.is_shared:
            self.settle()
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
        self.settle()
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
            x = x[:, : self.length].transpose(1, 2).contiguous()
            both.append(untrained(x, self.wants_gradient))
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
        self._static = static_scales.expand(
            self.format, self._scales, self._number, self._heads, self._size, device
        )
        self.is_initialized = True

    def _new_pool(self, format: KVFormat, block_size: int) -> torch.Tensor:
        """Without blocks yet: ``[0, H, block_size, C]`` uint8."""
        content = format.bytes_per_token(self._size, block_size)
        shape = (0, self._heads, block_size, content)
        return torch.empty(shape, dtype=torch.uint8, device=self.device)

    def update(self, key_states, value_states, *args, **kwargs):
        """Take ``[B, H, T, D]`` in; returns all of K and V, as :class:`Paged`."""
        if self._pending is not None:
            self.commit()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[2]
        expected = self._batch, self._heads, new, self._size
        if key_states.shape != expected or value_states.shape != expected:
            raise ValueError(
                f"KVQCache: K {list(key_states.shape)} and V {list(value_states.shape)}, expected "
                f"{list(expected)}: [sequences, kv heads, tokens, head size]; reset() it for "
                "another batch, or make another"
            )
        if key_states.dtype != value_states.dtype:  # under torch.autocast K comes as fp32
            value_states = value_states.to(key_states.dtype)
        wanted = key_states.requires_grad or value_states.requires_grad
        self.wants_gradient |= torch.is_grad_enabled() and wanted
        self._pending, self._new = (key_states, value_states), new
        self.length += new
        return Paged.pair(self)

    @property
    def keys(self) -> Paged | None:
        """K of all tokens, as cross attention asks for it; None before the first."""
        return Paged.pair(self)[0] if self.is_initialized else None

    @keys.setter
    def keys(self, value: None) -> None:
        """transformers' own layers begin with None."""

    @property
    def values(self) -> Paged | None:
        """V likewise."""
        return Paged.pair(self)[1] if self.is_initialized else None

    @values.setter
    def values(self, value: None) -> None:
        pass

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` positions. ValueError for a positive number, and,
        in formats with recent rows, for more than ``SPARE`` and more than the last ``WIDE`` that
        the last update brought."""
        if tokens_to_remove > 0 or int(tokens_to_remove) != tokens_to_remove:
            raise ValueError(
                f"KVQCache.crop({tokens_to_remove}): expected minus the number of tokens to remove"
            )
        tokens_to_remove = int(tokens_to_remove)  # of a tensor, too
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

    def batch_select_indices(self, indices: torch.Tensor | list[int] | slice) -> None:
        """Keep the sequences *indices*, which may be a mask, in that order."""
        if isinstance(indices, slice):
            self._change(lambda rows: rows[indices])
        else:
            self._change(lambda rows: rows[torch.as_tensor(indices, device=rows.device)])

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
