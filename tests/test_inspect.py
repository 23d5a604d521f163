"""``kvq inspect``: what it reads from a checkpoint and what it says of it; no vLLM involved."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from kvq_plugin import inspection, inspection_report
from kvq_plugin.formats import SERVED

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
    assert checkpoint.geometry == inspection.Geometry(4, 2, 32)
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
    ],
)
def test_problems_are_named_and_fail(write, broken, says):
    text, error = report(write(scales(k_scale=0.25, v_scale=0.5) | broken))
    assert says in text and "problem" in error
    assert text.count(" no ") >= 4 and " yes " in text


def test_outliers_are_remarked(write):
    k = CHANNEL.clone()
    k[3] = 50.0
    text, _ = report(write(scales(k_scale=k, v_scale=1.0)))
    assert "K: 1 beyond 10x the median" in text and "V is 1: uncalibrated?" in text


def test_plot(write):
    path = write(scales(k_scale=CHANNEL, v_scale=0.5))
    file = path / "scales.png"
    assert "scales.png" in report(path, file)[0]
    assert file.read_bytes().startswith(b"\x89PNG") and not list(path.glob(".*.part"))
    assert "expected a name that ends in .png" in report(path, path / "scales.pdf")[1]


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
