"""``python -m kvq_plugin.gpu_check``: all steps, within a time limit, a table last."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from kvq_plugin.gpu_check import build, candidates, correctness, sanitize, timing, worker
from kvq_plugin.gpu_check.report import Clock, Outcome, Report
from kvq_plugin.tables import print_table


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="make gpu-check",
        description="Build, verify and time kvq_plugin's GPU kernels on this machine's CUDA GPU.",
    )
    p.add_argument("--out", type=Path, default=Path("build/gpu-check"), help="where the CSV goes")
    p.add_argument("--minutes", type=float, default=7.5, help="time limit of the whole run")
    p.add_argument("--no-timing", action="store_true", help="verify only")
    return p


def table(rows: Sequence[timing.Row]) -> Table:
    """Attention alone, short enough for a terminal."""
    made = Table(box=None, header_style="bold")
    for name in ("kernel", "cache", "batch", "context", "us", "GB/s", "of copy"):
        made.add_column(name, justify="left" if name in ("kernel", "cache") else "right")
    for row in rows:
        if row.what != "store":
            shape = (str(row.batch), str(row.context)) if row.batch else ("", "")
            time = f"{row.microseconds:.0f}" if row.microseconds else ""
            rate, share = f"{row.gb_per_s:.0f}", f"{row.of_copy:.0%}"
            made.add_row(row.kernel, row.format or row.what, *shape, time, rate, share)
    return made


def _kernels(report: Report) -> list[candidates.Candidate]:
    """What is there to check: CUDA C++ if it was built, Triton's if it is installed."""
    made = [candidates.triton()]
    if build.ROOT.joinpath("kvq_plugin", "_kvq_cuda.so").exists():
        made.append(candidates.cuda())
    return [c for c in made if c is not None]


def _gather(outcomes: dict, processes: list, clock: Clock, limit: float) -> Outcome:
    outcomes.update(worker.finish(processes, clock, limit))
    return Outcome(passed=len(processes))


def check(report: Report, device: torch.device, arguments: argparse.Namespace) -> list[timing.Row]:
    """Every step on *device*; the rows of the timing."""
    clock = report.clock
    capability = "".join(map(str, torch.cuda.get_device_capability(device)))
    report.run("build", lambda: build.build(capability, timeout=clock.left()))
    made = _kernels(report)
    if not made:
        raise ValueError(
            "there is nothing to check: no nvcc to build the CUDA C++ kernels and no Triton; "
            "install either"
        )
    names = [c.name for c in made]
    report.console.print(f"checking {' and '.join(names)}", highlight=False)
    # What is not timed runs at the same time: correctness, sanitizers, graphs.
    limit = 0.6 * clock.left()
    watched = {tool: sanitize.start(tool, names) for tool in sanitize.TOOLS}
    shards = worker.count(torch.cuda.mem_get_info(device)[0])
    processes = worker.start(names, shards, limit - 30)
    report.run("CUDA graphs", lambda: correctness.check_graphs(made, device))
    outcomes: dict[str, Outcome] = {}
    report.run("correctness", lambda: _gather(outcomes, processes, clock, limit))
    for step, outcome in outcomes.items():
        report.run(step, lambda outcome=outcome: outcome)
    report.run("compute-sanitizer", lambda: sanitize.finish(watched, clock.left() - 110))
    rows: list[timing.Row] = []
    if not arguments.no_timing:

        def time():
            found, outcome = timing.run(made, device, clock, clock.left() - 10)
            rows.extend(found)
            return outcome

        report.run("timing", time)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 if every check passed, 1 if one failed, 2 if nothing could be checked."""
    arguments = parser().parse_args(argv)
    console = Console()
    if not torch.cuda.is_available() or torch.version.hip is not None:
        console.print(
            f"no CUDA GPU for PyTorch {torch.__version__}: gpu-check needs one, and a CUDA build "
            f"of PyTorch (set GPU_PYTHON to its Python); make test checks what needs no GPU"
        )
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    console.print(
        f"{torch.cuda.get_device_name(device)}, PyTorch {torch.__version__}, "
        f"Python {sys.version.split()[0]}",
        highlight=False,
    )
    report = Report(console, Clock(60 * arguments.minutes))
    try:
        rows = check(report, device, arguments)
    except ValueError as e:
        console.print(str(e), highlight=False)
        return 2
    if rows:
        path = arguments.out / "gpu.csv"
        timing.write_csv(path, rows)
        console.print(f"wrote {path}", highlight=False)
        print_table(console, table(rows))
    verdict = "every check passed" if report.good else "CHECKS FAILED (above)"
    console.print(verdict, highlight=False)
    return 0 if report.good else 1


if __name__ == "__main__":
    sys.exit(main())
