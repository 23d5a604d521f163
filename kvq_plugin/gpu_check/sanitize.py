"""memcheck and racecheck: every kernel on small shapes under NVIDIA's compute-sanitizer.

Run as a module, this is the program that the sanitizer watches.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from kvq_plugin.gpu_check import candidates, correctness
from kvq_plugin.gpu_check.report import Clock, Outcome

TOOLS = ("memcheck", "racecheck")
#: What compute-sanitizer exits with if it found something.
FOUND = 86


def find() -> str | None:
    beside = Path("/usr/local/cuda/bin/compute-sanitizer")
    return shutil.which("compute-sanitizer") or (str(beside) if beside.exists() else None)


def start(tool: str, names: list[str]) -> subprocess.Popen | None:
    """The small program under *tool*, in the background; None where there is no sanitizer."""
    sanitizer = find()
    if sanitizer is None:
        return None
    # With torch's own caching of memory, neighbours would hide what lies past the end.
    env = dict(os.environ, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    program = [sys.executable, "-m", "kvq_plugin.gpu_check.sanitize", *names]
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), *program]
    return subprocess.Popen(
        command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(processes: dict[str, subprocess.Popen | None], limit: float) -> Outcome:
    """What the sanitizers found, waiting up to *limit* seconds for all."""
    outcome, end = Outcome(), time.monotonic() + limit
    for tool, process in processes.items():
        if process is None:
            outcome.skipped = "no compute-sanitizer on PATH or in /usr/local/cuda/bin"
            continue
        try:
            text, _ = process.communicate(timeout=max(1.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            outcome.skipped = f"{tool}, which took more than {limit:.0f} s"
            continue
        if "Device not supported" in text:
            outcome.skipped = f"{tool}: the sanitizer does not support this machine's GPU"
        else:
            outcome.check(tool, process.returncode == 0, text[-2000:])
    return outcome


def main(names: list[str]) -> int:
    """A few ragged batches with every format. Returns an exit status."""
    made = [c for c in (candidates.cuda(), candidates.triton()) if c and c.name in names]
    outcome = correctness.check_ragged(made, torch.device("cuda"), Clock(3600), 3600, cases=12)
    print("\n".join(outcome.failures))
    return bool(outcome.failures)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
