"""Questions in LongBench's format, scored as LongBench scores them.

The format, the metric and the answer's length of each dataset, and what is done to a prompt that is
too long are those of LongBench (Bai et al., ACL 2024; github.com/THUDM/LongBench). Its instructions
to the model are in its repository: ``config/dataset2prompt.json`` there is what ``--task-prompts``
takes, and its figures are reproduced with it. Without, PROMPTS are used, which are ours.
"""

from __future__ import annotations

import importlib
import json
import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from kvq_plugin.texts import decoded

KEYS = ("context", "input", "answers", "all_classes", "dataset", "length")
#: Datasets that are not put into a chat model's template, as their examples are to be continued.
RAW = {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
#: Datasets of which the answer is the first line alone.
FIRST_LINE = {"trec", "triviaqa", "samsum", "lsht"}
#: Words (characters in Chinese) of the context: the ranges of LongBench-E.
RANGES = {"0-4k": (0, 4000), "4-8k": (4000, 8000), "8k+": (8000, 1 << 60)}

#: metric -> what we ask for, with the fields of an entry.
PROMPTS = {
    "qa": "{context}\n\nAnswer from the text above in as few words as you can.\n"
    "Question: {input}\nAnswer:",
    "qa_zh": "{context}\n\n请根据上文用尽量少的字回答问题。\n问题：{input}\n答案：",
    "rouge": "{context}\n\nFrom the text above, write a summary. {input}\nSummary:",
    "rouge_zh": "{context}\n\n请根据上文写出回答或总结。{input}\n答案：",
    "classification": "{context}\n{input}",
    "retrieval": "{context}\n\nWhich paragraph above is this about?\n{input}\nIt is paragraph",
    "retrieval_zh": "{context}\n\n下面的摘要出自上文哪一段？\n{input}\n答案：段落",
    "count": "{context}\n\nSome paragraphs above are repeated. The number of different ones is",
    "code": "{context}{input}",
}
#: dataset -> its metric, and the tokens that its answer may have.
DATASETS = {
    **dict.fromkeys(("narrativeqa", "qasper"), ("qa", 128)),
    "multifieldqa_en": ("qa", 64),
    "multifieldqa_zh": ("qa_zh", 64),
    **dict.fromkeys(("hotpotqa", "2wikimqa", "musique", "triviaqa"), ("qa", 32)),
    "dureader": ("rouge_zh", 128),
    **dict.fromkeys(("gov_report", "qmsum", "multi_news"), ("rouge", 512)),
    "vcsum": ("rouge_zh", 512),
    "samsum": ("rouge", 128),
    **dict.fromkeys(("trec", "lsht"), ("classification", 64)),
    "passage_count": ("count", 32),
    "passage_retrieval_en": ("retrieval", 32),
    "passage_retrieval_zh": ("retrieval_zh", 32),
    **dict.fromkeys(("lcc", "repobench-p"), ("code", 64)),
}


@dataclass(frozen=True)
class Entry:
    """One line of a file, ready to be asked.

    Attributes:
        dataset: its name, without the ``_e`` of LongBench-E.
        length: words (characters in Chinese) of the context, as the file says.
        prompt: token ids, to be continued greedily for *max_tokens*.
        answers, classes: what is right; of which classes, for classification.
    """

    dataset: str
    length: int
    prompt: list[int]
    max_tokens: int
    answers: tuple[str, ...]
    classes: tuple[str, ...]

    def score(self, text: str) -> float:
        """0 to 1: how good an answer *text* is, by the best of :attr:`answers`."""
        metric = METRICS[DATASETS[self.dataset][0]]
        if self.dataset in FIRST_LINE:
            text = text.lstrip("\n").split("\n")[0]
        return max(metric(text, answer, self.classes) for answer in self.answers)


def read(file: Path, tokenizer, room: int, prompts: Mapping[str, str] | None = None) -> list[Entry]:
    """The entries of a JSON Lines *file*.

    Args:
        room: tokens that prompt and answer may have together; of a longer prompt the middle is
            left out.
        prompts: template by dataset, in place of PROMPTS.

    Raises ValueError, with the line, for what is no entry or a dataset of another name, and for
    packages that a metric needs and that are not installed.
    """
    entries, room = [], room - len(_chat(tokenizer, ""))
    for number, line in enumerate(decoded(file).split("\n"), 1):
        if line.strip():
            try:
                entries.append(_entry(json.loads(line), tokenizer, room, prompts or {}))
            except ValueError as error:
                raise ValueError(f"{file}, line {number}: {error}") from None
    if not entries:
        raise ValueError(f"{file} has no entries: expected one JSON object per line")
    for metric in {DATASETS[entry.dataset][0] for entry in entries}:
        for package in _PACKAGES.get(metric, ()):
            _package(package)
    return entries


def templates(file: Path) -> dict[str, str]:
    """By dataset, of a JSON *file* like LongBench's ``config/dataset2prompt.json``."""
    try:
        found = json.loads(decoded(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise ValueError(
            f"{file}: expected an object with a template by dataset, as LongBench's "
            "config/dataset2prompt.json"
        )
    return found


def _entry(found: Any, tokenizer, room: int, prompts: Mapping[str, str]) -> Entry:
    missing = [key for key in KEYS if not isinstance(found, dict) or key not in found]
    if missing:
        raise ValueError(f"expected an object with {', '.join(KEYS)}; {', '.join(missing)} missing")
    texts = [found["context"], found["input"], found["dataset"], *(found["answers"] or ())]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("expected text as context, input, dataset and each of the answers")
    dataset = found["dataset"].removesuffix("_e")
    if dataset not in DATASETS:
        raise ValueError(f"unknown dataset {dataset!r}; known are {', '.join(DATASETS)}")
    if not found["answers"]:
        raise ValueError("expected at least one answer")
    metric, tokens = DATASETS[dataset]
    template = prompts.get(dataset, PROMPTS[metric])
    # Not str.format: contexts have braces of their own, templates may have too.
    text = re.sub(r"\{(context|input)\}", lambda field: found[field[1]], template)
    ids = tokenizer(text, verbose=False).input_ids
    if len(ids) > room - tokens:
        if room - tokens < 2:
            raise ValueError(
                f"expected room for {tokens} tokens of {dataset}'s answer and 2 or more of its "
                f"question, got {room} beside the chat template: raise --tasks-max-length by "
                f"{tokens + 2 - room} or more, or leave {dataset} out"
            )
        half = (room - tokens) // 2
        ends = (ids[:half], ids[-half:])
        text = "".join(tokenizer.decode(end, skip_special_tokens=True) for end in ends)
        ids = tokenizer(text, verbose=False).input_ids[: room - tokens]
    if dataset not in RAW:
        ids = _chat(tokenizer, text) or ids
    classes = tuple(found["all_classes"] or ())
    return Entry(dataset, found["length"], ids, tokens, tuple(found["answers"]), classes)


def _chat(tokenizer, text: str) -> list[int]:
    """*text* as a question in the model's chat template; [] where it has none."""
    if not getattr(tokenizer, "chat_template", None):
        return []
    message = [{"role": "user", "content": text}]
    whole = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return tokenizer(whole, add_special_tokens=False, verbose=False).input_ids


# --- metrics: (text, answer, classes) -> 0 to 1 --------------------------------------------------

#: metric -> packages of the extra that it needs.
_PACKAGES = {
    "qa_zh": ("jieba",),
    "rouge": ("rouge",),
    "rouge_zh": ("rouge", "jieba"),
    "code": ("rapidfuzz",),
}
_PUNCTUATION = set(string.punctuation)
_PUNCTUATION_ZH = _PUNCTUATION | set(
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏"
)


def _package(name: str):
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(
            f"this metric needs the package {name}: pip install 'kvq-plugin[longbench]'"
        ) from None


def _f1(given: Sequence[str], right: Sequence[str]) -> float:
    same = (Counter(given) & Counter(right)).total()
    return 2 * same / (len(given) + len(right)) if same else 0.0


def _words(text: str) -> list[str]:
    """As SQuAD compares answers: no case, punctuation or articles."""
    text = "".join(c for c in text.lower() if c not in _PUNCTUATION)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _qa(text: str, answer: str, _) -> float:
    return _f1(_words(text), _words(answer))


def _words_zh(text: str) -> list[str]:
    words = _package("jieba").cut(text, cut_all=False)
    words = ("".join(c for c in word.lower() if c not in _PUNCTUATION_ZH) for word in words)
    return [short for word in words if (short := "".join(word.split()))]


def _qa_zh(text: str, answer: str, _) -> float:
    return _f1(_words_zh(text), _words_zh(answer))


def _rouge(text: str, answer: str, _) -> float:
    """ROUGE-L's F of the package that LongBench takes it from."""
    if not text.strip() or not answer.strip():
        return 0.0
    try:
        [scores] = _package("rouge").Rouge().get_scores([text], [answer])
    except (ValueError, RecursionError):  # nothing but full stops; too long
        return 0.0
    return scores["rouge-l"]["f"]


def _rouge_zh(text: str, answer: str, _) -> float:
    cut = _package("jieba").cut
    return _rouge(" ".join(cut(text)), " ".join(cut(answer)), None)


def _classification(text: str, answer: str, classes: Iterable[str]) -> float:
    """A share of 1 for each class that the text names, but for parts of the right one's name."""
    named = [name for name in classes if name in text]
    named = [name for name in named if name == answer or name not in answer]
    return 1 / len(named) if answer in named else 0.0


def _count(text: str, answer: str, _) -> float:
    """The share of the text's numbers that are the right one."""
    numbers = re.findall(r"\d+", text)
    return numbers.count(answer.strip()) / len(numbers) if numbers else 0.0


def _retrieval(text: str, answer: str, _) -> float:
    """As :func:`_count`, for the first number of ``Paragraph 12``."""
    number = re.search(r"\d+", answer)
    return _count(text, number[0], None) if number else 0.0


def _code(text: str, answer: str, _) -> float:
    """Similarity of the first line that is no comment, fence or blank before it."""
    lines = text.lstrip("\n").split("\n")
    line = next((x for x in lines if not any(mark in x for mark in ("`", "#", "//"))), "")
    return round(_package("rapidfuzz.fuzz").ratio(line, answer)) / 100


METRICS: dict[str, Callable[[str, str, Iterable[str]], float]] = {
    "qa": _qa,
    "qa_zh": _qa_zh,
    "rouge": _rouge,
    "rouge_zh": _rouge_zh,
    "classification": _classification,
    "retrieval": _retrieval,
    "retrieval_zh": _retrieval,
    "count": _count,
    "code": _code,
}


# --- figures ---------------------------------------------------------------------------


def figures(
    entries: Sequence[Entry], answers: Mapping[str, Sequence[str]], baseline: str
) -> dict[str, Any]:
    """By dataset: ``items`` and, by KV cache, ``score`` of 100, ``by_length`` (score by RANGES) and
    but for *baseline* ``change`` of the score and its standard error ``change_error``, that of the
    paired differences (None of a single entry)."""
    scores = {
        name: [entry.score(text) for entry, text in zip(entries, texts, strict=True)]
        for name, texts in answers.items()
    }
    places: dict[str, list[int]] = defaultdict(list)
    for at, entry in enumerate(entries):
        places[entry.dataset].append(at)
    found = {}
    for dataset, of in places.items():
        caches = {}
        for name, all_scores in scores.items():
            own = caches[name] = {"score": 100 * fmean(all_scores[at] for at in of)}
            own["by_length"] = {
                label: 100 * fmean(all_scores[at] for at in here)
                for label, (low, high) in RANGES.items()
                if (here := [at for at in of if low <= entries[at].length < high])
            }
            if name != baseline:
                changes = [100 * (all_scores[at] - scores[baseline][at]) for at in of]
                own["change"] = fmean(changes)
                own["change_error"] = stdev(changes) / len(of) ** 0.5 if len(of) > 1 else None
        found[dataset] = {"items": len(of), "caches": caches}
    return found
