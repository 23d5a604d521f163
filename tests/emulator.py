"""The CUDA C++ kernels on a CPU: compiled by g++ with its address sanitizer, run thread by thread.

``tests/cuda/emulate.cpp`` is the program. A call is recorded as the struct that
``kvq_plugin/kernels/cuda.py`` would launch with and the storages its pointers lie in, so the
binding is part of what is tested. Nothing here is a test.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import struct
import subprocess
from functools import cache as memoize
from pathlib import Path

import pytest
import torch

from kvq_plugin.calls import Attend, Store
from kvq_plugin.kernels import cuda, structs

ROOT = Path(__file__).parent.parent
SOURCES = (ROOT / "csrc" / "cuda", ROOT / "tests" / "cuda", ROOT / "csrc")
#: -Og: with more, compiling takes longer than all that is run.
FLAGS = ("-std=c++17", "-Og", "-g1", "-fsanitize=address", "-ffp-contract=off", "-Wall", "-Wextra",
         "-Wno-unused-function", "-Wno-clobbered", "-Werror")  # fmt: skip


class DecodeParams(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("a", "b", "along", "across")),
        ("count", ctypes.c_int64),
        ("code", ctypes.c_int64),
    ]


_KINDS = {structs.StoreParams: 0, structs.AttendParams: 1, DecodeParams: 2}


def cached(name: str, command: list[str], *inputs: Path) -> Path:
    """*command* ``-o`` a file of build/, compiled again only when an input has changed. What the
    compiler said lies beside it, with suffix ``.log``."""
    digest = hashlib.sha256(repr(command).encode())
    for folder in inputs:
        for path in sorted(folder.glob("*.*")):
            digest.update(path.read_bytes())
    target = ROOT / "build" / "tests" / f"{name}-{digest.hexdigest()[:16]}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_suffix(f".{os.getpid()}")
        done = subprocess.run(
            [*command, "-o", str(fresh)], capture_output=True, text=True, timeout=280
        )
        said = done.stdout + done.stderr
        assert done.returncode == 0, f"{' '.join(command)}\n{said[-6000:]}"
        target.with_suffix(".log").write_text(said)
        fresh.rename(target)
    return target


def compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if found is None:
        pytest.skip("no C++ compiler")
    return found


@memoize
def program() -> Path:
    source = ROOT / "tests" / "cuda" / "emulate.cpp"
    include = f"-I{ROOT / 'csrc' / 'cuda'}"
    return cached("emulate", [compiler(), *FLAGS, include, str(source)], *SOURCES)


@memoize
def host_library():
    """The part of ``_kvq_cuda.so`` that needs no GPU: plans."""
    source = ROOT / "csrc" / "cuda" / "host.cpp"
    command = [compiler(), "-std=c++17", "-O1", "-Wall", "-Wextra", "-Wno-unused-function",
               "-Werror", "-fPIC", "-shared", "-fvisibility=hidden", str(source)]  # fmt: skip
    library = ctypes.CDLL(str(cached("host", command, *SOURCES)))
    library.kvq_cuda_plan.restype = ctypes.c_int64
    library.kvq_cuda_plan.argtypes = [
        ctypes.POINTER(structs.AttendParams), ctypes.c_int64, ctypes.c_int32,
    ]  # fmt: skip
    return library


def run(path: Path, params: ctypes.Structure, reads=(), writes=(), order="") -> None:
    """Run the kernel that takes *params* over copies of the storages behind the tensors *reads*
    and *writes*; those of *writes* are copied back. Fails with the program's own words."""
    regions = {}
    for tensor in (*reads, *writes):
        if tensor is not None:
            storage = tensor.untyped_storage()
            regions[storage.data_ptr()] = storage.nbytes()
    raw = bytes(params)
    with path.open("wb") as file:
        file.write(struct.pack("3q", _KINDS[type(params)], len(raw), len(regions)) + raw)
        for address, size in regions.items():
            file.write(struct.pack("2q", address, size) + ctypes.string_at(address, size))
    # Leaks: a fiber's stack is released while its frames still are on it.
    env = dict(
        os.environ,
        ASAN_OPTIONS="detect_leaks=0:detect_stack_use_after_return=0",
        LD_PRELOAD="",  # which importing vLLM sets; the sanitizer's runtime must come first
        KVQ_EMULATED_ORDER=order,
    )
    done = subprocess.run(
        [str(program()), str(path)], capture_output=True, text=True, timeout=280, env=env
    )
    assert done.returncode == 0, done.stderr[-4000:]
    after = path.read_bytes()
    at = 24 + len(raw)
    written = {t.untyped_storage().data_ptr() for t in writes}
    for address, size in regions.items():
        at += 16
        if address in written:
            ctypes.memmove(address, after[at : at + size], size)
        at += size


def attend(path: Path, out: torch.Tensor, arguments, *, multiprocessors: int = 4, order="",
           **options):  # fmt: skip
    """As :func:`kvq_plugin.kernels.cuda.attend`, emulated. Returns the struct. *order*: of the
    blocks, "backwards" or a seed."""
    call = Attend(out, *arguments, **options)
    params = cuda.attend_params(call)
    need = cuda.plan(host_library(), params, call.max_seq_len, multiprocessors)
    workspace = torch.full((need // 4,), float("nan")) if need else None
    counters = torch.zeros(params.blocks, dtype=torch.int32) if need else None
    params.workspace, params.counters = map(structs.pointer, (workspace, counters))
    query, cache, *tables, _, _, key, value = arguments
    statics = [t for s in (key, value) if s is not None for t in (s.scale, s.zero_point)]
    names = ("alibi_slopes", "sinks", "recent_cache", "recent_block_table")
    options = [*(options.get(name) for name in names), workspace]
    writes = [out] if counters is None else [out, counters]
    run(path, params, [query, cache, *tables, *statics, *options], writes, order)
    assert counters is None or not counters.any(), "counters are not zeros again"
    return params


def store(
    path: Path, key, value, cache, slots, format, key_static=None, value_static=None, *,
    recent_cache=None, recent_slot_mapping=None,
):  # fmt: skip
    """As :func:`kvq_plugin.kernels.cuda.store`, emulated."""
    params = cuda.store_params(Store(key, value, cache, slots, format, key_static, value_static,
                                     recent_cache, recent_slot_mapping))  # fmt: skip
    statics = [s for s in (key_static, value_static) if s is not None]
    reads = [key, value, slots, recent_slot_mapping]
    reads += [t for s in statics for t in (s.inverse, s.zero_point)]
    run(path, params, reads, [x for x in (cache, recent_cache) if x is not None])
