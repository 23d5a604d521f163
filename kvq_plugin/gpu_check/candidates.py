"""What is checked: kernels by name, behind the signatures of :mod:`kvq_plugin.kernels`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from kvq_plugin import reference
from kvq_plugin.formats import FORMATS, KVFormat
from kvq_plugin.layout import GPU_V1

#: One entry per row of the table, aliases dropped.
ROWS: tuple[KVFormat, ...] = tuple({f.id: f for f in FORMATS.values()}.values())


@dataclass(frozen=True)
class Candidate:
    """``store`` and ``attend`` of one implementation; ``refusal(format, head_size, cache)`` says
    why it does not serve a case, or None."""

    name: str
    store: Callable[..., None]
    attend: Callable[..., None]
    refusal: Callable[[KVFormat, int, torch.Tensor], str | None]


def _never(format: KVFormat, head_size: int, cache: torch.Tensor) -> None:
    return None


def cuda() -> Candidate:
    from kvq_plugin.kernels import cuda as kernels

    return Candidate("cuda", kernels.store, kernels.attend, kernels.refusal)


def triton() -> Candidate | None:
    """Triton's kernels; None where Triton is not installed."""
    if find_spec("triton") is None:
        return None
    from kvq_plugin.kernels import triton_paged, triton_store

    return Candidate("triton", triton_store.store, triton_paged.attend, _never)


def standin(name: str = "reference") -> Candidate:
    """The executable specification in the place of kernels: CPU only, slow."""

    def store(*args) -> None:
        reference.store(*args, layout=GPU_V1)

    def attend(out, *args, max_query_len, max_seq_len, workspace=None, **options) -> None:
        out.copy_(reference.attend(*args, **options, layout=GPU_V1))

    return Candidate(name, store, attend, _never)
