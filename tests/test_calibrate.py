"""``kvq calibrate`` short of a vLLM engine: names, samples, output, the transformers driver."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import make, make_multimodal
from transformers import AutoConfig

from kvq_plugin import inspection
from kvq_plugin.calibrate.checkpoint import Source
from kvq_plugin.calibrate.data import read_texts, sample_windows
from kvq_plugin.calibrate.engine import _gathered, check_ignored
from kvq_plugin.calibrate.names import checkpoint_names, load_name, probes
from kvq_plugin.calibrate.observers import Observers
from kvq_plugin.calibrate.output import FIGURES, PLOT, SCALES, Target, left_out, with_scheme
from kvq_plugin.calibrate.run import Job, _how_to_serve, calibrate
from kvq_plugin.calibrate.settings import Settings, Strategy
from kvq_plugin.calibrate.table import scale_table
from kvq_plugin.calibrate.worker import ObservingWorker
from kvq_plugin.evaluate import load_tokenizer
from kvq_plugin.hf_cache import KVQCache
from kvq_plugin.serving import compat
from kvq_plugin.serving.scales.declared import declared_scheme, quantization_section
from kvq_plugin.serving.scales.keys import layer_number

random.seed(0)
WINDOWS = [[random.randrange(3, 500) for _ in range(60)] for _ in range(3)]
SCHEME = Settings().kv_cache_scheme()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("model"), "gqa")


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return load_tokenizer(str(smollm2))


def by_hf(model: Path, out: Path, settings=None, **changes) -> dict[str, torch.Tensor]:
    """Scales that the transformers driver writes to *out*."""
    target = Target(out, **changes)
    calibrate(Source.find(str(model)), target, settings or Settings(), WINDOWS, driver="hf")
    return load_file(out / SCALES)


# --- names -----------------------------------------------------------------------------


def test_layer_number():
    assert layer_number("model.layers.17.self_attn.attn") == 17
    assert layer_number("h.3") == 3
    assert layer_number("model.self_attn") is None
    with pytest.raises(ValueError, match="model.self_attn.attn: expected a layer number"):
        check_ignored(Settings(), ["model.layers.0.attn", "model.self_attn.attn"])


@pytest.mark.parametrize(
    ("module", "tensor", "found"),
    (
        ("model.layers.0.self_attn.attn", "model.layers.0.self_attn.k_proj.weight",
         "model.layers.0.self_attn"),
        # vLLM's loader adds "transformer."; `.attn.k_scale` stays as it is, hence twice.
        ("transformer.h.0.attn.attn", "h.0.attn.c_attn.weight", "h.0.attn.attn"),
        ("transformer.h.0.self_attention.attn", "h.0.self_attention.dense.bias",
         "h.0.self_attention"),
        ("language_model.model.layers.0.self_attn.attn",
         "model.language_model.layers.0.self_attn.k_proj.weight",
         "model.language_model.layers.0.self_attn"),
    ),
)  # fmt: skip
def test_scales_go_where_the_loader_looks(module, tensor, found):
    other = tensor.replace(".0.", ".10.")

    def rename(name: str) -> str:  # as vLLM's hf_to_vllm_mapper of multimodal models
        return load_name(name).replace("model.language_model.", "language_model.model.")

    loaded = {probe: rename(probe) for probe in probes([other, tensor])}
    assert checkpoint_names([module], loaded) == {module: found}


def test_a_layer_that_cannot_be_placed_is_named():
    loaded = {p: load_name(p) for p in probes(["a.layers.0.mixer.x", "b.layers.0.attn.x"])}
    with pytest.raises(ValueError, match=r"model.layers.7.self_attn.attn \(none\)"):
        checkpoint_names(["model.layers.7.self_attn.attn"], loaded)


# --- samples ---------------------------------------------------------------------------


def test_windows_are_drawn_by_the_seed(tokenizer):
    texts = ["one two three four five six seven eight nine ten " * 40]
    first = sample_windows(tokenizer, texts, 3, 32, seed=1)
    assert first == sample_windows(tokenizer, texts, 3, 32, seed=1)
    assert first != sample_windows(tokenizer, texts, 3, 32, seed=2)
    assert {len(w) for w in first} == {32}
    assert len(sample_windows(tokenizer, texts, 100, 32, seed=1)) == 100  # overlapping


def test_too_little_data_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"one sample needs 2,048"):
        sample_windows(tokenizer, ["a few words"], 4, 2048, 0)


def test_jsonl(tmp_path, tokenizer):
    file = tmp_path / "data.jsonl"
    messages = [{"role": "user", "content": "Hello?"}]
    lines = ["plain", {"text": "as text"}, {"prompt": "as prompt"}, {"messages": messages}]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    plain, text, prompt, chat = read_texts([str(file)], tokenizer)
    assert (plain, text, prompt) == ("plain", "as text", "as prompt")
    assert "Hello?" in chat and "<|im_start|>user" in chat


@pytest.mark.parametrize(
    ("content", "said"),
    (
        (b'"fine"\n{"txt": 1}', "line 2"),
        (b'"fine"\n{', "line 2 is not JSON"),
        (b'{"messages": [{"rule": 1}]}', "line 1"),
        (b"", "is empty"),
        (b"\n  \n", "is empty"),
        (b"\xff\xfe", "expected UTF-8 text, got .* `iconv -f utf-16"),
    ),
)
def test_bad_data_is_refused(tmp_path, tokenizer, content, said):
    file = tmp_path / "data.jsonl"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read_texts([str(file)], tokenizer)


# --- the transformers driver, and what is written ----------------------------------------


def test_scales_are_amax_over_what_the_cache_holds(tiny, tmp_path):
    from transformers import AutoModelForCausalLM

    scales = by_hf(tiny, tmp_path / "out")
    network = AutoModelForCausalLM.from_pretrained(tiny, dtype="auto")
    for i in range(2):
        for kind, attribute in (("k", "keys"), ("v", "values")):
            with torch.inference_mode():
                caches = [network(torch.tensor([w])).past_key_values for w in WINDOWS]
            held = torch.cat([getattr(c.layers[i], attribute) for c in caches], 2).float()
            expected = held.abs().amax((0, 2)) / 127  # [H, D]
            assert torch.equal(
                scales[f"model.layers.{i}.self_attn.{kind}_scale"], expected[:, None]
            )
    assert len(scales) == 4


@pytest.mark.parametrize(
    ("settings", "shape", "strategy"),
    (
        (Settings("fp8", Strategy.TENSOR), (1,), "tensor"),
        (Settings("fp8", Strategy.HEAD), (2, 1, 1), "attn_head"),
        (Settings("int8", Strategy.CHANNEL, asymmetric=True), (2, 1, 32), "channel"),
        (Settings("int8", Strategy.GROUP, group_size=8), (2, 1, 32), "channel"),
    ),
)
def test_output_is_what_compressed_tensors_declares(tiny, tmp_path, settings, shape, strategy):
    from compressed_tensors.quantization import QuantizationConfig

    out = tmp_path / "out"
    scales = by_hf(tiny, out, settings)
    section = json.loads((out / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(section).kv_cache_scheme
    assert (scheme.num_bits, scheme.strategy) == (8, strategy)
    assert scheme.type == ("int" if settings.scheme == "int8" else "float")
    assert scheme.symmetric is not settings.asymmetric and scheme.dynamic is False
    assert {tuple(t.shape) for t in scales.values()} == {shape}
    assert any("zero_point" in name for name in scales) is settings.asymmetric
    if settings.strategy is Strategy.GROUP:
        grouped = scales["model.layers.0.self_attn.k_scale"].unflatten(-1, (4, 8))
        assert bool((grouped == grouped[..., :1]).all()) and grouped.unique().numel() > 4


def test_index_names_every_tensor_and_weights_are_links(tiny, tmp_path):
    out = tmp_path / "out"
    by_hf(tiny, out)
    weight_map = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    for file in set(weight_map.values()):
        with safe_open(out / file, framework="pt") as tensors:
            assert set(tensors.keys()) == {n for n, f in weight_map.items() if f == file}
    assert os.path.samefile(tiny / "model.safetensors", out / "model-weights.safetensors")
    with safe_open(out / SCALES, framework="pt") as tensors:
        assert tensors.metadata()["kvq_observer"] == "minmax"
    by_hf(tiny, tmp_path / "copied", copy=True)
    copied = tmp_path / "copied" / "model-weights.safetensors"
    assert not os.path.samefile(tiny / "model.safetensors", copied)
    assert copied.read_bytes() == (tiny / "model.safetensors").read_bytes()


@pytest.mark.parametrize("mask", (0o022, 0o077, 0o002))
def test_what_is_written_follows_the_umask(tiny, tmp_path, mask):
    out, before = tmp_path / "out", os.umask(mask)
    try:
        by_hf(tiny, out, copy=True)
    finally:
        os.umask(before)
    assert out.stat().st_mode & 0o777 == 0o777 & ~mask
    modes = {file.name: file.stat().st_mode & 0o777 for file in out.iterdir()}
    assert modes == dict.fromkeys(modes, 0o666 & ~mask) and SCALES in modes
    assert not list(tmp_path.glob(".out*"))


def test_transformers_loads_the_output(tiny, tmp_path):
    """Through compressed-tensors, which reads the scheme and our shard."""
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    scales = by_hf(tiny, out, Settings("fp8", Strategy.TENSOR))
    network = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    loaded = network.state_dict()["model.layers.1.self_attn.k_scale"]
    assert torch.allclose(loaded.float(), scales["model.layers.1.self_attn.k_scale"], rtol=2**-8)


def test_optional_scales(tiny, tmp_path):
    scales = by_hf(tiny, tmp_path / "out", Settings("fp8", Strategy.TENSOR, prob_scale=True))
    assert float(scales["model.layers.1.self_attn.prob_output_scale"]) == 2.0**-8  # >= 1 / 448
    with pytest.raises(ValueError, match="--driver engine"):
        by_hf(tiny, tmp_path / "q", Settings(q_scale=True))
    assert not (tmp_path / "q").exists()


def test_probabilities_have_a_symmetric_scale_whatever_k_has(tiny, tmp_path):
    settings = Settings(asymmetric=True, prob_scale=True)
    scales = by_hf(tiny, tmp_path / "out", settings)
    assert float(scales["model.layers.1.self_attn.prob_output_scale"]) == pytest.approx(1 / 127)


def test_ignored_layers_have_no_scales_and_are_noted(tiny, tmp_path):
    scales = by_hf(tiny, tmp_path / "out", Settings(ignore=frozenset([0])))
    assert {layer_number(name) for name in scales} == {1}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["kv_cache_skip_layers"] == [0]
    with pytest.raises(ValueError, match=r"layers \[5\]"):
        check_ignored(Settings(ignore=frozenset([5])), ["model.layers.0.self_attn"])
    with pytest.raises(ValueError, match="nothing is left"):
        check_ignored(Settings(ignore=frozenset([0])), ["model.layers.0.self_attn"])
    with pytest.raises(ValueError, match="found no attention layer that writes K and V"):
        check_ignored(Settings(), [])
    checkpoint = inspection.read(tmp_path / "out")
    assert not checkpoint.problems and inspection.automatic(checkpoint)[0]
    model = AutoConfig.from_pretrained(tiny)
    with pytest.raises(ValueError, match="leaves layers 0 unquantized.*without --ignore"):
        KVQCache(model, "int8", scales=str(tmp_path / "out"))


def edited(model: Path, folder: Path, **changes) -> Path:
    """*model* at *folder*, with *changes* to its configuration."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize(("name", "stays"), (("int4", False), ("int8", True)))
