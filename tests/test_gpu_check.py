"""``make gpu-check`` without a GPU: its logic, with the reference standing in for the kernels.

What only a device can show (the build's result, graphs, sanitizers, times) is not pretended here.
"""

import csv
import inspect
import io
import json
import subprocess
import sys
from dataclasses import replace

import emulator
import golden_cases
import pytest
import torch
from rich.console import Console

from kvq_plugin import kernels, reference
from kvq_plugin.formats import FORMATS
from kvq_plugin.gpu_check import (
    __main__,
    build,
    candidates,
    correctness,
    golden,
    problems,
    sanitize,
    timing,
    worker,
)
from kvq_plugin.gpu_check.report import Clock, Outcome, Report
from kvq_plugin.layout import GPU_V1

CPU = torch.device("cpu")
FOREVER = Clock(1e9)
SMALL = correctness.Grid((1, 4), (64,), (40, 70), (1, 3), (16,), compared=2)
GOOD = candidates.standin()


def off_by(factor: float) -> candidates.Candidate:
    """A kernel whose outputs are *factor* times what they should be."""

    def attend(out, *args, **kwargs):
        GOOD.attend(out, *args, **kwargs)
        out.mul_(factor)

    return replace(GOOD, name="wrong", attend=attend)


def test_all_candidates_take_the_same_arguments():
    """The kernels a device would run are found, and take what the checks pass."""
    pytest.importorskip("triton")
    made = [candidates.cuda(), candidates.triton()]
    assert [c.name for c in made] == ["cuda", "triton"]
    for c in made:
        store, attend = (list(inspect.signature(f).parameters) for f in (c.store, c.attend))
        assert store == list(inspect.signature(kernels.store).parameters)
        assert attend[:10] == list(inspect.signature(kernels.attend).parameters)[:10]
        assert {"max_query_len", "max_seq_len", "workspace"} <= set(attend)


def report(clock: Clock = FOREVER) -> tuple[Report, io.StringIO]:
    text = io.StringIO()
    return Report(Console(file=text, width=100), clock), text


def test_the_grid_has_every_shape_once_and_every_format():
    for grid in (correctness.GRID, SMALL):
        seen = [(d, page, *shape) for (d, page, _), mine in grid.cases() for shape in mine]
        sizes = (grid.groups, grid.head_sizes, grid.contexts, grid.batches, grid.pages)
        total = 1
        for axis in sizes:
            total *= len(axis)
        assert len(seen) == len(set(seen)) == total
    met = {(f, d) for (d, _, f), mine in correctness.GRID.cases() if mine}
    assert met == {(f, d) for f in candidates.ROWS for d in correctness.GRID.head_sizes}


def test_good_kernels_pass_and_wrong_ones_do_not():
    good = correctness.check_grid([GOOD], CPU, FOREVER, 1e9, SMALL)
    assert good.passed == 8 and not good.failures and not good.skipped
    both = correctness.check_grid([GOOD, off_by(1.01)], CPU, FOREVER, 1e9, SMALL)
    assert both.passed == 8 and len(both.failures) == 8
    assert "wrong" in both.failures[0] and "context" in both.failures[0]


def test_an_output_that_is_not_finite_fails():
    lost = replace(GOOD, attend=lambda out, *args, **kwargs: None)
    outcome = correctness.check_grid([lost], CPU, FOREVER, 1e9, SMALL)
    assert len(outcome.failures) == 8 and "finite" in outcome.failures[0]


def test_a_candidate_is_not_asked_for_what_it_refuses():
    shy = replace(off_by(2.0), refusal=lambda *case: "not today")
    assert correctness.check_grid([shy], CPU, FOREVER, 1e9, SMALL) == Outcome()


def test_ragged_batches():
    outcome = correctness.check_ragged([GOOD, off_by(1.01)], CPU, FOREVER, 1e9, cases=8)
    assert outcome.passed == 8 and len(outcome.failures) == 8


def test_the_decoded_pool_is_what_the_reference_loads():
    for format in candidates.ROWS:
        pool = problems.decoded(problems.fill(GOOD, format, 32, 16, 3, 2, CPU))
        dense = reference.load(pool.cache, format, 32, *pool.statics, layout=GPU_V1)
        for got, expected in zip((pool.keys, pool.values), dense, strict=True):
            assert torch.equal(got, expected.flatten(0, 1))


def test_golden_bytes():
    """The emulated CUDA C++ store writes the golden bytes; one wrong byte is found."""

    def few(case):
        return (case.head_size, case.dtype) == (64, "bfloat16")

    assert golden.cases_module() is golden_cases
    good = golden.check([GOOD], CPU, few)
    assert good.passed == sum(map(few, golden_cases.cases())) and not good.failures

    def store(*args):
        GOOD.store(*args)
        args[2][0, 0, 0, 0] ^= 1

    bad = golden.check([replace(GOOD, store=store)], CPU, few)
    assert len(bad.failures) == good.passed and "bytes" in bad.failures[0]


