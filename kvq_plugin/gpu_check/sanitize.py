"""Small steps of every kernel under NVIDIA's compute-sanitizer."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

#: Those that each candidate is run under. The last two look for what CUDA C++ does by hand:
#: barriers, and partial results in a workspace.
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
#: What compute-sanitizer exits with if it found something.
FOUND = 86
#: With torch's own caching of memory, neighbours would hide what lies past the end.
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
KERNELS = ("attend_kernel", "merge_kernel", "store_kernel", "seal_kernel")


def find() -> str | None:
    beside = Path("/usr/local/cuda/bin/compute-sanitizer")
    return shutil.which("compute-sanitizer") or (str(beside) if beside.exists() else None)


def command(sanitizer: str, tool: str) -> list[str]:
    """What to put before a program. torch asks the driver for things it may lack, which is no
    error of a kernel's; nor are torch's own kernels of interest, but initcheck must see all writes,
    theirs too."""
    made = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), "--report-api-errors", "no",
            "--target-processes", "application-only", "--print-limit", "20"]  # fmt: skip
    help = subprocess.run([sanitizer, "--help"], capture_output=True, text=True, timeout=20).stdout
    if tool != "initcheck" and "--kernel-name " in help:
        made += [word for name in KERNELS for word in ("--kernel-name", f"kns={name}")]
    return made


def verdict(tool: str, text: str) -> tuple[str, str]:
    """("absent" or "fail" or "pass", why) for a tool that ended with FOUND or said it cannot run
    here; *text* is all it printed. initcheck counts where it names a kernel of ours."""
    said = [line for line in text.splitlines() if line.startswith("=========")]
    if "Device not supported" in text:
        return "absent", f"{tool} does not support this machine's GPU"
    if tool == "initcheck" and not re.search("|".join(KERNELS), "\n".join(said)):
        return "pass", "reports of torch's kernels alone"
    return "fail", "\n".join(said[:30])