def test_a_mapping_without_scales_does_not_hide_them(tiny, tmp_path, name, stays):
    """`auto` follows a mapping first: the output would be served without the new scales. Its
    figures go too: `kvq allocate --force` would take the output for its own."""
    section = {"layers": {"0": "auto", "1": name}, "other": 1}
    model, out = edited(tiny, tmp_path / "model", kvq=section), tmp_path / "out"
    for file in (FIGURES, PLOT):
        (model / file).touch()
    by_hf(model, out)
    config = json.loads((out / "config.json").read_text())
    assert [(out / file).exists() for file in (FIGURES, PLOT)] == [stays, stays]
    assert config["kvq"] == (section if stays else {"other": 1})
    said = "\n".join(_how_to_serve(Job(str(model), Target(out)), Source.find(str(model))))
    assert ("mapping of layers to KV caches" in said) is not stays
    assert ("takes int8" in inspection.automatic(inspection.read(out))[1]) is not stays


@pytest.mark.parametrize("key", ("quantization_config", "compression_config"))
@pytest.mark.parametrize("nested", (False, True))
def test_transformers_loads_without_the_scheme_wherever_it_is(tiny, tmp_path, key, nested):
    section = {"quant_method": "compressed-tensors", "kv_cache_scheme": SCHEME}
    if nested:
        model = edited(make_multimodal(tmp_path), tmp_path / "model")
        config = json.loads((model / "config.json").read_text())
        config["text_config"][key] = section
        (model / "config.json").write_text(json.dumps(config))
    else:
        model = edited(tiny, tmp_path / "model", **{key: section})
    config = Source.find(str(model)).without_kv_scheme()["config"]
    assert declared_scheme(config) is None and not quantization_section(config)


