"""README and documentation say what the code says: KV caches, vLLM versions, the first example."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from kvq_plugin.formats import SERVED
from kvq_plugin.serving.compat import RUN_VERSIONS

ROOT = Path(__file__).parents[1]


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


# | `name`, `name` | formula | 136 (1.88x) | 264 (1.94x) | scales |
ROW = re.compile(r"^\| (`\w+`(?:, `\w+`)*) \| [^|]+ \| (\d+) \((.+)x\) \| (\d+) \((.+)x\) \|", re.M)
ROWS = [
    (re.findall(r"\w+", names), figures) for names, *figures in ROW.findall(read("docs/formats.md"))
]


def test_every_name_has_a_row():
    assert sorted(name for names, _ in ROWS for name in names) == sorted(SERVED)


@pytest.mark.parametrize(("names", "figures"), ROWS, ids=lambda value: value[0])
def test_bytes_and_ratios(names, figures):
    for head_size, stated, ratio in ((64, *figures[:2]), (128, *figures[2:])):
        for name in names:
            stored = SERVED[name].bytes_per_token(head_size)
            assert (str(stored), f"{4 * head_size / stored:.2f}") == (stated, ratio)


def test_the_readmes_table_is_the_picture():
    """Of docs/data/formats.csv, whose figures test_docs.py traces to the pages they are from."""
    row = r"^\| `(\w+)` \| ([\d.]+)x \| \+([\d.]+) % \| ([\d.]+)x \|"
    found = re.findall(row, read("README.md"), re.M)
    with (ROOT / "docs" / "data" / "formats.csv").open(encoding="utf-8") as file:
        keys = ("name", "tokens", "perplexity", "speed")
        rows = [tuple(row[key] for key in keys) for row in csv.DictReader(file)]
    assert sorted(found) == sorted(rows)


def test_the_readme_stays_short():
    """A screen of why, a screen of how, a table, links."""
    assert len(read("README.md").splitlines()) < 90


def test_vllm_versions_are_those_that_are_run():
    page = read("docs/support.md")
    assert dict(re.findall(r"^\| (0\.\d+\.\d+) \| (.+) \|$", page, re.M)) == RUN_VERSIONS
    first, *_, last = (version.rsplit(".", 1)[0] for version in RUN_VERSIONS)
    assert f"vLLM {first} to {last}" in page and f"vLLM {first} to {last}" in read("README.md")


def test_the_example_for_transformers_runs(smollm2):
    """As it stands in the quick start, with MODEL the built-in one."""
    blocks = re.findall(r"^ *```python\n(.+?)^ *```", read("docs/quickstart.md"), re.S | re.M)
    [code] = [textwrap.dedent(block) for block in blocks if "KVQCache" in block]
    done = subprocess.run(
        [sys.executable, "-c", f"MODEL = {str(smollm2)!r}\n{code}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "The capital of France is Paris" in done.stdout
