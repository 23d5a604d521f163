"""What the command line refuses before anything runs: numbers, names, and what is empty."""

from __future__ import annotations

import argparse

import pytest

from kvq_plugin import cli, demo, model, options, texts
from kvq_plugin.evaluate import BASELINE
from kvq_plugin.tasks import arguments


def refused(capsys, *argv: str) -> str:
    """What argparse says of *argv*, whose exit code is 2."""
    with pytest.raises(SystemExit) as caught:
        cli.main(list(argv))
    assert caught.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("number", ["1e305", "1.8e308", "1048577", "2147483648"])
@pytest.mark.parametrize("command", ["demo", "eval", "bench engine"])
def test_memory_is_one_that_a_machine_can_have(command, number, capsys):
    """Before it becomes bytes, of which there are too many for a float, or for anybody."""
    said = refused(capsys, *command.split(), "--kv-memory-gib", number)
    assert "--kv-memory-gib: expected " in said and number in said
    assert options.gib(str(options.MOST_GIB)) == 2**20
    assert options.gib("1e-9") * 2**30 > 1
    with pytest.raises(argparse.ArgumentTypeError, match="finite number above 0, got 1e-300"):
        options.gib("1e-300")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("eval --windows abc", "expected a positive whole number, got abc"),
        ("demo --streams 2.5", "expected a positive whole number, got 2.5"),
        ("demo --kv-memory-gib much", "expected a finite number above 0, got much"),
        ("eval --task-lengths 200,x", "such as 1000,4000; got '200,x'"),
        ("eval --task-contexts x", "expected a positive whole number, got x"),
        ("bench generate --batches 1,,8", "such as 1000,4000; got '1,,8'"),
        ("eval --task-set ,", "expected tasks of needle, "),
        ("eval --dtypes ,", "expected names with commas between them, of auto, "),
    ],
)
def test_what_is_no_number_and_no_name(argv, says, capsys):
    """With what was expected, where argparse would tell the name of a function."""
    said = refused(capsys, *argv.split())
    assert says in said and "invalid" not in said


def test_lists_of_numbers():
    assert arguments.positives("4000,1000, 4000") == (1000, 4000)


@pytest.mark.parametrize(
    ("argv", "where"),
    [
        (["demo", "--model", ""], "after --model"),
        (["demo", "--model="], "behind --model="),
        (["eval", ""], "after eval"),
        (["doctor", "--url", ""], "after --url"),
        (["eval", "--dtypes", ""], "after --dtypes"),
        (["eval", "--text", "a.txt", ""], "after a.txt"),
        (["calibrate", "m", "-o", "out", "--data", ""], "after --data"),
        (["inspect", ""], "after inspect"),
    ],
)
def test_an_empty_argument_is_an_unset_variable(argv, where, capsys):
    said = refused(capsys, *argv)
    assert f"expected something {where}, got an empty argument: is a shell variable unset?" in said


def test_empty_names_below_the_command_line(tmp_path):
    with pytest.raises(ValueError, match="hub name of a model, got an empty one; is a shell"):
        options.model_or_builtin("")
    with pytest.raises(ValueError, match="UTF-8 text, got an empty name: is a shell variable"):
        texts.read_text("")
    with pytest.raises(ValueError, match="is a directory: expected a file of UTF-8 text"):
        texts.read_text(str(tmp_path))


def test_the_built_in_model_has_no_place(tmp_path, monkeypatch, capsys):
    """Neither a home that cannot be written, nor none: it says what to set. A package that is
    missing has a message of its own."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(model, "find_gguf", lambda: tmp_path / "model.gguf")
    assert cli.main(["eval"]) == 1
    said = capsys.readouterr().err
    assert f"{tmp_path}/file/cache" in said and "set XDG_CACHE_HOME to a folder" in said

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(model, "cache_root", homeless)
    with pytest.raises(ValueError, match="has no place .*set XDG_CACHE_HOME"):
        options.model_or_builtin(None)

    def missing():
        raise FileNotFoundError("no GGUF file in the package")

    monkeypatch.setattr(model, "cache_root", lambda: tmp_path)
    monkeypatch.setattr(model, "find_gguf", missing)
    with pytest.raises(FileNotFoundError, match="^no GGUF file in the package$"):
        options.model_or_builtin(None)


def test_the_demo_speaks_of_windows_that_can_be_asked_for(monkeypatch):
    """Not of those that it calibrates on besides."""

    class Words:
        def __call__(self, text, **_):
            return argparse.Namespace(input_ids=text.split())

    monkeypatch.setattr(demo, "load_tokenizer", lambda _: Words())
    monkeypatch.setattr(demo, "positions", lambda _: 11)
    monkeypatch.setattr(demo, "builtin_text", lambda: "word " * 69)
    settings = demo.Settings("m", [BASELINE], 3, 1, 5, 5, 1 << 30)
    with pytest.raises(ValueError, match="3 windows of 10 and 4 more .* need 70: .* at most 2 or"):
        demo.run(settings)
