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
    """The portable kernels and the best ones that this machine runs without AMX: between them they
    have every dot product. ``make sanitize`` takes all."""
    best = next(isa for isa in ISAS if isa != "amx")
    command = [ROOT / "scripts/sanitize.sh", sys.executable, str(BATCHES)]
    done = subprocess.run(
        [*command, *dict.fromkeys(("generic", best))], capture_output=True, text=True
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert f"{BATCHES} batches on {best}" in done.stdout
