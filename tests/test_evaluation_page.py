"""`kvq eval --report`: the page is whole, well formed and needs nothing from elsewhere."""

from __future__ import annotations

import base64
import io
import json
import math
import random
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from kvq_plugin import cli, evaluation_page, report
from kvq_plugin.divergence import Divergence
from kvq_plugin.evaluate import BASELINE, Evaluation, Score
from kvq_plugin.tasks.asked import Asked
from kvq_plugin.tasks.items import Item

LENGTH, WINDOWS = 101, 2
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")
BODY = 960  # pixels: 60 rem of the page's style
ABOUT = {"model": "a <b> & c", "versions": {"vLLM": "0.32"}, "texts": ["x&y.txt"]}


def score(loss: float, kl: float | None, windows: int = WINDOWS) -> Score:
    """Later tokens are easier to guess, and diverge more."""
    tokens = range(windows * (LENGTH - 1))
    place = [1 + t % (LENGTH - 1) for t in tokens]
    noise = random.Random(0)
    logprobs = tuple(-3 + p / LENGTH - loss * noise.random() for p in place)
    if kl is None:
        return Score(logprobs)
    kls = tuple(kl * p / LENGTH for p in place)
    return Score(logprobs, divergence=Divergence(kls, kls, tuple(t % 10 > 0 for t in tokens)))


def evaluations(texts=("novel.txt", "x&y.txt"), kl: float | None = 1.0) -> dict[str, Evaluation]:
    losses = {BASELINE: (100, 0.0, None), "int8": (190, 0.001, 0.001), "int4": (360, 0.1, 0.05)}
    found = {}
    for dtype, (held, loss, own) in losses.items():
        scores = {text: score(loss, kl and own) for text in texts}
        found[dtype] = Evaluation(scores, held)
    return found


def floor(texts=("novel.txt", "x&y.txt")) -> Evaluation:
    return Evaluation({text: score(0.0, 0.002, 1) for text in texts}, 100)


def tasks() -> dict:
    """Two tasks, one of them too hard; int4 has three in ten of the other."""
    items = [
        Item(task, length, depth, context, [1], "12345", 7)
        for task in ("needle", "tracking")
        for length in (256, 1000)
        for depth in (0.0, 0.5, 1.0)
        for context in range(10)
    ]
    auto = [item.answer if item.task == "needle" else "" for item in items]
    int4 = [text if item.context < 3 else "" for item, text in zip(items, auto, strict=True)]
    return Asked(items).figures({BASELINE: auto, "int8": auto, "int4": int4}, BASELINE, {})


def images(page: ElementTree.Element) -> list[bytes]:
    found = []
    for image in page.iter("img"):
        kind, data = image.get("src").split(",", 1)
        assert kind == "data:image/png;base64"
        found.append(base64.b64decode(data, validate=True))
    return found


def colours(png: bytes) -> int:
    """How many the picture has, once decoded."""
    with Image.open(io.BytesIO(png)) as image:
        assert image.size[0] > 500
        return len(image.convert("RGB").getcolors(1 << 24))


def test_page_is_whole(tmp_path):
    folder = tmp_path / "report"
    evaluation_page.write(folder, evaluations(), floor(), LENGTH, ABOUT, tasks=tasks())
    names = {"index.html", "report.json", *evaluation_page.PLOTS}
    assert {file.name for file in folder.iterdir()} == names
    assert [file.name for file in tmp_path.iterdir()] == ["report"]
    text = (folder / "index.html").read_text(encoding="utf-8")
    page = ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>"))  # well formed
    assert page.findtext("head/title") == "KV caches of a <b> & c"
    found = images(page)
    assert len(found) == 4
    assert all(colours(png) > 20 for png in found)
    assert found == [(folder / name).read_bytes() for name in evaluation_page.PLOTS]
    cells = {cell.text for cell in page.iter("td")}
    assert {"auto, noise floor", "≤ int8", "int4", "360", "90.00%", "vLLM 0.32", "*9"} <= cells


