"""Disks that are full, folders that are read-only, files that are broken: one line of error, and
nothing half-written. In this process, with its rights and its file size limit taken away."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import struct
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import make

from kvq_plugin import cli, evaluation_page, logits, model
from kvq_plugin.allocate.measure import Sensitivities
from kvq_plugin.bench import output, serve
from kvq_plugin.bench.engine import Engine
from kvq_plugin.calibrate.checkpoint import Source
from kvq_plugin.calibrate.output import Target, write
from kvq_plugin.evaluate import BASELINE, Evaluation, Score

_CAPGET, _CAPSET, _VERSION_3 = 125, 126, 0x20080522  # x86-64
_OVERRIDES = 0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH: root's way past permissions


@contextmanager
def no_privileges():
    """Permissions count within the block, for root too."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = struct.pack("Ii", _VERSION_3, 0)
    data = ctypes.create_string_buffer(24)
    assert libc.syscall(_CAPGET, header, data) == 0
    words = list(struct.unpack("6I", data.raw))
    without = [words[0] & ~_OVERRIDES, *words[1:]]
    assert libc.syscall(_CAPSET, header, struct.pack("6I", *without)) == 0
    try:
        yield
    finally:
        assert libc.syscall(_CAPSET, header, struct.pack("6I", *words)) == 0


