"""Choosing formats under a budget, without an engine; test_allocate_engine.py measures."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from kvq_plugin import cli
from kvq_plugin.allocate import arguments, measure, output
from kvq_plugin.allocate.measure import Sensitivities, identity
from kvq_plugin.allocate.solve import (
    Allocation,
    Shape,
    average_bits,
    budget_bytes,
    parse_bits,
    parse_memory,
    require_range,
    require_served,
)
from kvq_plugin.calibrate.checkpoint import Source
from kvq_plugin.calibrate.output import Target

FORMATS = ("k3v2", "int4", "k8v4", "auto")


def _problem(layers: int, seed: int):
    draw = random.Random(seed)
    shapes = [Shape(n, draw.choice((1, 3)), draw.choice((64, 128))) for n in range(layers)]
    costs = []
    for _ in shapes:
        scale = 10 ** draw.uniform(-4, -1)
        costs.append({name: scale * draw.random() for name in FORMATS[:-1]} | {"auto": 0.0})
    return shapes, costs


@pytest.mark.parametrize("seed", range(4))
def test_no_choice_is_better(seed):
    """Against all 4^5 choices, at budgets over the whole range."""
    shapes, costs = _problem(5, seed)
    allocation = Allocation(shapes, costs)
    every = [
        (sum(s.bytes(n) for s, n in zip(shapes, names, strict=True)),
         sum(c[n] for c, n in zip(costs, names, strict=True)))
        for names in itertools.product(FORMATS, repeat=5)
    ]  # fmt: skip
    least, most = min(every)[0], max(size for size, _ in every)
    for budget in range(least, most + 300, (most - least) // 12):
        choice = allocation.within(budget)
        assert choice.size <= budget
        assert choice.kl == pytest.approx(min(kl for size, kl in every if size <= budget))
        assert choice.size == sum(s.bytes(n) for s, n in zip(shapes, choice.names, strict=True))
    points = allocation.frontier()
    assert points[0][0] == average_bits(least, shapes) and points[-1][1] == 0
    assert all(a < b and x > y for (a, x), (b, y) in itertools.pairwise(points))


def test_budgets():
    shapes = [Shape(0, 3, 64), Shape(1, 3, 64)]
    assert budget_bytes(4.875, shapes) == 2 * 3 * 78 == sum(s.bytes("int4") for s in shapes)
    assert average_bits(2 * 3 * 78, shapes) == 4.875
    assert parse_bits("4.0bits") == parse_bits("4") == 4.0
    assert parse_memory("1GiB") == 1 << 30 and parse_memory("1.5 MB") == 1_500_000
    for bad in ("4.0 GiB", "four", ""):
        with pytest.raises(ValueError, match="expected bits per value"):
            parse_bits(bad)
    with pytest.raises(ValueError, match="expected a number and a unit"):
        parse_memory("100")


def test_bad_budgets_name_the_range():
    shapes = [Shape(0, 3, 64), Shape(1, 3, 64)]
    for asked, where in ((3.0, "below the smallest"), (17.0, "above the largest")):
        with pytest.raises(ValueError, match=f"{where}.*expected 3.125 to 16.000 bits"):
            require_range(budget_bytes(asked, shapes), shapes, FORMATS)
    require_range(budget_bytes(3.125, shapes), shapes, FORMATS)


class Meter:
    """One whose layers cost their number, and that counts."""

    def __init__(self, layers: int, fail_after: int = 1000) -> None:
        self.shapes = [Shape(n, 3, 64) for n in range(layers)]
        self.asked, self.left = [], fail_after

    def kl(self, names) -> float:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        self.asked.append(names)
        return float(sum(names))


def checkpoint(folder: Path, value: float, **config) -> str:
    """A model of one weight at *folder*."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    save_file({"weight": torch.full((8,), value)}, folder / "model.safetensors")
    return str(folder)


def test_an_interrupted_measurement_goes_on(tmp_path):
    file, windows, model = tmp_path / "cells.json", [[1, 2, 3]], checkpoint(tmp_path / "m", 1.0)
    first = Sensitivities.resume(file, model, windows, 4, "float32")
    with pytest.raises(KeyboardInterrupt):
        first.measure(Meter(3, fail_after=5), FORMATS)
    again, meter = Sensitivities.resume(file, model, windows, 4, "float32"), Meter(3)
    again.measure(meter, FORMATS)
    assert len(meter.asked) == 3 * 4 - 5  # three formats, each uniform and in three layers
    assert again.costs(FORMATS)[2] == {"k3v2": 2.0, "int4": 2.0, "k8v4": 2.0, "auto": 0.0}
    assert json.loads(file.read_text())["uniform"]["int4"] == 3.0
    with pytest.raises(ValueError, match="remove it, or name another with --cells"):
        Sensitivities.resume(file, model, [[1, 2, 4]], 4, "float32")