@pytest.mark.parametrize(("first", "second", "at_floor"), [(0.002, 9.0, True), (0.003, 0.0, False)])
def test_the_floor_is_compared_on_its_own_windows(tmp_path, first, second, at_floor):
    """The floor runs the first windows only, and the others may be easier or harder."""

    def of(*kls: float) -> Evaluation:
        values = tuple(kl for kl in kls for _ in range(LENGTH - 1))
        divergence = Divergence(values, values, (True,) * len(values))
        return Evaluation({"t": Score((-1.0,) * len(values), divergence=divergence)}, 100)

    auto = Evaluation({"t": Score((-1.0,) * (2 * LENGTH - 2))}, 100)
    found, own = {BASELINE: auto, "int8": of(first, second)}, of(0.002)
    assert report.Results(found, own).is_at_floor("int8", "t") is at_floor
    evaluation_page.write(tmp_path / "r", found, own, LENGTH, ABOUT)
    assert ("≤ int8" in (tmp_path / "r" / "index.html").read_text("utf-8")) is at_floor


def test_page_needs_no_other_host(tmp_path):
    evaluation_page.write(tmp_path / "r", evaluations(), floor(), LENGTH, ABOUT)
    text = (tmp_path / "r" / "index.html").read_text()
    without_images = re.sub(r'"data:image/png;base64,[^"]*"', '""', text)
    assert not re.search(r"//|@import|url\(|<script|<link|<iframe", without_images)


def test_figures_by_hand(tmp_path):
    evaluation_page.write(tmp_path / "r", evaluations(), floor(), LENGTH, ABOUT)
    found = json.loads((tmp_path / "r" / "report.json").read_text())
    assert found["about"] == ABOUT
    int4 = found["dtypes"]["int4"]
    own = int4["texts"]["novel.txt"]
    assert int4["kv_tokens"] == 360 and own["tokens"] == 200
    assert own["divergence"]["kl"] == pytest.approx(0.05 / 2)
    assert own["perplexity"] == pytest.approx(math.exp(2.5 + 0.05), rel=0.02)
    # Positions 1 to 3 of 100 in the first of 32 bins; the last one ends at 100.
    assert found["positions"][0] == [1, 3] and found["positions"][-1][1] == 100
    assert own["kl_by_position"][0] == pytest.approx(0.05 * 2 / LENGTH)
    assert own["kl_by_position"] == sorted(own["kl_by_position"])
    assert found["floor"]["novel.txt"]["tokens"] == 100


def test_greedy_generations_have_a_table(tmp_path):
    agreements = {"auto, noise floor": [900, 1100], "int4": [7, 30]}
    evaluation_page.write(tmp_path / "r", evaluations(), floor(), LENGTH, ABOUT, agreements)
    text = (tmp_path / "r" / "index.html").read_text()
    assert "<td>int4</td><td>18.5</td><td>7, 30</td>" in text
    assert json.loads((tmp_path / "r" / "report.json").read_text())["greedy_tokens_in_common"] == (
        agreements
    )


