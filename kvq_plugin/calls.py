"""One call of each operator: its arguments, put together once and handed down as they are."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from kvq_plugin.formats import KVFormat
from kvq_plugin.reference import StaticScale


@dataclass(frozen=True)
class Workspace:
    """Memory of :func:`kvq_plugin.ops.attend` on GPUs that no call may need while another runs.

    Attributes:
        scratch: uint8; what is in it between calls does not matter.
        counters: int32, zeros before the first call and again after each.
    """

    scratch: torch.Tensor
    counters: torch.Tensor


@dataclass(frozen=True, slots=True)
class Store:
    """Arguments of :func:`kvq_plugin.ops.store`, which says what they are."""

    key: torch.Tensor
    value: torch.Tensor
    cache: torch.Tensor
    slot_mapping: torch.Tensor
    format: KVFormat
    key_static: StaticScale | None = None
    value_static: StaticScale | None = None
    recent_cache: torch.Tensor | None = None
    recent_slot_mapping: torch.Tensor | None = None

    @property
    def rows(self) -> torch.Tensor:
        return self.key

    def recent_rows(self) -> Store:
        """The call that writes the rows to the recent cache."""
        slots = self.recent_slot_mapping
        return Store(self.key, self.value, self.recent_cache, slots, self.format.recent)


@dataclass(frozen=True, slots=True)
class Attend:
    """Arguments of :func:`kvq_plugin.ops.attend`, which says what they are.

    On GPUs, grids and splits follow from the bounds and from shapes, never from data on the device,
    so that a CUDA graph may capture every call.
    """

    out: torch.Tensor
    query: torch.Tensor
    cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    format: KVFormat
    scale: float
    key_static: StaticScale | None = None
    value_static: StaticScale | None = None
    causal: bool = True
    window: int = 0
    softcap: float = 0.0
    alibi_slopes: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    recent_cache: torch.Tensor | None = None
    recent_block_table: torch.Tensor | None = None
    max_query_len: int | None = None
    max_seq_len: int | None = None
    workspace: Workspace | None = None

    @property
    def rows(self) -> torch.Tensor:
        return self.query

    def bounded(self) -> Attend:
        """With the bounds that shapes allow, where none are given."""
        if self.max_query_len is not None and self.max_seq_len is not None:
            return self
        most, room = self.query.shape[0], self.block_table.shape[1] * self.cache.shape[2]
        return replace(
            self,
            max_query_len=most if self.max_query_len is None else self.max_query_len,
            max_seq_len=room if self.max_seq_len is None else self.max_seq_len,
        )

    @property
    def group(self) -> int:
        """Query heads per kv head."""
        return self.query.shape[1] // self.cache.shape[1]


def statics(call: Store | Attend, which: str) -> list[torch.Tensor | None]:
    """*which* ("scale" or "inverse") and zero point of K, then of V; None where there is none."""
    return [
        None if static is None else getattr(static, name)
        for static in (call.key_static, call.value_static)
        for name in (which, "zero_point")
    ]
