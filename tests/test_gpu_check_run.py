"""A run of ``make gpu-check`` without a GPU: processes, budgets and evidence, with the reference
and candidates that fail (fakes.py) in the place of kernels. Its checks: ``test_gpu_check.py``.

What sanitizers find is not pretended here.
"""

import csv
import json
import os
import time
from pathlib import Path

import pytest
import torch

from kvq_plugin.formats import get_format
from kvq_plugin.gpu_check import __main__, candidates, evidence, library, run, sanitize

INT8 = get_format("int8_per_token_head")


@pytest.fixture(autouse=True)
def path(monkeypatch):
    """Processes find fakes.py and this checkout."""
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join(map(str, (library.ROOT, Path(__file__).parent)))
    )


# The run as a whole -----------------------------------------------------------------------------


def check(capsys, out: Path, *arguments: str) -> tuple[int, str]:
    status = __main__.main(["--device", "cpu", "--quick", "--out", str(out), *arguments])
    return status, capsys.readouterr().out


def table(text: str) -> dict[tuple[str, str], str]:
    """(candidate, step) -> the verdict that the summary's table has."""
    rows = (line.split() for line in text.splitlines() if line and not line.startswith(" "))
    known = ("FAILED", "ok", "partly", "not", "NOT", "UNFINISHED")
    return {(r[0], r[1]): r[2] for r in rows if len(r) > 6 and r[2] in known}


def test_a_dry_run_of_everything(tmp_path, capsys):
    """All steps, processes, lines, rows and files, with the reference."""
    status, text = check(capsys, tmp_path, "--candidates", "reference,torch", "--formats", "fp8")
    assert status == 0 and "all checks passed" in text
    rows = table(text)
    for step in (*run.STEPS, "timing"):
        assert rows["reference", step] == "ok"
    assert {rows["reference", tool] for tool in sanitize.TOOLS} == {"not"}  # not here
    assert rows["torch", "timing"] == "ok"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cases.jsonl", "gpu.csv", "summary.txt"]
    with (tmp_path / "gpu.csv").open() as file:
        timed = [(r["what"], r["kernel"]) for r in csv.DictReader(file)]
    assert ("attend", "reference") in timed and ("attend", "torch sdpa") in timed
    assert text.endswith((tmp_path / "summary.txt").read_text())
    assert __main__.main(["--summarize", str(tmp_path)]) == 0
    assert __main__.main(["--out", str(tmp_path)]) == 2  # evidence is not added to


