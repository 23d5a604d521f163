"""What is measured: shapes, and each candidate set up on them.

A candidate holds its own cache, filled through its own store kernel with the same K and V.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from kvq_plugin import _native, hugepages, ops
from kvq_plugin.formats import SERVED, Kind, KVFormat
from kvq_plugin.reference import StaticScale
from kvq_plugin.serving import compat

BLOCK = 128  # vLLM's block size on CPUs
STOCK = {"stock bf16": "auto", "stock fp8": "fp8"}
#: 4.5 standard deviations of the N(0, 1) inputs.
STATIC_RANGE = 4.5


@dataclass(frozen=True)
class Shape:
    """``batch`` sequences of ``context`` tokens, the last ``new`` of them queries."""

    batch: int
    context: int
    heads: int
    kv_heads: int
    head_size: int
    new: int = 1

    def __str__(self) -> str:
        kind = f"{self.new} new on" if self.new > 1 else "decode"
        return (
            f"{kind} B={self.batch} L={self.context}, {self.heads}/{self.kv_heads} heads, "
            f"D={self.head_size}"
        )

    @property
    def tokens(self) -> int:
        return self.batch * self.context


ATTENTION_SHAPES = (
    Shape(8, 4096, 32, 8, 128),
    Shape(1, 32768, 32, 8, 128),
    Shape(4, 8192, 8, 8, 128),
    Shape(4, 8192, 32, 2, 128),
    Shape(24, 7000, 9, 3, 64),
    Shape(1, 8704, 32, 8, 128, new=512),
)
STORE_SHAPES = (
    Shape(1, 4096, 32, 8, 128, new=4096),
    Shape(256, 1024, 32, 8, 128),  # at 4,096 tokens ten caches took 23 GB
    Shape(1, 4096, 9, 3, 64, new=4096),
)


@dataclass(frozen=True)
class Candidate:
    """Something to time. ``bytes`` is the cache memory one run reads or writes."""

    run: Callable[[], object]
    bytes: int


#: Of tokens: in the cache, and in that of recent rows.
Slots = tuple[torch.Tensor, torch.Tensor]


class _Batch:
    """Inputs all candidates of one shape share."""

    def __init__(self, shape: Shape) -> None:
        s = self.shape = shape
        generator = torch.Generator().manual_seed(0)
        self.blocks = s.batch * -(-s.context // BLOCK)
        # Scattered blocks, as a server that has run for a while has them.
        order = torch.randperm(self.blocks, generator=generator)
        self.block_table = order.to(torch.int32).view(s.batch, -1)
        # Recent rows take turns in as many blocks as an engine would have for them.
        held = (s.new + 64) // BLOCK + 2
        turn = torch.arange(self.block_table.shape[1], dtype=torch.int32) % held
        self.recent_table = torch.arange(s.batch, dtype=torch.int32)[:, None] * held + turn
        self.seq_lens = torch.full((s.batch,), s.context, dtype=torch.int32)
        self.starts = torch.arange(s.batch + 1, dtype=torch.int32) * s.new
        queries = s.batch * s.new
        self.query = torch.randn(
            queries, s.heads, s.head_size, generator=generator, dtype=torch.bfloat16
        )
        self.out = torch.empty_like(self.query)
        # One sequence's K and V serve all: what is stored does not change what it costs.
        kv = torch.randn(
            2, s.context, s.kv_heads, s.head_size, generator=generator, dtype=torch.bfloat16
        )
        self.key, self.value = kv
        self.scale = s.head_size**-0.5

    def slots(self, sequence: int) -> Slots:
        """Of every token of a sequence."""
        positions = torch.arange(self.shape.context)
        tables = (self.block_table[sequence], self.recent_table[sequence])
        return tuple(t.long()[positions // BLOCK] * BLOCK + positions % BLOCK for t in tables)

    def new_slots(self) -> Slots:
        """Of the last ``new`` tokens of every sequence."""
        each = [self.slots(i) for i in range(self.shape.batch)]
        return tuple(
            torch.cat([s[-self.shape.new :] for s in of]) for of in zip(*each, strict=True)
        )


class _Ours:
    def __init__(self, batch: _Batch, format: KVFormat) -> None:
        s = batch.shape
        self.batch, self.format = batch, format
        self.cache = self._pages(format, batch.blocks)
        self.recent = None
        if format.recent is not None:
            self.recent = self._pages(format.recent, int(batch.recent_table.max()) + 1)
        self.bytes_per_token = self.cache.shape[-1] * s.kv_heads
        self.static = None
        if not format.is_dynamic:
            code = format.key.code
            scale = 1.0 if code.kind is Kind.FLOAT else STATIC_RANGE / code.qmax
            self.static = StaticScale.expand(scale, s.kv_heads, s.head_size)

    def _pages(self, format: KVFormat, blocks: int) -> torch.Tensor:
        shape = self.batch.shape
        content = format.bytes_per_token(shape.head_size, BLOCK)
        size = (blocks, shape.kv_heads, BLOCK, content)
        with hugepages.HugePages():  # as in an engine
            return torch.zeros(size, dtype=torch.uint8)

    def _recent(self, name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
        return {} if self.recent is None else {"recent_cache": self.recent, name: value}

    def store(self, key: torch.Tensor, value: torch.Tensor, slots: Slots) -> None:
        recent = self._recent("recent_slot_mapping", slots[1])
        ops.store(key, value, self.cache, slots[0], self.format, self.static, self.static, **recent)

    def attend(self) -> None:
        b = self.batch
        tables = (b.block_table, b.seq_lens, b.starts)
        statics = (self.static, self.static)
        recent = self._recent("recent_block_table", b.recent_table)
        ops.attend(b.out, b.query, self.cache, *tables, self.format, b.scale, *statics, **recent)


def stock_isa(head_size: int, kv_cache_dtype: str) -> str:
    """vLLM's kernels for this processor; without AMX tiles where ``KVQ_ISA`` leaves ours without.

    Otherwise a run that stands for a processor without tiles would have them on one side.
    """
    isa = compat._get_attn_isa(torch.bfloat16, BLOCK, head_size, kv_cache_dtype)
    return "vec" if isa == "amx" and _native.isa() != "amx" else isa


class _Stock:
    """vLLM's own CPU kernels, called as its backend calls them."""

    def __init__(self, batch: _Batch, kv_cache_dtype: str) -> None:
        s = batch.shape
        self.batch, self.dtype = batch, kv_cache_dtype
        element = torch.bfloat16 if kv_cache_dtype == "auto" else torch.uint8
        cache = torch.zeros(batch.blocks, s.kv_heads, 2 * BLOCK, s.head_size, dtype=element)
        self.key_cache, self.value_cache = cache.chunk(2, dim=2)
        self.bytes_per_token = 2 * s.kv_heads * s.head_size * cache.element_size()
        self.isa = stock_isa(s.head_size, kv_cache_dtype)
        self.plan = compat.cpu_attn_get_scheduler_metadata(
            num_reqs=s.batch,
            num_heads=s.heads,
            num_kv_heads=s.kv_heads,
            head_dim=s.head_size,
            seq_lens=batch.seq_lens,
            dtype=torch.bfloat16,
            query_start_loc=batch.starts,
            causal=True,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=True,
            dynamic_causal=None,
            kv_cache_dtype=kv_cache_dtype,
        )

    def store(self, key: torch.Tensor, value: torch.Tensor, slots: Slots) -> None:
        compat.cpu_attn_reshape_and_cache(
            key,
            value,
            self.key_cache,
            self.value_cache,
            slots[0],
            self.isa,
            k_scale=1.0,
            v_scale=1.0,
            kv_cache_dtype=self.dtype,
        )

    def attend(self) -> None:
        b = self.batch
        compat.cpu_attention_with_kv_cache(
            query=b.query,
            key_cache=self.key_cache,
            value_cache=self.value_cache,
            output=b.out,
            query_start_loc=b.starts,
            seq_lens=b.seq_lens,
            scale=b.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=b.block_table,
            softcap=0.0,
            scheduler_metadata=self.plan,
            s_aux=None,
            dynamic_causal=None,
            k_scale=1.0,
            v_scale=1.0,
            kv_cache_dtype=self.dtype,
        )


