"""Registration cannot break a server that does not use the plugin: it is done as a whole, or vLLM
is as without it. ``without_names.py`` is the script of the processes looked at here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from engine_jobs import Batch, Job, run
from tiny_models import make

from kvq_plugin.serving.compat import required

pytest.importorskip("vllm")

SCRIPT = Path(__file__).with_name("without_names.py")
#: Without these nobody can tell on which platform vLLM runs, so nothing can be refused either.
BLIND = ("vllm.platforms.current_platform", "vllm.platforms.interface:Platform.is_cpu")


def look(what: str, model: Path) -> dict:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), what, str(model)],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"VLLM_PLUGINS": "", "VLLM_LOGGING_LEVEL": "WARNING"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("models"), "gqa")


@pytest.fixture(scope="module")
def names(model) -> dict:
    return look("names", model)


def test_without_any_one_name_nothing_is_changed_and_one_warning_says_why(names):
    assert len(names) > 100
    for name, found in names.items():
        assert found["left"] == [], name
        [warning] = found["warned"]
        assert "steps aside" in warning and name.rpartition(".")[2] in warning


def test_without_any_one_name_vllm_works_as_without_the_plugin(names):
    for name, found in names.items():
        assert found["auto"] == ["auto", "NoneType"], name
        assert found["fp8"] == ["fp8", "NoneType"], name  # vLLM's own


def test_without_any_one_name_our_caches_are_refused(names):
    for name, found in names.items():
        assert "int8" in found["own"], name  # not a name at all
        if name not in BLIND:
            assert "int8_per_token_head" in found["refused"], name
            assert name.rpartition(".")[2] in found["refused"]  # the reason


def test_modules_that_are_not_loaded_are_looked_up_in_their_source(monkeypatch):
    for place in (("vllm.v1.attention.backends.cpu_attn", ""), ("vllm.config.vllm", "VllmConfig")):
        monkeypatch.delitem(sys.modules, place[0], raising=False)
        name = "model_config" if place[1] else "CPUAttentionBackend"
        assert required.has(*place, name) and not required.has(*place, "no_such_name")


def test_what_fails_after_registration_concerns_our_caches_alone(model):
    for module, found in look("modules", model).items():
        assert found["auto"] == "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend", module
        assert "kvq_plugin failed" in found["refused"] and module in found["refused"]


def test_names_are_known_where_no_device_is(model):
    """On the head node of a Ray cluster of GPUs, whose workers register as a whole."""
    found = look("nowhere", model)
    assert "int8" in found["choices"] and found["accepted"] == "int8"
    assert not found["registered"] and found["then"]
    assert found["selected"].endswith("backend.KVQ_int8_per_token_head")


@pytest.mark.slow
def test_an_engine_runs_without_the_plugin(model):
    """With the plugin in vLLM's list, and a name missing that vLLM itself does not use."""
    batch = Batch([[1, 2, 3]], {"max_tokens": 4})
    jobs = [
        Job({"model": str(model), "kv_cache_dtype": d}, [batch])
        for d in ("auto", "int4_per_token_head")
    ]
    script = str(Path(__file__).with_name("broken_engine.py"))
    auto, refused = run(jobs, script=script, env={"VLLM_LOGGING_LEVEL": "ERROR"})
    assert auto.error is None and len(auto.batches[0][0].tokens) == 4
    assert "Value error" in refused.error and "stepped aside" in refused.error
