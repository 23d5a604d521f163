"""scripts/gpu_vllm: what it says of a run's lines, and the modules that stand in for absent ones.

Its engines need a GPU, or the bundle and Python 3.12 for a dry run: ``python scripts/gpu_vllm``.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parent.parent / "scripts" / "gpu_vllm"


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"gpu_vllm_{name}", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


run = load("run")
SAME = {"tokens": [[1, 2, 3], [4, 5, 6]], "logprobs": [[-1.0] * 3] * 2, "gaps": [[0.5] * 3] * 2}


def summary(tmp_path, *lines: dict) -> str:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / run.LINES).write_text(text)
    return run.summarize(tmp_path)


def test_tokens_that_part_at_a_near_tie_are_told_from_others():
    other = SAME | {"tokens": [[1, 9, 3], [4, 5, 9]], "gaps": [[0.5, 0.01, 0.5], [0.5] * 3]}
    text = run.same_tokens(SAME | {"logprobs": [[-1.25] * 3] * 2}, other)
    assert text.startswith("tokens: 3 of 6 before the first that differs; 2 of 2 sequences part, 1")
    assert text.endswith("differ by 0.2500")


def test_equal_tokens_part_nowhere():
    assert "6 of 6 before the first that differs; 0 of 2" in run.same_tokens(SAME, SAME)


def test_a_half_finished_run_is_read(tmp_path):
    begun = {"stage": "process", "status": "begin"}
    text = summary(
        tmp_path,
        {"engine": "auto", **begun},
        {"engine": "auto", "stage": "tokens", "status": "pass", **SAME},
        {"engine": "auto", "stage": "process", "status": "end"},
        {"engine": "int8", **begun},
        {"engine": "int8", "stage": "tokens", "status": "pass", **SAME},
        {"engine": "int8", "stage": "drift", "status": "fail", "error": "ValueError: x"},
        {"engine": "fp8", **begun},
        {"engine": "fp8", "stage": "end", "status": "killed past its time limit"},
    )
    assert "6 of 6" in text and "(against auto)" in text
    assert "drift FAILED: ValueError: x" in text
    assert "fp8\n  killed past its time limit" in text


def test_a_run_in_which_nothing_starts_is_given_up(tmp_path):
    ended = [{"engine": x, "stage": "end", "status": "0"} for x in ("a", "b", "transformers", "c")]
    summary(tmp_path, *ended[:3])
    assert not run.hopeless(tmp_path)
    summary(tmp_path, *ended)
    assert run.hopeless(tmp_path)
    summary(tmp_path, *ended, {"engine": "b", "stage": "start", "status": "pass",
                               "v2_runner": True, "backends": ["x"], "graphs": ""})  # fmt: skip
    assert not run.hopeless(tmp_path)


def test_engines_are_compared_with_engines_of_the_plan():
    plan = {spec["name"]: spec for spec in run.engines()}
    assert all(spec.get("like", "auto") in plan for spec in plan.values())
    assert len(plan) == len(run.engines()) >= run.DEFAULT


def test_triton_finds_a_cache_that_moved(tmp_path):
    folder = tmp_path / "old" / "KEY"
    folder.mkdir(parents=True)
    group = folder / "__grp__kernel.json"
    group.write_text(json.dumps({"child_paths": {"kernel.cubin": str(folder / "kernel.cubin")}}))
    run.move_cache(tmp_path / "old", tmp_path / "new")
    moved = json.loads((tmp_path / "new" / "KEY" / group.name).read_text())
    assert moved["child_paths"] == {"kernel.cubin": str(tmp_path / "new" / "KEY" / "kernel.cubin")}


def test_absent_packages_import_as_empty_modules():
    code = (
        f"import sys; sys.path.insert(0, {str(SCRIPTS)!r}); import absent;"
        "absent.NAMES = ('xgrammar_of_none',);"  # one that is installed is found before
        "import xgrammar_of_none.testing; from xgrammar_of_none import Grammar;"
        "assert isinstance(Grammar, type);"
        "import importlib.util as u; assert u.find_spec('no_such_package') is None"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_stand_ins_compute_what_vllms_library_does():
    code = (
        f"import sys; sys.path.insert(0, {str(SCRIPTS)!r}); import torch, custom_ops;"
        "x = torch.randn(3, 8); out = torch.empty(3, 4);"
        "torch.ops._C.silu_and_mul(out, x);"
        "assert torch.equal(out, torch.nn.functional.silu(x[:, :4]) * x[:, 4:]);"
        "assert torch.ops._C.weak_ref_tensor(x).data_ptr() == x.data_ptr();"
        "assert not torch.ops._C.cutlass_scaled_mm_supports_fp8(90)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
