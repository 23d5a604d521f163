"""Questions from a seed, the statistics of their answers, and what is shown of them."""

from __future__ import annotations

import argparse
import json
import random
import re
from types import SimpleNamespace

import pytest
from tiny_models import make

from kvq_plugin import cli
from kvq_plugin.evaluate import BASELINE, evaluate, load_tokenizer
from kvq_plugin.tasks import arguments, asked, page, results, tables
from kvq_plugin.tasks.asked import Asked, Settings, positions
from kvq_plugin.tasks.items import DEPTHS, TASKS, Item, make_items
from kvq_plugin.tasks.statistics import mcnemar, wilson


class Words:
    """A tokenizer of words, with the space before each, digits and signs."""

    chat_template = None

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return SimpleNamespace(input_ids=re.findall(r" ?[A-Za-z]+| ?\d|\s|[^\w\s]", text))

    def decode(self, ids, skip_special_tokens=True):
        return "".join(ids)


LENGTHS = (300, 900)


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return make_items(Words(), list(TASKS), LENGTHS, 2, 7)


def text(item: Item) -> str:
    return "".join(item.prompt)


def test_same_seed_same_questions(items):
    assert make_items(Words(), list(TASKS), LENGTHS, 2, 7) == items
    assert make_items(Words(), list(TASKS), LENGTHS, 2, 8) != items
    # What else is asked for does not matter.
    alone = make_items(Words(), ["tracking"], (900,), 2, 7)
    assert alone == [item for item in items if (item.task, item.length) == ("tracking", 900)]


def test_questions_fill_their_length(items):
    for item in items:
        used = len(item.prompt) + item.max_tokens
        # A sentence, a line or an entry more would not fit. Copies: two of them.
        assert item.length - 60 <= used <= item.length, (item.task, item.length, used)


def test_answer_is_in_the_context_once_at_its_depth(items):
    for item in items:
        if item.depth is None:
            continue
        context, question = text(item).rsplit("\n", 1)
        assert context.count(item.answer) == 1 and item.answer not in question
        place = context.index(item.answer) / len(context)
        assert abs(place - item.depth) < 0.3, (item.task, item.depth, place)


def test_needles_are_each_others_distractors(items):
    needles = [item for item in items if item.task == "needle" and item.context == 0]
    for length in LENGTHS:
        five = [item for item in needles if item.length == length]
        assert [item.depth for item in five] == list(DEPTHS)
        assert len({item.answer for item in five}) == 5
        contexts = {text(item).rsplit("\n", 1)[0] for item in five}
        assert len(contexts) == 1
        for item in five:
            assert all(other.answer in text(item) for other in five)
            name = re.search(r"code of the ([\w ]+) is$", text(item))[1]
            assert f"The access code of the {name} is {item.answer}." in text(item)


def test_tracked_value_is_reached_by_two_steps(items):
    for item in items:
        if item.task == "tracking":
            asked = text(item).split()[-2]
            middle = re.search(rf"\b{asked} = (\w+)", text(item))[1]
            assert re.search(rf"\b{middle} = {item.answer}\b", text(item))


def test_copies_are_of_all_there_is(items):
    for item in items:
        if item.task in ("copy", "json"):
            assert text(item).count(item.answer) == 1
            assert len(item.answer) > item.length / 3
        if item.task == "json":
            entries = json.loads(item.answer)
            assert len(entries) > 1 and set(entries[0]) == {"name", "code", "open"}


def test_too_short_a_length_is_refused_with_what_would_do():
    with pytest.raises(ValueError, match="length of 50 tokens is too short: ask for [0-9]+ or"):
        make_items(Words(), ["needle"], [50], 1, 0)


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        ({"max_position_embeddings": 512}, 512),
        ({"text_config": {"max_position_embeddings": 600}}, 600),
        ({"max_position_embeddings": 512, "rope_scaling": {"type": "yarn", "factor": 4.0}}, 2048),
        (
            {
                "max_position_embeddings": 512,
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 2},
                    "sliding_attention": {"rope_type": "default"},
                },
            },
            1024,
        ),
    ],
)
def test_lengths_that_the_model_has_no_positions_for(config, limit, tmp_path, monkeypatch):
    """Refused before questions are made, which takes an hour of a hundred million tokens."""
    made = []
    monkeypatch.setattr(asked, "make_items", lambda *given: made.append(given) or [])
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = str(tmp_path)
    with pytest.raises(ValueError, match=f"has {limit + 1} tokens, .* ask for {limit} or fewer"):
        Settings(lengths=(192, limit + 1)).ask(model, Words())
    assert not made
    Settings(lengths=(192, limit)).ask(model, Words())
    Settings(names=(), lengths=(limit + 1,)).ask(model, Words())
    (tmp_path / "config.json").write_text("{}")  # alibi and the like: as many as are asked
    Settings(lengths=(99_999_999,)).ask(model, Words())
    assert len(made) == 3


