"""What `kvq allocate` measures, against an engine that serves the same, and its command line."""

from __future__ import annotations

import json
import statistics

import pytest
from tiny_models import make

from kvq_plugin import cli
from kvq_plugin.allocate.measure import metering, windows_of
from kvq_plugin.allocate.output import FIGURES, PLOT, write
from kvq_plugin.calibrate.checkpoint import Source
from kvq_plugin.calibrate.output import Target
from kvq_plugin.evaluate import evaluate, load_tokenizer
from kvq_plugin.mapping import MIXED

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_a_probe_costs_what_serving_costs(smollm2, tmp_path):
    """Layers 10 to 29 as int4: by probes, with the first ten layers' results reused, and by an
    engine whose layers have that KV cache."""
    windows = windows_of(load_tokenizer(str(smollm2)), "builtin", 1, 384)
    mapping = {"0-9": "auto", "10-29": "int4"}
    with metering(str(smollm2), windows, stride=1, dtype="bfloat16") as meter:
        nothing = meter.kl({})
        probed = meter.kl(dict.fromkeys(range(10, 30), "int4"))
        coarse = meter.kl(dict.fromkeys(range(10, 30), "k3v2"))
        again = meter.kl(dict.fromkeys(range(10, 30), "int4"))
    assert nothing == 0 and again == probed < coarse / 3
    mapped = Target(tmp_path / "mapped")
    write(Source.find(str(smollm2)), mapped, mapping, None)
    kept = tmp_path / "kept"
    kept.mkdir()
    texts = {"text": windows}
    evaluate(str(mapped.folder), "auto", texts, keep=kept)  # which is unquantized there too
    served = evaluate(str(mapped.folder), MIXED, texts, reference=kept)
    served = statistics.fmean(served.scores["text"].divergence.kl)
    print(f"KL {probed:.6f} by probes, {served:.6f} served")
    assert served == pytest.approx(probed, rel=0.15)  # 384 tokens, another order of rounding


def test_layers_that_share_their_caches_are_refused_in_words(tmp_path):
    """Not by the end of an engine's log."""
    model = make(tmp_path, "kv_sharing")
    with (
        pytest.raises(ValueError, match="layers of this model share their KV caches: expected one"),
        metering(str(model), [list(range(3, 40))]),
    ):
        pass


def test_the_command_writes_what_serves(smollm2, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["allocate", str(smollm2), "-o", str(out), "--formats", "k3v2,int4"]
    small = ["--text", "builtin", "--length", "96", "--stride", "8", "--no-verify"]
    assert cli.main([*command, *small, "--budget", "3bits"]) == 1
    assert "expected 3.125 to 4.875 bits" in capsys.readouterr().err and not out.exists()
    assert cli.main([*command, *small, "--tokens", "100000", "--memory", "600MB"]) == 0
    figures = json.loads((out / FIGURES).read_text())
    assert 3.125 < figures["bits"] <= 8 * 6000 / (2 * 30 * 3 * 64)
    assert json.loads((out / "config.json").read_text())["kvq"]["layers"] == figures["mapping"]
    assert (out / PLOT).stat().st_size > 10_000 and len(figures["sensitivity"]) == 30
    assert (out / "model.safetensors").samefile(smollm2 / "model.safetensors")
    assert cli.main(["inspect", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"{figures['bytes_per_token']:,} bytes a token" in said and "k3v2" in said
    assert cli.main([*command, *small, "--budget", "4bits"]) == 1
    assert "exists" in capsys.readouterr().err
