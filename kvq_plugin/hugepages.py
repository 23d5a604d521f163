"""Huge pages under a KV cache in CPU memory.

A decode step reads pages of the cache in an order that only the block table knows. On 4 KiB
pages of memory nearly every one of them starts with a miss in the TLB, and hardware prefetching
ends where it ends; on 2 MiB pages decode attention was 3 to 13 % faster here.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch

HUGE_PAGE = 2 << 20
_MADV_DONTNEED = 4
_MADV_HUGEPAGE = 14
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@cache
def allowed() -> bool:
    """Whether this system gives huge pages to who asks."""
    try:
        return "[never]" not in _SETTING.read_text()
    except OSError:
        return False


def advise(memory: torch.Tensor) -> bool:
    """Put a fresh cache, *memory*, on huge pages; False where that did not happen.

    Whole huge pages inside the tensor's storage are concerned, and only when the storage is on
    the CPU and all zero, as a cache is before its first token. Its small pages are then given
    back and come again, zeroed and huge, when touched, which happens here: 0.2 to 1.5 s per GiB,
    where collapsing pages in place took 4.4.
    """
    if memory.device.type != "cpu" or not allowed():
        return False
    storage = memory.untyped_storage()
    if storage.data_ptr() % 8:
        return False
    skip = -storage.data_ptr() % HUGE_PAGE
    size = (storage.nbytes() - skip) // HUGE_PAGE * HUGE_PAGE
    if size <= 0:
        return False
    words = torch.empty(0, dtype=torch.int64).set_(storage, 0, (storage.nbytes() // 8,))
    inside = words.narrow(0, skip // 8, size // 8)
    if inside.count_nonzero():
        return False
    madvise = ctypes.CDLL(None).madvise
    where = ctypes.c_void_p(inside.data_ptr()), ctypes.c_size_t(size)
    if madvise(*where, _MADV_HUGEPAGE) or madvise(*where, _MADV_DONTNEED):
        return False
    inside.zero_()
    return True