@pytest.mark.parametrize("option", ["--tasks", "--task-prompts"])
def test_a_folder_for_a_file_of_questions(option, tmp_path, capsys):
    (tmp_path / "q.jsonl").write_text("")
    files = ["--tasks", str(tmp_path / "q.jsonl"), option, str(tmp_path)]
    assert cli.main(["eval", "m", *files]) == 1
    said = capsys.readouterr().err
    assert f"kvq: {option} {tmp_path}: is a directory: expected a file with" in said


def test_right_is_the_answer_and_no_more():
    item = Item("needle", 100, 0.5, 0, [], "4821", 6)
    for right in ("4821", " 4821.", "\n4821 and", " 4821\n"):
        assert item.is_right(right)
    for wrong in ("", "482", " 48215", "is 4821", "4 821", "4821st"):
        assert not item.is_right(wrong)


# --- statistics ------------------------------------------------------------------------


def test_wilson_against_published_values():
    """Brown, Cai, DasGupta (2001), and the ends."""
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    with pytest.raises(ValueError, match="0 to N right answers"):
        wilson(3, 2)


def test_mcnemar_against_the_binomial():
    assert mcnemar(0, 0) == mcnemar(3, 3) == 1.0
    assert mcnemar(0, 5) == mcnemar(5, 0) == pytest.approx(2 / 32)
    assert mcnemar(1, 9) == pytest.approx(2 * (1 + 10) / 1024)


def small(task="needle", contexts=10, depths=(0.0, 1.0)) -> list[Item]:
    return [
        Item(task, 256, depth, context, [1, 2], f"{context}{depth:g}", 4)
        for context in range(contexts)
        for depth in depths
    ]


def test_figures_by_hand():
    items = small()
    right = [item.answer for item in items]
    # int4: wrong at the beginning of contexts 0 to 5, of which auto has one wrong at the end.
    int4 = ["no" if i.depth == 0 and i.context < 6 else i.answer for i in items]
    auto = ["no" if i.depth == 1 and i.context == 0 else i.answer for i in items]
    found = results.figures(items, {BASELINE: auto, "int8": right, "int4": int4}, BASELINE)
    [row] = found["rows"]
    assert (row["task"], row["length"], row["able"]) == ("needle", 256, True)
    first, last = row["cells"]
    assert first["right"] == {BASELINE: 10, "int8": 10, "int4": 4} and first["depth"] == 0
    assert last["right"] == {BASELINE: 9, "int8": 10, "int4": 10} and last["items"] == 10
    assert "p" not in row["caches"][BASELINE]
    assert row["caches"]["int8"]["gained"] == 1 and row["caches"]["int8"]["p"] == 1.0
    # Context 0 lost one and gained one.
    own = row["caches"]["int4"]
    assert (own["lost"], own["gained"], own["p"]) == (5, 0, mcnemar(5, 0))
    assert (own["right"], own["low"], own["high"]) == (14, *wilson(7, 10))
    assert found["total"]["int4"] == own


def test_questions_about_one_context_are_no_trials_of_their_own():
    """Right or wrong together: the interval is that of contexts, not of five times as many."""
    items = small(contexts=20, depths=DEPTHS)
    auto = [i.answer if i.context < 14 else "no" for i in items]
    own = results.figures(items, {BASELINE: auto}, BASELINE)["total"][BASELINE]
    assert (own["right"], own["items"]) == (70, 100)
    assert (own["low"], own["high"]) == wilson(14, 20)


def test_what_auto_cannot_do_is_not_ranked_and_counts_in_the_total():
    items = small() + small("tracking")
    auto = [i.answer if i.task == "needle" or i.context < 4 else "no" for i in items]
    none = ["no"] * len(items)
    found = results.figures(items, {BASELINE: auto, "int4": none}, BASELINE)
    able, unable = found["rows"]
    assert able["able"] and not unable["able"]
    assert not any(cell["able"] for cell in unable["cells"])
    assert tables.row_cell(able, "int4") == "*0"
    unable["caches"]["int4"]["p"] = 0.001
    assert tables.row_cell(unable, "int4") == "0"  # no star
    # Chosen by auto's answers, the total would favour auto: it has all.
    assert found["total"]["int4"]["items"] == 40 and found["total"]["int4"]["lost"] == 14


def test_floor_answers_the_short_ones():
    items = small() + [Item("copy", 256, None, c, [1], "long", 40) for c in range(3)]
    asked = Asked(items)
    assert len(asked.questions) == 23 and len(asked.short) == 20
    answers = {BASELINE: [i.answer for i in items], "int8": [i.answer for i in items]}
    found = asked.figures(answers, BASELINE, {"floor": [i.answer for i in items[:19]] + ["no"]})
    assert found["longbench"] == {}
    needle, copy = found["generated"]["rows"]
    assert needle["caches"]["floor"]["right"] == 19 and "floor" not in copy["caches"]
    total = found["generated"]["total"]
    assert list(total) == [BASELINE, "floor", "int8"]
    assert total["floor"]["items"] == 20 and total["int8"]["items"] == 23


