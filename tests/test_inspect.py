"""``kvq inspect``: what it reads from a checkpoint and what it says of it; no vLLM involved."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from kvq_plugin import inspection, inspection_report
from kvq_plugin.formats import SERVED
from kvq_plugin.geometry import Geometry

CONFIG = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 128,
    "model_type": "llama",
}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False}
CHANNEL = torch.linspace(0.1, 0.3, 64)


@pytest.fixture
def write(tmp_path):
    """``write(scales, **quantization_config)`` -> a checkpoint of two layers."""

    def run(scales, config=CONFIG, **quantization):
        tensors = {f"model.layers.{i}.self_attn.k_proj.weight": torch.ones(2) for i in range(2)}
        tensors["vision_tower.layers.0.self_attn.k_proj.weight"] = torch.ones(2)
        tensors |= {k: torch.as_tensor(v).clone() for k, v in scales.items()}
        save_file(tensors, tmp_path / "model.safetensors")
        extra = {"quantization_config": quantization} if quantization else {}
        (tmp_path / "config.json").write_text(json.dumps(config | extra))
        return tmp_path

    return run


def scales(**by_name):
    return {f"model.layers.{i}.self_attn.{k}": v for i in range(2) for k, v in by_name.items()}


def report(path, plot=None):
    """What the command prints, and the error it ends with."""
    output = io.StringIO()
    console = Console(file=output, width=200)
    try:
        inspection_report.run(str(path), plot, console)
    except ValueError as error:
        return output.getvalue(), str(error)
    return output.getvalue(), None


def verdicts(path):
    checkpoint = inspection.read(path)
    return {n: inspection.verdict(checkpoint, n, f)[0] for n, f in SERVED.items()}


def test_reads_scales_as_serving_does(write):
    path = write(
        scales(k_scale=CHANNEL, v_scale=[[[0.5]], [[0.25]]], k_zero_point=torch.arange(64)),
        quant_method="compressed-tensors",
        kv_cache_scheme=INT8,
    )
    checkpoint = inspection.read(path)
    assert checkpoint.geometry == Geometry(4, 2, 32)
    assert checkpoint.weights is None and checkpoint.scheme.type == "int"
    first = checkpoint.layers[0]
    assert torch.equal(first.values["k_scale"], CHANNEL.view(2, 32))
    assert first.values["v_scale"].tolist() == [0.5, 0.25]
    assert not checkpoint.problems and not checkpoint.bare
    text, error = report(path)
    assert error is None
    for part in ("channel", "head", "0.1", "0.3", "K asymmetric", "compressed-tensors"):
        assert part in text


@pytest.mark.parametrize("scheme", [INT8, {**INT8, "type": "float"}, None])
def test_says_which_dtypes_serve(write, scheme):
    extra = {"quant_method": "compressed-tensors", "kv_cache_scheme": scheme} if scheme else {}
    found = verdicts(write(scales(k_scale=0.5, v_scale=0.5), **extra))
    for name, format in SERVED.items():
        wanted = not scheme or scheme["type"] == ("float" if "fp8" in name else "int")
        assert found[name] == (format.is_dynamic or wanted)


def test_a_checkpoint_without_scales(write):
    path = write({})
    assert verdicts(path) == {n: f.is_dynamic or bool(f.default_scale) for n, f in SERVED.items()}
    text, error = report(path)
    assert error is None and "kvq calibrate" in text and "unquantized" in text
    assert "no KV scales to plot" in report(path, path / "x.png")[1]


def test_a_single_scale_stands_for_both_and_modelopt_declares_in_a_file(write):
    path = write({f"model.layers.{i}.self_attn.kv_scale": 0.5 for i in range(2)})
    (path / "hf_quant_config.json").write_text(
        json.dumps({"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}})
    )
    checkpoint = inspection.read(path)
    assert (
        checkpoint.layers[1].values == {"k_scale": 0.5, "v_scale": 0.5} and not checkpoint.problems
    )
    assert checkpoint.weights == "FP8" and checkpoint.scheme.dtype() == "fp8"
    assert checkpoint.origins == ["AutoFP8"]


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ({"model.layers.1.self_attn.k_scale": torch.ones(5)}, "k_scale of shape (5,)"),
        ({"model.layers.1.self_attn.k_scale": float("nan")}, "1 NaN"),
        ({"model.layers.0.self_attn.k_proj.k_scale": 0.5}, "given twice"),
        ({"model.layers.7.self_attn.k_scale": 0.5}, "no weights for"),
        ({"model.layers.0.self_attn.v_scale": -1.0}, "no K or V scale for model.layers.0"),
        ({"model.layers.1.self_attn.kv_scale": 0.5}, "v_scale is given twice"),
        ({"model.layers.1.self_attn.q_scale": torch.ones(4)}, "beside a single k_scale"),
    ],
)
def test_problems_are_named_and_fail(write, broken, says):
    text, error = report(write(scales(k_scale=0.25, v_scale=0.5) | broken))
    assert says in text and "problem" in error
    assert text.count(" no ") >= 4 and " yes " in text


def test_a_scale_in_two_files_is_given_twice(write):
    path = write(scales(k_scale=0.25, v_scale=0.5))
    again = {"model.layers.0.self_attn.k_scale": torch.tensor(0.5)}
    save_file(again, path / "more.safetensors")
    text, error = report(path)
    assert "k_scale is given twice" in text and "two of its files" in text and "problem" in error


def test_minus_one_says_that_there_is_no_scale(write):
    """As serving reads it: fp8 has its default, int8 lacks what it needs, and nothing is wrong."""
    path = write(scales(k_scale=-1.0, v_scale=-1.0))
    assert verdicts(path) == {n: f.is_dynamic or bool(f.default_scale) for n, f in SERVED.items()}
    assert not inspection.read(path).problems


def test_scales_that_no_scheme_declares_are_not_for_auto(write):
    for tensors, said in (({}, False), (scales(k_scale=0.25, v_scale=0.5), True)):
        serves, how = inspection.automatic(inspection.read(write(tensors)))
        assert serves and ("loaders may fail" in how) is said


def test_layers_behind_the_models_own_need_no_scales(write):
    """Layers for multi-token prediction, which serving passes over."""
    config = CONFIG | {"num_hidden_layers": 1, "num_nextn_predict_layers": 1}
    declared = {"quant_method": "compressed-tensors", "kv_cache_scheme": INT8}
    own = {f"model.layers.0.self_attn.{k}": 0.5 for k in ("k_scale", "v_scale")}
    checkpoint = inspection.read(write(own, config, **declared))
    assert not checkpoint.bare and not checkpoint.problems
    theirs = {"mtp.layers.0.self_attn.k_scale": 0.5, "model.layers.1.self_attn.k_scale": 0.5}
    assert not inspection.read(write(own | theirs, config, **declared)).problems
    [problem] = inspection.read(write(own | {"model.layers.2.self_attn.k_scale": 0.5})).problems[:1]
    assert "no weights for the scales of model.layers.2" in problem


@pytest.mark.parametrize(
    "stated",
    [
        {"global_head_dim": 64, "num_global_key_value_heads": 1, "attention_k_eq_v": True},
        {"per_layer_config": {"1": {"head_dim": 64, "num_key_value_heads": 1}}},
    ],
)
def test_layers_may_have_heads_of_their_own(write, stated):
    """Gemma 4's global layers, in its own words and in transformers'."""
    config = CONFIG | stated | {"layer_types": ["sliding_attention", "full_attention"]}
    own = {f"model.layers.0.self_attn.{k}": torch.ones(2, 1, 32) for k in ("k_scale", "v_scale")}
    own |= {f"model.layers.1.self_attn.{k}": torch.ones(1, 1, 64) for k in ("k_scale", "v_scale")}
    checkpoint = inspection.read(write(own, config))
    assert not checkpoint.problems
    assert [tuple(x.values["k_scale"].shape) for x in checkpoint.layers] == [(2, 32), (1, 64)]


def test_a_mapping_costs_what_each_layers_heads_do(write):
    """As in Gemma 4, whose global layers have fewer and wider heads."""
    stated = {"global_head_dim": 64, "num_global_key_value_heads": 1, "num_hidden_layers": 2}
    stated |= {"kvq": {"layers": {"0": "int8_per_token_head", "1": "int8_per_token_head"}}}
    stated |= {"layer_types": ["sliding_attention", "full_attention"]}
    text = report(write({}, CONFIG | stated))[0]
    # A token's two scales take 8 bytes a head: two heads in the one layer, one in the other.
    sizes = 2 * (2 * 32 + 8) + (2 * 64 + 8)
    assert f"{sizes} bytes a token" in text and f"{sizes * 8 / 256:.3f}" in text


def test_skipped_layers_need_no_scales(write):
    own = {f"model.layers.1.self_attn.{k}": 0.5 for k in ("k_scale", "v_scale")}
    declared = {"quant_method": "compressed-tensors", "kv_cache_scheme": INT8}
    assert inspection.read(write(own, **declared)).problems
    checkpoint = inspection.read(write(own, **declared, kv_cache_skip_layers=[0]))
    assert checkpoint.skipped == {0} and not checkpoint.bare and not checkpoint.problems


@pytest.mark.parametrize("scheme", [INT8, {**INT8, "type": "float"}, None])
def test_zero_points_are_for_int8(write, scheme):
    extra = {"quant_method": "compressed-tensors", "kv_cache_scheme": scheme} if scheme else {}
    path = write(scales(k_scale=0.5, v_scale=0.5, k_zero_point=3.0), **extra)
    found = verdicts(path)
    assert not any(found[n] for n in ("fp8", "fp8_e4m3", "fp8_e5m2"))
    assert found["int8"] is (scheme is None or scheme["type"] == "int")
    problems = inspection.read(path).problems
    assert bool(problems) is (scheme is not None and scheme["type"] == "float")
    assert all("k_zero_point is not zero" in problem for problem in problems)


def test_outliers_are_remarked(write):
    k = CHANNEL.clone()
    k[3] = 50.0
    text, _ = report(write(scales(k_scale=k, v_scale=1.0)))
    assert "K: 1 beyond 10x the median" in text and "V is 1: uncalibrated?" in text


@pytest.mark.parametrize(("scheme", "qmax"), [(INT8, 127), ({**INT8, "type": "float"}, 448)])
def test_scales_of_no_model_are_remarked(write, scheme, qmax):
    """They are served, with a warning of the same bounds: no problem, and no error."""
    section = {"quant_method": "compressed-tensors", "kv_cache_scheme": scheme}
    text, error = report(write(scales(k_scale=1e-30, v_scale=CHANNEL * 1e30), **section))
    assert error is None and "problem:" not in text
    assert f"K: largest code stands for {qmax * 1e-30:.3g}" in text
    assert f"V: largest code stands for {qmax * 3e29:.3g}" in text
    text, _ = report(write(scales(k_scale=1e-4, v_scale=CHANNEL), **section))
    assert "stands for" not in text


def test_plot(write):
    path = write(scales(k_scale=CHANNEL, v_scale=0.5))
    file = path / "scales.png"
    assert "scales.png" in report(path, file)[0]
    assert file.read_bytes().startswith(b"\x89PNG") and not list(path.glob(".*.part"))
    assert "expected a name that ends in .png" in report(path, path / "scales.pdf")[1]


def test_where_no_plot_can_go_is_said_first(write):
    path = write(scales(k_scale=CHANNEL, v_scale=0.5))
    (path / "folder.png").mkdir()
    for file, said in (
        (path / "folder.png", "it is a directory: name another"),
        (path / "none" / "scales.png", "none is no directory to write to: name another"),
    ):
        text, error = report(path, file)
        assert (
            text == ""
            and f"--plot {file}: expected a file to write, and " in error
            and said in error
        )


def test_layers_have_whole_numbers(write, monkeypatch):
    from matplotlib.figure import Figure

    ticks = []

    def savefig(figure, file, **_):
        ticks.extend(figure.axes[-1].get_xticks())
        file.touch()

    monkeypatch.setattr(Figure, "savefig", savefig)
    path = write(scales(k_scale=CHANNEL, v_scale=0.5))
    report(path, path / "scales.png")
    assert ticks and all(tick == int(tick) for tick in ticks)


@pytest.mark.parametrize("width", [40, 80])
def test_a_pipe_or_a_narrow_terminal_cuts_no_figure(write, width):
    values = torch.linspace(0.0491234, 0.3, 64)
    path = write(scales(k_scale=values, v_scale=values, q_scale=0.4321))
    output = io.StringIO()
    inspection_report.run(str(path), console=Console(file=output, width=width))
    text = output.getvalue()
    assert "…" not in text
    for figure in ("0.04912", "0.1726", "0.3", "0.4321"):
        assert figure in text


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a checkpoint's directory"):
        inspection.read("/no/such/place")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="num_attention_heads"):
        inspection.read(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ValueError, match="no safetensors files"):
        inspection.read(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="no safetensors file"):
        inspection.read(tmp_path)


def test_needs_no_vllm(write):
    path = write(scales(k_scale=0.5, v_scale=0.5))
    code = (
        "import sys; sys.modules['vllm'] = None\n"
        "from kvq_plugin import cli\n"
        f"sys.exit(cli.main(['inspect', {str(path)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "K tensor" in done.stdout


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json: expected a model's directory"):
        inspection.read(tmp_path)


def test_dtypes_are_checked_before_anything_runs(write):
    path = str(write({}))
    inspection.check_dtypes(path, ["auto", "fp8", "int8_per_token_head", "int4"])
    with pytest.raises(ValueError, match="int8 was asked of .*: refused: needs calibrated .*kvq c"):
        inspection.check_dtypes(path, ["auto", "fp8", "int8"])
    with pytest.raises(ValueError, match="kvq_mixed was asked of .*`kvq allocate`, or ask for int"):
        inspection.check_dtypes(path, ["kvq_mixed"])


def test_dtypes_of_a_calibrated_checkpoint(write):
    section = {"quant_method": "compressed-tensors", "kv_cache_scheme": INT8}
    path = str(write(scales(k_scale=CHANNEL, v_scale=0.5), **section))
    inspection.check_dtypes(path, ["auto", "int8"])
    with pytest.raises(ValueError, match="fp8 was asked of .*for another code .*`kvq calibrate`"):
        inspection.check_dtypes(path, ["fp8"])
    path = str(write(scales(k_scale=CHANNEL), **section))
    with pytest.raises(ValueError, match=r"1 problem\(s\); no K or V scale for .*kvq calibrate"):
        inspection.check_dtypes(path, ["int8"])


def test_dtypes_of_a_mapping(write):
    mapping = {"num_hidden_layers": 2, "kvq": {"layers": {"0": "int4", "1": "k8v4"}}}
    inspection.check_dtypes(str(write({}, CONFIG | mapping)), ["auto", "kvq_mixed"])


def test_a_mappings_int8_needs_scales_of_its_layers(write):
    mapping = CONFIG | {"num_hidden_layers": 2, "kvq": {"layers": {"0": "int4", "1": "int8"}}}
    says = "layer 1 keeps int8, which needs calibrated scales; add them with `kvq calibrate`"
    path = write({}, mapping)
    text = report(path)[0]
    assert text.count(says) == 2 and re.search(r"auto +no +takes kvq_mixed", text)
    with pytest.raises(ValueError, match=f"kvq_mixed was asked of .*{says}"):
        inspection.check_dtypes(str(path), ["kvq_mixed"])
    own = {f"model.layers.1.self_attn.{k}": 0.5 for k in ("k_scale", "v_scale")}
    inspection.check_dtypes(str(write(own, mapping)), ["kvq_mixed"])


@pytest.mark.parametrize("config", ["{}", '{"num_attention_heads": [1, 2], "hidden_size": 8}'])
def test_dtypes_of_what_cannot_be_read_are_the_engines(tmp_path, config):
    inspection.check_dtypes("/nowhere/at/all", ["int8"])
    (tmp_path / "config.json").write_text(config)
    inspection.check_dtypes(str(tmp_path), ["int8", "kvq_mixed"])