def test_code_of_the_checkpoint_may_run_beside_a_scheme(tiny, tmp_path):
    classes = {"AutoConfig": "mine.MyConfig"}
    section = {"quant_method": "compressed-tensors", "kv_cache_scheme": SCHEME}
    model = edited(
        tiny, tmp_path / "m", model_type="mine", auto_map=classes, quantization_config=section
    )
    (model / "mine.py").write_text(
        "from transformers import LlamaConfig\nclass MyConfig(LlamaConfig):\n"
        "    model_type = 'mine'\n"
    )
    config = Source.find(str(model)).without_kv_scheme(trust_remote_code=True)["config"]
    assert type(config).__name__ == "MyConfig"


def test_folders_come_along_but_for_other_weights(tiny, tmp_path):
    model, out = edited(tiny, tmp_path / "model"), tmp_path / "out"
    files = ("additional_chat_templates/tool.jinja", "code/layers/attention.py")
    dropped = ("original/x.pth", "onnx/deep/model.onnx", ".cache/x", "code/__pycache__/x.pyc")
    for name in files + dropped:
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text(name)
    (model / "linked").symlink_to(tmp_path)
    by_hf(model, out)
    assert all((out / name).read_text() == name for name in files)
    assert not any((out / name).exists() for name in (*dropped, "linked"))
    assert not (out / "original").exists() and not (out / "code" / "__pycache__").exists()
    assert left_out(Source.find(str(model))) == ["linked", "onnx", "original"]