def test_page_in_a_browser(tmp_path):
    """As a person sees it: nothing on the console, all plots drawn."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no headless browser ({', '.join(BROWSERS)}): apt-get install chromium")
    folder = tmp_path / "report"
    evaluation_page.write(folder, evaluations(), floor(), LENGTH, ABOUT, tasks=tasks())
    shot = tmp_path / "page.png"
    log = subprocess.run(
        [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *("--host-resolver-rules=MAP * ~NOTFOUND", "--no-first-run", "--enable-logging=stderr"),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1100,5000"),
            *(f"--screenshot={shot}", (folder / "index.html").as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=240,
    ).stderr
    assert shot.is_file(), log[-3000:]
    assert "CONSOLE" not in log, log
    with Image.open(shot) as picture:
        seen = picture.convert("RGB")
    assert seen.size == (1100, 5000)
    ink, left, at = 255 - np.asarray(seen, float), (1100 - BODY) // 2, 0
    for name in evaluation_page.PLOTS:  # one below the other
        with Image.open(folder / name) as plot:
            width = min(plot.width, BODY)
            scaled = plot.convert("RGB").resize((width, round(plot.height * width / plot.width)))
        drawn, across = 255 - np.asarray(scaled, float), ink[at:, left : left + width]
        rows, lines = drawn.mean((1, 2)), across.mean((1, 2))
        places = np.lib.stride_tricks.sliding_window_view(lines, len(rows))
        place = int(abs(places - rows).mean(1).argmin())
        there = across[place : place + len(rows)]
        # What the plot has ink on, 40 of 255 and more, has that ink on the page.
        assert abs(there - drawn)[drawn > 40].mean() < 20, name
        at += place + len(rows)


def test_without_divergences(tmp_path):
    """Perplexity alone: two plots, and memory against its change."""
    evaluation_page.write(tmp_path / "r", evaluations(kl=None), None, LENGTH, ABOUT)
    names = {file.name for file in (tmp_path / "r").iterdir()} & set(evaluation_page.PLOTS)
    assert names == {"perplexity_by_position.png", "memory_and_quality.png"}


def test_one_dtype_has_nothing_to_plot_against(tmp_path):
    only = {BASELINE: evaluations()[BASELINE]}
    evaluation_page.write(tmp_path / "r", only, floor(), LENGTH, ABOUT)
    assert not (tmp_path / "r" / "memory_and_quality.png").exists()


def test_nothing_is_left_of_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation_page, "_page", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluation_page.write(tmp_path / "r", evaluations(), floor(), LENGTH, ABOUT)
    assert not list(tmp_path.iterdir())


def test_folder_is_looked_at_before_engines_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "evaluate", None)  # would be a traceback
    assert cli.main(["eval", "m", "--report", str(tmp_path)]) == 1
    assert "exists: name another folder" in capsys.readouterr().err
    assert cli.main(["eval", "m", "--report", str(tmp_path / "a" / "b")]) == 1
    assert "not a writable directory" in capsys.readouterr().err


def test_command_measures_the_floor_and_writes(tmp_path, monkeypatch, capsys):
    """``auto`` first, keeping what the others are compared with; the floor in small chunks."""
    asked = []

    def evaluate(model, dtype, texts, *, keep=None, reference=None, chunk=None, **_):
        assert keep is None or keep.is_dir()
        asked.append(
            (dtype, keep is not None, reference is not None, chunk, *map(len, texts.values()))
        )
        kl = None if reference is None else 0.002 if dtype == BASELINE else 0.05
        return Evaluation({t: score(0.1, kl, len(w)) for t, w in texts.items()}, 100)

    monkeypatch.setattr(report, "evaluate", evaluate)
    monkeypatch.setattr(report, "WINDOW", LENGTH)
    monkeypatch.setattr(report, "load_tokenizer", lambda _: None)
    monkeypatch.setattr(report, "positions", lambda _: None)
    monkeypatch.setattr(report, "make_windows", lambda *_: [[1] * LENGTH] * 4)
    out = tmp_path / "report"
    command = ["eval", "m", "--dtypes", "int4", "--windows", "4", "--no-tasks"]
    assert cli.main([*command, "--report", str(out)]) == 0
    assert asked == [
        (BASELINE, True, False, None, 4),
        (BASELINE, False, True, 26, 2),
        ("int4", False, True, None, 4),
    ]
    printed = capsys.readouterr().out
    assert "0.02500" in printed and "noise floor" in printed and "index.html" in printed
    about = json.loads((out / "report.json").read_text())["about"]
    assert about["versions"]["vLLM"] and about["compiled kernels"]
    assert "Greedy" not in printed
    asked.clear()
    assert cli.main([*command, "--no-divergence"]) == 0
    assert asked == [(BASELINE, False, False, None, 4), ("int4", False, False, None, 4)]
    assert "noise floor" not in capsys.readouterr().out


def test_command_compares_generations(monkeypatch, capsys):
    """Those of ``auto`` are a text for the others, and each engine's own are compared."""
    asked = []

    def evaluate(model, dtype, texts, *, reference=None, prompts=(), length=0, **_):
        asked.append((dtype, {name: len(windows) for name, windows in texts.items()}, len(prompts)))
        generations = tuple([1] * length for _ in prompts)
        if dtype == "int4":
            generations[1][report.PROMPT + 40] = 2
            generations[2][report.PROMPT + 10] = 2
        scores = {t: score(0.1, reference and 0.01, len(w)) for t, w in texts.items()}
        return Evaluation({report.OWN: score(0.1, None, 3), **scores}, 100, generations)

    monkeypatch.setattr(report, "evaluate", evaluate)
    monkeypatch.setattr(report, "load_tokenizer", lambda _: None)
    monkeypatch.setattr(report, "positions", lambda _: None)
    monkeypatch.setattr(
        report, "make_windows", lambda _, text, count, length=LENGTH: [[1] * length] * count
    )
    command = ["eval", "m", "--dtypes", "int4", "--windows", "4", "--no-tasks"]
    assert cli.main([*command, "--drift", "3"]) == 0
    both = {"builtin": 4, report.OWN: 3}
    assert asked == [
        (BASELINE, {"builtin": 4}, 3),
        (BASELINE, {"builtin": 2, report.OWN: 2}, 2),
        ("int4", both, 3),
    ]
    printed = capsys.readouterr().out
    assert re.search(r"noise floor +1920 +1920 +2 of 2", printed)
    assert re.search(r"int4 +40 +10 +1 of 3", printed)


