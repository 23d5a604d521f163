"""The README's tables say what the code says: KV caches, and vLLM versions."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvq_plugin.formats import SERVED
from kvq_plugin.serving.compat import RUN_VERSIONS

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
# | `name`, `name` | formula | 136 (1.88x) | 264 (1.94x) | scales |
ROW = re.compile(r"^\| (`\w+`(?:, `\w+`)*) \| [^|]+ \| (\d+) \((.+)x\) \| (\d+) \((.+)x\) \|", re.M)
ROWS = [(re.findall(r"\w+", names), figures) for names, *figures in ROW.findall(README)]


def test_every_name_has_a_row():
    assert sorted(name for names, _ in ROWS for name in names) == sorted(SERVED)


@pytest.mark.parametrize(("names", "figures"), ROWS, ids=lambda value: value[0])
def test_bytes_and_ratios(names, figures):
    for head_size, stated, ratio in ((64, *figures[:2]), (128, *figures[2:])):
        for name in names:
            stored = SERVED[name].bytes_per_token(head_size)
            assert (str(stored), f"{4 * head_size / stored:.2f}") == (stated, ratio)


def test_vllm_versions_are_those_that_are_run():
    assert dict(re.findall(r"^\| (0\.\d+\.\d+) \| (.+) \|$", README, re.M)) == RUN_VERSIONS
    first, *_, last = (version.rsplit(".", 1)[0] for version in RUN_VERSIONS)
    assert f"vLLM {first} to {last}" in README


def test_the_example_for_transformers_runs(smollm2):
    """As it stands, with MODEL the built-in one."""
    [code] = [
        block for block in re.findall(r"```python\n(.+?)```", README, re.S) if "KVQCache" in block
    ]
    done = subprocess.run(
        [sys.executable, "-c", f"MODEL = {str(smollm2)!r}\n{code}"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "The capital of France is Paris" in done.stdout
