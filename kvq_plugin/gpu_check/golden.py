"""Bit identity: what the stores write, against the committed hashes of the CPU's bytes."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

import torch

from kvq_plugin.gpu_check.build import ROOT
from kvq_plugin.gpu_check.candidates import Candidate
from kvq_plugin.gpu_check.report import Outcome
from kvq_plugin.layout import GPU_V1


def cases_module() -> ModuleType:
    """tests/golden_cases.py of this checkout: the inputs, and the hashes."""
    name = "golden_cases"
    if name not in sys.modules:
        path = ROOT / "tests" / f"{name}.py"
        if not path.exists():
            raise ValueError(f"{path} is missing: run gpu-check in a checkout of the project")
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def check(
    candidates: Sequence[Candidate],
    device: torch.device,
    only: Callable[[object], bool] = lambda case: True,
    shard: tuple[int, int] = (0, 1),
) -> Outcome:
    """Every golden case that *only* lets through, with each candidate that serves it; of those,
    with *shard* (index, count), each count-th from index on."""
    golden = cases_module()
    hashes, outcome = golden.golden(), Outcome()
    for case in list(filter(only, golden.cases()))[shard[0] :: shard[1]]:
        cache = golden.empty(case).to(device)
        for candidate in candidates:
            if candidate.refusal(case.format, case.head_size, cache) is None:
                pages = golden.stored(case, candidate.store, GPU_V1, device)
                same = golden.digest(pages) == hashes[case.name]
                outcome.check(f"{candidate.name} {case.name}", same, "other bytes than the CPU's")
    return outcome
