"""Fixtures that several test modules share."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvq_plugin.model import builtin_model

# So that an assert in a shared helper reports its values as one in a test does.
pytest.register_assert_rewrite("attending")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Directory of the built-in model, converted in the user's cache on first use."""
    return builtin_model()
