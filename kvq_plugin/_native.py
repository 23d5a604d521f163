"""Loads the compiled kernels, once, and answers what they are.

``KVQ_ISA`` forces a lower instruction set than the processor has (for tests and for comparing);
``use_isa`` switches for the duration of a block.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

LIBRARY = Path(__file__).parent / "_kvq.so"


@cache
def load() -> ctypes.CDLL:
    """Register ``torch.ops.kvq`` and return the library.

    Raises ImportError when it was not built, ValueError when ``KVQ_ISA`` names an instruction
    set this machine lacks.
    """
    if not LIBRARY.exists():
        raise ImportError(
            f"kvq_plugin's compiled kernels are missing (expected {LIBRARY.name} beside "
            f"{Path(__file__).name}); build them with `make install`, or "
            "`pip install --no-build-isolation .` in an environment that has torch"
        )
    torch.ops.load_library(str(LIBRARY))
    library = ctypes.CDLL(str(LIBRARY))
    for name in ("kvq_current_isa", "kvq_supported_isa", "kvq_format_row"):
        getattr(library, name).restype = ctypes.c_char_p
    library.kvq_rotation.restype = ctypes.c_float
    if forced := os.environ.get("KVQ_ISA"):
        _switch(library, forced)
    return library


_user: int | None = None  # the process that uses the kernels; in a fork of it, still its parent's


def survive_forks(forget: Callable[[], None]) -> None:
    """Told before this process uses the kernels. In forks of it *forget* is called, which has
    :mod:`~kvq_plugin.ops` tell of these, too.

    GNU's OpenMP, which torch brings, waits in such a process for threads that only its parent has,
    for ever; with one thread it asks for none. Bits do not depend on the number of threads.
    """
    global _user
    if _user is None:
        os.register_at_fork(after_in_child=forget)  # for good, and forks inherit it
    elif _user != os.getpid() and torch.get_num_threads() > 1 and not _openmp_forks():
        torch.set_num_threads(1)
        warnings.warn(
            f"kvq_plugin: this process was forked off one that uses the kernels ({_user}), whose "
            "threads it lacks: results are the same, by one thread. For more, start processes "
            "with multiprocessing's 'spawn'",
            RuntimeWarning,
            stacklevel=4,
        )
    _user = os.getpid()


def _openmp_forks() -> bool:
    """Whether Intel's or LLVM's OpenMP is in use, preloaded before torch's: after a fork these
    start threads anew."""
    maps = Path("/proc/self/maps").read_text()
    return "libiomp5" in maps or "/libomp.so" in maps


def isa() -> str:
    """The instruction set in use, from ``generic`` to ``amx`` (``supported_isas`` lists them)."""
    return load().kvq_current_isa().decode()


def supported_isas() -> list[str]:
    """Instruction sets this machine can run, best first."""
    return _supported(load())


def compiled_isas() -> list[str]:
    """Instruction sets that this build has kernels for, best first, whatever the machine."""
    library = load()
    library.kvq_compiled_isa.restype = ctypes.c_char_p
    names = (library.kvq_compiled_isa(i) for i in range(8))
    return [name.decode() for name in names if name]


def _supported(library: ctypes.CDLL) -> list[str]:
    names = (library.kvq_supported_isa(i) for i in range(8))
    return [name.decode() for name in names if name]


def _switch(library: ctypes.CDLL, name: str) -> None:
    if not library.kvq_use_isa(name.encode()):
        raise ValueError(
            f"KVQ_ISA={name!r} cannot be used here: expected one of {_supported(library)}"
        )


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Run the block with the kernels of *name*; ValueError when the machine lacks it."""
    before = isa()
    _switch(load(), name)
    try:
        yield
    finally:
        _switch(load(), before)


def format_table() -> list[tuple[str, tuple, tuple, bool]]:
    """The library's rows: name, then (code id, per token, rotated, grouping) of key and of value,
    and whether the format has recent rows."""
    rows, out = [], (ctypes.c_int * 9)()
    while name := load().kvq_format_row(len(rows), out):
        key, value = ((out[i], bool(out[i + 1]), bool(out[i + 2]), out[i + 3]) for i in (0, 4))
        rows.append((name.decode(), key, value, bool(out[8])))
    return rows


def rotation(head_size: int) -> tuple[torch.Tensor, float]:
    """Factors of a rotated row's channels, and :func:`kvq_plugin.rotation.gain`, of the library."""
    factors = torch.empty(head_size)
    gain = load().kvq_rotation(head_size, ctypes.c_void_p(factors.data_ptr()))
    return factors, gain


def page_layout(format_id: int, head_size: int, block_size: int) -> tuple[int, ...]:
    """Byte offsets of K codes, V codes, K metadata, V metadata, first row, and the page's size."""
    out = (ctypes.c_long * 6)()
    sizes = ctypes.c_long(head_size), ctypes.c_long(block_size)
    if not load().kvq_page_layout(format_id, *sizes, out):
        raise ValueError(f"no format {format_id}: expected a row of {format_table()}")
    return tuple(out)


def max_head_size() -> int:
    """The largest head size the kernels have room for."""
    return load().kvq_max_head_size()


def encode(code_id: int, values: torch.Tensor) -> torch.Tensor:
    """Unsigned codes (as a page holds them) of contiguous fp32 *values*, by ``csrc/codec.h``."""
    codes = torch.empty(values.shape, dtype=torch.uint8)
    _convert(code_id, values, codes, encode=True)
    return codes


def decode(code_id: int, codes: torch.Tensor) -> torch.Tensor:
    """fp32 values, before scaling, of contiguous uint8 *codes*, by ``csrc/codec.h``."""
    values = torch.empty(codes.shape, dtype=torch.float32)
    _convert(code_id, values, codes, encode=False)
    return values


def _convert(code_id: int, values: torch.Tensor, codes: torch.Tensor, encode: bool) -> None:
    load().kvq_convert(
        code_id,
        ctypes.c_void_p(values.data_ptr()),
        ctypes.c_void_p(codes.data_ptr()),
        ctypes.c_long(values.numel()),
        int(encode),
    )


def convert_scales(values: torch.Tensor, codes: torch.Tensor, encode: bool) -> None:
    """Lite scales: contiguous fp32 *values* -> uint8 *codes*, or back, by ``csrc/codec.h``."""
    load().kvq_convert_scales(
        ctypes.c_void_p(values.data_ptr()),
        ctypes.c_void_p(codes.data_ptr()),
        ctypes.c_long(values.numel()),
        int(encode),
    )
