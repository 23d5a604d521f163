"""What ``kvq calibrate`` refuses or warns of, and that nothing is left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from scaled import quantize_weights
from test_calibrate import by_hf, edited
from tiny_models import make
from transformers import BertConfig, BertModel

from kvq_plugin import cli
from kvq_plugin.allocate import output as allocate_output
from kvq_plugin.calibrate import output as output_module
from kvq_plugin.calibrate.checkpoint import Source
from kvq_plugin.calibrate.engine import broken_message
from kvq_plugin.calibrate.output import FIGURES, SCALES, Target
from kvq_plugin.calibrate.run import _few_tokens, _require_fitting
from kvq_plugin.calibrate.settings import Settings, Strategy
from kvq_plugin.serving.scales.declared import INDEX


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("model"), "gqa")


def test_nan_names_the_layer(tiny, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.self_attn.k_proj.weight"][0, 0] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layer 1 .* of K are NaN or infinite in sample 1"):
        by_hf(model, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == [model]


def test_nan_message_counts_what_follows():
    broken = [("model.layers.3.self_attn.attn", "v", 7), ("model.layers.4.self_attn.attn", "k", 9)]
    message = broken_message({}, broken, 2)
    assert "layer 3" in message and "7 values of V" in message and "1 later layers" in message


@pytest.mark.parametrize("error", (KeyboardInterrupt, OSError(28, "No space left on device")))
def test_nothing_half_written_is_left(tiny, tmp_path, monkeypatch, error):
    """Neither by the first output nor by one that was to replace an earlier one."""
    by_hf(tiny, tmp_path / "out")
    before = (tmp_path / "out" / SCALES).read_bytes()

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(output_module, "copy_rest", fail)
    for name in ("out", "new"):
        with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else OSError):
            by_hf(tiny, tmp_path / name, Settings("fp8"), force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / SCALES).read_bytes() == before


def appears_meanwhile(monkeypatch, place: Path) -> None:
    """Have a stranger's folder take *place* while an output is being written."""
    stock = output_module.copy_rest

    def copy_rest(*args):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        (place / "thesis.txt").write_text("the only copy")
        stock(*args)

    monkeypatch.setattr(output_module, "copy_rest", copy_rest)


@pytest.mark.parametrize("force", (False, True))
def test_what_appears_at_the_output_meanwhile_stays(tiny, tmp_path, monkeypatch, force):
    out = tmp_path / "out"
    if force:
        by_hf(tiny, out)
    appears_meanwhile(monkeypatch, out)
    remedy = "has no kv_scales.safetensors: remove it yourself" if force else "or pass --force"
    with pytest.raises(ValueError, match=f"out appeared or changed while `kvq calib.*{remedy}"):
        by_hf(tiny, out, force=force)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("force", (False, True))
def test_the_second_of_two_runs_replaces_by_force_alone(tiny, tmp_path, monkeypatch, force):
    out, stock = tmp_path / "out", output_module.copy_rest

    def copy_rest(*args):
        monkeypatch.setattr(output_module, "copy_rest", stock)
        by_hf(tiny, out, Settings("fp8"))
        stock(*args)

    monkeypatch.setattr(output_module, "copy_rest", copy_rest)
    if force:
        by_hf(tiny, out, force=True)
    else:
        with pytest.raises(ValueError, match="out exists: name another output, or pass --force"):
            by_hf(tiny, out)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert Source(out).kv_scheme.type == ("int" if force else "float")


@pytest.mark.parametrize("force", (False, True))
def test_the_last_moment_replaces_nothing(tiny, tmp_path, monkeypatch, force):
    """A folder that appears between the check and the renaming; an earlier output then stays
    beside it, where the error says."""
    out, stock = tmp_path / "out", Path.rename
    if force:
        by_hf(tiny, out)

    def rename(self, target):
        if self.name == "new":
            out.mkdir()
            (out / "thesis.txt").write_text("the only copy")
        return stock(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(ValueError, match="the earlier output is in " if force else "appeared"):
        by_hf(tiny, out, force=force)
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]
    kept = [entry for p in tmp_path.iterdir() if p != out for entry in p.iterdir()]
    assert [(p.name, (p / SCALES).is_file()) for p in kept] == [("old", True)] * force