@contextmanager
def full_disk(size: int):
    """No file grows beyond *size* bytes within the block: "File too large" for what does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def locked(tmp_path, monkeypatch):
    """A folder that may be read and not written."""
    # By default root is asked about what it could take, not about what it has.
    monkeypatch.setattr(os, "access", partial(os.access, effective_ids=True))
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o555)
    with no_privileges():
        yield folder
    folder.chmod(0o755)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("tiny"), "gqa")


def one_line(capsys) -> str:
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("kvq: "), lines
    return lines[0]


def test_a_model_without_a_tokenizer(tiny, capsys):
    assert cli.main(["eval", str(tiny)]) == 1
    assert f"no tokenizer for {tiny}: " in one_line(capsys)


@pytest.mark.parametrize(
    "command",
    [
        ["calibrate", "MODEL", "-o", "LOCKED/out"],
        ["eval", "MODEL", "--report", "LOCKED/out"],
        ["bench", "attention", "--out", "LOCKED"],
        ["bench", "store", "--out", "LOCKED/new"],
        ["bench", "serve", "--model", "MODEL", "--input=64", "--output=64", "--out", "LOCKED"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_a_folder_that_is_read_only(command, tiny, locked, monkeypatch, capsys):
    """Said before anything runs: there is nothing here to run it on."""
    for module, name in ((output.kernels, "run"), (serve, "run")):
        monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("it ran"))
    words = [w.replace("MODEL", str(tiny)).replace("LOCKED", str(locked)) for w in command]
    assert cli.main(words) == 1
    assert re.search("not (a )?writable", one_line(capsys))
    assert list(locked.iterdir()) == []


def test_a_model_that_may_not_be_read(tiny, tmp_path, capsys):
    model = Target(tmp_path / "model").folder
    os.mkdir(model)
    for file in tiny.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    (model / "model.safetensors").chmod(0)
    with no_privileges():
        for command in (["inspect", str(model)], ["calibrate", str(model), "-o", "out"]):
            assert cli.main(command) == 1
            assert "ermission denied" in one_line(capsys)
    (model / "config.json").chmod(0)
    with no_privileges():
        assert cli.main(["inspect", str(model)]) == 1
        assert "ermission denied" in one_line(capsys)


@pytest.mark.parametrize("size", [0, 100, 20_000])
def test_a_disk_that_fills_up_during_calibration(size, tiny, tmp_path):
    scales = {f"model.layers.{i}.self_attn.k_scale": torch.ones(200) for i in range(2)}
    out = tmp_path / "out"
    source = Source.find(str(tiny))
    assert (tiny / "model.safetensors").stat().st_size > size
    with full_disk(size), pytest.raises(OSError):  # which the command prints as one line
        write(source, Target(out, copy=True), scales, {"num_bits": 8}, [], {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [0, 5_000])
def test_a_disk_that_fills_up_under_a_report(size, tmp_path):
    evaluation = Evaluation({"text": Score((-2.0,) * 4096)}, 1000)
    with full_disk(size), pytest.raises(OSError):
        evaluation_page.write(tmp_path / "out", {BASELINE: evaluation}, None, 2048, {})
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_under_a_benchmark(monkeypatch, tmp_path):
    """What an earlier run wrote stays as it is."""
    row = serve.Row("a", 1, *[1] * 9)
    monkeypatch.setattr(serve, "run", lambda *a, **k: [row])
    load = serve.Load("m", 1, 1, 1, 1, True, 1)
    output.run_serve(load, [Engine("a", BASELINE)], tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before.keys() == {"serve.csv", "serve.png"}
    for size in (10, 1000):
        with full_disk(size), pytest.raises(OSError):
            output.run_serve(load, [Engine("a", BASELINE)], tmp_path)
        kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        assert kept["serve.csv"] == before["serve.csv"] and kept == before


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("model.safetensors", lambda content: content[: len(content) // 2]),
        ("model.safetensors", lambda content: content[:4]),
        ("model.safetensors", lambda content: b"\xff" * 64 + content[64:]),
        ("model.safetensors", lambda content: b""),
        ("config.json", lambda content: content[: len(content) // 2]),
        ("config.json", lambda content: b"\xff\xfe\x00"),
        ("config.json", lambda content: b"[]"),
    ],
    ids=("half", "header", "garbage", "empty", "half json", "no text", "no object"),
)
def test_a_checkpoint_that_is_broken(file, damage, tiny, tmp_path, capsys):
    model = tmp_path / "model"
    model.mkdir()
    for each in tiny.iterdir():
        (model / each.name).write_bytes(each.read_bytes())
    (model / file).write_bytes(damage((model / file).read_bytes()))
    for command in (["inspect", str(model)], ["calibrate", str(model), "-o", str(model) + "-out"]):
        assert cli.main(command) == 1
        assert file in one_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def says(error: pytest.ExceptionInfo, place: Path, remedy: str) -> None:
    message = str(error.value)
    assert f"{place} was not written (" in message and "make room there, or " in message
    assert remedy in message, message


def test_a_full_disk_is_named_with_a_way_out(tiny, tmp_path):
    """The system's error names no file, and safetensors' was a traceback."""
    source, out = Source.find(str(tiny)), tmp_path / "out"
    with full_disk(100), pytest.raises(OSError) as error:
        write(source, Target(out, copy=True), {}, {"num_bits": 8}, [], {})
    says(error, out, "name another output")
    evaluation = Evaluation({"text": Score((-2.0,) * 4096)}, 1000)
    with full_disk(100), pytest.raises(OSError) as error:
        evaluation_page.write(out, {BASELINE: evaluation}, None, 2048, {})
    says(error, out, "--report")
    with full_disk(10), pytest.raises(OSError) as error:
        Sensitivities(tmp_path / "cells.json", {"model": "tiny"}).save()
    says(error, tmp_path / "cells.json", "--cells")
    kept = logits.Seen([1, 2, 3], None, str(tmp_path / "0-0.safetensors"))
    kept.see(torch.ones(3, 64), torch.ones(3, 8))
    with full_disk(100), pytest.raises(OSError) as error:
        kept.result(main=True)
    says(error, tmp_path / "0-0.safetensors", "TMPDIR")
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".safetensors"] == []


def test_the_built_in_models_disk_is_full(tiny, tmp_path, monkeypatch, capsys):
    """A stand-in's conversion; safetensors says so in an error of its own."""
    import transformers

    stand_in = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    tokenizer = SimpleNamespace(save_pretrained=lambda folder: None)
    for name, made in (("AutoTokenizer", tokenizer), ("AutoModelForCausalLM", stand_in)):
        stock = SimpleNamespace(from_pretrained=lambda *a, made=made, **k: made)
        monkeypatch.setattr(transformers, name, stock)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(model, "find_gguf", lambda: tmp_path / "some.gguf")
    with full_disk(10_000):
        assert cli.main(["eval"]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    place = tmp_path / "kvq_plugin" / model.DIRECTORY
    assert said.startswith(f"kvq: {place} was not written (") and "XDG_CACHE_HOME" in said
    assert [path.suffix for path in place.parent.iterdir()] == [".lock"]
