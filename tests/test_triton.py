"""Triton's kernels where there is no GPU: in its interpreter, and the choice between kernels."""

import os
import subprocess
import sys
from importlib.metadata import version as installed
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from kvq_plugin import kernels
from kvq_plugin.calls import Attend, Store
from kvq_plugin.formats import get_format
from kvq_plugin.kernels import launch

ROOT = Path(__file__).parent.parent
#: Triton 3.6, which PyTorch 2.11 for CUDA comes with.
OTHER = Path(os.environ.get("KVQ_OTHER_TRITON", Path(sys.prefix, "other-triton")))
FORMAT = get_format("int8_per_token_head")


def pytest_of(triton: str, *arguments: str, **environment: str) -> None:
    """Tests in a process of their own, under "this" Triton or the "other"."""
    path = [str(ROOT)]
    if triton == "other":
        if not (OTHER / "triton").is_dir():
            pytest.skip(f"no other Triton in {OTHER}: make test installs one there, where pip can")
        path.insert(0, str(OTHER))
    environment = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join(path)}
    version = subprocess.run(
        [sys.executable, "-c", "import triton; print(triton.__version__)"],
        env=environment, capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    assert (version == installed("triton")) == (triton == "this")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--durations=5", "-p", "no:cacheprovider",
         *(str(ROOT / "tests" / a) for a in arguments)],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=880,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("triton", ("this", "other"))
