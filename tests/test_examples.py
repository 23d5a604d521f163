"""Every script in examples/ runs as it stands. The server's runs from the wheel: test_wheel.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvq_plugin.servers import engine_env

EXAMPLES = Path(__file__).parents[1] / "examples"
#: script -> what its output must hold
SAYS = {
    "offline_batch.py": ("100", "Tokyo"),
    "calibrate_and_serve.py": ("tokens in 256 MiB", "100"),
    "transformers_generate.py": ("int8_per_token_head: The capital of France is Paris",
                                 "int4: The capital of France is Paris"),
}  # fmt: skip
ELSEWHERE = {"kernels_on_tensors.py", "server_and_client.py"}


def run(name: str, *arguments: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments],
        env={**os.environ, **engine_env(), "PYTHONPATH": str(EXAMPLES.parent)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def test_every_example_is_run_and_listed():
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    assert scripts == set(SAYS) | ELSEWHERE
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\((\w+\.py)\)", listed)) == scripts


def test_the_kernels_alone():
    """Errors follow the bits, and no other package than torch is needed."""
    rows = re.findall(r"^(\w+) +(\d+) bytes.*error ([\d.]+)%$", run("kernels_on_tensors.py"), re.M)
    assert [name for name, *_ in rows] == ["int8_per_token_head", "k8v4", "int4_per_token_head"]
    sizes, errors = ([float(row[i]) for row in rows] for i in (1, 2))
    assert sizes == sorted(sizes, reverse=True) and errors == sorted(errors)
    assert errors[0] < 1.5 and errors[-1] < 20


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", SAYS)
def test_example(name, smollm2):
    printed = run(name, smollm2)
    print(printed)
    for words in SAYS[name]:
        assert words in printed
