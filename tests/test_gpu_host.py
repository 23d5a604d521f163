"""What the host does for each launch of a GPU's kernels: nothing it has done before.

The kernels are stood in for; everything up to the launch is the package's own.
"""

import oracle
import pytest
import sealed_problem
import torch
from cases import ROWS, WINDOW_ROWS, name_of
from gpu_engine import noted_kernels
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="Triton is not installed")

import triton

from kvq_plugin import kernels
from kvq_plugin.calls import Attend, Store
from kvq_plugin.kernels import (
    cuda,
    launch,
    prefill,
    triton_attend,
    triton_seal,
    triton_sealed,
    triton_store,
)
from kvq_plugin.layout import GPU_V1


class Constructions(TorchDispatchMode):
    """Operators that make a tensor other than a view, while it is entered."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not any(r.alias_info for r in func._schema.returns):
            self.made.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=("cuda", "triton"))
def launches(request, monkeypatch):
    """Kernels of one family; the launches they were asked for."""
    return noted_kernels(monkeypatch, request.param)


def step(problem, workspace, out) -> None:
    """A step of decoding: one new row a sequence stored, then attention."""
    rows = problem.query[:, : problem.cache.shape[1]]
    slots = torch.arange(rows.shape[0])
    statics = problem.arguments()[-2:]
    kernels.store(Store(rows, rows, problem.cache, slots, problem.format, *statics))
    kernels.attend(Attend(out, *problem.arguments(), max_query_len=1, max_seq_len=900,
                          workspace=workspace))  # fmt: skip


@pytest.mark.parametrize("format", WINDOW_ROWS, ids=name_of)
def test_nothing_is_built_again_for_recent_rows(launches, monkeypatch, format):
    p = sealed_problem.build(format, ((700, 1), (30, 1)))
    monkeypatch.setattr(kernels, "workspace_size", lambda head_size, device: 1 << 24)
    workspace = kernels.new_workspace(p.query.shape[2], torch.device("cpu"))
    rows, slots = p.query[:, : p.caches[0].shape[1]], torch.arange(2)
    out, (cache, recent), (table, recent_table) = torch.empty_like(p.query), p.caches, p.tables
    counts = []
    for _ in range(3):
        with Constructions() as constructions:
            kernels.store(Store(rows, rows, cache, slots, format, None, None, recent, slots))
            kernels.attend(Attend(
                out, p.query, cache, table, p.seq_lens, p.query_start_loc, format, p.scale,
                recent_cache=recent, recent_block_table=recent_table, max_query_len=1,
                max_seq_len=900, workspace=workspace,
            ))  # fmt: skip
        counts.append(len(constructions.made))
    assert len(launches) >= 6 and counts[1:] == [0, 0], constructions.made


@pytest.mark.parametrize("format", ROWS, ids=name_of)
def test_nothing_is_built_again(launches, monkeypatch, format):
    """Nor is anything allocated, which a graph's capture would keep."""
    problem = oracle.build(format, ((700, 1), (30, 1)), kind=GPU_V1)
    monkeypatch.setattr(kernels, "workspace_size", lambda head_size, device: 1 << 24)
    workspace = kernels.new_workspace(problem.query.shape[2], torch.device("cpu"))
    out = torch.empty_like(problem.query)
    slots = 1  # of store's, made here
    counts = []
    for _ in range(3):
        with Constructions() as constructions:
            step(problem, workspace, out)
        counts.append(len(constructions.made) - slots)
    assert len(launches) >= 6
    assert counts[1:] == [0, 0], constructions.made
    with Constructions() as constructions:
        step(problem, None, out)
    assert len(constructions.made) > slots  # the check itself notices


def test_reasons_against_a_kernel_are_looked_for_once_a_call(monkeypatch):
    noted_kernels(monkeypatch, "cuda")
    monkeypatch.setattr(kernels, "_choice", lambda: "auto")
    asked, refusal = [], cuda.refusal
    monkeypatch.setattr(cuda, "refusal", lambda *args: asked.append(args) or refusal(*args))
    problem = oracle.build(ROWS[0], ((700, 1), (30, 1)), kind=GPU_V1)
    step(problem, None, torch.empty_like(problem.query))
    assert len(asked) == 2  # of a store, and of attention


def test_prefills_of_most_batches_share_a_kernel():
    steps = {n: prefill._steps(n) for n in range(1, 1000)}
    assert set(steps.values()) == {4, 8, 12} and all(n < 1 << k for n, k in steps.items())


def test_the_host_does_not_divide_as_kernels_do(launches, monkeypatch):
    """Triton's functions for both take 100 times as long as these."""
    numbers = [(a, b) for a in (0, 1, 31, 32, 33) for b in (1, 16, 32)]
    assert all(launch.cdiv(*pair) == triton.cdiv(*pair) for pair in numbers)
    assert all(launch.power_of_2(n) == triton.next_power_of_2(n) for n in range(1, 70))
    problem = oracle.build(ROWS[1], ((700, 9), (30, 1)), kind=GPU_V1)
    step(problem, None, torch.empty_like(problem.query))
    launches.clear()
    for name in ("cdiv", "next_power_of_2"):
        monkeypatch.setattr(triton, name, None)
    step(problem, None, torch.empty_like(problem.query))
    assert launches


#: Arguments whose value, or alignment, is another one in another batch.
VARYING = {
    triton_attend.attend_kernel: (("num_seqs",), ("block_table", "seq_lens", "query_start")),
    triton_attend.merge_kernel: (("num_seqs", "splits"), ("seq_lens", "query_start")),
    triton_store.store_kernel: (("tokens",), ("slots",)),
    triton_seal.seal_kernel: (("tokens",), ("slots", "recent_slots")),
    triton_sealed.sealed_kernel: (
        ("num_seqs",),
        ("block_table", "recent_table", "seq_lens", "query_start"),
    ),
}


@pytest.mark.parametrize("kernel", VARYING, ids=lambda kernel: kernel.fn.__name__)
def test_no_batch_needs_a_kernel_of_its_own(kernel):
    """Triton compiles once more for a number that is 1, or a multiple of 16, and for a pointer that
    is: in the middle of serving, or of a graph's capture."""
    params = {p.name: p for p in kernel.params}
    values, pointers = VARYING[kernel]
    assert all(params[name].do_not_specialize for name in values)
    assert all(params[name].do_not_specialize_on_alignment for name in pointers)
