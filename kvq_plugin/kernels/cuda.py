"""The CUDA C++ kernels: ``_kvq_cuda.so`` (built from csrc/cuda by nvcc alone) through ctypes.

The library knows nothing of torch, so one build serves every torch; this module fills the structs
of ``csrc/cuda/params.h`` from tensors and launches on torch's current stream. Nothing here reads a
device's memory or waits for it, so that a CUDA graph may capture every call.

Calls come from :mod:`kvq_plugin.ops`, which has checked them.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, byref, c_int32, c_int64, c_void_p
from functools import cache as memoize
from pathlib import Path

import torch

from kvq_plugin.calls import Attend, Store, Workspace
from kvq_plugin.formats import KVFormat
from kvq_plugin.kernels import misaligned, page_refusal
from kvq_plugin.kernels.structs import (
    AttendParams,
    StoreParams,
    attend_params,
    store_params,
)

LIBRARY = Path(__file__).parent.parent / "_kvq_cuda.so"
#: Compute capability from which mma.m16n8k16 and fp16 -> fp32 products exist.
CAPABILITY = (8, 0)
#: Slots that stores, which divide in 32 bits, can tell apart.
SLOTS = 1 << 31
#: Counters of the partial results that are in, of which a launch takes one a block.
COUNTERS = 4096
#: Rows of all blocks that share a multiprocessor, at most (plan.h): 2 of 16, or 4 of 8.
_ROWS = 32


def open_library(path: Path | str) -> ctypes.CDLL:
    """The library at *path* with its functions declared. Raises OSError where it cannot load."""
    library = ctypes.CDLL(str(path))
    library.kvq_cuda_plan.argtypes = [POINTER(AttendParams), c_int64, c_int32]
    library.kvq_cuda_plan.restype = c_int64
    library.kvq_cuda_store.argtypes = [POINTER(StoreParams), c_void_p]
    library.kvq_cuda_attend.argtypes = [POINTER(AttendParams), c_void_p]
    library.kvq_cuda_error.argtypes = [c_int32]
    library.kvq_cuda_error.restype = ctypes.c_char_p
    return library


@memoize
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    if not LIBRARY.exists():
        return f"{LIBRARY.name} is not built (make cuda builds it; it needs nvcc)"
    try:
        return open_library(LIBRARY)
    except OSError as e:
        return f"{LIBRARY.name} does not load: {e}"


def library_refusal() -> str | None:
    """Why there are no CUDA C++ kernels in this installation; None if there are."""
    library = _load()
    return library if isinstance(library, str) else None


@memoize
def _device_refusal(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.hip is not None:
        return f"the cache is on {device}, and CUDA C++ kernels need an NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        got, need = (".".join(map(str, c)) for c in (capability, CAPABILITY))
        return f"{device} has compute capability {got}, and CUDA C++ kernels need {need} or later"
    return None


@memoize
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@memoize
def shape_refusal(format: KVFormat, head_size: int, block_size: int) -> str | None:
    """Why no CUDA C++ kernel reads pages of this shape; None if one does."""
    if (reason := page_refusal(format, head_size, block_size)) is not None:
        return reason
    # Rows of a head size class above 64 are read 16 bytes at a time.
    bits = min(format.key.code.bits, format.value.code.bits)
    if head_size > 64 and head_size * bits // 8 % 16:
        return (
            f"rows of {head_size} {bits}-bit codes are {head_size * bits // 8} bytes, and CUDA C++ "
            f"kernels read multiples of 16; Triton's kernels take head size {head_size}"
        )
    return None


def refusal(
    format: KVFormat,
    head_size: int,
    cache: torch.Tensor,
    recent_cache: torch.Tensor | None = None,
) -> str | None:
    """Why the CUDA C++ kernels cannot serve *cache* ``[B, H, N, C]`` (and *recent_cache*); None if
    they can."""
    reason = library_refusal()
    if reason is not None:
        return reason
    reason = _device_refusal(cache.device) or shape_refusal(format, head_size, cache.shape[2])
    for name, x in (("cache", cache), ("recent cache", recent_cache)):
        if reason is None and x is not None and x.shape[0] * x.shape[2] > SLOTS:
            reason = (
                f"the {name} has {x.shape[0] * x.shape[2]:,} slots, and CUDA C++ kernels count to "
                f"{SLOTS:,}"
            )
        if reason is None and x is not None:
            reason = misaligned(x, name)
    return reason


def _check(error: int) -> None:
    if error:
        message = _load().kvq_cuda_error(error).decode()
        raise RuntimeError(f"a CUDA C++ kernel could not be launched: {message} ({error})")


@memoize
def _loaded(device: torch.device) -> ctypes.CDLL:
    """The library, with its kernels on *device*: loading them in the middle of a graph's capture
    would break it."""
    library = _load()
    with torch.cuda.device(device):
        _check(library.kvq_cuda_load())
    return library


def _launch(name: str, params: Structure, device: torch.device) -> None:
    function = getattr(_loaded(device), name)
    with torch.cuda.device(device):
        _check(function(byref(params), torch.cuda.current_stream(device).cuda_stream))


def plan(library, params: AttendParams, max_seq_len: int, multiprocessors: int) -> int:
    """Fill in how *params* is dealt out. Returns the bytes of partial results it needs."""
    return library.kvq_cuda_plan(byref(params), max_seq_len, multiprocessors)


def workspace_size(head_size: int, device: torch.device) -> int:
    """Bytes that :func:`attend` uses at most, whatever the batch: two partial results a block."""
    rows = 2 * _ROWS * _multiprocessors(device)
    return rows * (head_size + 2) * 4


def _place(params: AttendParams, need: int, workspace: Workspace | None, device) -> tuple:
    """Point *params* at *need* bytes in *workspace*, or at new ones. Returns what keeps them."""
    if workspace is None:
        scratch = torch.empty(need, dtype=torch.uint8, device=device)
        counters = torch.zeros(params.blocks, dtype=torch.int32, device=device)
    else:
        scratch, counters = workspace.scratch, workspace.counters
    if scratch.numel() < need or counters.numel() < params.blocks:
        raise ValueError(
            f"the workspace must hold {need} bytes and {params.blocks} counters, got "
            f"{scratch.numel()} and {counters.numel()}; reserve "
            f"kvq_plugin.kernels.new_workspace(...)"
        )
    params.workspace, params.counters = scratch.data_ptr(), counters.data_ptr()
    return scratch, counters


def store(call: Store) -> None:
    """As :func:`kvq_plugin.ops.store`, into pages of layout ``gpu-v1``. Of two rows for one slot
    either may stay. For a call that :func:`refusal` has no reason against.
    """
    _launch("kvq_cuda_store", store_params(call), call.cache.device)


def attend(call: Attend) -> None:
    """As :func:`kvq_plugin.ops.attend`, over pages of layout ``gpu-v1``.

    Made for decoding: a few query tokens per sequence. Longer queries are right, but read the
    cache once per 8 or 16 rows, so prefer Triton's kernels for them.

    The workspace has ``scratch`` of up to :func:`workspace_size` bytes, 16-byte aligned, and
    COUNTERS ``counters``; None: allocated for the call.

    For a call that :func:`refusal` has no reason against. Raises ValueError for a workspace that is
    too small.
    """
    library, device = _load(), call.cache.device
    params = attend_params(call)
    need = plan(library, params, call.max_seq_len, _multiprocessors(device))
    kept = _place(params, need, call.workspace, device) if need else None
    _launch("kvq_cuda_attend", params, device)
    del kept  # memory given back now is used again behind this launch
