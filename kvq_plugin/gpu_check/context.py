"""What a case is, and where it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from kvq_plugin.formats import KVFormat
from kvq_plugin.gpu_check.candidates import ROWS
from kvq_plugin.kernels import Workspace, new_workspace

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
    def _workspace(self) -> Workspace:
        if self.device.type == "cpu":
            return Workspace(torch.empty(1 << 16, dtype=torch.uint8), torch.zeros(1).int())
        return new_workspace(256, self.device)

    def scratch(self) -> Workspace:
        """The workspace, reserved once as vLLM's backend does, its scratch full of NaN: what a
        kernel reads there without having written it shows. Raises AssertionError if calls before
        have left counters behind."""
        assert not self._workspace.counters.any(), "counters of the workspace are not zeros again"
        self._workspace.scratch.fill_(0xFF)
        return self._workspace

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def captured(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """A replay of *step*; on a CPU, *step*."""
    if device.type == "cpu":
        return step
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        step()  # compiles and loads, where that is still to do
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