@pytest.mark.parametrize(
    ("windows", "drift", "of_the_floor", "again"),
    [
        (1, 0, "its first window prefilled", None),
        (4, 0, "its first 2 windows prefilled", None),
        (1, 1, "its first window prefilled", "again, the first"),
        (4, 1, "its first 2 windows (1 of own generations) prefilled", "again, the first"),
        (4, 3, "its first 2 windows prefilled", "again, the first 2, one at a time"),
    ],
)
def test_captions_count_what_ran(windows, drift, of_the_floor, again, monkeypatch, capsys):
    def evaluate(model, dtype, texts, *, reference=None, prompts=(), length=0, **_):
        generations = tuple([1] * length for _ in prompts)
        scores = {t: score(0.1, reference and 0.01, len(w)) for t, w in texts.items()}
        if prompts:
            scores.setdefault(report.OWN, score(0.1, None, len(prompts)))
        return Evaluation(scores, 100, generations)

    monkeypatch.setattr(report, "evaluate", evaluate)
    monkeypatch.setattr(report, "load_tokenizer", lambda _: None)
    monkeypatch.setattr(report, "positions", lambda _: None)
    monkeypatch.setattr(
        report, "make_windows", lambda _, text, count, length=LENGTH: [[1] * length] * count
    )
    command = ["eval", "m", "--dtypes", "int4", "--windows", str(windows), "--no-tasks"]
    assert cli.main([*command, *(["--drift", str(drift)] if drift else [])]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{windows} window{'s' * (windows > 1)} of 2,048 tokens; change" in printed
    assert f"against itself, {of_the_floor} in chunks" in printed
    if again:
        assert again in printed and ("one at a time" in printed) == (drift > 1)
        assert cli.main([*command, "--drift", str(drift), "--no-divergence"]) == 0
        assert "Noise floor" not in capsys.readouterr().out


def test_where_there_is_a_pool_its_size_is_said(tmp_path, monkeypatch):
    def evaluate(dtype, texts, **_):
        return Evaluation({t: score(0.1, None, len(w)) for t, w in texts.items()}, 100)

    monkeypatch.setattr(report, "_engine", lambda *_: evaluate)
    monkeypatch.setattr(report, "WINDOW", LENGTH)
    monkeypatch.setattr(report, "load_tokenizer", lambda _: None)
    monkeypatch.setattr(report, "positions", lambda _: None)
    monkeypatch.setattr(report, "make_windows", lambda *_: [[1] * LENGTH] * 4)
    command = ["eval", "m", "--dtypes", "int4", "--windows", "4", "--no-tasks", "--no-divergence"]
    for driver, said in (("vllm", "1 GiB"), ("transformers", None)):
        out = tmp_path / driver
        assert cli.main([*command, "--driver", driver, "--report", str(out)]) == 0
        assert json.loads((out / "report.json").read_text())["about"].get("KV_memory") == said
