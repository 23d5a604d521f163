"""What a run leaves behind: a line of JSON per case, appended as it ends, and what they add up to.

All processes append to one file. A line is one write to a file opened for appending, so lines of
several processes do not mix, and a process that is killed loses the case it was in, whose ``begin``
is there.
"""

from __future__ import annotations

import csv
import io
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAME = "cases.jsonl"
#: What a process exits with when its CUDA context is lost: whoever starts it may go on behind it.
LOST = 3
#: Columns of gpu.csv; ``gb_per_s`` counts bytes of the cache (both ways for a copy), ``of_copy`` is
#: that over the copy's.
COLUMNS = ("what", "kernel", "format", "batch", "context", "kv_heads", "group", "head_size", "page",
           "microseconds", "gb_per_s", "of_copy")  # fmt: skip


class Lines:
    """Appends lines to the evidence in *folder*, each with the values of *fixed*."""

    def __init__(self, folder: Path, **fixed: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._fixed = fixed
        self._file = os.open(folder / NAME, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, status: str, **values: Any) -> None:
        line = {**self._fixed, "status": status, "at": round(time.time(), 2), **values}
        os.write(self._file, (json.dumps(line) + "\n").encode())


def read(folder: Path) -> tuple[list[dict], int]:
    """All lines, and how many could not be read (the last of a machine that stopped)."""
    path = folder / NAME
    if not path.exists():
        raise ValueError(f"{path} is missing: expected the output folder of a run of gpu-check")
    found, broken = [], 0
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
            line["status"]
            found.append(line)
        except (ValueError, KeyError, TypeError):
            broken += 1
    return found, broken


@dataclass
class Part:
    """One process's share of a step (a format's), restarts included."""

    passed: int = 0
    failures: list[str] = field(default_factory=list)
    refused: int = 0
    absent: str = ""
    left: int = 0
    begun: dict | None = None
    started: float = 0.0
    ended: float = 0.0
    running: bool = False

    def add(self, line: dict) -> None:
        status, case = line["status"], line.get("case", "")
        if status == "start":
            self.started, self.running = self.started or line["at"], True
        elif status == "begin":
            self.begun = line
        elif status == "pass":
            self.passed += 1
        elif status == "fail":
            self.failures.append(f"{case}: {line.get('detail', '')}")
        elif status == "refused":
            self.refused += 1
        elif status == "absent":
            self.absent = line.get("detail", "")
        elif status == "cut":
            self.left = line["left"]
        elif status == "end":
            self.ended, self.running = line["at"], False
            if line.get("how"):
                lost = line.get("code") == LOST and not self.begun
                if not lost:  # else the case that lost the context has failed already
                    where = f"in {self.begun['case']}: " if self.begun else ""
                    self.failures.append(f"{where}{line['how']}\n{line.get('tail', '')}".strip())
            self.begun = None
        if status in ("pass", "fail", "refused", "absent"):
            self.begun = None


@dataclass
class Step:
    """All of one step of one candidate."""

    candidate: str
    step: str
    parts: dict[str, Part] = field(default_factory=dict)

    def total(self, what: str) -> int:
        return sum(getattr(p, what) for p in self.parts.values())

    @property
    def failures(self) -> list[str]:
        """What failed, and which parts had not a single pass, though they came to an end."""
        found = [f for p in self.parts.values() for f in p.failures]
        for name, part in self.parts.items():
            silent = not (part.passed or part.failures or part.absent or part.running)
            if silent and part.ended:
                found.append(f"{name or 'all'}: not one case passed ({part.refused} refused)")
        return found

    @property
    def word(self) -> str:
        if self.failures:
            return "FAILED"
        if not self.parts:
            return "NOT REACHED"
        if any(p.running for p in self.parts.values()):
            return "UNFINISHED"
        if not self.total("passed"):
            return "not here"
        return "partly" if self.total("left") else "ok"

    @property
    def seconds(self) -> float:
        ends = [(p.started, p.ended) for p in self.parts.values() if p.started and p.ended]
        return max(e for _, e in ends) - min(s for s, _ in ends) if ends else 0.0


@dataclass
class Summary:
    """What the lines of a run say."""

    steps: list[Step]
    machine: dict
    rows: list[dict]
    broken: int = 0

    @property
    def good(self) -> bool:
        return any(s.word == "ok" for s in self.steps) and all(
            s.word in ("ok", "partly", "not here") for s in self.steps
        )

    def text(self, failures: int = 6) -> str:
        """A table of the steps, then what failed, the timings and the verdict."""
        about = self.machine or {"device": "unknown: the machine step has not passed"}
        out = [", ".join(f"{k} {v}" for k, v in about.items() if k != "free_memory"), ""]
        wide = "{:<12} {:<10} {:<11} {:>6} {:>6} {:>8} {:>6} {:>6}".format
        heads = ("candidate", "step", "verdict", "passed", "failed", "refused", "left", "s")
        out.append(wide(*heads))
        for s in self.steps:
            numbers = (s.total("passed"), len(s.failures), s.total("refused"), s.total("left"))
            out.append(wide(s.candidate, s.step, s.word, *numbers, f"{s.seconds:.0f}"))
        for s in self.steps:
            absent = dict.fromkeys(p.absent for p in s.parts.values() if p.absent)
            out += [f"\n{s.candidate} {s.step}: {why}" for why in absent]
            if s.failures:
                out.append(f"\n{s.candidate} {s.step}: {len(s.failures)} failed")
                out += ["  " + _short(f).replace("\n", "\n    ") for f in s.failures[:failures]]
                if len(s.failures) > failures:
                    out.append(f"  and {len(s.failures) - failures} more (in {NAME})")
        if self.rows:
            out += ["", *self._timings()]
        if self.broken:
            out.append(f"\n{self.broken} lines of {NAME} could not be read")
        red = [f"{s.candidate} {s.step}" for s in self.steps if s.word.isupper()]
        out.append("\nall checks passed" if self.good else f"\nNOT GOOD: {', '.join(red) or 'all'}")
        return "\n".join(out)

    def _timings(self) -> list[str]:
        wide = "{:<8} {:<14} {:<22} {:>6} {:>14} {:>9} {:>7} {:>8}".format
        yield_ = [wide("what", "kernel", "cache", "batch", "context", "us", "GB/s", "of copy")]
        for r in self.rows:
            numbers = f"{r['microseconds']:.1f}", f"{r['gb_per_s']:.0f}", f"{r['of_copy']:.0%}"
            yield_.append(wide(*(str(r[c]) for c in COLUMNS[:5]), *numbers))
        return yield_

    def write(self, folder: Path) -> None:
        """summary.txt, and gpu.csv if anything was timed; each complete or not there at all."""
        put(folder / "summary.txt", self.text() + "\n")
        if self.rows:
            text = io.StringIO()
            writer = csv.DictWriter(text, COLUMNS)
            writer.writeheader()
            for row in self.rows:
                rounded = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
                writer.writerow(rounded)
            put(folder / "gpu.csv", text.getvalue())


def _short(text: str) -> str:
    """Its head, which says what, and its end, where a traceback says why."""
    return text if len(text) < 1000 else f"{text[:300]}\n...{text[-600:]}"


def put(path: Path, text: str) -> None:
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def summarize(folder: Path) -> Summary:
    """The state of the run whose output folder this is, finished or not. Raises ValueError where
    there is none."""
    lines, broken = read(folder)
    steps: dict[tuple[str, str], Step] = {}
    machine, rows = {}, []
    for line in lines:
        for candidate, step in line.get("planned", ()):
            steps.setdefault((candidate, step), Step(candidate, step))
        if "step" not in line:
            continue
        key = line["candidate"], line["step"]
        step = steps.setdefault(key, Step(*key))
        step.parts.setdefault(line.get("part", ""), Part()).add(line)
        row = line.get("row")
        if row and step.step == "machine":
            machine = row
        elif row and "gb_per_s" in row:
            rows.append(row)
    return Summary(list(steps.values()), machine, rows, broken)
