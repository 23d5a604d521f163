"""Starts the steps of a run, one process per candidate, step and format, and ends them in time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from kvq_plugin.gpu_check import sanitize
from kvq_plugin.gpu_check.evidence import LOST, Lines, read

#: Steps that are done once per format, most telling first.
STEPS = ("bytes", "batches", "graphs", "grid")
#: GPU memory that one process may need: all pools of one format, decoded, and one sequence of it.
MEMORY = 6 << 30
#: Seconds between asking a process to end, by its --seconds, and killing its group.
GRACE = 15
#: How often a step goes on behind a case that took its process with it.
RESTARTS = 3


@dataclass(frozen=True)
class Job:
    candidate: str
    step: str
    part: str = ""
    first: int = 0
    restarts: int = 0

    @property
    def sanitized(self) -> bool:
        return self.step in sanitize.TOOLS


@dataclass(frozen=True)
class Phase:
    """Jobs that run side by side. ``most`` seconds, and ``least`` that earlier phases leave it."""

    jobs: tuple[Job, ...]
    most: float
    least: float
    alone: bool = False


def phases(
    candidates: Sequence[str], formats: Sequence[str], only: Sequence[str] = ()
) -> list[Phase]:
    """The first candidate's correctness and times come before anything of the others. *only* these
    steps (none: all), besides what they need."""
    machine = Phase((Job("-", "machine"),), 40, 10)
    library = Phase((Job("cuda", "library"),), 170, 15)
    out = [machine, library] if "cuda" in candidates else [machine]
    real = [c for c in candidates if c != "torch"]
    watched = [c for c in real if c != "auto"]
    for mine, seconds in ((real[:1], (75, 40)), (real[1:], (150, 60))):
        jobs = []
        if mine != real[:1] or len(real) == 1:
            jobs += [Job(c, tool) for c in watched for tool in sanitize.TOOLS[:2]]
            jobs += [Job(c, tool) for c in watched[:1] for tool in sanitize.TOOLS[2:]]
        for c in mine:
            steps = ("batches", "graphs") if c == "auto" else STEPS
            jobs += [Job(c, step, format) for step in steps for format in formats]
            jobs += [Job(c, "dispatch")] if c == "auto" else []
        timed = [Job(c, "timing") for c in mine if c != "auto"]
        if mine == real[:1] and "torch" in candidates:
            timed.append(Job("torch", "timing"))
        jobs, timed = ([j for j in x if not only or j.step in only] for x in (jobs, timed))
        jobs.sort(key=lambda job: job.step == "grid")  # it takes what time is left
        out += [Phase(tuple(jobs), *seconds)] if jobs else []
        out += [Phase((job,), 50, 30, alone=True) for job in timed]
    return out


@dataclass
class Runner:
    """Runs phases within *seconds* in all. ``options`` go to every process; *say* prints."""

    out: Path
    seconds: float
    options: Sequence[str]
    say: Callable[[str], None]
    slots: int = 1
    grace: float = GRACE
    start: float = field(default_factory=time.monotonic)
    running: list = field(default_factory=list)
    failed: set = field(default_factory=set)

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.start)

    def run(self, plan: Sequence[Phase]) -> None:
        """All of *plan*. Whatever ends this, no process is left behind."""
        planned = dict.fromkeys((j.candidate, j.step) for p in plan for j in p.jobs)
        Lines(self.out).write("plan", planned=list(planned))
        try:
            for i, phase in enumerate(plan):
                kept = sum(later.least for later in plan[i + 1 :])
                self._phase(phase, max(phase.least, min(phase.most, self.left() - kept)))
                if ("-", "machine") in self.failed:
                    return
                if i == 0:
                    self.slots = self._count()
        finally:
            for task in self.running:
                task.kill()

    def _count(self) -> int:
        """Processes that fit this machine."""
        rows = [line["row"] for line in read(self.out)[0] if line.get("step") == "machine"
                and "row" in line]  # fmt: skip
        fit = rows[-1].get("free_memory", 1 << 40) // MEMORY if rows else 1
        return max(1, min((os.cpu_count() or 2) - 1, fit, 14))

    def _phase(self, phase: Phase, seconds: float) -> None:
        end = time.monotonic() + max(0.0, min(seconds, self.left() - self.grace))
        waiting = list(phase.jobs)
        slots = 1 if phase.alone else self.slots
        while waiting or self.running:
            while waiting and len(self.running) < slots:
                job, left = waiting.pop(0), end - time.monotonic()
                # Its share of the time, by how many rounds are still to come.
                rounds = 1 if job.sanitized else -(-(len(waiting) + 1) // slots)
                reason = self._reason(job) or ("no time was left" if left < 1 else "")
                if reason:
                    Lines(self.out, **_names(job)).write("end", how=f"not started: {reason}")
                    self.failed.add((job.candidate, job.step))
                elif (absent := self._absent(job)) is not None:
                    Lines(self.out, **_names(job)).write("absent", detail=absent)
                else:
                    self.running.append(Task(self, job, left / rounds))
            for task in [t for t in self.running if t.over()]:
                self.running.remove(task)
                again = task.finish()
                if again is not None and end - time.monotonic() > 1:
                    waiting.insert(0, again)
            time.sleep(0.02)

    def _reason(self, job: Job) -> str:
        if job.candidate == "cuda" and ("cuda", "library") in self.failed:
            return "there is no library (step library)"
        return ""

    def _absent(self, job: Job) -> str | None:
        if job.sanitized and sanitize.find() is None:
            return "no compute-sanitizer on PATH or in /usr/local/cuda/bin"
        return None


def _names(job: Job) -> dict:
    return {"candidate": job.candidate, "step": job.step, "part": job.part}


class Task:
    """One process, the head of a group of its own (compilers and sanitizers are in it too)."""

    def __init__(self, runner: Runner, job: Job, seconds: float) -> None:
        self.runner, self.job = runner, job
        self.lines = Lines(runner.out, **_names(job))
        command = [sys.executable, "-m", "kvq_plugin.gpu_check.step", job.candidate, job.step,
                   "--out", str(runner.out), "--part", job.part, "--first", str(job.first),
                   "--seconds", f"{seconds:.1f}", *runner.options]  # fmt: skip
        env = dict(os.environ, OMP_NUM_THREADS="2", PYTHONUNBUFFERED="1")
        if job.candidate in ("cuda", "triton", "auto"):
            env["KVQ_GPU_KERNELS"] = job.candidate
        if job.sanitized:
            command = sanitize.command(sanitize.find(), job.step) + command
            env |= sanitize.ENVIRONMENT
        self.lines.write("start", seconds=round(seconds, 1))
        self.output = tempfile.TemporaryFile()  # noqa: SIM115 (until finish)
        # Not a session of its own: that would outlive a machine's time limit on this run.
        self.process = subprocess.Popen(
            command, env=env, stdout=self.output, stderr=subprocess.STDOUT, process_group=0
        )
        self.begin = time.monotonic()
        self.deadline = self.begin + seconds + runner.grace
        self.killed = False

    def over(self) -> bool:
        if self.process.poll() is None and time.monotonic() > self.deadline:
            self.kill()
        return self.killed or self.process.poll() is not None

    def kill(self) -> None:
        self.killed = True
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(5)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            pass  # gone, or stuck in the driver: it is not waited for

    def finish(self) -> Job | None:
        """Write down how it ended. Returns the job that goes on behind the case it ended in."""
        job, code, taken = self.job, self.process.poll(), time.monotonic() - self.begin
        self.output.seek(0)
        text = self.output.read().decode(errors="replace")
        if self.killed:
            how = f"killed after {taken:.0f} s, past its time limit"
        elif code is None or code < 0:
            how = f"died of {signal.Signals(-code).name if code else 'an unknown cause'}"
        else:
            how = {0: "", LOST: "the CUDA context was lost"}.get(code, f"exit status {code}")
        tail = text.split("\nExtension modules:")[0][-2000:]  # faulthandler's list is no news
        if job.sanitized and (code == sanitize.FOUND or "Device not supported" in text):
            status, said = sanitize.verdict(job.step, text)
            how, tail = ("the sanitizer found errors", said) if status == "fail" else ("", said)
            if status != "fail":
                self.lines.write(status, case=job.step, detail=said)
        self.lines.write("end", code=code, how=how, tail=tail if how else "",
                         seconds=round(taken, 1))  # fmt: skip
        said = how or "ended"
        name = " ".join(filter(None, (job.candidate, job.step, job.part)))
        self.runner.say(f"{self.runner.seconds - self.runner.left():5.0f} s  {name}: {said}")
        mine = [line for line in read(self.runner.out)[0] if _names(job).items() <= line.items()]
        if how or not any(line["status"] == "pass" for line in mine):
            self.runner.failed.add((job.candidate, job.step))
        if not how:
            return None
        died = code == LOST or (code is not None and code < 0 and not self.killed)
        if not died or job.sanitized or job.restarts == RESTARTS:
            return None
        begun = [line["index"] for line in mine if line["status"] == "begin"]
        if not begun:
            return None
        return replace(job, first=begun[-1] + 1, restarts=job.restarts + 1)
