"""64-bit ARM: that the kernels compile. ``make aarch64`` runs them, on an emulated processor."""

import shutil
import subprocess
from pathlib import Path

import pytest

CPU = Path(__file__).parent.parent / "csrc" / "cpu"
COMPILER = "aarch64-linux-gnu-g++"
ISAS = {"generic": [], "neon_dotprod": ["-march=armv8.2-a+dotprod"]}


@pytest.mark.skipif(not shutil.which(COMPILER), reason=f"needs {COMPILER}")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", sorted(p.name for p in CPU.glob("*.cpp") if p.name != "ops.cpp"))
def test_the_kernels_compile(name, isa):
    """What x86 alone has is behind a condition. (The operators need torch's headers for ARM.)"""
    command = [COMPILER, "-std=c++17", "-fsyntax-only", "-Wno-psabi", f"-DKVQ_ISA={isa}",
               "-DKVQ_TABLE=kGenericKernels", "-DKVQ_ARM=1", *ISAS[isa], CPU / name]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
