"""Huge pages under a KV cache in CPU memory.

A decode step reads pages of the cache in an order that only the block table knows. On 4 KiB
pages of memory nearly every one of them starts with a miss in the TLB, and hardware prefetching
ends where it ends; on 2 MiB pages decode attention was 3 to 13 % faster here.

The kernel decides at the first touch of memory, and vLLM touches all of a cache as it allocates
it, by ``torch.zeros``. Asked before that, the same zeros took 0.17 to 0.29 s a GiB here on huge
pages and 0.32 to 0.42 s on small ones; exchanging small pages later cost up to 1.5 s a GiB more.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

HUGE_PAGE = 2 << 20
VARIABLE = "KVQ_HUGE_PAGES"
_MADV_DONTNEED = 4
_MADV_HUGEPAGE = 14
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_ROLLUP = Path("/proc/self/smaps_rollup")


def enabled() -> bool:
    """Whether the user wants huge pages: yes, unless ``KVQ_HUGE_PAGES=0``.

    Raises ValueError when the variable is neither 0 nor 1.
    """
    value = os.environ.get(VARIABLE, "1")
    if value not in ("0", "1"):
        raise ValueError(
            f"{VARIABLE}={value!r}: expected 1 (KV caches in CPU memory lie on huge pages where "
            "the system has them; the default) or 0 (they do not)"
        )
    return value == "1"


def obstacle() -> str | None:
    """Why a cache will not lie on huge pages; None when it may. ValueError as :func:`enabled`."""
    if not enabled():
        return f"{VARIABLE}=0"
    try:
        setting = _SETTING.read_text().strip()
    except OSError:
        return f"this system has no {_SETTING}"
    return f"{_SETTING} says {setting}" if "[never]" in setting else None


def ask(memory: torch.Tensor) -> int:
    """Have the whole huge pages inside *memory*'s storage come huge when next touched.

    Returns their bytes. Their contents are lost (zeros follow); the rest of the storage stays as
    it is. Raises OSError where the system refuses.
    """
    storage = memory.untyped_storage()
    skip = -storage.data_ptr() % HUGE_PAGE
    size = max(0, storage.nbytes() - skip) // HUGE_PAGE * HUGE_PAGE
    libc = ctypes.CDLL(None, use_errno=True)
    where = ctypes.c_void_p(storage.data_ptr() + skip), ctypes.c_size_t(size)
    # An allocator may hand out memory that has been in use, and so has small pages: give them back.
    for advice in (_MADV_HUGEPAGE, _MADV_DONTNEED) if size else ():
        if libc.madvise(*where, advice):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return size


class HugePages(TorchFunctionMode):
    """Within the block, ``torch.zeros`` on the CPU asks for huge pages before it writes zeros.

    Says in *log* how much memory lies on them, how long that took, or why none does.
    """

    def __init__(self, log: logging.Logger | None = None) -> None:
        super().__init__()
        self._log = log or logging.getLogger(__name__)

    def __torch_function__(self, func, types, args=(), kwargs=None) -> Any:
        if func is not torch.zeros:
            return func(*args, **(kwargs or {}))
        started, huge = time.perf_counter(), huge_bytes()
        memory = torch.empty(*args, **(kwargs or {}))
        reason = self._prepare(memory)
        memory.zero_()
        if reason is None:
            self._log.info(
                "KV cache: %.2f of %.2f GiB on huge pages, zeroed in %.2f s (%s=0 would leave it "
                "on small ones).",
                (huge_bytes() - huge) / 2**30,
                memory.nbytes / 2**30,
                time.perf_counter() - started,
                VARIABLE,
            )
        else:
            self._log.info("KV cache: not on huge pages: %s.", reason)
        return memory

    @staticmethod
    def _prepare(memory: torch.Tensor) -> str | None:
        """Ask for huge pages under *memory*; why not, where it cannot be."""
        if memory.device.type != "cpu":
            return f"it is on {memory.device}"
        reason = obstacle()
        if reason is not None:
            return reason
        try:
            return None if ask(memory) else "it is smaller than one"
        except OSError as error:
            return f"the system refused ({error.strerror})"


def huge_bytes() -> int:
    """Bytes of this process that lie on huge pages; 0 where the system does not tell."""
    with suppress(OSError):
        found = re.search(r"^AnonHugePages:\s+(\d+) kB", _ROLLUP.read_text(), re.MULTILINE)
        return int(found[1]) << 10 if found else 0
    return 0
