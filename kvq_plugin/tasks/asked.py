"""What one ``kvq eval`` asks of every engine, and the figures of what they answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvq_plugin import geometry
from kvq_plugin.hub import checkpoint_folder
from kvq_plugin.serving.scales.declared import read_config
from kvq_plugin.tasks import longbench, results
from kvq_plugin.tasks.items import TASKS, Item, make_items

#: Answers of at most so many tokens are asked of the noise floor too, which answers one at a time.
SHORT = 16
#: What they call the scaling of rotary embeddings.
_ROPES = ("rope_scaling", "rope_parameters")


@dataclass(frozen=True)
class Settings:
    """Arguments of ``kvq eval`` that concern tasks.

    Attributes:
        names: generated tasks, of TASKS.
        lengths: tokens of their questions, answers included.
        contexts: of each task and length; those with depths ask five questions about each.
        seed: what makes them.
        file: questions in LongBench's format.
        prompts: a JSON file with LongBench's templates by dataset.
        room: tokens that a question of *file* may have, answer included; the model's by default.
    """

    names: tuple[str, ...] = tuple(TASKS)
    lengths: tuple[int, ...] = (192, 1000)
    contexts: int = 10
    seed: int = 0
    file: Path | None = None
    prompts: Path | None = None
    room: int | None = None

    def described(self) -> str:
        """In words, for the report."""
        parts = []
        if self.names:
            lengths = " and ".join(f"{length:,}" for length in self.lengths)
            parts.append(
                f"{', '.join(self.names)} at {lengths} tokens, {self.contexts} contexts each, seed "
                f"{self.seed}"
            )
        if self.file is not None:
            templates = self.prompts.name if self.prompts else "kvq's"
            parts.append(f"{self.file.name} with {templates} templates")
        return "; ".join(parts) or "none"

    def ask(self, model: str, tokenizer) -> Asked:
        """The questions; ValueError for files that cannot be asked, and lengths that the model has
        no positions for, before engines run."""
        self._check_lengths(model)
        items = make_items(tokenizer, self.names, self.lengths, self.contexts, self.seed)
        entries = []
        if self.file is not None:
            prompts = longbench.templates(self.prompts) if self.prompts else None
            room = self.room or longest(model)
            entries = longbench.read(self.file, tokenizer, room, prompts)
        return Asked(items, entries)

    def _check_lengths(self, model: str) -> None:
        """Before questions are made: of 100 million tokens that takes over a minute."""
        limit = _stretched(model) if self.names else None
        if limit is not None and max(self.lengths) > limit:
            raise ValueError(
                f"--task-lengths has {max(self.lengths)} tokens, and the model has positions for "
                f"{limit:,}: ask for {limit} or fewer, or leave the generated tasks out with "
                "--no-tasks"
            )


def positions(model: str) -> int | None:
    """Tokens that *model* has positions for, by its configuration; None where that does not say."""
    return geometry.positions(_config(model))


def _config(model: str) -> dict[str, Any]:
    return read_config(checkpoint_folder(model, only=["*.json"]) / "config.json")


def _stretched(model: str) -> int | None:
    """:func:`positions` times the factor by which rotary embeddings are scaled, where they are:
    some models count these in, vLLM adds them for others, and says so where it does not."""
    config = _config(model)
    limit, text = geometry.positions(config), config.get("text_config") or config
    ropes = [rope for key in _ROPES if isinstance(rope := text.get(key), dict)]
    # With layers of several kinds one for each.
    ropes += [of for rope in ropes for of in rope.values() if isinstance(of, dict)]
    factors = [f for rope in ropes if isinstance(f := rope.get("factor"), int | float) and f > 1]
    return limit and int(limit * max(factors, default=1))


def longest(model: str) -> int:
    """Tokens that *model* was made for, by its configuration."""
    found = positions(model)
    if found is None:
        raise ValueError(
            "expected max_position_embeddings in the model's config.json, found none: say how long "
            "its questions may be with --tasks-max-length"
        )
    return found


@dataclass(frozen=True)
class Asked:
    """Generated items, and entries of a file, in the order in which they are asked."""

    items: Sequence[Item] = ()
    entries: Sequence[longbench.Entry] = ()

    @property
    def questions(self) -> list[tuple[list[int], int]]:
        """(prompt, tokens that the answer may have) of all."""
        return [(q.prompt, q.max_tokens) for q in (*self.items, *self.entries)]

    @property
    def short(self) -> list[tuple[list[int], int]]:
        """Those of the noise floor."""
        return [(item.prompt, item.max_tokens) for item in self.items if _is_short(item)]

    def figures(
        self,
        answers: Mapping[str, Sequence[str]],
        baseline: str,
        floor: Mapping[str, Sequence[str]],
    ) -> dict[str, Any]:
        """``generated`` (see results.figures) and ``longbench`` (see longbench.figures), both {}
        where nothing was asked. *answers*: to :attr:`questions` by KV cache, *floor*: its name, and
        its answers to :attr:`short`."""
        count, found = len(self.items), {"generated": {}, "longbench": {}}
        if self.items:
            own: dict[str, list] = {baseline: list(answers[baseline][:count])}
            for name, texts in floor.items():
                given = iter(texts)
                own[name] = [next(given) if _is_short(item) else None for item in self.items]
            own |= {name: list(texts[:count]) for name, texts in answers.items()}
            found["generated"] = results.figures(self.items, own, baseline)
        if self.entries:
            own = {name: texts[count:] for name, texts in answers.items()}
            found["longbench"] = longbench.figures(self.entries, own, baseline)
        return found


def _is_short(item: Item) -> bool:
    return item.max_tokens <= SHORT