FAULTS = ("segfaults", "exits", "does_not_compile", "does_not_load", "refuses")


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """A run in which every candidate but one fails in its own way; its exit status and summary.
    cmake is there, and fails; the bundle is there, and holds no library."""
    folder = tmp_path_factory.mktemp("faulty")
    bundle, tools = folder / "bundle", folder / "bin"
    for path in (bundle, tools):
        path.mkdir()
    (bundle / library.NAME).write_bytes(b"no library at all" * 100)
    (bundle / "manifest.json").write_text(json.dumps({"sources": library.digest()}))
    for name in ("cmake", "nvcc"):
        (tools / name).write_text("#!/bin/sh\necho 'attend.h(7): error: expected a ;'; exit 2\n")
        (tools / name).chmod(0o755)
    names = ",".join(f"fakes:{name}" for name in FAULTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
        patch.setenv("PYTHONPATH", f"{library.ROOT}{os.pathsep}{Path(__file__).parent}")
        status = __main__.main([
            "--device", "cpu", "--quick", "--out", str(folder / "out"), "--steps", "batches",
            "--formats", INT8.name, "--candidates", f"reference,cuda,{names}",
            "--bundle", str(bundle),
        ])  # fmt: skip
    return status, evidence.summarize(folder / "out")


def test_a_failing_candidate_stops_only_itself(faulty):
    status, summary = faulty
    verdicts = {(s.candidate, s.step): s.word for s in summary.steps}
    assert status == 1 and not summary.good
    assert verdicts["reference", "batches"] == "ok"
    assert {verdicts[f"fakes:{name}", "batches"] for name in FAULTS} == {"FAILED"}
    assert (verdicts["cuda", "library"], verdicts["cuda", "batches"]) == ("FAILED", "FAILED")


@pytest.mark.parametrize(
    ("candidate", "words"),
    (
        ("cuda library", ("attend.h(7): error: expected a ;", "invalid ELF header")),
        ("cuda batches", ("not started: there is no library",)),
        ("fakes:segfaults batches", ("in int8_per_token_head decodes", "died of SIGSEGV")),
        ("fakes:exits batches", ("exit status 7", "out of luck")),
        ("fakes:does_not_compile batches", ("CompilationError: at 12:4",)),
        ("fakes:does_not_load batches", ("exit status 1", "undefined symbol: attend")),
        ("fakes:refuses batches", ("not one case passed (8 refused)",)),
    ),
)
def test_the_summary_says_what_broke(faulty, candidate, words):
    step = next(s for s in faulty[1].steps if f"{s.candidate} {s.step}" == candidate)
    text = faulty[1].text()
    for word in words:
        assert any(word in failure for failure in step.failures) and word in text
    assert candidate in text.split("NOT GOOD:")[1]


def test_what_passed_before_a_crash_is_kept_and_the_step_goes_on_behind_it(faulty):
    """A process dies at its second attention; four of them get to the sixth of eight."""
    part = next(s for s in faulty[1].steps if s.candidate == "fakes:segfaults").parts[INT8.name]
    assert (part.passed, len(part.failures)) == (2, run.RESTARTS + 1)
    died = next(s for s in faulty[1].steps if s.candidate == "fakes:exits").parts[INT8.name]
    assert (died.passed, len(died.failures)) == (1, 1)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_a_step_past_its_time_is_killed_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setenv("KVQ_FAKE_CHILD", str(tmp_path / "child"))
    jobs = [run.Job(name, "batches", INT8.name) for name in ("fakes:hangs", "reference")]
    plan = [run.Phase((jobs[0],), 12, 1), run.Phase((jobs[1],), 60, 1)]
    runner = run.Runner(tmp_path / "out", 200, ("--device", "cpu", "--quick"), print, grace=1)
    runner.run(plan)
    hung, good = evidence.summarize(tmp_path / "out").steps
    assert hung.parts[INT8.name].passed == 1 and hung.word == "FAILED" and good.word == "ok"
    assert "decodes beside prefills: killed after 1" in hung.failures[0]
    assert not alive(int((tmp_path / "child").read_text()))


def test_no_process_outlives_a_run_that_is_ended(tmp_path, monkeypatch):
    class Ended(Exception):
        pass

    child = tmp_path / "child"
    monkeypatch.setenv("KVQ_FAKE_CHILD", str(child))
    over = run.Task.over

    def ending(task):
        if child.exists() and child.read_text():
            raise Ended
        return over(task)

    monkeypatch.setattr(run.Task, "over", ending)
    plan = [run.Phase((run.Job("fakes:hangs", "batches", INT8.name),), 100, 1)]
    runner = run.Runner(tmp_path / "out", 200, ("--device", "cpu", "--quick"), print)
    with pytest.raises(Ended):
        runner.run(plan)
    deadline = time.monotonic() + 10
    while alive(int(child.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(int(child.read_text()))
    summary = evidence.summarize(tmp_path / "out")
    assert summary.steps[0].word == "UNFINISHED" and not summary.good


def test_without_a_gpu_it_says_what_it_needs(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert __main__.main(["--out", str(tmp_path), "--minutes", "2"]) == 2
    text = capsys.readouterr().out
    assert "no CUDA GPU for PyTorch" in text and "GPU_PYTHON" in text and "NOT REACHED" in text


def test_the_plan_starts_with_cuda_and_fits_seven_minutes():
    plan = run.phases(["cuda", "triton", "auto", "torch"], [f.name for f in candidates.ROWS])
    order = [(job.candidate, job.step) for phase in plan for job in phase.jobs]
    assert order[:2] == [("-", "machine"), ("cuda", "library")]
    assert order.index(("cuda", "timing")) < min(
        i for i, (candidate, _) in enumerate(order) if candidate == "triton"
    )
    assert ("auto", "dispatch") in order and ("triton", "memcheck") in order
    assert sum(phase.least for phase in plan) < 420
    for phase in plan:  # what is timed has the GPU to itself
        assert phase.alone == (phase.jobs[0].step == "timing") and (
            not phase.alone or len(phase.jobs) == 1
        )


# Evidence ---------------------------------------------------------------------------------------


def test_a_half_finished_run_is_read(tmp_path, capsys):
    lines = evidence.Lines(tmp_path)
    lines.write("plan", planned=[("cuda", "grid"), ("cuda", "timing"), ("triton", "grid")])
    mine = evidence.Lines(tmp_path, candidate="cuda", step="grid", part="fp8")
    mine.write("start")
    mine.write("pass", case="one")
    mine.write("cut", left=9)
    mine.write("end", code=0, how="")
    other = evidence.Lines(tmp_path, candidate="cuda", step="timing")
    other.write("start")
    with (tmp_path / evidence.NAME).open("a") as file:
        file.write('{"candidate": "cuda", "ste')  # the machine stopped here
    assert __main__.main(["--summarize", str(tmp_path)]) == 1
    text = capsys.readouterr().out
    rows = table(text)
    assert rows["cuda", "grid"] == "partly" and rows["cuda", "timing"] == "UNFINISHED"
    assert rows["triton", "grid"] == "NOT" and "1 lines of cases.jsonl could not be read" in text
    assert __main__.main(["--summarize", str(tmp_path / "nowhere")]) == 2


def test_nothing_checked_is_not_good(tmp_path):
    evidence.Lines(tmp_path).write("plan", planned=[])
    assert not evidence.summarize(tmp_path).good


# Sanitizers -------------------------------------------------------------------------------------

FAKE = """#!/bin/sh
if [ "$1" = --help ]; then echo "  --kernel-name arg   filter"; exit 0; fi
echo "$@" >> "$(dirname "$0")/said"
tool=$2
while [ "$1" != "$KVQ_PYTHON" ]; do shift; done
[ $tool = synccheck ] && { echo "========= Error: Device not supported"; exit 1; }
"$@"
case $tool in
  racecheck) echo "========= Race reported at attend_kernel"; exit 86;;
  initcheck) echo "========= Uninitialized read at elementwise_kernel"; exit 86;;
esac
"""


def test_sanitizers(tmp_path, monkeypatch, capsys):
    """memcheck clean, a race, a GPU that is not supported, and a report of torch's own kernel."""
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(FAKE)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("KVQ_PYTHON", run.sys.executable)
    status, text = check(
        capsys, tmp_path / "out", "--candidates", "reference", "--formats", INT8.name,
        "--steps", ",".join(sanitize.TOOLS),
    )  # fmt: skip
    rows = table(text)
    assert status == 1 and [rows["reference", t] for t in sanitize.TOOLS] == [
        "ok", "FAILED", "not", "ok",
    ]  # fmt: skip
    assert "Race reported at attend_kernel" in text and "does not support" in text
    said = (tool.parent / "said").read_text().splitlines()
    for line in said:
        assert "--report-api-errors no" in line
        assert ("kns=attend_kernel" in line) == ("initcheck" not in line)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_check_on_this_gpu(tmp_path):
    assert __main__.main(["--steps", "bytes,batches,graphs", "--out", str(tmp_path)]) == 0
