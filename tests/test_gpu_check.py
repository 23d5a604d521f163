"""The checks of ``make gpu-check`` without a GPU, in this process: the reference passes them, and
kernels that are wrong do not. Its processes, budgets and evidence: ``test_gpu_check_run.py``.

What only a device can show (graphs, times) is not pretended here.
"""

import json
import time
from dataclasses import replace

import emulator
import fakes
import golden_cases
import pytest
import torch

from kvq_plugin import reference
from kvq_plugin.formats import SERVED, get_format
from kvq_plugin.gpu_check import (
    candidates,
    checks,
    evidence,
    golden,
    library,
    problems,
    stock,
    timing,
)
from kvq_plugin.gpu_check import step as steps
from kvq_plugin.gpu_check.context import Context
from kvq_plugin.layout import GPU_V1

CPU = torch.device("cpu")
INT8 = get_format("int8_per_token_head")
QUICK = Context(CPU, (INT8,), quick=True)
GOOD = candidates.standin()


def outcomes(cases, tmp_path, context=QUICK, seconds=1e9) -> list[dict]:
    """The lines of *cases*, run in this process."""
    folder = tmp_path / f"lines-{len(list(tmp_path.iterdir()))}"
    assert steps.work(cases, evidence.Lines(folder), context, seconds) == 0
    return [line for line in evidence.read(folder)[0] if line["status"] != "begin"]


def words(lines) -> list[str]:
    return [line["status"] for line in lines]


# Checks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ("batches", "graphs", "grid"))
def test_good_kernels_pass_and_wrong_ones_do_not(tmp_path, step):
    good, bad = (outcomes(getattr(checks, step)(c, QUICK), tmp_path) for c in (GOOD, fakes.wrong()))
    assert len(good) == len(bad) and set(words(good)) == {"pass"} and set(words(bad)) == {"fail"}
    assert "relative RMS error" in bad[0]["detail"]


def test_a_store_s_wrong_byte_is_found_in_a_batch_and_by_the_golden_hashes(tmp_path):
    def store(*args):
        GOOD.store(*args)
        args[2][0, 0, 0, 0] ^= 1

    bad = replace(GOOD, store=store)
    found = outcomes(list(checks.batches(bad, QUICK))[:1], tmp_path)
    assert "bytes of the pages differ" in found[0]["detail"]
    assert set(words(outcomes(golden.cases(bad, QUICK), tmp_path))) == {"fail"}
    assert set(words(outcomes(golden.cases(GOOD, QUICK), tmp_path))) == {"pass"}


def test_rows_of_no_sequence_and_outputs_that_are_not_written_are_found(tmp_path):
    def everywhere(out, *args, **kwargs):
        GOOD.attend(out, *args, **kwargs)
        out.nan_to_num_()

    cases = {name: call for name, call in checks.graphs(replace(GOOD, attend=everywhere), QUICK)}
    found = outcomes(cases.items(), tmp_path)
    assert "rows of no sequence were written" in found[0]["detail"]
    lost = replace(GOOD, attend=lambda out, *args, **kwargs: None)
    assert set(words(outcomes(checks.batches(lost, QUICK), tmp_path))) == {"fail"}
    assert "not finite" in outcomes(checks.grid(lost, QUICK), tmp_path)[0]["detail"]


def test_a_batch_goes_to_the_kernels_as_vllm_splits_it():
    """Decodes, then the rest, over one workspace; rows of query_start_loc count from the batch."""
    seen = []

    def attend(out, query, cache, table, lengths, starts, *args, **options):
        seen.append((lengths.tolist(), starts.tolist(), options))
        GOOD.attend(out, query, cache, table, lengths, starts, *args, **options)

    requests = [(40, 1), (20, 1), (50, 30), (16, 16)]
    checks._served(replace(GOOD, attend=attend), QUICK, INT8, requests)
    (decodes, first, one), (prefills, later, two) = seen
    assert (decodes, first) == ([40, 20], [0, 1, 2])
    assert (prefills, later) == ([50, 16], [2, 32, 48])
    assert (one["max_query_len"], two["max_query_len"]) == (1, 30)
    assert one["workspace"] is two["workspace"]
    assert one["workspace"].scratch.dtype == torch.uint8


def test_the_grid_has_every_shape_once_and_compiles_for_all_kinds_first():
    for grid in (checks.GRID, checks.SMALL):
        turns = [grid.shapes(turn, 6) for turn in range(6)]
        seen = [shape for shapes in turns for shape in shapes]
        total = 1
        for axis in (grid.groups, grid.head_sizes, grid.contexts, grid.batches, grid.pages):
            total *= len(axis)
        assert len(seen) == len(set(seen)) == total
    assert total >= len(candidates.ROWS)  # a shape for each, in a dry run
    assert sum(len(checks.GRID.shapes(t, 6)) for t in range(6)) == 720
    first = checks.GRID.shapes(0, 6)
    assert len({(d, group) for d, _, group, *_ in first[:15]}) == 15
    assert len({shape[:3] for shape in first[:45]}) == 45