def test_interpreted_kernels(triton):
    """tests/interpreted, in a process of its own: TRITON_INTERPRET changes what Triton's import
    and vLLM's do. On a machine with a GPU it is hidden, so that tensors stay on the CPU."""
    pytest_of(triton, "interpreted", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_kernels_of_the_other_triton(tmp_path):
    """What test_triton_compile.py holds of this Triton's code, of the other's."""
    pytest_of("other", "test_triton_compile.py", TRITON_CACHE_DIR=str(tmp_path))


# --- launches ------------------------------------------------------------------------------------


def test_every_case_has_a_launch_choice():
    for name in ("fp8", "int4_per_token_head", "int4", "k3v2"):
        for head_size in range(16, 257, 16):
            for long in (False, True):
                assert launch.attend_choice(get_format(name), head_size, long).block_n >= 16


@pytest.mark.parametrize("group", (1, 3, 4, 7, 8, 16, 33, 64, 71, 128))
@pytest.mark.parametrize("max_query_len", (1, 2, 4, 7, 16, 17, 64, 5000))
def test_rows_of_a_program(group, max_query_len):
    short, *long = launch.rows(group, max_query_len)
    assert 16 <= short.block_m <= launch.MAX_ROWS
    assert short.block_q >= 1 and short.short == short.block_q and not short.long
    assert long or short.short >= max_query_len, "somebody must own every query"
    for rows in (short, *long):
        assert rows.chunks * rows.heads >= group and rows.block_q >= 1
        assert rows.short == short.short and rows.long == (rows is not short)


def test_splits_fill_the_device_and_stay_worth_it(monkeypatch):
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)
    device = torch.device("cuda", 0)
    for batch in (1, 8, 17, 64, 4096):
        for length in (100, 1000, 131072):
            programs = batch * 8
            splits = launch.split_count(programs, length, device, long=False)
            assert 1 <= splits <= max(1, -(-length // launch.MIN_SPLIT_TOKENS))
            assert splits == 1 or programs * splits <= 4 * 132
            need = programs * splits * 64 * 129 * 4 if splits > 1 else 0
            assert need <= launch.workspace_size(128, device)
    assert launch.split_count(8, 131072, device, long=False) == 66


def test_misaligned_pages():
    good = torch.zeros(1, 1, 16, 136, dtype=torch.uint8)
    bad, rows = (
        torch.zeros(16 * 136 + 8, dtype=torch.uint8)[8:].view_as(good),
        torch.zeros(1, 1, 64),
    )
    for name, caches in (("the cache", (bad, None)), ("the recent cache", (good, bad))):
        call = Store(rows, rows, caches[0], None, FORMAT, recent_cache=caches[1])
        with pytest.raises(ValueError, match=f"of 16 bytes: {name}'s .*allocate it aligned"):
            launch.check(call)


# --- which kernels -------------------------------------------------------------------------------


@pytest.fixture
def called(monkeypatch):
    """Names of the kernels that :mod:`kvq_plugin.kernels` calls, instead of calling them."""
    names = []

    def module(name, **more):
        def note(call):
            names.append(name)

        def serves(call):
            return call.max_query_len >= 128

        return SimpleNamespace(store=note, seal=note, attend=note, serves=serves, **more)

    cuda = module("cuda", refusal=lambda format, size, *caches: "no 80" if size == 80 else None)
    monkeypatch.setitem(sys.modules, "kvq_plugin.kernels.cuda", cuda)
    monkeypatch.setattr(kernels, "cuda", cuda, raising=False)
    monkeypatch.setattr(kernels, "_triton", module)
    kernels._choice.cache_clear()
    yield names
    kernels._choice.cache_clear()


def attend(head_size, max_query_len):
    query, cache = torch.zeros(1, 8, head_size), torch.zeros(1, 2, 16, 8)
    kernels.attend(Attend(query, query, cache, None, torch.ones(1), None, FORMAT, 1.0,
                          max_query_len=max_query_len, max_seq_len=1))  # fmt: skip


@pytest.mark.parametrize(
    ("choice", "head_size", "max_query_len", "expected"),
    (
        ("auto", 64, 1, "cuda"),
        ("auto", 64, 4, "cuda"),
        ("auto", 64, 8, "cuda"),
        ("auto", 64, 9, "triton_paged"),
        ("auto", 64, 500, "prefill"),
        ("triton", 64, 500, "prefill"),
        ("auto", 80, 1, "triton_paged"),
        ("triton", 64, 1, "triton_paged"),
        ("cuda", 64, 500, "cuda"),
    ),
)
def test_choice_of_attention(called, monkeypatch, choice, head_size, max_query_len, expected):
    monkeypatch.setenv("KVQ_GPU_KERNELS", choice)
    attend(head_size, max_query_len)
    assert called == [expected]


def test_kernels_that_cannot_do_what_they_were_told_to(called, monkeypatch):
    monkeypatch.setenv("KVQ_GPU_KERNELS", "cuda")
    with pytest.raises(ValueError, match="KVQ_GPU_KERNELS=cuda: no 80; unset it"):
        attend(80, 1)


@pytest.mark.parametrize(("choice", "expected"), (("auto", "cuda"), ("triton", "triton_store")))
def test_choice_of_store(called, monkeypatch, choice, expected):
    monkeypatch.setenv("KVQ_GPU_KERNELS", choice)
    row = torch.zeros(1, 2, 64)
    kernels.store(Store(row, row, torch.zeros(1, 2, 16, 8), None, FORMAT))
    assert called == [expected]


@pytest.mark.parametrize("name", ("int4", "k3v2"))
def test_formats_with_recent_rows_go_to_cuda_whatever_the_query(called, monkeypatch, name):
    """Where CUDA C++ serves; else Triton stores and seals, and attends without the detour."""
    format = get_format(name)

    def both(head_size):
        row, cache = torch.zeros(1, 2, head_size), torch.zeros(1, 2, 32, 8)
        query, recent = torch.zeros(1, 8, head_size), {"recent_cache": cache}
        kernels.store(Store(row, row, cache, None, format, **recent))
        kernels.attend(Attend(query, query, cache, None, torch.ones(1), None, format, 1.0,
                              max_query_len=9, max_seq_len=1))  # fmt: skip

    both(64)
    assert called == ["cuda", "cuda"]
    for choice, head_size in (("auto", 80), ("triton", 64)):
        called.clear()
        monkeypatch.setenv("KVQ_GPU_KERNELS", choice)
        kernels._choice.cache_clear()
        both(head_size)
        assert called == ["triton_store", "triton_seal", "triton_paged"]


def test_misspelt_choice_is_refused(called, monkeypatch):
    monkeypatch.setenv("KVQ_GPU_KERNELS", "cutlass")
    with pytest.raises(ValueError, match="KVQ_GPU_KERNELS='cutlass': expected one of auto"):
        attend(64, 1)