def test_golden_bytes_of_the_emulated_cuda_kernels(tmp_path):
    def store(*args):
        emulator.store(tmp_path / "call", *args)

    emulated = replace(GOOD, name="emulated", store=store)

    def one_a_format(case):
        wanted = case.granularity.is_dynamic or case.granularity.value == "channel"
        return wanted and (case.head_size, case.dtype) == (80, "bfloat16")

    outcome = golden.check([emulated], CPU, one_a_format)
    assert outcome.passed == len(candidates.ROWS) and not outcome.failures


# The run as a whole -----------------------------------------------------------------------------


def test_steps_end_when_their_time_is_over_and_say_so():
    times = iter(range(100))
    clock = Clock(1000, now=lambda: next(times))
    outcome = correctness.check_grid([GOOD], CPU, clock, 4, SMALL)
    assert 0 < outcome.passed < 8
    assert outcome.skipped == f"{8 - outcome.passed} of 8 shapes, for time"
    assert outcome.word == "partly"


def test_workers_share_the_cases_and_lose_none(monkeypatch):
    few = [c for c in golden_cases.cases() if (c.head_size, c.dtype) == (16, "float16")][:4]
    monkeypatch.setattr(golden_cases, "cases", lambda: iter(few))
    grid = replace(SMALL, batches=(1,))
    parts = [worker.work([GOOD], CPU, i, 3, 1e9, grid, ragged=4) for i in range(3)]
    merged = worker.merge(parts)
    assert [merged[step].passed for step in worker.STEPS] == [4, 4, 4]
    assert not any(o.failures or o.skipped for o in merged.values())


def test_a_worker_that_dies_is_a_failure():
    good = json.dumps({"grid": {"passed": 3, "failures": [], "skipped": ""}})
    processes = [
        subprocess.Popen([sys.executable, "-c", code], text=True, stdout=subprocess.PIPE)
        for code in (f"print('noise'); print('{good}')", "print('out of memory'); exit(7)")
    ]
    merged = worker.finish(processes, FOREVER, 60)
    assert merged["grid"].passed == 3
    assert "status 7" in merged["grid"].failures[0]
    assert "out of memory" in merged["grid"].failures[0]


def test_one_step_s_failure_hides_no_other():
    made, text = report()

    def broken():
        raise RuntimeError("no such kernel [yet]")

    made.run("first", broken)
    made.run("second", lambda: Outcome(passed=3))
    made.run("third", lambda: Outcome(skipped="no tool"))
    assert not made.good
    said = text.getvalue()
    assert "RuntimeError: no such kernel [yet]" in said
    assert [made.outcomes[n].word for n in ("first", "second", "third")] == [
        "FAILED", "ok", "skipped",
    ]  # fmt: skip
    assert "not run: no tool" in said


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    monkeypatch.setattr(build.Path, "exists", lambda self: "csrc" in str(self))
    outcome = build.build("90", 1)
    assert "nvcc" in outcome.skipped and "left out" in outcome.skipped
    monkeypatch.setattr(sanitize, "find", lambda: None)
    watched = {tool: sanitize.start(tool, ["cuda"]) for tool in sanitize.TOOLS}
    assert "no compute-sanitizer" in sanitize.finish(watched, 1).skipped


def test_sanitizer_findings_fail():
    def process(code):
        return subprocess.Popen(
            [sys.executable, "-c", f"print('found'); exit({code})"],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    outcome = sanitize.finish({"memcheck": process(0), "racecheck": process(86)}, 60)
    assert outcome.passed == 1 and outcome.failures == ["racecheck: found\n"]


def test_a_failed_build_shows_the_compiler_s_words(monkeypatch):
    monkeypatch.setattr(build, "missing_tools", lambda: "")

    def failing(command, **kwargs):
        return subprocess.CompletedProcess(command, 1, "", "error: no such thing")

    monkeypatch.setattr(build.subprocess, "run", failing)
    assert "no such thing" in build.build("90", 1).failures[0]


def test_rows_go_into_the_csv_and_the_table(tmp_path):
    shape = (64, 8192, 8, 4, 128, 16)
    rows = [
        timing.Row("copy", "torch", "", 0, 0, 0, 0, 0, 0, 0.0, 4300.0, 1.0),
        timing.Row("attend", "cuda", "fp8_e4m3", *shape, 305.25, 3520.0, 0.8186),
        timing.Row("store", "cuda", "fp8_e4m3", *shape, 9.5, 300.0, 0.07),
    ]
    timing.write_csv(tmp_path / "deep" / "gpu.csv", rows)
    with (tmp_path / "deep" / "gpu.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [r["kernel"] for r in read] == ["torch", "cuda", "cuda"]
    assert float(read[1]["of_copy"]) == 0.8186
    text = io.StringIO()
    Console(file=text, width=100).print(__main__.table(rows))
    lines = text.getvalue().splitlines()
    assert len(lines) == 3 and lines[2].split() == [
        "cuda", "fp8_e4m3", "64", "8192", "305", "3520", "82%",
    ]  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_it_needs(capsys):
    assert __main__.main([]) == 2
    assert "CUDA GPU" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_check_on_this_gpu(tmp_path):
    assert __main__.main(["--no-timing", "--out", str(tmp_path)]) == 0


def test_format_names_that_are_timed_exist():
    assert set(timing.FORMATS_TIMED) <= set(FORMATS)