def test_costs_of_another_model_are_not_taken(tmp_path):
    """Neither where its folder has the same name, its files the same sizes."""
    file, windows = tmp_path / "cells.json", [[1, 2, 3]]
    model = checkpoint(tmp_path / "a" / "m", 1.0)
    first = Sensitivities.resume(file, model, windows, 4, "float32")
    first.measure(Meter(3), FORMATS)
    same = checkpoint(tmp_path / "same" / "m", 1.0, transformers_version="6")
    assert Sensitivities.resume(file, same, windows, 4, "float32").uniform["int4"] == 3.0
    tuned = checkpoint(tmp_path / "b" / "m", 2.0)
    longer = checkpoint(tmp_path / "c" / "m", 1.0, rope_theta=1e6)
    for other in (tuned, longer):
        with pytest.raises(ValueError, match="was measured with"):
            Sensitivities.resume(file, other, windows, 4, "float32")


@pytest.mark.parametrize(
    ("arguments", "said"),
    (
        ([], "expected --budget BITS, or --tokens N"),
        (["--tokens", "1000"], "--tokens and --memory go together"),
        (["--tokens", "0", "--memory", "1GiB"], "--tokens and --memory go together"),
        (["--tokens", "1000", "--memory", "many"], "--memory 'many': expected a number"),
        (["--budget", "few"], "--budget 'few': expected bits"),
        (["--budget", "1bits"], "below the smallest"),
        (["--budget", "99"], "above the largest"),
        (["--budget", "9" * 400], "--budget 999999999999999999999999999... is beyond"),
        (["--budget", "9" * 308], "--budget 1e+308 is beyond all numbers: expected less"),
        (["--tokens", "9", "--memory", "9" * 300 + "TiB"], "... is beyond all numbers"),
        (["--budget", "5", "--length", "9000"], "8192 positions, one of them for the token after: "
         "use --length 8191 or less"),
        (["--budget", "5", "--cells", "{tmp}"], "costs would go to {tmp}, which is no file"),
        (["--budget", "5", "--cells", "{tmp}/no/x"], "{tmp}/no is no directory that can be"),
    ),
)  # fmt: skip
def test_bad_options_are_refused_before_an_engine_starts(
    tmp_path, monkeypatch, capsys, arguments, said
):
    shape = {"num_attention_heads": 4, "hidden_size": 256, "num_hidden_layers": 2}
    model = checkpoint(tmp_path / "m", 1.0, max_position_embeddings=8192, **shape)
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    monkeypatch.setattr(measure, "metering", lambda *_: pytest.fail("an engine started"))
    assert cli.main(["allocate", model, "-o", str(tmp_path / "out"), *arguments]) == 1
    assert said.format(tmp=tmp_path) in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(
    ("config", "arguments", "said"),
    (
        # Head sizes of 80: k3v2 has groups of 32. It ended in a traceback of the engine.
        ({"head_dim": 80}, [], "0 has heads of 80, which k3v2 cannot have: expected a multiple of "
         "32; pass --formats int4,k8v4,int8_per_token_head,auto"),
        ({"head_dim": 80}, ["--formats", "k3v2,auto"], "use --kv-cache-dtype auto"),
        ({"head_dim": 24}, ["--formats", "int4,k8v4,auto"], "24, which int4, k8v4 cannot have"),
        # As GPT-2 calls them, and Source.require_length did not.
        ({"n_positions": 512}, ["--length", "600"], "512 positions, one of them for the"),
    ),
)  # fmt: skip
def test_what_config_json_shows_is_refused_first(
    tmp_path, monkeypatch, capsys, config, arguments, said
):
    shape = {"num_attention_heads": 4, "hidden_size": 256, "num_hidden_layers": 2}
    model = checkpoint(tmp_path / "m", 1.0, **shape, **config)
    monkeypatch.setattr(measure, "metering", lambda *_: pytest.fail("an engine started"))
    command = ["allocate", model, "-o", str(tmp_path / "out"), "--budget", "6", *arguments]
    assert cli.main(command) == 1
    assert said in capsys.readouterr().err
    require_served([Shape(0, 2, 80)], ["int4", "k8v4", "auto"])


