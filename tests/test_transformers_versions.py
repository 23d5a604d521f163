"""The tests of KVQCache on the other end of the supported range of transformers, in a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvq_plugin.hf_cache import VERSIONS

#: transformers 5.24, which vLLM does not take, in a folder of its own (make test; CONTRIBUTING).
OTHER = Path(os.environ.get("KVQ_OTHER_TRANSFORMERS", Path(sys.prefix, "other-transformers")))
TESTS = (
    "test_hf_cache.py", "test_hf_generate.py", "test_hf_own_attention.py", "test_hf_recent.py",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_newest_transformers():
    if not (OTHER / "transformers").is_dir():
        pytest.skip(f"no transformers in {OTHER} (KVQ_OTHER_TRANSFORMERS; see CONTRIBUTING)")
    root = Path(__file__).parents[1]
    env = os.environ | {"PYTHONPATH": f"{OTHER}{os.pathsep}{root}"}
    asked = [sys.executable, "-c", "import transformers; print(transformers.__version__)"]
    version = subprocess.run(asked, env=env, capture_output=True, text=True, timeout=120).stdout
    assert version.strip() == VERSIONS[-1]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *(str(root / "tests" / name) for name in TESTS)],
        env=env,
        cwd=root,
        capture_output=True,
        text=True,
        timeout=1100,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_installed_transformers_is_in_the_range():
    import transformers

    def parts(version: str) -> tuple[int, ...]:
        return tuple(map(int, version.split(".")[:2]))

    assert parts(VERSIONS[0]) <= parts(transformers.__version__) <= parts(VERSIONS[-1])
