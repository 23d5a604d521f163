"""One process of a run: ``python -m kvq_plugin.gpu_check.step CANDIDATE STEP --out DIR ...``.

Writes a line before and after each case. What a case raises is its failure and ends nothing but
that case, unless the device's context is gone with it: then the process ends, and ``run.py`` starts
another behind that case.
"""

from __future__ import annotations

import argparse
import faulthandler
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from kvq_plugin.formats import get_format
from kvq_plugin.gpu_check.candidates import ROWS, Candidate
from kvq_plugin.gpu_check.context import Case, Context, Refused
from kvq_plugin.gpu_check.evidence import LOST, Lines


def attempt(call: Callable[[], dict | None], context: Context) -> tuple[str, dict]:
    """What *call* came to: (status, values of its line)."""
    try:
        row = call()
        context.synchronize()
        return "pass", {"row": row} if row else {}
    except Refused as e:
        return "refused", {"detail": str(e)}
    except Exception as e:
        values = {"detail": f"{type(e).__name__}: {e}"[:1500]}
        if not isinstance(e, AssertionError):
            values["trace"] = traceback.format_exc()[-1500:]
        return "fail", values


def lost(context: Context) -> bool:
    """Whether the device's context is gone, as after an illegal access."""
    try:
        context.synchronize()
        return False
    except Exception:
        return True


def work(cases: Iterable[Case], lines: Lines, context: Context, seconds: float, first=0) -> int:
    """Run *cases* from index *first* on, for *seconds*. Returns an exit status."""
    end = time.monotonic() + seconds
    cases = list(cases)
    for index, (name, call) in enumerate(cases[first:], first):
        if time.monotonic() >= end:
            lines.write("cut", left=len(cases) - index)
            break
        lines.write("begin", case=name, index=index)
        begin = time.monotonic()
        status, values = attempt(call, context)
        lines.write(status, case=name, seconds=round(time.monotonic() - begin, 3), **values)
        if status == "fail" and context.device.type == "cuda":
            if lost(context):
                return LOST
            torch.cuda.empty_cache()  # after running out of memory
    return 0


def steps() -> dict[str, Callable[[Candidate, Context], Iterable[Case]]]:
    from kvq_plugin.gpu_check import checks, golden, library, sanitize, timing

    return {
        "machine": library.machine,
        "library": library.cases,
        "bytes": golden.cases,
        "batches": checks.batches,
        "graphs": checks.graphs,
        "grid": checks.grid,
        "dispatch": checks.dispatch,
        "timing": timing.cases,
        **dict.fromkeys(sanitize.TOOLS, checks.sanitized),
    }


def main(argv=None) -> int:
    from kvq_plugin.gpu_check import candidates

    p = argparse.ArgumentParser()
    p.add_argument("candidate")
    p.add_argument("step")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--part", default="", help="formats, with commas; none: all")
    p.add_argument("--seconds", type=float, default=60)
    p.add_argument("--first", type=int, default=0)
    p.add_argument("--device", default="cuda")
    p.add_argument("--bundle", type=Path)
    p.add_argument("--quick", action="store_true")
    a = p.parse_args(argv)
    faulthandler.enable()
    lines = Lines(a.out, candidate=a.candidate, step=a.step, part=a.part)
    formats = tuple(map(get_format, a.part.split(","))) if a.part else ROWS
    context = Context(torch.device(a.device), formats, a.quick, a.bundle)
    # The library is what the step of that name provides.
    candidate = None if a.step == "library" else candidates.get(a.candidate)
    return work(steps()[a.step](candidate, context), lines, context, a.seconds, a.first)


if __name__ == "__main__":
    sys.exit(main())
