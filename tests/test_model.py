"""The built-in model: where it is kept, and that it is converted once."""

from __future__ import annotations

import json

import pytest

from kvq_plugin import model


def test_checkpoint_is_bf16_and_can_chat(smollm2):
    config = json.loads((smollm2 / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert (config["num_hidden_layers"], config["num_key_value_heads"]) == (30, 3)
    assert "<|im_start|>" in (smollm2 / "chat_template.jinja").read_text()


def test_weights_are_bf16(smollm2):
    from safetensors import safe_open

    with safe_open(smollm2 / "model.safetensors", framework="pt") as weights:
        types = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
    assert types == {"BF16"}


def test_tokenizer_is_reversible(smollm2):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    text = "In 1815, I'll pay 3.14 — naïve?\n\n\tdef f(x):"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.tokenize("2048") == list("2048")  # SmolLM2 splits numbers into digits
    assert tokenizer.model_max_length == 8192


def test_cache_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert model.cache_root() == tmp_path / "kvq_plugin"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert model.cache_root() == tmp_path / ".cache" / "kvq_plugin"


def test_converted_once(monkeypatch, tmp_path):
    calls = []

    def convert(gguf, target):
        calls.append(gguf)
        target.mkdir()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(model, "_convert", convert)
    assert model.builtin_model() == model.builtin_model()
    assert len(calls) == 1


def test_failed_conversion_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"not a model")
    monkeypatch.setattr(model, "find_gguf", lambda: broken)
    with pytest.raises(Exception, match=r"(?i)gguf|magic"):
        model.builtin_model()
    assert not [p for p in model.cache_root().iterdir() if p.is_dir()]


def test_missing_package_names_the_remedy(monkeypatch):
    monkeypatch.setattr(model, "PACKAGE", "kvq_no_such_package")
    with pytest.raises(FileNotFoundError, match="make install"):
        model.find_gguf()