def test_a_model_of_sliding_windows_alone_is_refused(tmp_path, monkeypatch, capsys):
    """No layer takes part in a budget: the end was a division by no values."""
    shape = {"num_attention_heads": 4, "hidden_size": 256, "num_hidden_layers": 2}
    model = checkpoint(tmp_path / "m", 1.0, **shape)
    text = tmp_path / "text.txt"
    text.write_text("a b c d " * 2048)
    tokenizer = lambda text, **_: SimpleNamespace(input_ids=list(range(len(text))))  # noqa: E731
    monkeypatch.setattr(arguments, "load_tokenizer", lambda _: tokenizer)
    meter = Meter(0)
    monkeypatch.setattr(measure, "metering", lambda *_: nullcontext(meter))
    command = ["allocate", model, "-o", str(tmp_path / "out"), "--budget", "6", "--text", str(text)]
    assert cli.main(command) == 1
    assert "kvq: every layer of the model has a sliding window" in capsys.readouterr().err
    assert not meter.asked and sorted(p.name for p in tmp_path.iterdir()) == ["m", "text.txt"]


def test_costs_that_cannot_be_written_leave_nothing(tmp_path):
    (tmp_path / "cells.json").mkdir()
    with pytest.raises(IsADirectoryError):
        Sensitivities(tmp_path / "cells.json", {}).save()
    assert [p.name for p in tmp_path.iterdir()] == ["cells.json"]


def test_what_appears_at_the_output_meanwhile_stays(tmp_path, monkeypatch):
    source, out = Source.find(checkpoint(tmp_path / "m", 1.0)), tmp_path / "out"
    stock = output.copy_rest

    def copy_rest(*args):
        out.mkdir()
        (out / "thesis.txt").write_text("the only copy")
        stock(*args)

    monkeypatch.setattr(output, "copy_rest", copy_rest)
    with pytest.raises(ValueError, match="out appeared or changed while `kvq allocate` ran"):
        output.write(source, Target(out), {"default": "int4"}, None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "out"]
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]


def test_shards_below_the_folder_come_along(tmp_path):
    """And the figures of an earlier mapping do not."""
    model = Path(checkpoint(tmp_path / "m", 1.0, kvq=None))
    (model / "below").mkdir()
    (model / "model.safetensors").rename(model / "below" / "x.safetensors")
    index = {"weight_map": {"weight": "below/x.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in (output.FIGURES, output.PLOT):
        (model / name).write_text("of another mapping")
    output.write(Source.find(str(model)), Target(tmp_path / "out"), {"default": "int4"}, None)
    files = [p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert sorted(map(str, files)) == [
        "below/x.safetensors", "config.json", "model.safetensors.index.json"
    ]  # fmt: skip


def test_shapes_are_not_guessed(tmp_path):
    stated = {"num_attention_heads": 4, "hidden_size": 256, "num_hidden_layers": 2}
    source = Source(Path(checkpoint(tmp_path / "even", 1.0, **stated)))
    assert measure.stated_shapes(source) == [Shape(0, 4, 64), Shape(1, 4, 64)]
    mixed = {"layer_types": ["full_attention", "linear_attention"]}
    for name, more in (("mixed", mixed), ("latent", {"kv_lora_rank": 64})):
        source = Source(Path(checkpoint(tmp_path / name, 1.0, **stated, **more)))
        assert measure.stated_shapes(source) == []


def test_the_published_costs_are_of_the_built_in_model(smollm2):
    published = Path(__file__).parent.parent / "docs/data/smollm2-135m.cells.json"
    assert json.loads(published.read_text())["what"]["checkpoint"] == identity(str(smollm2))


def test_where_the_output_cannot_go_is_said_first(tmp_path, monkeypatch):
    source = Source.find(checkpoint(tmp_path / "m", 1.0))
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "not-there-yet")
    with pytest.raises(ValueError, match="exists: name another output"):
        output.require_free(Target(dangling), source)
    with pytest.raises(ValueError, match="`kvq allocate` wrote.*kvq_allocation.json"):
        output.require_free(Target(dangling, force=True), source)
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match="no room on disk"):
        output.require_free(Target(tmp_path / "out"), source)
