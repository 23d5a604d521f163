"""The README's table of KV caches says what the format table says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvq_plugin.formats import FORMATS

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
# | `name`, `name` | formula | 136 (1.88x) | 264 (1.94x) | scales |
ROW = re.compile(r"^\| (`\w+`(?:, `\w+`)*) \| [^|]+ \| (\d+) \((.+)x\) \| (\d+) \((.+)x\) \|", re.M)
ROWS = [(re.findall(r"\w+", names), figures) for names, *figures in ROW.findall(README)]


def test_every_name_has_a_row():
    assert sorted(name for names, _ in ROWS for name in names) == sorted(FORMATS)


@pytest.mark.parametrize(("names", "figures"), ROWS, ids=lambda value: value[0])
def test_bytes_and_ratios(names, figures):
    for head_size, stated, ratio in ((64, *figures[:2]), (128, *figures[2:])):
        for name in names:
            stored = FORMATS[name].bytes_per_token(head_size)
            assert (str(stored), f"{4 * head_size / stored:.2f}") == (stated, ratio)
