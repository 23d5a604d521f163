"""Checkpoints that were damaged or made up: one line that names the file and the key, from every
command that reads them, and nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kvq_plugin import cli
from kvq_plugin.calibrate.checkpoint import Source
from kvq_plugin.serving.scales.declared import INDEX, read_config, tensor_names, weight_map

CONFIG = {
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
}
WEIGHT = "model.layers.0.self_attn.k_proj.weight"


def model(folder: Path, index=None, **changes) -> Path:
    """A checkpoint of one weight at *folder*, with an *index* where one is given."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    save_file({WEIGHT: torch.ones(2)}, folder / "model.safetensors")
    if index is not None:
        (folder / INDEX).write_text(json.dumps(index))
    return folder


def refusals(folder: Path, capsys) -> list[str]:
    """What `kvq inspect` and `kvq calibrate` say of *folder*, a line each."""
    out, said = folder.parent / "out", []
    commands = (["inspect", str(folder)], ["calibrate", str(folder), "-o", str(out)])
    for command in commands:
        assert cli.main(command) == 1
        error = capsys.readouterr().err
        assert error.startswith("kvq: ") and error.count("\n") == 1
        said.append(error)
    assert sorted(folder.parent.iterdir()) == sorted({folder, *folder.parent.glob("*.safetensors")})
    return said


@pytest.mark.parametrize(
    ("key", "changes"),
    (
        ("num_hidden_layers", {"num_hidden_layers": "two"}),
        ("num_hidden_layers", {"num_hidden_layers": None}),
        ("num_hidden_layers", {"num_hidden_layers": True}),
        ("num_key_value_heads", {"num_key_value_heads": 0}),
        ("max_position_embeddings", {"max_position_embeddings": "many"}),
        ("text_config", {"text_config": "x"}),
        ("text_config.hidden_size", {"text_config": CONFIG | {"hidden_size": "wide"}}),
        ("quantization_config", {"quantization_config": [1]}),
        ("quantization_config", {"quantization_config": "int8"}),
        (
            "quantization_config.kv_cache_scheme.num_bits",
            {"quantization_config": {"kv_cache_scheme": {"num_bits": "eight"}}},
        ),
        (
            "quantization_config.kv_cache_skip_layers",
            {"quantization_config": {"kv_cache_skip_layers": 5}},
        ),
        ("kvq", {"kvq": "x"}),
    ),
)
def test_a_value_of_the_wrong_type_is_named(tmp_path, capsys, key, changes):
    folder = model(tmp_path / "m", **changes)
    for line in refusals(folder, capsys):
        assert f"{folder / 'config.json'}: {key} is " in line and ": expected a" in line


@pytest.mark.parametrize(
    ("index", "says"),
    (
        ({"metadata": {}}, "weight_map is null"),
        ({"weight_map": ["a"]}, 'weight_map is ["a"]'),
        ({"weight_map": "a"}, 'weight_map is "a"'),
        ({"weight_map": None}, "weight_map is null"),
        ({"weight_map": {}}, "weight_map is {}"),
        ({"weight_map": {"a": 3}}, "tensor a in 3: expected the name"),
        ({"weight_map": {"a": "."}}, 'tensor a in ".": expected the name'),
        ({"weight_map": {"a": "config.json"}}, 'tensor a in "config.json": expected the name'),
        ({"weight_map": {"a": "gone.safetensors"}}, "names files that are not there: gone"),
        ({"weight_map": {WEIGHT: "../x.safetensors"}}, 'in "../x.safetensors": expected the'),
        ({"weight_map": {WEIGHT: "m/../../x.safetensors"}}, 'in "m/../../x.safetensors": exp'),
        ({"weight_map": {WEIGHT: "/x.safetensors"}}, 'in "/x.safetensors": expected the name'),
    ),
)
def test_an_index_that_names_no_weights_of_its_own_is_refused(tmp_path, capsys, index, says):
    save_file({WEIGHT: torch.ones(2)}, tmp_path / "x.safetensors")
    folder = model(tmp_path / "m", index)
    for line in refusals(folder, capsys):
        assert line.startswith(f"kvq: {folder / INDEX}") and says in line


def test_names_of_an_index(tmp_path):
    """One spelling each, so that no file is written twice; serving asks for the tensors alone."""
    names = {"a": "./x.safetensors", "b": "x.safetensors", "c": "below//y.safetensors"}
    folder = model(tmp_path / "m", {"weight_map": names})
    found = {"a": "x.safetensors", "b": "x.safetensors", "c": "below/y.safetensors"}
    assert weight_map(folder / INDEX, present=False) == found
    assert tensor_names(folder) == set("abc")
    with pytest.raises(ValueError, match="not there: below/y.safetensors, x.safetensors"):
        weight_map(folder / INDEX)


@pytest.mark.parametrize(
    "changes",
    (
        {"num_key_value_heads": None, "head_dim": None, "max_position_embeddings": None},
        {"text_config": None, "quantization_config": None, "layer_types": None, "kvq": None},
        {"quantization_config": {"quant_method": "other", "num_bits": [2, 4]}},
        {"num_nextn_predict_layers": 0, "max_position_embeddings": -1},
    ),
)
def test_what_models_say_is_let_through(tmp_path, changes):
    folder = model(tmp_path / "m", **changes)
    assert read_config(folder / "config.json") == CONFIG | changes
    assert Source.find(str(folder)).max_length() in (None, 512)


@pytest.mark.parametrize(
    "changes", ({"num_attention_heads": [4, 2]}, {"num_key_value_heads": [2, 1]})
)
def test_heads_layer_by_layer_are_for_calibrating_alone(tmp_path, capsys, changes):
    folder = model(tmp_path / "m", **changes)
    assert Source.find(str(folder)).geometry() is None
    assert cli.main(["inspect", str(folder)]) == 1
    assert "layer by layer: expected one number" in capsys.readouterr().err
