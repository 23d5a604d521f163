"""Where each token of each sequence lies: one table for all layers of a cache.

transformers hands every layer the same batch: ``B`` sequences of ``length`` positions. Of these
only the tokens are kept; what the attention mask hides, padding on the left say, has no place in
the pages, so that attention needs no mask. Reordering sequences, as beams do at every token, moves
rows of the table and no page: sequences share blocks until one of them has to write into one.

Formats with recent rows have blocks of ``GROUP`` tokens for them beside the others. A sequence lets
go of those that no query will read and nobody can step back to: ``SPARE`` tokens before the last
forward pass, or ``WIDE`` before its end where that was longer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvq_plugin.formats import GROUP, KVFormat
from kvq_plugin.hf_cache.blocks import Blocks

#: Tokens that can be taken back at any time, in formats with recent rows.
SPARE = GROUP
#: Tokens of the last forward pass that can be taken back: drafts, of which the first come with the
#: prompt. Recent rows before them do not outlive the pass.
WIDE = 256


@dataclass(frozen=True, slots=True)
class Place:
    """What a step asks of a layer's pool, the one of all rows or that of recent ones.

    Attributes:
        moved: the blocks that the pool keeps, in their new order; None: all, where they are.
        count: how many blocks it must have then.
        copies: blocks to copy next, as indices (from, to); None for none.
        slots: ``[B * T]`` int64, where each new row goes; -1 for a masked one.
        table: ``[B, columns]`` int32.
        after: the blocks that the pool keeps when attention has read it, in the order in which the
            next step knows them; None: all, where they are.
    """

    moved: torch.Tensor | None
    count: int
    copies: tuple[torch.Tensor, torch.Tensor] | None
    slots: torch.Tensor
    table: torch.Tensor
    after: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """What one forward pass of ``B`` sequences by ``T`` new positions asks of every layer.

    Attributes:
        pages, recent: places of the new rows; ``recent`` is None but for formats that have some.
        lengths: ``[B]`` int32, tokens kept; starts: ``[B + 1]`` int32, where each sequence's
            queries begin.
        rows: which of the ``B * T`` rows are tokens, int64; None for all of them.
        longest: bound of ``lengths``.
    """

    pages: Place
    recent: Place | None
    lengths: torch.Tensor
    starts: torch.Tensor
    rows: torch.Tensor | None
    longest: int


class BlockTable:
    """Blocks of ``block_size`` tokens of *format* for ``batch`` sequences, on ``device``.

    ``kept`` is a bool ``[B, length]``, which positions are tokens; None while all of them are.
    Layers take their turns with the same arguments, so each step and each change is worked out
    once, for the first that asks. They count changes (a step back, another batch) and say how many
    they have seen: one may still have to store what came before a change others have made.
    """

    def __init__(self, block_size: int, format: KVFormat) -> None:
        self.block_size, self.format = block_size, format
        self.changes = 0
        self._on: dict[torch.device, BlockTable] = {}
        self.clear()

    def clear(self) -> None:
        """Forget all sequences."""
        self.pages: Blocks | None = None
        self.recent: Blocks | None = None
        self.kept: torch.Tensor | None = None
        self._asked: tuple[int, int, int] | None = None
        self._mask: torch.Tensor | None = None
        self._step: Step | None = None

    def on(self, device: torch.device) -> BlockTable:
        """The same table for layers on *device*: the first to ask get this one."""
        if device not in self._on:
            table = BlockTable(self.block_size, self.format) if self._on else self
            table._on = self._on
            self._on[device] = table
        return self._on[device]

    def start(self, batch: int, device: torch.device) -> None:
        """Begin with *batch* empty sequences, unless they have begun."""
        if self.pages is None:
            self.pages = Blocks(self.block_size, batch, device)
            if self.format.recent is not None:
                self.recent = Blocks(GROUP, batch, device)

    @property
    def batch(self) -> int:
        return len(self.pages.table)

    @property
    def _device(self) -> torch.device:
        return self.pages.table.device

    def step(self, number: int, length: int, new: int, mask: torch.Tensor | None) -> Step | None:
        """The step after change *number*, from *length* positions by *new* ones.

        *mask* is bool ``[B, length + new]``, False for positions that are no tokens, or None: all
        of the new ones are. Returns None where it hides a kept token or shows one that was not
        kept, be it by another layer: then pages alone cannot answer.
        """
        asked = number, length, new
        if asked == self._asked:
            same = mask is None or mask is self._mask or self.agrees(length + new, mask)
            return self._step if same else None
        if number != self.changes:
            raise ValueError(
                f"KVQCache: a layer has seen {number} changes of the batch, others {self.changes}: "
                "all layers must see the same tokens and changes, in the same order"
            )
        step = self._work_out(length, new, mask)
        if step is not None:
            self._asked, self._mask, self._step = asked, mask, step
        return step

    def agrees(self, length: int, mask: torch.Tensor) -> bool:
        """Whether *mask* ``[B, length]`` shows the tokens that were kept, and no others."""
        kept = self._kept(length)
        return mask.shape == kept.shape and torch.equal(mask, kept)

    def shown(self, length: int, mask: torch.Tensor | None) -> torch.Tensor | None:
        """*mask* ``[B, length]``, of ones where it is None and positions have been hidden."""
        if mask is not None or self.kept is None:
            return mask
        return torch.ones(self.batch, length, dtype=torch.bool, device=self._device)

    def check_shown(self, length: int, mask: torch.Tensor | None) -> None:
        """ValueError where *mask*, ``[B, length]`` or ``[B, 1, T, length]``, shows a position that
        was hidden when it came: nothing was stored for it."""
        mask = self.shown(length, mask)
        if mask is None or self.kept is None or mask.shape[-1] != length:
            return
        visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        visible = visible.flatten(1, -2).any(1) if visible.dim() > 2 else visible
        if bool((visible & ~self.kept[:, :length]).any()):
            raise ValueError(
                "KVQCache: this call sees positions that the attention mask hid when they came, of "
                "which nothing is stored: pass an attention_mask that hides them still, or reset() "
                "the cache and give it all tokens again"
            )

    def is_news(self, number: int) -> bool:
        """Whether nobody has made change *number*, counted from 1; from now on somebody has."""
        news = number > self.changes
        self.changes = max(number, self.changes)
        return news

    def select(self, select) -> None:
        """Another batch: ``select(rows)`` of the table."""
        if self.pages is None:
            return
        for blocks in filter(None, (self.pages, self.recent)):
            blocks.select(select)
        if self.kept is not None:
            self.kept = select(self.kept)

    def check_crop(self, length: int) -> None:
        """ValueError where the recent rows that the sequences need at *length* positions, all of
        them before, are gone."""
        if self.recent is None or not length:
            return
        firsts = self.recent.first_columns()
        for count, first in zip(self.counts(length).tolist(), firsts, strict=True):
            if self.format.sealed_before(count) < first * GROUP:
                raise ValueError(
                    f"KVQCache.crop to {length} tokens: in {self.format.name} up to {SPARE} tokens "
                    f"can be taken back, or up to {WIDE} of the last forward pass, as older rows "
                    "are sealed for good: reset() the cache and give it the tokens again, or use "
                    "'int8_per_token_head', which has no limit"
                )

    def crop(self, length: int) -> None:
        """The sequences have *length* positions, fewer than before."""
        if self.recent is not None and not length:
            self.recent.clear()

    def counts(self, length: int) -> torch.Tensor:
        """``[B]`` int64: tokens among the first *length* positions of each sequence."""
        if self.kept is None:
            return torch.full((self.batch,), length, device=self._device)
        return self.kept[:, :length].sum(1)

    def _work_out(self, length: int, new: int, mask: torch.Tensor | None) -> Step | None:
        if self.kept is None and (mask is None or bool(mask.all())):
            return self._even_step(length, new)
        kept = self._kept(length, new)
        if mask is not None:
            if mask.shape != kept.shape or not self.agrees(length, mask[:, :length]):
                return None
            kept = mask
        before, now = self.counts(length), kept[:, length:]
        lengths = before + now.sum(1)
        self.kept = kept.clone()
        longest = int(lengths.max())
        position = (before[:, None] + now.cumsum(1) - 1).clamp(min=0)
        starts = torch.nn.functional.pad(now.sum(1).cumsum(0), (1, 0)).int()
        rows = None if bool(now.all()) else now.flatten().nonzero().flatten()
        places = self._places(before.tolist(), lengths.tolist(), position, now)
        return Step(*places, lengths.int(), starts, rows, longest)

    def _kept(self, length: int, new: int = 0) -> torch.Tensor:
        """``[B, length + new]``: what was kept, and all of the *new*."""
        shape = (self.batch, length + new)
        kept = torch.ones(shape, dtype=torch.bool, device=self._device)
        if self.kept is not None:
            kept[:, :length] = self.kept[:, :length]
        return kept

    def _even_step(self, length: int, new: int) -> Step:
        """Every sequence has *length* tokens: what nearly every step is, so it is kept cheap."""
        batch, device = self.batch, self._device
        position = torch.arange(length, length + new, device=device)
        places = self._places([length] * batch, [length + new] * batch, position)
        lengths = torch.full((batch,), length + new, dtype=torch.int32, device=device)
        starts = torch.arange(0, batch * new + 1, new, dtype=torch.int32, device=device)
        return Step(*places, lengths, starts, None, length + new)

    def _places(self, before: list[int], lengths: list[int], position, now=None):
        """Places of tokens *position* of sequences that have *before* tokens and then *lengths*;
        *now* hides those that are none."""
        places: list[Place | None] = [None, None]
        for i, blocks in enumerate((self.pages, self.recent)):
            if blocks is None:
                continue
            has_recent = blocks is self.recent
            moved = blocks.drop(self._kept_columns(before)) if has_recent else None
            # Pages grow together, as growing copies them; recent rows are few once they are read.
            room = lengths if has_recent else [max(lengths)] * len(lengths)
            copies = blocks.make_room(before, room)
            slots = blocks.slots(position)
            if now is not None:
                slots = torch.where(now, slots, -1)
            asked = moved, blocks.count, copies, slots.flatten(), blocks.table
            is_wide = has_recent and position.shape[-1] > WIDE
            after = blocks.drop(self._kept_columns(lengths, WIDE)) if is_wide else None
            places[i] = Place(*asked, after)
        return places

    def _kept_columns(self, counts: list[int], spare: int = SPARE) -> list[int]:
        """The first block of recent rows that sequences of so many tokens need, of which *spare*
        may be taken back."""
        lowest = (self.format.sealed_before(count) - spare for count in counts)
        return [max(0, at) // GROUP for at in lowest]