def _candidates(batch: _Batch, names: list[str]) -> dict[str, _Ours | _Stock]:
    # Asks Linux for AMX tiles where there are any, which vLLM's kernels use without asking.
    _native.isa()
    stock = {name: _Stock(batch, dtype) for name, dtype in STOCK.items()}
    return stock | {name: _Ours(batch, SERVED[name]) for name in names}


def attention(shape: Shape, names: list[str]) -> dict[str, Candidate]:
    """Decode or prefill attention on *shape*: stock kernels and our formats *names*."""
    batch = _Batch(shape)
    made = _candidates(batch, names)
    for each in made.values():
        for sequence in range(shape.batch):
            each.store(batch.key, batch.value, batch.slots(sequence))
    return {n: Candidate(c.attend, shape.tokens * c.bytes_per_token) for n, c in made.items()}


def store(shape: Shape, names: list[str]) -> dict[str, Candidate]:
    """Writing the ``new`` tokens of every sequence of *shape*."""
    batch = _Batch(shape)
    slots = batch.new_slots()
    rows = torch.arange(slots[0].numel()) % shape.context
    key, value = batch.key[rows], batch.value[rows]

    def candidate(made: _Ours | _Stock) -> Candidate:
        size = len(rows) * made.bytes_per_token
        return Candidate(lambda: made.store(key, value, slots), size)

    return {name: candidate(c) for name, c in _candidates(batch, names).items()}
