"""Which blocks of a pool hold the tokens of which sequence: allocation, for all layers alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


class Blocks:
    """Blocks of *size* tokens for a batch of sequences that each begin with none.

    Attributes:
        table: ``[B, columns]`` int32; -1 where a sequence has let go of its block, or has none yet.
        count: how many blocks a layer's pool must have.
    """

    def __init__(self, size: int, batch: int, device: torch.device) -> None:
        self.size = size
        self.table = torch.empty((batch, 0), dtype=torch.int32, device=device)
        self.count = 0
        self._free: list[int] = []
        self._shared = False
        self._dropped: list[int] = [0] * batch
        self._ends: list[int] = [0] * batch  # columns each sequence has had blocks for

    def select(self, select: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Another batch: ``select(rows)`` of the table. No block moves; sequences share them."""
        self.table = select(self.table)
        ends = torch.tensor([self._dropped, self._ends])
        self._dropped, self._ends = (select(x).tolist() for x in ends)
        self._count_uses()

    def make_room(self, before: Sequence[int], lengths: Sequence[int]):
        """Blocks for *lengths* tokens, each sequence's own from token *before* on; -> those to copy
        first, as indices (from, to), or None."""
        copies = self._separate(before) if self._shared else None
        need = [-(-length // self.size) for length in lengths]
        if any(n > end for n, end in zip(need, self._ends, strict=True)):
            # One more column at a time, or 1/64 of a long table: growing copies a layer's pages.
            ends = [
                max(n, end + end // 64) if n > end else end
                for n, end in zip(need, self._ends, strict=True)
            ]
            self._grow(max(ends))
            column = torch.arange(self.table.shape[1])
            have, then = torch.tensor([self._ends, ends])[..., None]
            fresh = (column >= have) & (column < then)
            blocks = torch.tensor(self._take(int(fresh.sum())), dtype=torch.int32)
            device = self.table.device  # out of place: steps have the tables of before
            self.table = self.table.masked_scatter(fresh.to(device), blocks.to(device))
            self._ends = ends
        self._grow(1)  # slots are looked up of positions that are no tokens, too
        return copies

    def _grow(self, columns: int) -> None:
        more = columns - self.table.shape[1]
        if more > 0:
            self.table = torch.nn.functional.pad(self.table, (0, more), value=-1)

    def slots(self, position: torch.Tensor) -> torch.Tensor:
        """Slots of *position* ``[B, T]``, or ``[T]`` for the same of every sequence."""
        position = position.expand(len(self.table), -1)
        block = self.table.gather(1, position // self.size).long()
        return block * self.size + position % self.size

    def drop(self, columns: Sequence[int]) -> torch.Tensor | None:
        """Let go of each sequence's blocks before its column; -> the blocks that a pool keeps, in
        their new order, where more than half of it would be free, else None."""
        if columns == self._dropped:
            return None
        self._dropped = list(columns)
        keep = torch.tensor(columns, device=self.table.device)[:, None]
        column = torch.arange(self.table.shape[1], device=self.table.device)
        self.table = self.table.masked_fill(column < keep, -1)
        used = sorted(self._count_uses())
        if 2 * len(used) >= self.count:
            return None
        kept = torch.tensor(used, dtype=torch.long, device=self.table.device)
        number = torch.full((self.count + 1,), -1, dtype=torch.int32, device=self.table.device)
        number[kept] = torch.arange(len(used), dtype=torch.int32, device=self.table.device)
        self.table = number[self.table.long()]  # -1 is the last entry, which is -1
        self.count, self._free = len(used), []
        return kept

    def first_columns(self) -> list[int]:
        """The first column of each sequence that it has not let go of."""
        return list(self._dropped)

    def clear(self) -> None:
        """The sequences have no tokens any more."""
        self.table = self.table[:, :0]
        self._dropped = [0] * len(self.table)
        self._ends = [0] * len(self.table)
        self._count_uses()

    def _count_uses(self) -> set[int]:
        listed = [block for block in self.table.flatten().tolist() if block >= 0]
        used = set(listed)
        self._free = [block for block in range(self.count) if block not in used]
        self._shared = len(used) < len(listed)
        return used

    def _take(self, count: int) -> list[int]:
        taken, self._free = self._free[:count], self._free[count:]
        more = count - len(taken)
        self.count += more
        return taken + list(range(self.count - more, self.count))

    def _separate(self, before: Sequence[int]):
        """Give each sequence blocks of its own where it will write: from token *before* on."""
        table = self.table.tolist()
        uses: dict[int, int] = {}
        for row in table:
            for block in row:
                uses[block] = uses.get(block, 0) + 1
        copies: list[tuple[int, int]] = []
        for row, count in zip(table, before, strict=True):
            for column in range(count // self.size, len(row)):
                block = row[column]
                if block < 0 or uses[block] == 1:
                    continue
                uses[block] -= 1
                [row[column]] = self._take(1)
                uses[row[column]] = 1
                if column == count // self.size and count % self.size:
                    copies.append((block, row[column]))
        device = self.table.device
        self.table = torch.tensor(table, dtype=torch.int32, device=device).view(self.table.shape)
        if not copies:
            return None
        both = torch.tensor(copies, device=device)
        return both[:, 0], both[:, 1]
