"""Store and attend on GPUs: by CUDA C++ kernels where they serve the case, else by Triton's; long
queries through FlashAttention (:mod:`kvq_plugin.kernels.prefill`).

``KVQ_GPU_KERNELS`` chooses: ``auto`` (the default), ``triton``, or ``cuda``, which is an error
where the CUDA C++ kernels cannot serve. The bytes in the cache are the same either way, and the
same as on CPUs apart from their order (layout ``gpu-v1``).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache as memoize
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

from kvq_plugin.formats import KVFormat
from kvq_plugin.reference import StaticScale

CHOICES = ("auto", "triton", "cuda")
#: Tokens of a sequence that the CUDA C++ kernels take, those of speculative decoding, as long as
#: they read the cache once, which they do for so many rows a kv head (choose.h).
CUDA_TOKENS, CUDA_ROWS = 8, 128


@dataclass(frozen=True)
class Workspace:
    """Memory of :func:`attend` that no call may need while another runs.

    Attributes:
        scratch: uint8; what is in it between calls does not matter.
        counters: int32, zeros before the first call and again after each.
    """

    scratch: torch.Tensor
    counters: torch.Tensor


@memoize
def _choice() -> str:
    choice = os.environ.get("KVQ_GPU_KERNELS", "auto")
    if choice not in CHOICES:
        raise ValueError(f"KVQ_GPU_KERNELS={choice!r}: expected one of {', '.join(CHOICES)}")
    return choice


def _cuda_serves(format: KVFormat, head_size: int, cache: torch.Tensor) -> bool:
    """Whether the CUDA C++ kernels shall run; told to, they raise themselves if they cannot."""
    if _choice() == "auto":
        from kvq_plugin.kernels import cuda

        return cuda.supports(format, head_size, cache)
    return _choice() == "cuda"


def _check_sealed(format: KVFormat) -> None:
    """Formats with recent rows have kernels in CUDA C++ only, which say themselves why they cannot
    serve a case."""
    if _choice() == "triton":
        raise ValueError(
            f"KVQ_GPU_KERNELS=triton: Triton has no kernels for {format.name}, CUDA C++ has; unset "
            f"it, or use k8v4, int4_per_token_head or int8_per_token_head"
        )


def _triton(module: str) -> ModuleType:
    """A module of this package that imports Triton."""
    if find_spec("triton") is None:
        raise ValueError(
            "this case needs Triton, which is not installed: pip install triton (a CUDA or ROCm "
            "build of PyTorch brings it), or use head sizes the CUDA C++ kernels serve"
        )
    return import_module(f"kvq_plugin.kernels.{module}")


def store(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    format: KVFormat,
    key_static: StaticScale | None = None,
    value_static: StaticScale | None = None,
    *,
    recent_cache: torch.Tensor | None = None,
    recent_slot_mapping: torch.Tensor | None = None,
) -> None:
    """Quantize new rows into pages of layout ``gpu-v1``; checked arguments of
    :func:`kvq_plugin.ops.store`.

    Raises ValueError for a head size, block size or alignment that the kernels cannot do.
    """
    args = (key, value, cache, slot_mapping, format, key_static, value_static)
    if format.recent is not None:
        from kvq_plugin.kernels import cuda

        _check_sealed(format)
        cuda.store(*args, recent_cache=recent_cache, recent_slot_mapping=recent_slot_mapping)
    elif _cuda_serves(format, key.shape[-1], cache):
        from kvq_plugin.kernels import cuda

        cuda.store(*args)
    else:
        _triton("triton_store").store(*args)


def attend(
    out: torch.Tensor,
    query: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    format: KVFormat,
    scale: float,
    key_static: StaticScale | None = None,
    value_static: StaticScale | None = None,
    *,
    max_query_len: int,
    **options: Any,
) -> None:
    """Attention over pages of layout ``gpu-v1``; checked arguments of
    :func:`kvq_plugin.ops.attend`, and

    Args:
        max_query_len: bound of the batch, known on the host.
        options: the keywords of :func:`kvq_plugin.ops.attend`, and ``max_seq_len``, another such
            bound, which must be given. Grids and splits follow from the bounds and from shapes,
            never from data on the device. ``workspace``: a :func:`new_workspace`; allocated for
            the call if None.

    Raises ValueError for a head size, block size or alignment that the kernels cannot do.
    """
    args = (
        out, query, cache, block_table, seq_lens, query_start_loc, format, scale,
        key_static, value_static,
    )  # fmt: skip
    options["max_query_len"] = max_query_len
    if format.recent is not None:
        from kvq_plugin.kernels import cuda

        _check_sealed(format)
        cuda.attend(*args, **options)
        return
    for name in ("recent_cache", "recent_block_table"):
        options.pop(name, None)
    rows = max_query_len * (query.shape[1] // cache.shape[1])
    few = max_query_len == 1 or (max_query_len <= CUDA_TOKENS and rows <= CUDA_ROWS)
    if (few or _choice() == "cuda") and _cuda_serves(format, query.shape[-1], cache):
        from kvq_plugin.kernels import cuda

        cuda.attend(*args, **options)
        return
    if options.get("workspace") is not None:
        options["workspace"] = options["workspace"].scratch
    prefill = _triton("prefill")
    if prefill.serves(query, cache, seq_lens.shape[0], **options):
        bounds = {k: options.get(k) for k in ("max_query_len", "max_seq_len", "workspace")}
        prefill.attend(*args, **bounds)
    else:
        _triton("triton_paged").attend(*args, **options)


def workspace_size(head_size: int, device: torch.device) -> int:
    """Bytes of scratch that :func:`attend` needs at most on *device*, whatever the batch."""
    from kvq_plugin.kernels import cuda, launch, prefill

    return max(module.workspace_size(head_size, device) for module in (cuda, launch, prefill))


def new_workspace(head_size: int, device: torch.device) -> Workspace:
    """What to reserve once and pass as ``workspace`` to :func:`attend`."""
    from kvq_plugin.kernels.cuda import COUNTERS

    return Workspace(
        torch.empty(workspace_size(head_size, device), dtype=torch.uint8, device=device),
        torch.zeros(COUNTERS, dtype=torch.int32, device=device),
    )
