"""Questions that a seed makes, with the one answer that is right.

Every task has its answer in the prompt, so that what the cache keeps of it decides. A prompt is
text to be continued, with no chat template: base models answer too. No data set is needed, and the
same seed and tokenizer give the same questions everywhere.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

#: Where in the context the answer stands: 0 its beginning, 1 its end.
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
#: Tokens generated beyond the answer's own, to see whether it ends there.
SPARE = 2
#: Tokens of the whole text beyond those of its parts, at most; and of a context, at least.
_SLACK, _LEAST = 4, 60

_ADJECTIVES, _NOUNS, _VERBS = (
    words.split()
    for words in (
        "amber ancient bitter black blue bright broken brown calm cold crimson distant early empty "
        "gentle golden green grey hidden hollow jade late little lonely loud narrow northern old "
        "pale quiet red round royal silent silver southern steep sunny tall western white wooden "
        "yellow",
        "anchor barn basket bell bridge candle castle cellar chapel cottage door engine farm ferry "
        "forest garden gate harbour hill house island kettle lamp ladder lantern library market "
        "meadow mill mirror orchard palace pasture piano quarry river road school ship station "
        "stove table tower tunnel valley village wagon well",
        "crosses faces follows passes reaches resembles shades touches",
    )
)


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        task: name in TASKS.
        length: tokens of prompt and answer together, at most, that were asked for.
        depth: one of DEPTHS, or None for tasks whose answer is the whole context.
        context: items of the same task and length with the same number share their context.
        prompt: token ids, to be continued greedily for *max_tokens*.
        answer: what must follow, white space before it aside.
    """

    task: str
    length: int
    depth: float | None
    context: int
    prompt: list[int]
    answer: str
    max_tokens: int

    def is_right(self, text: str) -> bool:
        """Whether *text*, which the model wrote, is the answer, and the answer ends there."""
        return re.match(rf"\s*{re.escape(self.answer)}(?!\w)", text) is not None


def make_items(
    tokenizer, tasks: Sequence[str], lengths: Sequence[int], contexts: int, seed: int
) -> list[Item]:
    """*contexts* contexts of each of *tasks* at each of *lengths*: 5 items each, one per depth, for
    tasks with depths, else one.

    Raises ValueError for a length that is too short to hold the question.
    """
    return [
        item
        for task in tasks
        for length in lengths
        for context in range(contexts)
        # Of its own: what else is asked for changes no question.
        for item in _context(tokenizer, task, length, context, f"{seed}/{task}/{length}/{context}")
    ]


def _context(tokenizer, task: str, length: int, context: int, seed: str) -> Iterator[Item]:
    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    for depth, text, answer in TASKS[task](random.Random(seed), length, count):
        prompt = tokenizer(text, verbose=False).input_ids
        tokens = count(answer) + SPARE
        yield Item(task, length, depth, context, prompt, answer, tokens)


#: One question: its depth, its prompt and its answer.
Question = tuple[float | None, str, str]
Count = Callable[[str], int]


def _names(rng: random.Random) -> Iterator[str]:
    """``old mill`` and the like, each once; the first 43 have no word in common."""
    adjectives, nouns = (rng.sample(words, len(words)) for words in (_ADJECTIVES, _NOUNS))
    for turn in range(len(nouns)):
        for i, adjective in enumerate(adjectives):
            yield f"{adjective} {nouns[(i + turn) % len(nouns)]}"


def _number(rng: random.Random) -> str:
    return str(rng.randrange(10_000, 100_000))


def _sentence(rng: random.Random) -> str:
    one, two = (f"{rng.choice(_ADJECTIVES)} {rng.choice(_NOUNS)}" for _ in range(2))
    return f"The {one} {rng.choice(_VERBS)} the {two}."


def _filler(rng: random.Random, room: int, count: Count) -> list[str]:
    """Sentences that say nothing, of at most *room* tokens."""
    found = []
    while room > 0:
        sentence = _sentence(rng)
        room -= count(" " + sentence)
        if room >= 0:
            found.append(sentence)
    return found


def _at_depths(lines: list[str], filler: list[str]) -> str:
    """*lines* among the filler, at DEPTHS."""
    parts = list(filler)
    for depth, line in sorted(zip(DEPTHS, lines, strict=True), reverse=True):
        parts.insert(round(depth * len(filler)), line)
    return " ".join(parts)


