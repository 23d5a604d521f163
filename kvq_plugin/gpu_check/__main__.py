"""``python -m kvq_plugin.gpu_check``: all steps, within a time limit, a summary last."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from kvq_plugin.gpu_check import evidence
from kvq_plugin.gpu_check.run import Runner, phases

CANDIDATES = "cuda,triton,auto,torch"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="make gpu-check",
        description="Verify and time kvq_plugin's GPU kernels on this machine's CUDA GPU.",
    )
    p.add_argument(
        "--out",
        type=Path,
        default=Path("build/gpu-check"),
        help="output folder: cases.jsonl, summary.txt, gpu.csv; a new or empty one",
    )
    p.add_argument("--bundle", type=Path, help="what make gpu-bundle made; else build here")
    p.add_argument("--minutes", type=float, default=7, help="time limit of the whole run")
    p.add_argument("--steps", help="bytes, batches, graphs, grid, timing...; default: all")
    p.add_argument("--candidates", default=CANDIDATES, help=f"default: {CANDIDATES}")
    p.add_argument("--formats", help="names with commas; default: all")
    p.add_argument(
        "--summarize",
        type=Path,
        metavar="DIR",
        help="only say what the lines of a run, finished or not, come to",
    )
    p.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu: a dry run, with --candidates reference",
    )
    p.add_argument("--quick", action="store_true", help="few and small cases")
    return p  # fmt: skip


def conclude(folder: Path) -> int:
    """Print and write the summary. Returns the exit status: 0 if all is good, else 1."""
    summary = evidence.summarize(folder)
    summary.write(folder)
    print(summary.text(), flush=True)
    return 0 if summary.good else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 if every check passed, 1 if not, 2 if nothing could be checked."""
    a = parser().parse_args(argv)
    try:
        if a.summarize:
            return conclude(a.summarize)
        if (a.out / evidence.NAME).exists():
            raise ValueError(f"{a.out} holds a run already: give another --out, or remove it")
        if a.bundle and not a.bundle.is_dir():
            raise ValueError(f"--bundle {a.bundle} is no folder: make gpu-bundle makes one")
    except ValueError as e:
        print(e, file=sys.stderr)
        return 2
    formats = a.formats.split(",") if a.formats else _formats()
    options = ["--device", a.device, *(["--quick"] if a.quick else [])]
    options += ["--bundle", str(a.bundle.resolve())] if a.bundle else []
    runner = Runner(a.out, 60 * a.minutes, options, lambda text: print(text, flush=True))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what follows is done
    steps = a.steps.split(",") if a.steps else ()
    try:
        runner.run(phases(a.candidates.split(","), formats, steps))
    finally:
        status = conclude(a.out)
    return 2 if ("-", "machine") in runner.failed else status


def _formats() -> list[str]:
    from kvq_plugin.gpu_check.candidates import ROWS

    return [f.name for f in ROWS]


if __name__ == "__main__":
    sys.exit(main())
