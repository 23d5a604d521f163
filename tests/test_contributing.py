"""CONTRIBUTING's list of what a new code touches leaves no file out."""

from __future__ import annotations

import re
from pathlib import Path

from kvq_plugin import formats

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
#: A code by its name in C++ or in Python.
IN_CPP = re.compile(r"\bCode::k[A-Z]\w+")
IN_PYTHON = re.compile(
    rf"(?<![\w.])({'|'.join(n for n, v in vars(formats).items() if isinstance(v, formats.Code))})\b"
)


def section() -> str:
    return re.search(r"^## Adding a format\n(.*?)^## ", TEXT, re.M | re.S)[1]


def naming_a_code() -> list[Path]:
    found = [p for p in (ROOT / "csrc").rglob("*.*") if IN_CPP.search(p.read_text())]
    found += [p for p in (ROOT / "kvq_plugin").rglob("*.py") if IN_PYTHON.search(p.read_text())]
    return found


def test_every_place_that_names_a_code_is_listed():
    text, places = section(), naming_a_code()
    assert len(places) > 10
    listed = [p for p in places if p.name in text or p.parent.name + "/`" in text]
    assert sorted(places) == sorted(listed)


def test_every_place_that_is_listed_exists():
    names = re.findall(r"`((?:[\w-]+/)*[\w-]+\.(?:py|h|cpp|cu))`", section())
    files = [p.as_posix() for d in ("csrc", "kvq_plugin", "tests") for p in (ROOT / d).rglob("*.*")]
    missing = [n for n in names if not any(f.endswith(f"/{n}") for f in files)]
    assert len(names) > 20 and not missing