def _needle(rng: random.Random, length: int, count: Count) -> Iterator[Question]:
    """Facts of one form, one per depth, in sentences about other things: each is asked for, and
    the four others distract from it."""
    names = _names(rng)
    facts = [(next(names), _number(rng)) for _ in DEPTHS]
    lines = [f"The access code of the {name} is {code}." for name, code in facts]
    intro = "Remember the access codes in this text.\n\n"
    ask = "\n\nThe access code of the {} is"
    fixed = count(intro + " ".join(lines)) + max(count(ask.format(n) + f" {c}") for n, c in facts)
    filler = _filler(rng, _room(length, fixed), count)
    text = intro + _at_depths(lines, filler)
    for depth, (name, code) in zip(DEPTHS, facts, strict=True):
        yield depth, text + ask.format(name), code


def _multikey(rng: random.Random, length: int, count: Count) -> Iterator[Question]:
    """Nothing but keys and values, one per depth asked for."""
    names = _names(rng)
    intro, ask = "A list of access codes:\n", "\nFrom the list above:\n{}:"
    room = _room(length, count(intro + ask.format("southern lantern") + " 12345"))
    pairs = _pairs(rng, names, room, count)
    text = intro + _lines(pairs)
    for depth in DEPTHS:
        name, code = pairs[round(depth * (len(pairs) - 1))]
        yield depth, text + ask.format(name), code


def _tracking(rng: random.Random, length: int, count: Count) -> Iterator[Question]:
    """Five variables with a value, in sentences about other things, and five that equal one of
    them, which are asked for."""
    letters = [a + b + c for a in "ABCDEFGH" for b in "KLMNPQRS" for c in "TVWXYZ"]
    names = rng.sample(letters, 2 * len(DEPTHS))
    values = [_number(rng) for _ in DEPTHS]
    first, second = names[: len(DEPTHS)], names[len(DEPTHS) :]
    lines = [f"{n} = {v}; {m} = {n};" for n, m, v in zip(first, second, values, strict=True)]
    intro, ask = "Remember the values of the variables in this text.\n\n", "\n\nThe value of {} is"
    fixed = count(intro + " ".join(lines) + ask.format("AAA") + " 12345")
    text = intro + _at_depths(lines, _filler(rng, _room(length, fixed), count))
    for depth, name, value in zip(DEPTHS, second, values, strict=True):
        yield depth, text + ask.format(name), value


def _copy_list(rng: random.Random, length: int, count: Count) -> Iterator[Question]:
    """A list to repeat, after a short one that shows how."""
    names = _names(rng)
    shown = _lines([(next(names), _number(rng)) for _ in range(2)])
    begin, end = f"List:\n{shown}\n\nCopy:\n{shown}\n\nList:\n", "\n\nCopy:\n"
    text = _lines(_pairs(rng, names, _room(length, count(begin + end)) // 2, count))
    yield None, begin + text + end, text


def _copy_json(rng: random.Random, length: int, count: Count) -> Iterator[Question]:
    """The same as JSON, with a number and a truth value in every entry."""
    names = _names(rng)

    def entry() -> dict:
        return {"name": next(names), "code": int(_number(rng)), "open": rng.random() < 0.5}

    shown, entries = json.dumps([entry()]), [entry()]
    begin, end = f"JSON:\n{shown}\n\nCopy:\n{shown}\n\nJSON:\n", "\n\nCopy:\n"
    room = _room(length, count(begin + end)) // 2
    while count(json.dumps(more := [*entries, entry()])) <= room:
        entries = more
    text = json.dumps(entries)
    yield None, begin + text + end, text


def _pairs(rng: random.Random, names: Iterator[str], room: int, count: Count):
    """(name, code) of lines that take at most *room* tokens."""
    pairs = []
    while True:
        pair = (next(names), _number(rng))
        room -= count(_lines([pair]) + "\n")
        if room < 0:
            return pairs
        pairs.append(pair)


def _lines(pairs) -> str:
    return "\n".join(f"{name}: {code}" for name, code in pairs)


def _room(length: int, fixed: int) -> int:
    """Tokens left of *length*."""
    fixed += SPARE + _SLACK
    if length < fixed + _LEAST:
        raise ValueError(
            f"a length of {length} tokens is too short: ask for {fixed + _LEAST} or more"
        )
    return length - fixed


#: name -> how its questions are made, of at most so many tokens with the answer.
TASKS: dict[str, Callable[[random.Random, int, Count], Iterator[Question]]] = {
    "needle": _needle,
    "multikey": _multikey,
    "tracking": _tracking,
    "copy": _copy_list,
    "json": _copy_json,
}
