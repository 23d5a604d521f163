"""What a case is, and where it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from kvq_plugin.formats import KVFormat
from kvq_plugin.gpu_check.candidates import ROWS

#: A case: its name, and a call that returns nothing, or values to write down, or raises.
Case = tuple[str, Callable[[], dict | None]]


class Refused(Exception):
    """The candidate does not serve this case, and says so."""


@dataclass(frozen=True)
class Context:
    """Where and what to check. ``quick``: few and small cases, for a dry run."""

    device: torch.device
    formats: tuple[KVFormat, ...] = ROWS
    quick: bool = False
    bundle: Path | None = None

    @cached_property
    def _scratch(self) -> torch.Tensor:
        if self.device.type == "cpu":
            return torch.empty(1 << 16, dtype=torch.uint8)
        from kvq_plugin import kernels

        size = kernels.workspace_size(256, self.device)
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def scratch(self) -> torch.Tensor:
        """The workspace, reserved once as vLLM's backend does, full of NaN: what a kernel reads
        there without having written it shows."""
        return self._scratch.fill_(0xFF)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
