"""Fixtures that several test modules share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvq_plugin.model import builtin_model

# So that an assert in a shared helper reports its values as one in a test does.
pytest.register_assert_rewrite("attending", "fp16_bound")

#: Triton looks at TRITON_INTERPRET while it is imported, and vLLM imports Triton: the interpreter
#: has a process of its own (test_triton.py starts it).
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Directory of the built-in model, converted in the user's cache on first use."""
    return builtin_model()
