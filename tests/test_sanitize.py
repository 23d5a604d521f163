"""A short run of ``make sanitize``: the kernels under the sanitizers, on random batches."""

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cases import ISAS

ROOT = Path(__file__).parent.parent
BATCHES = 150


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(ISAS == ["reference"], reason="KVQ_KERNELS=reference: nothing compiled to test")
@pytest.mark.skipif(not shutil.which("g++") or platform.system() != "Linux", reason="needs g++")
def test_random_batches_under_the_sanitizers():
    """Kernels that decode to fp32 (AVX2's take two thirds of the portable ones' time to build), and
    the best that run here: those with emulated AMX tiles have every other dot product in them too.
    ``make sanitize`` takes all instruction sets."""
    plain = "avx2" if "avx2" in ISAS else "generic"
    best = "amx_emulated" if "avx512_bf16" in ISAS else ISAS[0]
    isas = dict.fromkeys((plain, best))
    command = [ROOT / "scripts/sanitize.sh", sys.executable, str(BATCHES), *isas]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    said = done.stdout.splitlines()[-1]  # what the build says names them, too
    assert f"{BATCHES} batches on " in said and all(isa in said for isa in isas), said
