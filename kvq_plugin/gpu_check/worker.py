"""The correctness steps, dealt to several processes: compiling Triton's kernels for hundreds of
cases is what takes the time, and one process compiles one at a time.

Run as a module, this is one of them: ``worker INDEX COUNT SECONDS NAME...`` prints its outcomes
as one line of JSON, last.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict

import torch

from kvq_plugin.gpu_check import candidates, correctness, golden
from kvq_plugin.gpu_check.report import Clock, Outcome

STEPS = ("golden bytes", "ragged batches", "grid")
#: GPU memory one process may need: the largest pool, decoded, and one sequence of it.
MEMORY = 6 << 30


def count(free_memory: int) -> int:
    """Processes that fit this machine."""
    return max(1, min(8, (os.cpu_count() or 2) // 2, free_memory // MEMORY))


def work(
    made: Sequence[candidates.Candidate],
    device: torch.device,
    index: int,
    shards: int,
    seconds: float,
    grid: correctness.Grid = correctness.GRID,
    ragged: int = 120,
) -> dict[str, Outcome]:
    """Every step over each *shards*-th case from *index* on."""
    clock, shard = Clock(seconds), (index, shards)
    return {
        "golden bytes": golden.check(made, device, shard=shard),
        "ragged batches": correctness.check_ragged(
            made, device, clock, seconds / 2, cases=ragged, shard=shard
        ),
        "grid": correctness.check_grid(made, device, clock, seconds, grid, shard=shard),
    }


def start(names: Sequence[str], shards: int, seconds: float) -> list[subprocess.Popen]:
    command = [sys.executable, "-m", "kvq_plugin.gpu_check.worker"]
    return [
        subprocess.Popen(
            [*command, str(index), str(shards), str(seconds), *names],
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for index in range(shards)
    ]  # fmt: skip


def merge(parts: Sequence[dict[str, Outcome]]) -> dict[str, Outcome]:
    """Step by step, what all processes found."""
    merged = {}
    for step in STEPS:
        mine = [part[step] for part in parts if step in part]
        merged[step] = Outcome(
            sum(o.passed for o in mine),
            [failure for o in mine for failure in o.failures],
            "; ".join(dict.fromkeys(o.skipped for o in mine if o.skipped)),
        )
    return merged


def finish(processes: Sequence[subprocess.Popen], clock: Clock, limit: float) -> dict:
    """Their outcomes, merged; one that says none, or not within *limit* seconds, has failed."""
    end, parts = clock.now() + limit, []
    for process in processes:
        try:
            text, _ = process.communicate(timeout=max(1.0, end - clock.now()))
        except subprocess.TimeoutExpired:
            process.kill()
            text = (process.communicate()[0] or "") + f"\nno end after {limit:.0f} s"
        lines = text.strip().splitlines()
        try:
            parts.append({k: Outcome(**v) for k, v in json.loads(lines[-1]).items()})
        except (IndexError, TypeError, ValueError, AttributeError):
            said = f"a process ended with status {process.returncode}: {text[-1500:]}"
            parts.append({STEPS[-1]: Outcome(failures=[said])})
    return merge(parts)


def main(arguments: Sequence[str]) -> None:
    index, shards, seconds, *names = arguments
    found = (candidates.triton(), candidates.cuda())
    made = [c for c in found if c is not None and c.name in names]
    outcomes = work(made, torch.device("cuda"), int(index), int(shards), float(seconds))
    print("\n" + json.dumps({step: asdict(outcome) for step, outcome in outcomes.items()}))


if __name__ == "__main__":
    main(sys.argv[1:])
