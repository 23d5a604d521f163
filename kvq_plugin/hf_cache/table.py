"""Which block holds which tokens of which sequence: one table for all layers of a cache.

transformers hands every layer the same batch: ``B`` sequences of ``length`` positions. Of these
only the tokens are kept; what the attention mask hides, padding on the left say, has no place in
the pages, so that attention needs no mask. Reordering sequences, as beams do at every token, moves
rows of the table and no page: sequences share blocks until one of them has to write into one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Step:
    """What one forward pass of ``B`` sequences by ``T`` new positions asks of every layer.

    Attributes:
        blocks: how many blocks a layer's pool must have.
        copies: blocks to copy first, as indices (from, to); None for none.
        slots: ``[B * T]`` int64, where each new row goes; -1 for a masked one.
        table: ``[B, columns]`` int32; lengths: ``[B]`` int32, tokens kept; starts: ``[B + 1]``
            int32, where each sequence's queries begin.
        rows: which of the ``B * T`` rows are tokens, int64; None for all of them.
        longest: bound of ``lengths``.
    """

    blocks: int
    copies: tuple[torch.Tensor, torch.Tensor] | None
    slots: torch.Tensor
    table: torch.Tensor
    lengths: torch.Tensor
    starts: torch.Tensor
    rows: torch.Tensor | None
    longest: int


class BlockTable:
    """Blocks of ``block_size`` tokens for ``batch`` sequences, on ``device``.

    ``kept`` is a bool ``[B, length]``, which positions are tokens; None while all of them are.
    Layers take their turns with the same arguments, so each step and each change is worked out
    once, for the first that asks. They count changes (a step back, another batch) and say how many
    they have seen: one may still have to store what came before a change others have made.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.changes = 0
        self._on: dict[torch.device, BlockTable] = {}
        self.clear()

    def clear(self) -> None:
        """Forget all sequences."""
        self.table: torch.Tensor | None = None
        self.kept: torch.Tensor | None = None
        self.blocks = 0
        self._free: list[int] = []
        self._shared = False
        self._asked: tuple[int, int, int] | None = None
        self._mask: torch.Tensor | None = None
        self._step: Step | None = None

    def on(self, device: torch.device) -> BlockTable:
        """The same table for layers on *device*: the first to ask get this one."""
        if device not in self._on:
            table = BlockTable(self.block_size) if self._on else self
            table._on = self._on
            self._on[device] = table
        return self._on[device]

    def start(self, batch: int, device: torch.device) -> None:
        """Begin with *batch* empty sequences, unless they have begun."""
        if self.table is None:
            self.table = torch.empty((batch, 0), dtype=torch.int32, device=device)

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

    def is_news(self, number: int) -> bool:
        """Whether nobody has made change *number*, counted from 1; from now on somebody has."""
        news = number > self.changes
        self.changes = max(number, self.changes)
        return news

    def select(self, select) -> None:
        """Another batch: ``select(rows)`` of the table."""
        if self.table is None:
            return
        self.table = select(self.table)
        if self.kept is not None:
            self.kept = select(self.kept)
        used = set(self.table.flatten().tolist())
        self._free = [block for block in range(self.blocks) if block not in used]
        self._shared = len(used) < self.table.numel()

    def counts(self, length: int) -> torch.Tensor:
        """``[B]`` int64: tokens among the first *length* positions of each sequence."""
        if self.kept is None:
            return torch.full((len(self.table),), length, device=self.table.device)
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
        copies = self._make_room(before.tolist(), longest)
        position = (before[:, None] + now.cumsum(1) - 1).clamp(min=0)
        block = self.table.gather(1, position // self.block_size)
        slots = torch.where(now, block * self.block_size + position % self.block_size, -1)
        starts = torch.nn.functional.pad(now.sum(1).cumsum(0), (1, 0)).int()
        rows = None if bool(now.all()) else now.flatten().nonzero().flatten()
        return Step(
            self.blocks, copies, slots.flatten(), self.table, lengths.int(), starts, rows, longest
        )

    def _kept(self, length: int, new: int = 0) -> torch.Tensor:
        """``[B, length + new]``: what was kept, and all of the *new*."""
        shape = (len(self.table), length + new)
        kept = torch.ones(shape, dtype=torch.bool, device=self.table.device)
        if self.kept is not None:
            kept[:, :length] = self.kept[:, :length]
        return kept

    def _even_step(self, length: int, new: int) -> Step:
        """Every sequence has *length* tokens: what nearly every step is, so it is kept cheap."""
        batch, device, size = len(self.table), self.table.device, self.block_size
        copies = self._make_room([length] * batch, length + new)
        if new == 1:
            slots = self.table[:, length // size].long() * size + length % size
        else:
            position = torch.arange(length, length + new, device=device)
            slots = (self.table[:, position // size].long() * size + position % size).flatten()
        lengths = torch.full((batch,), length + new, dtype=torch.int32, device=device)
        starts = torch.arange(0, batch * new + 1, new, dtype=torch.int32, device=device)
        return Step(self.blocks, copies, slots, self.table, lengths, starts, None, length + new)

    def _make_room(self, before: list[int], longest: int):
        """Blocks for *longest* tokens a sequence, of its own from token *before* on; -> copies."""
        columns = -(-longest // self.block_size)
        copies = self._separate(before) if self._shared else None
        have = self.table.shape[1]
        if columns > have:
            # One more column at a time, or 1/64 of a long table: growing copies a layer's pages.
            more = max(columns - have, have // 64) if have else columns
            fresh = torch.tensor(self._take(more * len(self.table)), dtype=torch.int32)
            fresh = fresh.view(more, len(self.table)).T
            self.table = torch.cat([self.table, fresh.to(self.table.device)], 1)
        return copies

    def _take(self, count: int) -> list[int]:
        taken, self._free = self._free[:count], self._free[count:]
        more = count - len(taken)
        self.blocks += more
        return taken + list(range(self.blocks - more, self.blocks))

    def _separate(self, before: list[int]):
        """Give each sequence blocks of its own where it will write: from token *before* on."""
        table = self.table.tolist()
        uses: dict[int, int] = {}
        for row in table:
            for block in row:
                uses[block] = uses.get(block, 0) + 1
        copies: list[tuple[int, int]] = []
        for row, count in zip(table, before, strict=True):
            for column in range(count // self.block_size, len(row)):
                block = row[column]
                if uses[block] == 1:
                    continue
                uses[block] -= 1
                [row[column]] = self._take(1)
                uses[row[column]] = 1
                if column == count // self.block_size and count % self.block_size:
                    copies.append((block, row[column]))
        device = self.table.device
        self.table = torch.tensor(table, dtype=torch.int32, device=device).view(self.table.shape)
        if not copies:
            return None
        both = torch.tensor(copies, device=device)
        return both[:, 0], both[:, 1]
