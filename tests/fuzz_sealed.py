"""Random stores of formats with recent rows, against the reference byte for byte; :mod:`fuzz` runs
them beside its own batches. Caches end where their last page does."""

from __future__ import annotations

import torch
from fuzz import DTYPES, Batch

from kvq_plugin import _native, ops, reference
from kvq_plugin.formats import GROUP, LOWBIT

ROWS = tuple(f for f in LOWBIT.values() if f.recent is not None)


class SealedBatch(Batch):
    """Sequences whose tokens are stored in some chunks, over caches of noise."""

    def __init__(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.format, self.dtype = self.pick(ROWS), self.pick(DTYPES)
        self.kv_heads = self.below(3) + 1
        step = self.format.head_size_step
        self.head_size = step * (1 + self.below(128 // step) if self.below(10) else 512 // step)
        self.sizes = [GROUP * (1 + self.below(4)) for _ in "ab"]
        self.lengths = [self.below(200) for _ in range(1 + self.below(3))]
        self.caches, self.slots = [], []
        formats = (self.format, self.format.recent)
        for format, size in zip(formats, self.sizes, strict=True):
            held = [-(-n // size) for n in self.lengths]
            blocks = sum(held) + 1
            content = format.bytes_per_token(self.head_size, size)
            order = torch.randperm(blocks, generator=self.random)[: sum(held)].split(held)
            shape = (blocks, self.kv_heads, size, content)
            noise = torch.randint(256, shape, generator=self.random, dtype=torch.uint8)
            self.caches.append(noise if self.below(2) else torch.full_like(noise, 0xFF))
            at = [torch.arange(n) for n in self.lengths]
            self.slots.append(
                [
                    mine[t // size] * size + t % size if len(t) else t
                    for mine, t in zip(order, at, strict=True)
                ]
            )
        self.calls = [self.call() for _ in range(1 + self.below(3))]

    def call(self) -> tuple:
        """Rows and slots of a stretch of tokens: in order or not, some twice, some skipped."""
        slots = [torch.cat(s) for s in self.slots]
        tokens = len(slots[0])
        begin = self.below(tokens + 1)
        kept = torch.arange(begin, min(tokens, begin + self.pick((1, 33, 64, 600))))
        if not self.below(3):
            kept = kept[torch.randperm(len(kept), generator=self.random)]
        if not self.below(4):
            kept = torch.cat([kept, kept])
        key, value = (
            self.normal(len(kept), self.kv_heads, self.head_size).to(self.dtype) for _ in "kv"
        )
        for x in (key, value):
            x *= 2.0 ** self.pick((0, 0, -20, 8, 14))
            if len(kept) and not self.below(3):
                self.spoil(x, 0.02)
            if len(kept) and not self.below(6):
                x[self.below(len(kept))] *= self.pick((0.0, float("inf"), 1e-30, 3e4))
        found = []
        for s in slots:
            skipped = torch.rand(len(kept), generator=self.random) < self.pick((0.0, 0.0, 0.1))
            found.append(torch.where(skipped, -1, s[kept]))
        return key, value, *found

    def run(self, isas: list[str]) -> None:
        want = self.stored(reference)
        for isa in isas:
            with _native.use_isa(isa):
                for name, a, b in zip(("sealed", "recent"), self.stored(ops), want, strict=True):
                    assert torch.equal(a, b), f"{isa}: bytes of the {name} cache differ"

    def stored(self, module) -> list[torch.Tensor]:
        caches = [c.clone() for c in self.caches]
        for key, value, slots, recent in self.calls:
            module.store(
                self.strided(key) if module is ops else key, value, caches[0], slots, self.format,
                recent_cache=caches[1], recent_slot_mapping=recent,
            )  # fmt: skip
        return caches

    def __str__(self) -> str:
        return (
            f"{self.format.name} {self.dtype} {self.kv_heads} heads of {self.head_size}, blocks of "
            f"{self.sizes}, sequences {self.lengths}, {len(self.calls)} stores"
        )
