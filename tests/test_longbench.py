"""Questions in LongBench's format: what is read, what is asked, and the metrics by hand."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

from kvq_plugin import cli, report
from kvq_plugin.evaluate import BASELINE, Evaluation, Score
from kvq_plugin.tasks import asked, longbench, page, tables
from kvq_plugin.tasks.longbench import DATASETS, METRICS, Entry, figures, read


class Words:
    """A tokenizer whose tokens are words; white space becomes one space."""

    def __init__(self, chat: bool = False):
        self.chat_template = "template" if chat else None

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return SimpleNamespace(input_ids=text.split())

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(ids) + " "

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        [message] = messages
        return f"<user> {message['content']} <assistant>"


def entry(**changes) -> dict:
    return {
        "context": "The mill {is} red.",
        "input": "What colour?",
        "answers": ["red", "dark red"],
        "all_classes": None,
        "dataset": "qasper",
        "length": 4,
        **changes,
    }


def write(folder, *entries) -> object:
    file = folder / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, entries)) + "\n\n")
    return file


def test_reads_what_longbench_has(tmp_path):
    file = write(tmp_path, entry(), entry(dataset="trec_e", all_classes=["a", "b"], _id="x"))
    one, two = read(file, Words(), 1000)
    assert (one.dataset, one.max_tokens, one.length, one.classes) == ("qasper", 128, 4, ())
    assert one.answers == ("red", "dark red")
    prompt = " ".join(one.prompt)
    assert prompt.startswith("The mill {is} red. ") and prompt.endswith("What colour? Answer:")
    assert (two.dataset, two.classes, two.max_tokens) == ("trec", ("a", "b"), 64)


def test_templates_of_longbench_itself(tmp_path):
    file = write(tmp_path, entry(context="{input} {x}"))
    [one] = read(file, Words(), 1000, {"qasper": "Article: {context} Now: {input}"})
    assert " ".join(one.prompt) == "Article: {input} {x} Now: What colour?"


def test_a_file_of_templates_is_looked_at(tmp_path):
    file = tmp_path / "prompts.json"
    file.write_text('{"qasper": "{context}"}')
    assert longbench.templates(file) == {"qasper": "{context}"}
    for text, message in (("{", "is not JSON"), ('["a"]', "expected an object with a template")):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            longbench.templates(file)


def test_of_long_prompts_the_middle_is_left_out(tmp_path):
    words = " ".join(f"w{i}" for i in range(500))
    file = write(tmp_path, entry(context=words, dataset="lcc", input=""))
    [one] = read(file, Words(), 104)
    assert one.prompt == [f"w{i}" for i in (*range(20), *range(480, 500))]


def test_no_room_beside_the_answer_is_refused(tmp_path):
    file = write(tmp_path, entry(context="word " * 500, dataset="lcc", input=""))
    with pytest.raises(ValueError, match="line 1: .* lcc's answer .* got 65 .*length by 1 or more"):
        read(file, Words(), 65)
    [one] = read(file, Words(), 66)
    assert len(one.prompt) == 2


def test_chat_template_but_for_what_is_continued(tmp_path):
    long = " ".join(["word"] * 300)
    file = write(tmp_path, entry(context=long), entry(dataset="trec", all_classes=["red"]))
    one, two = read(file, Words(chat=True), 200)
    assert (one.prompt[0], one.prompt[-1]) == ("<user>", "<assistant>")
    assert len(one.prompt) + one.max_tokens == 200
    assert two.prompt[0] == "The"


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"dataset": "hellaswag"}, "line 2: unknown dataset 'hellaswag'; known are narrativeqa"),
        ({"answers": []}, "line 2: expected at least one answer"),
        ({"answers": [7]}, "line 2: expected text as context, input, dataset and each"),
    ],
)
def test_what_is_no_entry_is_refused(tmp_path, broken, message):
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path, entry(), entry(**broken)), Words(), 1000)


def test_missing_fields_and_lines_that_are_no_json_are_named(tmp_path):
    one = entry()
    del one["answers"], one["length"]
    with pytest.raises(ValueError, match="line 1: .*; answers, length missing"):
        read(write(tmp_path, one), Words(), 1000)
    (tmp_path / "questions.jsonl").write_text("{nonsense\n")
    with pytest.raises(ValueError, match=r"questions.jsonl, line 1: "):
        read(tmp_path / "questions.jsonl", Words(), 1000)
    (tmp_path / "questions.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="has no entries"):
        read(tmp_path / "questions.jsonl", Words(), 1000)


def test_packages_are_missed_before_engines_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge", None)
    with pytest.raises(ValueError, match=r"rouge: pip install 'kvq-plugin\[longbench\]'"):
        read(write(tmp_path, entry(dataset="samsum")), Words(), 1000)
    assert read(write(tmp_path, entry()), Words(), 1000)  # needs none


# --- metrics ---------------------------------------------------------------------------


def metric(name: str, text: str, answer: str, classes=()) -> float:
    return METRICS[name](text, answer, classes)


def test_qa_f1():
    assert metric("qa", "The dark-red Mill!", "a darkred mill") == 1.0
    # two of three words given, two of four asked for
    assert metric("qa", "red mill burns", "old red mill stands") == pytest.approx(4 / 7)
    assert metric("qa", "", "red") == metric("qa", "blue", "red") == 0.0


def test_classification():
    classes = ["Number", "Number of people", "Date", "City"]
    assert metric("classification", "It is Date", "Date", classes) == 1.0
    assert metric("classification", "Date or City", "Date", classes) == 0.5
    # "Number" is named by the right answer itself.
    assert metric("classification", "Number of people", "Number of people", classes) == 1.0
    assert metric("classification", "Number", "Date", classes) == 0.0


def test_count_and_retrieval():
    assert metric("count", "There are 7.", "7") == 1.0
    assert metric("count", "7 of 12, or 17", "7") == pytest.approx(1 / 3)
    assert metric("count", "seven", "7") == 0.0
    assert metric("retrieval", "Paragraph 12", "Paragraph 12") == 1.0
    assert metric("retrieval", "Paragraph 1 or 12", "Paragraph 12") == 0.5
    assert metric("retrieval_zh", "段落12", "段落12") == 1.0


def test_rouge_l():
    pytest.importorskip("rouge", reason="the extra longbench")
    assert metric("rouge", "the mill is red", "the mill is red") == pytest.approx(1.0)
    # LCS "the mill red", 3 of 4 and 3 of 5 words
    found = metric("rouge", "the mill was red", "the old mill is red")
    assert found == pytest.approx(2 * 0.75 * 0.6 / 1.35, abs=1e-6)
    assert metric("rouge", "", "red") == metric("rouge", "...", "red") == 0.0


def test_code_similarity():
    pytest.importorskip("rapidfuzz", reason="the extra longbench")
    assert metric("code", "\n# a comment\nreturn x\nmore", "return x") == 1.0
    # 8 and 8 characters, 7 in common: 2 * 7 / 16 = 87.5, rounded to 88 as fuzzywuzzy does
    assert metric("code", "return y", "return x") == 0.88
    assert metric("code", "```", "return x") == 0.0


def test_chinese():
    pytest.importorskip("jieba", reason="the extra longbench")
    pytest.importorskip("rouge", reason="the extra longbench")
    assert metric("qa_zh", "北京。", "北京") == 1.0
    assert metric("qa_zh", "上海", "北京") == 0.0
    assert metric("rouge_zh", "我 喜欢 北京", "我喜欢北京") == pytest.approx(1.0)


def test_best_answer_and_first_line():
    trec = Entry("trec", 1, [], 64, ("Date",), ("Date", "City"))
    assert trec.score("\nDate\nCity") == 1.0
    qa = Entry("hotpotqa", 1, [], 32, ("blue", "red"), ())
    assert qa.score("red") == 1.0 and qa.score("red\nmill") < 1.0


def test_every_dataset_has_metric_and_template():
    assert len(DATASETS) == 21
    for kind, tokens in DATASETS.values():
        assert kind in METRICS and kind in longbench.PROMPTS and tokens in (32, 64, 128, 512)


def test_figures():
    entries = [Entry("hotpotqa", n, [], 32, ("red",), ()) for n in (100, 5000, 9000, 9000)]
    answers = {BASELINE: ["red"] * 4, "int4": ["red", "blue", "red", "red"]}
    found = figures(entries, answers, BASELINE)["hotpotqa"]
    assert found["items"] == 4 and found["caches"][BASELINE]["score"] == 100
    own = found["caches"]["int4"]
    assert (own["score"], own["change"], own["change_error"]) == (75, -25, 25)
    assert own["by_length"] == {"0-4k": 100, "4-8k": 0, "8k+": 100}
    assert tables.longbench_cell(own) == "75.00 (-25.00 ± 25.00)"
    html = "\n".join(page.html({"generated": {}, "longbench": {"hotpotqa": found}}, BASELINE))
    assert "<td>75.00 (-25.00 ± 25.00)</td>" in html


def test_command(tmp_path, monkeypatch, capsys):
    """Asked of every engine, after the generated tasks; the floor is asked the short ones."""
    seen = []

    def evaluate(model, dtype, texts, *, chunk=None, questions=(), **_):
        seen.append((dtype, chunk is not None, len(questions)))
        wrong = "nothing" if dtype == "int4" else "red"
        return Evaluation(
            {t: Score((-1.0, -2.0)) for t in texts}, 100, (), (wrong,) * len(questions)
        )

    monkeypatch.setattr(report, "evaluate", evaluate)
    monkeypatch.setattr(report, "load_tokenizer", lambda _: Words())
    monkeypatch.setattr(report, "make_windows", lambda *_: [[1] * 3])
    for module, name in ((report, "positions"), (asked, "longest"), (asked, "_stretched")):
        monkeypatch.setattr(module, name, lambda _: 4096)
    file = write(tmp_path, entry(), entry(answers=["blue"]))
    command = ["eval", "m", "--dtypes", "int4", "--no-divergence", "--tasks", str(file)]
    assert cli.main([*command, "--no-tasks"]) == 0
    assert seen == [(BASELINE, False, 2), ("int4", False, 2)]
    printed = capsys.readouterr().out
    assert "qasper" in printed and "50.00" in printed and "0.00 (-50.00 ± 50.00)" in printed
    seen.clear()
    assert cli.main([*command, "--task-set", "needle", "--task-contexts", "1"]) == 0
    assert seen == [(BASELINE, False, 12), ("int4", False, 12)]
    printed = capsys.readouterr().out
    assert "needle (too hard for auto)" in printed and "qasper" in printed
