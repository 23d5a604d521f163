"""Texts in other encodings, with marks and lines of other editors, and of one name."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvq_plugin import evaluation_page, report, texts
from kvq_plugin.allocate import measure
from kvq_plugin.calibrate.data import read_texts
from kvq_plugin.divergence import Divergence
from kvq_plugin.evaluate import BASELINE, Evaluation, Score
from kvq_plugin.tasks import longbench


def test_a_byte_order_mark_is_no_text(tmp_path):
    """It was the first token of the first window."""
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert texts.read_text(str(tmp_path / "a.txt")) == "one\ntwo"
    assert read_texts([str(tmp_path / "a.txt")], None) == ["one\ntwo"]
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf"one"\n')
    assert read_texts([str(tmp_path / "a.jsonl")], None) == ["one"]
    (tmp_path / "prompts.json").write_bytes(b'\xef\xbb\xbf{"qasper": "{context}"}')
    assert longbench.templates(tmp_path / "prompts.json") == {"qasper": "{context}"}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_two_bytes_a_letter_are_refused(encoding, tmp_path):
    """Without a mark English is UTF-8 with a NUL after each letter, and was scored as that; and
    latin1, which the message named, makes no text of it."""
    file = tmp_path / "a.txt"
    file.write_bytes("plain English".encode(encoding))
    for read in (texts.read_text, lambda name: read_texts([name], None)):
        with pytest.raises(ValueError, match="a.txt: expected UTF-8 .* `iconv -f utf-16 -t utf-8`"):
            read(str(file))


def test_questions_in_another_encoding_are_named(tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_bytes("{}\nBücher".encode("latin-1"))
    tokenizer = SimpleNamespace(chat_template=None)
    with pytest.raises(ValueError, match="questions.jsonl: expected UTF-8 text"):
        longbench.read(file, tokenizer, 100, None)


def test_lines_end_where_jsonl_ends_them(tmp_path):
    """Strings may have Unicode's other ends of lines in them."""
    said, file = "one\u2028two\x85three\u2029", tmp_path / "a.jsonl"
    lines = [json.dumps({"text": said}, ensure_ascii=False), json.dumps("four")]
    file.write_text("\r\n".join(lines), encoding="utf-8")
    assert read_texts([str(file)], None) == [said, "four"]


def test_a_text_that_is_too_short_is_named(tmp_path, monkeypatch):
    """Which of several it was could not be told."""
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 9}')
    for name, text in (("long", "a b c d e f g h i"), ("short", "a b")):
        (tmp_path / name).write_text(text)
    names = [str(tmp_path / name) for name in ("long", "short")]
    tokenizer = lambda text, **_: SimpleNamespace(input_ids=text.split())  # noqa: E731
    monkeypatch.setattr(report, "load_tokenizer", lambda _: tokenizer)
    with pytest.raises(ValueError, match="short: the text has 2 tokens, a window of 8 needs"):
        report.run_evaluation(str(tmp_path), [BASELINE], names, windows=1)
    with pytest.raises(ValueError, match="short: the text has 2 tokens"):
        measure.windows_of(tokenizer, names[1], 1, 8)


def test_texts_of_one_name_are_told_apart(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "160")
    names = ["old/mine.txt", "new/mine.txt", "else/other.txt"]
    assert list(texts.labels(names).values()) == ["old/mine.txt", "new/mine.txt", "other.txt"]
    apart = Divergence((0.1, 0.2), (0.1, 0.1), (1.0, 1.0))
    scores = {name: Score((-2.0, -1.0), divergence=apart) for name in names}
    found = Evaluation(scores, 1000)
    results = report.Results({BASELINE: Evaluation(scores, 1000), "fp8": found}, found)
    evaluation_page.write(tmp_path / "out", results.evaluations, found, 3, {"model": "m"})
    page = (tmp_path / "out" / evaluation_page.PAGE).read_text()
    for label in ("old/mine.txt", "new/mine.txt", "other.txt"):
        assert f"<h2>{label}</h2>" in page
    by_dtype = {dtype: e.scores for dtype, e in results.evaluations.items()}
    for table in (report.evaluation_table("m", by_dtype, 1), report.divergence_table(results)):
        report.print_table(report.Console(), table)
        printed = capsys.readouterr().out
        assert "old/mine.txt" in printed and "new/mine.txt" in printed
        assert "else/other.txt" not in printed and Path(names[2]).name in printed
