"""``kvq doctor``: findings on this machine and on pretended ones."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from kvq_plugin import _native, doctor
from kvq_plugin.doctor import ADVICE, BAD, GOOD, Finding, Machine
from kvq_plugin.formats import FORMATS
from kvq_plugin.mapping import MIXED, NAMES
from kvq_plugin.serving import compat
from kvq_plugin.serving.compat import required


def machine(**changes):
    healthy = {
        "env": {
            "VLLM_CPU_OMP_THREADS_BIND": "0-3",
            "LD_PRELOAD": "/x/libtcmalloc.so:/x/libiomp5.so",
        },
        "cpus": [0, 1, 2, 3],
        "nodes": 1,
        "mapped": "",
        "shm": 8 << 30,
        "find": lambda pattern: None,
    }
    return Machine(**healthy | changes)


def states(findings):
    return {finding.state for finding in findings}


def advice(findings):
    return "\n".join(f"{f.what} {f.advice}" for f in findings if f.state != GOOD)


def test_a_healthy_machine_gets_no_advice():
    assert states(doctor.cpu(machine())) == {GOOD}
    assert states(doctor.plugin(machine())) == {GOOD}
    assert states(doctor.kernels(machine())) == {GOOD}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"env": {}, "cpus": [0, 1, 4]}, "VLLM_CPU_OMP_THREADS_BIND=0-1,4"),
        ({"env": {}}, "apt install libtcmalloc-minimal4"),
        ({"env": {}, "find": lambda p: f"/lib/{p}"}, "export LD_PRELOAD=/lib/libtcmalloc"),
        ({"env": {"OMP_NUM_THREADS": "1"}}, "unset OMP_NUM_THREADS"),
        ({"shm": 64 << 20}, "--shm-size"),
        ({"env": {"LD_PRELOAD": "libiomp5.so libgomp.so"}}, "abort together"),
    ],
)
def test_cpu_advice(changes, says):
    assert says in advice(doctor.cpu(machine(**changes)))


def test_a_plugin_that_is_kept_out():
    found = list(doctor.plugin(machine(env={"VLLM_PLUGINS": "other"})))
    assert BAD in states(found) and "unset VLLM_PLUGINS" in advice(found)
    assert states(doctor.plugin(machine(env={"VLLM_PLUGINS": "other,kvq"}))) == {GOOD}


def test_a_vllm_that_lacks_something(monkeypatch):
    monkeypatch.setattr(required, "missing", lambda: ["vllm.config.cache.CacheDType"])
    assert "steps aside: this vLLM lacks vllm.config.cache.CacheDType" in advice(
        doctor.plugin(machine())
    )


def test_kernels_that_are_missing_or_held_back(monkeypatch):
    with _native.use_isa("generic"):
        assert "unset KVQ_ISA" in advice(doctor.kernels(machine()))
    assert "KVQ_KERNELS" in advice(doctor.kernels(machine(env={"KVQ_KERNELS": "reference"})))

    def missing():
        raise ImportError("not built; make install")

    for name in ("load", "supported_isas"):
        monkeypatch.setattr(_native, name, missing)
    assert states(doctor.kernels(machine())) == {BAD}
    assert not any(works for works, _ in doctor.dtypes().values())


@pytest.mark.parametrize(
    ("imported", "named", "state"),
    [
        (None, None, BAD),
        ("0.32.0", None, BAD),
        ("0.32.0", "0.32.0+cpu", GOOD),
        ("0.33.0", "0.33.0", GOOD),
        ("0.99.0", "0.99.0", ADVICE),
    ],
)
def test_vllm_version(imported, named, state):
    assert doctor.vllm_version(imported, named).state == state


@pytest.mark.parametrize(("version", "build"), compat.RUN_VERSIONS.items())
def test_vllm_versions_that_were_run(version, build):
    found = doctor.vllm_version(version, version)
    assert found == Finding(GOOD, f"vLLM {version} (engine tests run on {build})")


def test_dtypes_of_this_machine():
    pytest.importorskip("vllm")
    rows = doctor.dtypes()
    assert all(rows[name][0] for name in ("auto", *NAMES))
    [others] = [(names, why) for names, (works, why) in rows.items() if not works]
    assert "nvfp4" in others[0] and "neither" in others[1]


@pytest.fixture
def on_gpu(monkeypatch):
    """vLLM on a GPU, of the given compute capability, as far as the doctor can tell."""
    pytest.importorskip("vllm")
    import torch

    def set(*capability):
        monkeypatch.setattr(compat, "is_cpu", lambda: False)
        monkeypatch.setattr(compat, "is_gpu", lambda: True)
        for name, value in {
            "is_available": lambda: True,
            "device_count": lambda: 2,
            "get_device_name": lambda i: "stand-in for an H200",
            "get_device_capability": lambda i: capability,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    return set


def test_whose_is_whose_on_gpus(on_gpu, monkeypatch):
    on_gpu(9, 0)
    [finding] = doctor.gpu()
    assert finding.state == GOOD
    assert "serves int8, k8v4, int4, k3v2 by itself; fp8_e4m3, fp8," in finding.what
    assert "--attention-backend KVQ" in finding.advice
    for lacking, missing in (("it is not built", {"int4", "k3v2"}), (None, set())):
        monkeypatch.setattr(doctor, "refusal", lambda *shape, lacking=lacking: lacking)
        rows = doctor.dtypes()
        assert {name for name, (works, _) in rows.items() if not works} == missing | {MIXED}
        assert all("GPU kernels: it is not built" in rows[name][1] for name in missing)
    assert {name for name in FORMATS if "vLLM's own" in rows[name][1]} == FORMATS.keys() - {"int8"}


def test_gpus_that_are_too_old_or_not_vllms(on_gpu, monkeypatch):
    on_gpu(7, 5)
    assert "capability 7.5; the plugin's kernels need 8.0" in advice(doctor.gpu())
    monkeypatch.setattr(compat, "is_gpu", lambda: False)
    assert "but vLLM runs on cpu" in advice(doctor.gpu())
    assert not any(works for works, _ in doctor.dtypes().values())  # some third platform


def test_the_report(monkeypatch):
    pytest.importorskip("vllm")
    output = io.StringIO()
    doctor.run(Console(file=output, width=160))
    for part in ("vLLM", "registered as", "kernels", "for this process", "int8_per_token_head"):
        assert part in output.getvalue()
    monkeypatch.setattr(doctor, "gpu", lambda: iter([Finding(BAD, "broken")]))
    with pytest.raises(ValueError, match="1 problem"):
        doctor.run(Console(file=output))