def test_weights_in_a_file_of_the_scales_name_are_not_lost(tiny, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    (model / "model.safetensors").rename(model / SCALES)
    names = load_file(model / SCALES)
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, SCALES)}
    (model / INDEX).write_text(json.dumps(index))
    before = (model / SCALES).read_bytes()
    with pytest.raises(ValueError, match="has weights in a kv_scales.safetensors"):
        by_hf(model, tmp_path / "out")
    assert (model / SCALES).read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_weights_are_put_beside_others_never_over_them(tmp_path):
    old, new = tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    old.write_bytes(b"ours")
    new.write_bytes(b"a stranger's")
    with pytest.raises(ValueError, match=r"would become new.safetensors: expected names of their"):
        output_module.put(old, new, None, Target(tmp_path / "out"))
    assert new.read_bytes() == b"a stranger's"


def test_an_encoder_is_refused(tmp_path):
    """transformers puts a head of random weights on it and lets it count as a causal model."""
    config = BertConfig(
        vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64,
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="attends in both directions.*expected a decoder"):
        by_hf(tmp_path / "bert", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_transformers_would_make_up_are_named(tiny, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    weights = load_file(model / "model.safetensors")
    lost = "model.layers.1.self_attn.k_proj.weight"
    del weights[lost]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"has no weights for {lost}, and transformers would"):
        by_hf(model, tmp_path / "out")


def test_quantized_weights_miss_nothing(tiny, tmp_path):
    """Though transformers lacks their `weight`: they are named otherwise."""
    by_hf(quantize_weights(tiny, tmp_path / "model", 4, activations=False), tmp_path / "out")
    assert Source(tmp_path / "out").kv_scheme.type == "int"


def refusal(arguments: list[str], capsys) -> str:
    """The one line that ``kvq calibrate`` ends with."""
    assert cli.main(["calibrate", *arguments]) == 1
    return capsys.readouterr().err


def test_output_that_exists_is_refused(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("the only copy")
    assert "--force" in refusal([str(tiny), "-o", str(out)], capsys)
    assert "remove it yourself" in refusal([str(tiny), "-o", str(out), "--force"], capsys)
    assert (out / "thesis.txt").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    (
        (["{tmp}/nothing-here", "-o", "{tmp}/out"], "no such model"),
        (["{tmp}", "-o", "{tmp}/out"], "no config.json"),
        (["{tiny}", "-o", "{tmp}/no/such/place"], "is not a directory"),
        (["{tiny}", "-o", "{tiny}"], "would replace the model"),
        (["{tiny}", "-o", "{tiny}/sub"], "inside the model"),
        (["{smollm2}", "-o", "{tmp}/out", "--data", "{tmp}/empty.txt"], "is empty"),
        (["{smollm2}", "-o", "{tmp}/out", "--data", "{tmp}/none.txt"], "none.txt"),
        (["{smollm2}", "-o", "{tmp}/out", "--length", "99999"], "--length 8191"),
        (["{tiny}", "-o", "{tmp}/out", "--scheme", "fp8", "--asymmetric"], "no zero point"),
        (["{tiny}", "-o", "{tmp}/out", "--strategy", "group"], "--group-size"),
        (["{tiny}", "-o", "{tmp}/out", "--percentile", "99"], "add --observer percentile"),
        (
            ["{tiny}", "-o", "{tmp}/out", "--strategy", "group", "--group-size", "7"],
            "group size 7 does not divide the head size",
        ),
        (["{tiny}", "-o", "{tmp}/out", "--ignore", "0,99"], "--ignore names 99: the model has"),
        (["{tiny}", "-o", "{tmp}/out", "--ignore", "0,1"], "--ignore names every attention layer"),
        (["none", "-o", "{tmp}/out", "--driver", "hf", "--q-scale"], "q scales were asked for"),
        (
            ["none", "-o", "{tmp}/out", "--driver", "hf", "--tensor-parallel-size", "2"],
            "--tensor-parallel-size 2 was asked for",
        ),
    ),  # fmt: skip
)
def test_bad_input_is_one_line(tiny, smollm2, tmp_path, capsys, arguments, said):
    (tmp_path / "empty.txt").touch()
    places = {"tiny": tiny, "tmp": tmp_path, "smollm2": smollm2}
    message = refusal([a.format(**places) for a in arguments], capsys)
    assert message.startswith("kvq: ") and said in message
    assert [p.name for p in tmp_path.iterdir()] == ["empty.txt"]


@pytest.mark.parametrize(
    "changes", ({"head_dim": None, "hidden_size": None}, {"kv_lora_rank": 512})
)
def test_a_head_size_that_is_not_stated_is_not_guessed(tiny, tmp_path, changes):
    source = Source(edited(tiny, tmp_path / "m", **changes))
    assert Source(tiny).geometry() is not None and source.geometry() is None
    _require_fitting(Settings(strategy=Strategy.GROUP, group_size=7), source)


def test_few_tokens_are_warned_of():
    assert _few_tokens([[3] * 60] * 17) == []
    assert "1,000 tokens" in _few_tokens([[3] * 60] * 16)[0]
    assert "samples of 1:" in _few_tokens([[3]] * 2000)[0]


def test_full_disk_is_said_before_anything_runs(tiny, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "no room on disk" in refusal([str(tiny), "-o", str(tmp_path / "out")], capsys)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    (
        ("config.json", "{", "is not JSON"),
        ("config.json", "[]", "JSON object"),
        ("model.safetensors", "not tensors", "no safetensors file"),
        (INDEX, "{}", "weight_map"),
        (INDEX, '{"weight_map": {"a.b": "gone.safetensors"}}', "not there: gone"),
    ),
)
def test_damaged_checkpoint_is_refused(tiny, tmp_path, file, content, said):
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    (model / file).write_text(content)
    with pytest.raises(ValueError, match=said):
        Source.find(str(model))


def test_failure_to_write_tensors_is_an_oserror(tmp_path):
    with pytest.raises(OSError, match="cannot write x"):
        output_module._save({"a": torch.zeros(1)}, tmp_path / "no" / "x", None)


def test_weights_that_are_no_safetensors_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match="save_pretrained"):
        Source.find(str(tmp_path))


