"""Builds ``_kvq_cuda.so`` in place, as ``make cuda`` does, for this machine's GPU alone."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from kvq_plugin.gpu_check.report import Outcome

ROOT = Path(__file__).parent.parent.parent


def nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def missing_tools() -> str:
    """What the build lacks here, in words; empty if nothing."""
    if not (ROOT / "csrc" / "cuda" / "CMakeLists.txt").exists():
        return "csrc/cuda (run this in a checkout of the project)"
    missing = [name for name, found in (("nvcc", nvcc()), ("cmake", shutil.which("cmake")))
               if found is None]  # fmt: skip
    return " and ".join(missing)


def build(architecture: str, timeout: float, folder: Path | None = None) -> Outcome:
    """Build for *architecture* (``90``) into kvq_plugin/; skipped without nvcc or CMake, in
    which case only Triton's kernels are checked."""
    lacking = missing_tools()
    if lacking:
        return Outcome(skipped=f"no {lacking}; CUDA C++ kernels are left out")
    folder = folder or ROOT / "build" / f"cuda-{architecture}"
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    commands = (
        ["cmake", "-S", str(ROOT / "csrc" / "cuda"), "-B", str(folder), *generator,
         f"-DCMAKE_CUDA_ARCHITECTURES={architecture}-real"],
        ["cmake", "--build", str(folder), "--parallel"],
    )  # fmt: skip
    outcome, env = Outcome(), dict(os.environ, CUDACXX=nvcc() or "nvcc")
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env)
        if done.returncode:
            outcome.failures.append(f"{' '.join(command)}\n{(done.stdout + done.stderr)[-3000:]}")
            return outcome
        outcome.passed += 1
    return outcome