def test_force_through_a_link_replaces_what_it_points_to(tiny, tmp_path):
    """By renaming within that folder: the link's own may be on another file system."""
    there, link = tmp_path / "there", tmp_path / "link"
    there.mkdir()
    by_hf(tiny, there / "out")
    link.symlink_to(there / "out")
    by_hf(tiny, link, Settings("fp8"), force=True)
    assert link.is_symlink() and link.resolve() == there / "out"
    config = json.loads((there / "out" / "config.json").read_text())
    assert config["quantization_config"]["kv_cache_scheme"]["type"] == "float"
    assert [p.name for p in there.iterdir()] == ["out"]


def test_calibrating_an_output_again_replaces_its_scales(tiny, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    by_hf(tiny, first, Settings("fp8", Strategy.TENSOR))
    again = by_hf(first, second)
    assert again.keys() == by_hf(tiny, tmp_path / "direct").keys()
    assert all(torch.equal(t, load_file(tmp_path / "direct" / SCALES)[n]) for n, t in again.items())
    config = json.loads((second / "config.json").read_text())
    assert config["quantization_config"]["kv_cache_scheme"] == SCHEME


def test_scales_among_the_weights_are_left_out(tiny, tmp_path):
    """Old scales in the file of the weights: under another name they would be loaded as well."""
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    weights = load_file(model / "model.safetensors")
    old = {"model.layers.0.self_attn.k_proj.k_scale": torch.tensor(9.0)}
    save_file(weights | old, model / "model.safetensors", metadata={"format": "pt"})
    by_hf(model, tmp_path / "out")
    kept = load_file(tmp_path / "out" / "model-weights.safetensors")
    assert kept.keys() == weights.keys()
    assert all(torch.equal(kept[n], t) for n, t in weights.items())
    assert load_file(model / "model.safetensors").keys() == weights.keys() | old.keys()


@pytest.mark.parametrize("nested", (False, True))
def test_weight_quantization_keeps_its_configuration(tiny, tmp_path, nested):
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    config = json.loads((model / "config.json").read_text())
    own = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    (config.setdefault("text_config", {}) if nested else config)["quantization_config"] = own
    (model / "config.json").write_text(json.dumps(config))
    new = with_scheme(Source.find(str(model)), SCHEME, [])
    section = (new["text_config"] if nested else new)["quantization_config"]
    assert section == {**own, "kv_cache_scheme": SCHEME}
    assert ("quantization_config" in new) is not nested


def test_table_marks_suspects(tiny, tmp_path):
    settings = Settings(strategy=Strategy.TENSOR)
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.self_attn.v_proj.weight"][5] *= 200
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    source, target = Source.find(str(model)), Target(tmp_path / "out")
    layers = calibrate(source, target, settings, WINDOWS, driver="hf")
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(scale_table(settings, layers))
    rows = console.export_text().splitlines()
    assert sum("outlier" in row for row in rows) == 1
    assert any("V: 1 outlier channel: head 0 channel 5" in row for row in rows)


def test_heads_that_several_ranks_hold_are_joined_once(tmp_path, monkeypatch):
    """4 kv heads, twice each on 8 ranks, in a model whose configuration says 16."""
    attention = torch.nn.Module()
    attention.total_num_kv_heads, attention.attn = 4, torch.nn.Module()
    name = attention.attn.layer_name = "model.layers.0.self_attn.attn"
    settings, k = Settings(), torch.randn(32, 4, 32)
    config = SimpleNamespace(get_total_num_kv_heads=lambda: 16)
    for rank in range(8):
        observers = Observers(settings)
        observers.observe(name, "k", k[:, rank // 2 : rank // 2 + 1])
        monkeypatch.setattr(compat, "model_parallel_is_initialized", lambda: True)
        monkeypatch.setattr(compat, "get_tensor_model_parallel_rank", lambda r=rank: r)
        monkeypatch.setattr(compat, "get_tensor_model_parallel_world_size", lambda: 8)
        worker = SimpleNamespace(
            _kvq_observers=observers,
            get_model=lambda: attention,
            vllm_config=SimpleNamespace(model_config=config),
            rank=rank,
        )
        ObservingWorker.kvq_save(worker, str(tmp_path))
    [(_, joined)] = _gathered(settings, tmp_path, {name: "model.layers.0.self_attn"}).items()
    assert torch.equal(joined.high, k.amax(0))