def test_a_model_without_a_tokenizer_is_said_so(tmp_path, capsys):
    """transformers makes one of no words for it, by which any text has no tokens."""
    model = make(tmp_path, "gpt2")
    command = [str(model), "-o", str(tmp_path / "out"), "--length", "64"]
    assert "there is no usable one" in refusal(command, capsys)


def test_force_does_not_take_what_kvq_allocate_wrote(tiny, tmp_path):
    """It keeps a calibrated model's scales, and `kvq calibrate` a model's figures: each replaces
    its own outputs all the same."""
    mapping, found = {"default": "int8"}, SimpleNamespace(figures=lambda: {"bits": 8})
    calibrated, allocated, again = (tmp_path / name for name in ("c", "a", "again"))
    by_hf(tiny, calibrated)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocate_output, "plot", lambda found, file: None)
        source = Source.find(str(calibrated))
        allocate_output.write(source, Target(allocated), mapping, found)
        assert (allocated / SCALES).is_file()
        with pytest.raises(ValueError, match="a was written by `kvq allocate`, which keeps"):
            by_hf(tiny, allocated, force=True)
        allocate_output.write(source, Target(allocated, force=True), mapping, found)
        by_hf(allocated, again)
        assert (again / FIGURES).is_file()
        with pytest.raises(ValueError, match="again was written by `kvq calibrate`, which keeps"):
            allocate_output.require_free(Target(again, force=True), source)
        by_hf(allocated, again, force=True)
