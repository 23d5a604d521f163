"""What the model reads while it is calibrated: texts, cut into windows of tokens."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kvq_plugin.evaluate import Window, beginning
from kvq_plugin.texts import BUILTIN_TEXT, decoded, read_text


def read_texts(names: Sequence[str], tokenizer) -> list[str]:
    """The texts of *names*: ``builtin``, UTF-8 files, or ``.jsonl`` files with a text per line.

    A line is a string, or an object with ``text``, ``prompt`` or ``messages``; messages go
    through the tokenizer's chat template. Raises ValueError naming the file, and the line, that
    cannot be read or says nothing.
    """
    texts = []
    for name in names:
        lines = name != BUILTIN_TEXT and name.endswith(".jsonl")
        found = list(_lines(Path(name), tokenizer)) if lines else [read_text(name)]
        if not any(text.strip() for text in found):
            raise ValueError(f"{name} is empty: expected text to calibrate on")
        texts += found
    return texts


def _lines(path: Path, tokenizer) -> Iterator[str]:
    # Not splitlines: strings may have other ends of lines in them, such as U+2028.
    for number, line in enumerate(decoded(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            text = _text_of(json.loads(line), tokenizer)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
        except Exception as error:  # chat templates raise their own kinds
            raise ValueError(f"{path}, line {number}: {error}") from None
        if text is None:
            raise ValueError(
                f"{path}, line {number}: expected a string, or an object with text, prompt or "
                f"messages; got {line[:60]!r}"
            )
        yield text


def _text_of(entry: Any, tokenizer) -> str | None:
    if isinstance(entry, dict):
        if isinstance(entry.get("messages"), list):
            return tokenizer.apply_chat_template(entry["messages"], tokenize=False)
        entry = entry.get("text", entry.get("prompt"))
    return entry if isinstance(entry, str) else None


def sample_windows(
    tokenizer, texts: Sequence[str], count: int, length: int, seed: int
) -> list[Window]:
    """*count* windows of *length* tokens, drawn from all *texts* joined by empty lines.

    Neighbouring windows do not overlap while the texts are long enough for that; beyond, the
    rest start anywhere. Every window begins with BOS where the tokenizer says texts do. The
    same *seed* draws the same windows. Raises ValueError when the texts are shorter than one.
    """
    bos = beginning(tokenizer)
    ids: Window = []
    for text in texts:
        ids += tokenizer(text + "\n\n", add_special_tokens=False, verbose=False).input_ids
    step = length - len(bos)
    whole = len(ids) // step if step > 0 else 0
    if not whole:
        raise ValueError(
            f"the data has {len(ids):,} tokens and one sample needs {max(step, 1):,}: give more "
            "--data, or ask for a shorter --length"
        )
    draw = random.Random(seed)
    starts = [i * step for i in draw.sample(range(whole), min(count, whole))]
    starts += [draw.randint(0, len(ids) - step) for _ in range(count - len(starts))]
    return [bos + ids[at : at + step] for at in starts]
