"""Fixtures that several test modules share."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from kvq_plugin.model import builtin_model

# So that an assert in a shared helper reports its values as one in a test does.
pytest.register_assert_rewrite("attending", "fp16_bound", "gpu_batch")

#: Triton looks at TRITON_INTERPRET while it is imported, and vLLM imports Triton: the interpreter
#: has a process of its own (test_triton.py starts it).
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Directory of the built-in model, converted in the user's cache on first use."""
    return builtin_model()


def pytest_collection_modifyitems(config, items) -> None:
    """With two workers, files that start engines first: what takes long must not begin last."""
    if hasattr(config, "workerinput"):
        slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
        items.sort(key=lambda item: -slow[item.path])


def pytest_terminal_summary(terminalreporter) -> None:
    """A line per vLLM version: what of test_versions.py passed, failed or was skipped on it."""
    counts: dict[str, Counter] = defaultdict(Counter)
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            version = re.search(r"test_versions\.py::.*[\[-](\d+\.\d+\.\d+)[\]-]", report.nodeid)
            if version:
                counts[version[1]][outcome] += 1
    if counts:
        terminalreporter.section("vLLM versions")
    for version, outcomes in sorted(counts.items()):
        said = ", ".join(f"{number} {outcome}" for outcome, number in outcomes.items())
        terminalreporter.write_line(f"vLLM {version}: {said}")