def test_the_decoded_pool_is_what_the_reference_loads():
    for format in candidates.ROWS:
        page = problems.page_of(format, 16)
        pool = problems.decoded(problems.fill(GOOD, format, 32, page, 3, 2, CPU))
        if format.recent is None:
            dense = reference.load(pool.cache, format, 32, *pool.statics, layout=GPU_V1)
        else:
            *dense, key, value = reference.load_sealed(pool.cache, format, 32, layout=GPU_V1)
            recent = reference.load(pool.recent, format.recent, 32, layout=GPU_V1)
            assert torch.equal(pool.recent_values, recent[1].flatten(0, 1))
            assert all(map(torch.equal, pool.firsts, (key, value)))
        for got, expected in zip((pool.keys, pool.values), dense, strict=True):
            assert torch.equal(got, expected.flatten(0, 1))


@pytest.mark.parametrize("name", ("int4", "k3v2"))
def test_formats_with_recent_rows(tmp_path, name):
    """What is sealed wrongly and what is read wrongly is found, in every step."""
    context = replace(QUICK, formats=(get_format(name),))

    def store(*args, **recent):
        GOOD.store(*args, **recent)
        args[2][..., 5] ^= 1

    def attend(*args, recent_block_table, **options):
        GOOD.attend(*args, recent_block_table=recent_block_table.flip(1), **options)

    for step in (checks.batches, checks.graphs, checks.grid, golden.cases, timing.cases):
        assert set(words(outcomes(step(GOOD, context), tmp_path))) == {"pass"}
    sealed_wrong, read_wrong = replace(GOOD, store=store), replace(GOOD, attend=attend)
    found = outcomes(checks.batches(sealed_wrong, context), tmp_path)
    assert "bytes of the pages differ" in found[0]["detail"]
    assert set(words(outcomes(golden.cases(sealed_wrong, context), tmp_path))) == {"fail"}
    assert "relative RMS" in outcomes(checks.graphs(read_wrong, context), tmp_path)[0]["detail"]


def test_golden_bytes_of_the_emulated_cuda_kernels(tmp_path):
    def store(*args, **recent):
        emulator.store(tmp_path / "call", *args, **recent)

    emulated = replace(GOOD, store=store)
    context = Context(CPU)
    assert golden.cases_module() is golden_cases
    shapes = {f: "d80 n48" if f.recent is None else "d64 n64" for f in candidates.ROWS}
    wanted = {f"{f.name} {shape} bfloat16 {'token_head' if f.is_dynamic else 'channel'}"
              for f, shape in shapes.items()}  # fmt: skip
    cases = [case for case in golden.cases(emulated, context) if case[0] in wanted]
    assert words(outcomes(cases, tmp_path, context)) == ["pass"] * len(candidates.ROWS)


def test_names_that_are_timed_exist_and_baselines_are_left_out_without_vllm(tmp_path):
    assert set(timing.FORMATS_TIMED) <= set(SERVED)
    lines = outcomes(timing.cases(None, QUICK), tmp_path)
    assert words(lines) == ["pass", "pass", *["refused"] * len(stock.MODES)]
    assert list(lines[1]["row"]) == list(evidence.COLUMNS)
    assert timing._context([131072, 1024, 1024]) == "131072+2x1024"


# One process ------------------------------------------------------------------------------------


def test_a_step_stops_when_its_time_is_over_and_says_what_is_left(tmp_path):
    cases = [(str(i), lambda: time.sleep(0.05)) for i in range(100)]
    lines = outcomes(cases, tmp_path, seconds=0.2)
    assert lines[-1]["status"] == "cut" and lines[-1]["left"] == 100 - (len(lines) - 1) > 0


def test_a_lost_context_ends_the_process_and_running_out_of_memory_does_not(tmp_path, monkeypatch):
    gone = []

    def out_of_memory():
        raise torch.OutOfMemoryError("tried to allocate 9 TiB")

    def illegal():
        gone.append(1)
        raise RuntimeError("an illegal memory access was encountered")

    class GPU(Context):
        def synchronize(self):
            if gone:
                raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    cases = [("a", out_of_memory), ("b", lambda: None), ("c", illegal), ("d", lambda: None)]
    lines = evidence.Lines(tmp_path, candidate="cuda", step="grid")
    assert steps.work(cases, lines, GPU(torch.device("cuda")), 99) == evidence.LOST
    read = [(x["case"], x["status"]) for x in evidence.read(tmp_path)[0] if x["status"] != "begin"]
    assert read == [("a", "fail"), ("b", "pass"), ("c", "fail")]


# The library ------------------------------------------------------------------------------------


def test_a_bundle_of_other_sources_is_not_used(tmp_path, monkeypatch):
    (tmp_path / "manifest.json").write_text(json.dumps({"sources": "0"}))
    assert "make gpu-bundle again" in library.stale(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"sources": library.digest()}))
    assert library.stale(tmp_path) == ""
    assert "no readable manifest" in library.stale(tmp_path / "nowhere")
    assert "is missing" in library.unusable(tmp_path / library.NAME)


def test_a_bundle_holds_library_manifest_and_golden_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(library, "build", lambda archs, to: (to / library.NAME).write_text("it"))
    assert library.main(["--bundle", str(tmp_path)]) == 0
    assert library.stale(tmp_path) == "" and "sm_90a" in capsys.readouterr().out
    assert (tmp_path / "golden_cases.py").exists() and (
        tmp_path / "golden" / "gpu_v1.json"
    ).exists()


def test_a_missing_compiler_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(library.shutil, "which", lambda name: None)
    with pytest.raises(AssertionError, match="no nvcc and no cmake"):
        library.build(("90",), tmp_path)
