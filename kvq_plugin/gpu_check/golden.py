"""Bit identity: what the stores write, against the committed hashes of the CPU's bytes."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

from kvq_plugin.gpu_check.candidates import Candidate
from kvq_plugin.gpu_check.context import Case, Context, Refused
from kvq_plugin.gpu_check.library import ROOT
from kvq_plugin.layout import GPU_V1


def cases_module(bundle: Path | None = None) -> ModuleType:
    """golden_cases.py, the inputs and the hashes: of *bundle*, else of this checkout's tests."""
    name = "golden_cases"
    if name not in sys.modules:
        path = (bundle or ROOT / "tests") / f"{name}.py"
        if not path.exists():
            raise ValueError(f"{path} is missing: run gpu-check in a checkout, or with --bundle")
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def _check(case, candidate: Candidate, context: Context, golden: ModuleType, expected: str):
    cache = golden.empty(case).to(context.device)
    reason = candidate.refusal(case.format, case.head_size, cache)
    if reason:
        raise Refused(reason)
    pages = golden.stored(case, candidate.store, GPU_V1, context.device)
    assert golden.digest(pages) == expected, "other bytes than the CPU's"


def cases(candidate: Candidate, context: Context) -> Iterator[Case]:
    golden = cases_module(context.bundle)
    hashes, ids = golden.golden(), {f.id for f in context.formats}
    for case in golden.cases():
        few = (case.head_size, case.dtype) == (64, "bfloat16")
        if case.format.id in ids and (few or not context.quick):
            yield case.name, partial(_check, case, candidate, context, golden, hashes[case.name])
