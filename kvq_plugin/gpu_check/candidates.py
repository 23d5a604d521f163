"""What is checked: kernels by name, called through :mod:`kvq_plugin.ops` as backends do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch

from kvq_plugin import kernels, ops, reference
from kvq_plugin.formats import FORMATS, LOWBIT, KVFormat
from kvq_plugin.layout import GPU_V1

#: One entry per row of the table, aliases dropped.
ROWS: tuple[KVFormat, ...] = tuple(
    {f.id: f for f in (*FORMATS.values(), *LOWBIT.values())}.values()
)


def _never(format: KVFormat, head_size: int, cache: torch.Tensor) -> None:
    return None


@dataclass(frozen=True)
class Candidate:
    """``store`` and ``attend`` with the arguments of :mod:`kvq_plugin.ops`; ``refusal(format,
    head_size, cache)`` says why it does not serve a case, or None."""

    name: str
    store: Callable[..., None]
    attend: Callable[..., None]
    refusal: Callable[[KVFormat, int, torch.Tensor], str | None] = _never


def standin(name: str = "reference") -> Candidate:
    """The executable specification in the place of kernels: CPU only, slow."""

    def store(*args, **recent) -> None:
        reference.store(*args, **recent, layout=GPU_V1)

    def attend(out, *args, max_query_len, max_seq_len, workspace=None, **options) -> None:
        starts, sequences = args[4], args[3].shape[0]
        first, end = int(starts[0]), int(starts[sequences])
        args = (args[0][:end], *args[1:])
        out[first:end] = reference.attend(*args, **options, layout=GPU_V1)[first:]

    return Candidate(name, store, attend)


def get(name: str) -> Candidate | None:
    """``cuda``, ``triton`` and ``auto`` are the choices of ``KVQ_GPU_KERNELS``, under which
    ``run.py`` starts their processes; ``reference`` the stand-in; ``module:function`` whatever
    that returns. None for a baseline, which is only timed."""
    if ":" in name:
        module, function = name.split(":")
        return getattr(import_module(module), function)()
    if name == "reference":
        return standin()
    if name not in kernels.CHOICES:
        return None
    refusal = _never
    if name == "cuda":
        from kvq_plugin.kernels import cuda

        refusal, library = cuda.refusal, cuda._load()
        if isinstance(library, str):  # every case would be refused for it
            raise ValueError(library)
    return Candidate(name, ops.store, ops.attend, refusal)
