"""Candidates for gpu-check that fail in the ways that kernels on a GPU can. Nothing here is a test.

``python -m kvq_plugin.gpu_check --candidates fakes:segfaults`` finds them, with tests/ on the path.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from kvq_plugin.gpu_check import candidates

GOOD = candidates.standin()


def _second(name: str, happens) -> candidates.Candidate:
    """Right at the first attention of a process, then *happens*."""
    calls = []

    def attend(*args, **kwargs):
        calls.append(1)
        if len(calls) > 1:
            happens()
        GOOD.attend(*args, **kwargs)

    return replace(GOOD, name=name, attend=attend)


def segfaults() -> candidates.Candidate:
    return _second("segfaults", lambda: os.kill(os.getpid(), signal.SIGSEGV))


def exits() -> candidates.Candidate:
    def leave():
        print("out of luck", flush=True)
        os._exit(7)

    return _second("exits", leave)


def hangs() -> candidates.Candidate:
    """Behind a child, as a compiler would be; its id goes into $KVQ_FAKE_CHILD."""

    def wait():
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        Path(os.environ["KVQ_FAKE_CHILD"]).write_text(str(child.pid))
        child.wait()

    return _second("hangs", wait)


def does_not_compile() -> candidates.Candidate:
    def attend(*args, **kwargs):
        raise RuntimeError("CompilationError: at 12:4: unsupported operand")

    return replace(GOOD, name="does_not_compile", attend=attend)


def does_not_load() -> candidates.Candidate:
    raise OSError("libkernels.so: undefined symbol: attend")


def refuses() -> candidates.Candidate:
    return replace(GOOD, name="refuses", refusal=lambda *case: "not this one")


def wrong(factor: float = 1.02) -> candidates.Candidate:
    def attend(out, *args, **kwargs):
        GOOD.attend(out, *args, **kwargs)
        out.mul_(factor)

    return replace(GOOD, name="wrong", attend=attend)