def test_heat_map_and_tables_show_every_cell(capsys):
    from rich.console import Console

    items = small() + small("tracking") + [Item("copy", 9, None, c, [1], "x", 40) for c in (0, 1)]
    auto = [i.answer if i.task != "tracking" else "no" for i in items]
    int4 = ["no" if i.context < 6 else i.answer for i in items]
    found = results.figures(items, {BASELINE: auto, "int4": int4}, BASELINE)
    drawn = page.heat_map(found)
    said = [[t.get_text() for t in axis.texts] for axis in drawn.axes[:3]]
    assert said[0] == ["10/10", "4/10", "10/10", "4/10"] and said[2] == ["2/2", "0/2"]
    hatched = [len(axis.patches) for axis in drawn.axes[:3]]
    assert hatched == [0, 2, 0]
    html = "\n".join(page.html({"generated": found, "longbench": {}}, BASELINE))
    assert "<td>too hard for auto</td>" in html and "<td>*8</td>" in html
    console = Console(width=200)
    for table in tables.generated_tables(found, BASELINE):
        console.print(table)
    printed = capsys.readouterr().out
    assert "tracking (too hard for auto)" in printed and re.search(
        r"needle +256 +20 +20 +\*8", printed
    )


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"max_position_embeddings": 2048}, 2048),
        ({"text_config": {"max_position_embeddings": 512}}, 512),
        ({"n_positions": 1024, "max_position_embeddings": None}, 1024),
        ({"max_position_embeddings": -1}, None),
        ({"max_position_embeddings": 4096, "seq_length": 2048}, 2048),
        ({}, None),
    ],
)
def test_positions(tmp_path, config, expected):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert positions(str(tmp_path)) == expected


# --- the command -----------------------------------------------------------------------


def settings(*words: str) -> Settings:
    parser = argparse.ArgumentParser()
    arguments.add(parser)
    return arguments.settings(parser.parse_args(words))


def test_arguments():
    assert settings() == Settings()
    assert settings("--no-tasks").names == ()
    asked = settings("--task-set", "json,needle,json", "--task-lengths", "900,300,900")
    assert (asked.names, asked.lengths) == (("json", "needle"), (300, 900))
    assert settings("--task-contexts", "3", "--seed", "5").described() == (
        "needle, multikey, tracking, copy, json at 192 and 1,000 tokens, 3 contexts each, seed 5"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--task-prompts p.json", "--task-prompts was asked: without --tasks .*; name one"),
        ("--tasks-max-length 5", "--tasks-max-length was asked: without --tasks"),
        ("--no-tasks --task-set json", "--task-set was asked: with --no-tasks .* leave it out, or"),
        ("--no-tasks --task-lengths 192,1000", "--task-lengths was asked: with --no-tasks"),
        ("--no-tasks --task-contexts 3", "--task-contexts was asked: with --no-tasks"),
        ("--no-tasks --seed 0", "--seed was asked: with --no-tasks"),
    ],
)
def test_what_would_be_ignored_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        settings(*words.split())


def test_a_file_is_asked_with_its_options(tmp_path):
    file, prompts = tmp_path / "f.jsonl", tmp_path / "p.json"
    for path in (file, prompts):
        path.touch()
    words = f"--no-tasks --tasks {file} --task-prompts {prompts} --tasks-max-length 900"
    asked = settings(*words.split())
    assert (asked.names, asked.file, asked.prompts) == ((), file, prompts)
    assert asked.room == 900


def test_unknown_task_is_refused_with_the_known(capsys):
    with pytest.raises(SystemExit):
        cli.main(["eval", "m", "--task-set", "needle,haystack"])
    error = capsys.readouterr().err
    assert "unknown task 'haystack'; known are needle, multikey" in error


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_engine_answers_every_question(tmp_path, smollm2):
    """In order, the same alone and together, by the same process that scores."""
    model = str(make(tmp_path, "gqa"))
    load_tokenizer(str(smollm2)).save_pretrained(model)  # any: prompts are tokens
    rng = random.Random(3)
    begin = [rng.randrange(3, 500) for _ in range(200)]
    questions = [(begin + [rng.randrange(3, 500) for _ in range(9)], 4 + n % 3) for n in range(70)]
    ticks = []
    found = evaluate(
        model,
        "int8_per_token_head",
        {"random": [begin[:50]]},
        kv_memory_bytes=64 << 20,
        questions=questions + questions[:3],
        tick=lambda: ticks.append(1),
    )
    assert len(found.answers) == 73 and len(ticks) == 74
    assert found.answers[70:] == found.answers[:3]  # another batch, the prefix cached
    assert len(set(found.answers)) > 10 and len(found.scores["random"].logprobs) == 49
