"""Store and attend on GPUs: by CUDA C++ kernels where they serve the case, else by Triton's; long
queries through FlashAttention (:mod:`kvq_plugin.kernels.prefill`).

``KVQ_GPU_KERNELS`` chooses: ``auto`` (the default), ``triton``, or ``cuda``, which is an error
where the CUDA C++ kernels cannot serve. The bytes in the cache are the same either way, and the
same as on CPUs apart from their order (layout ``gpu-v1``).
"""

from __future__ import annotations

import os
from functools import cache as memoize
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

from kvq_plugin.calls import Attend, Store, Workspace
from kvq_plugin.formats import KVFormat
from kvq_plugin.layout import GPU_V1, PageLayout

CHOICES = ("auto", "triton", "cuda")
#: Tokens of a sequence that the CUDA C++ kernels take, those of speculative decoding, as long as
#: they read the cache once, which they do for so many rows a kv head (choose.h).
CUDA_TOKENS, CUDA_ROWS = 8, 128


@memoize
def _choice() -> str:
    choice = os.environ.get("KVQ_GPU_KERNELS", "auto")
    if choice not in CHOICES:
        raise ValueError(f"KVQ_GPU_KERNELS={choice!r}: expected one of {', '.join(CHOICES)}")
    return choice


def _cuda_serves(call: Store | Attend) -> bool:
    """Whether the CUDA C++ kernels shall run. Raises ValueError if told that they shall, and they
    cannot."""
    choice = _choice()
    if choice == "triton":
        return False
    from kvq_plugin.kernels import cuda

    reason = cuda.refusal(call.format, call.rows.shape[-1], call.cache, call.recent_cache)
    if reason is not None and choice == "cuda":
        raise ValueError(f"KVQ_GPU_KERNELS=cuda: {reason}; unset it, or set KVQ_GPU_KERNELS=triton")
    return reason is None


@memoize
def page_refusal(format: KVFormat, head_size: int, block_size: int) -> str | None:
    """Why layout ``gpu-v1`` has no pages of this shape; None if it has."""
    try:
        PageLayout(format, head_size, block_size, GPU_V1)
    except ValueError as e:
        return str(e)
    return None


def misaligned(cache: torch.Tensor, name: str) -> str | None:
    """Why no kernel reads the pages of *cache*, the *name*; None if they can."""
    strides = cache.stride()[:2]
    if not any(n % 16 for n in (cache.data_ptr(), *strides)):
        return None
    return (
        f"pages must start on multiples of 16 bytes: the {name}'s address is "
        f"{cache.data_ptr():#x}, its block and head strides are {list(strides)}; "
        f"allocate it aligned, as torch.empty does"
    )


def _triton(module: str) -> ModuleType:
    """A module of this package that imports Triton."""
    if find_spec("triton") is None:
        raise ValueError(
            "this case needs Triton, which is not installed: pip install triton (a CUDA or ROCm "
            "build of PyTorch brings it), or use head sizes the CUDA C++ kernels serve"
        )
    return import_module(f"kvq_plugin.kernels.{module}")


def store(call: Store) -> None:
    """Quantize new rows into pages of layout ``gpu-v1``, for a checked call.

    Raises ValueError for a head size, block size or alignment that the kernels cannot do.
    """
    if _cuda_serves(call):
        from kvq_plugin.kernels import cuda

        return cuda.store(call)
    if call.format.recent is None:
        return _triton("triton_store").store(call)
    _triton("triton_store").store(call.recent_rows())
    _triton("triton_seal").seal(call)


def attend(call: Attend) -> None:
    """Attention over pages of layout ``gpu-v1``, for a checked call with its bounds.

    Raises ValueError for a head size, block size or alignment that the kernels cannot do.
    """
    most, sealed = call.max_query_len, call.format.recent is not None
    few = most == 1 or (most <= CUDA_TOKENS and most * call.group <= CUDA_ROWS)
    if (few or sealed or _choice() == "cuda") and _cuda_serves(call):
        from kvq_plugin.kernels import cuda

        return cuda.attend(call)
    prefill = _triton("prefill")
    (prefill if prefill.serves(call) else _triton("triton_paged")).attend(call)


def refusal(format: KVFormat, head_size: int, block_size: int) -> str | None:
    """Why no kernels serve pages of this shape in this installation; None if some do."""
    from kvq_plugin.kernels import cuda

    choice, triton = _choice(), find_spec("triton") is not None
    if triton and choice != "cuda":
        return page_refusal(format, head_size, block_size)
    reason = cuda.library_refusal() or cuda.shape_refusal(format, head_size, block_size)
    if reason is None and choice != "triton":
        return None
    return f"KVQ_GPU_KERNELS=cuda: {reason}" if triton else f"{reason}, nor is Triton installed"


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
