"""The arguments of ``kvq eval`` that concern tasks."""

from __future__ import annotations

import argparse
from pathlib import Path

from kvq_plugin.tasks.asked import Settings
from kvq_plugin.tasks.items import TASKS


def add(command: argparse.ArgumentParser) -> None:
    """Add them to *command*."""
    every = ",".join(TASKS)
    command.add_argument(
        "--task-set",
        type=_names,
        default=every,
        metavar="NAME,NAME,...",
        help="tasks generated from a seed, whose answer is in the prompt (%(default)s)",
    )
    command.add_argument("--no-tasks", action="store_true", help="no generated tasks")
    command.add_argument(
        "--task-lengths",
        type=_numbers,
        default="192,1000",
        metavar="N,N,...",
        help="tokens of each question with its answer (%(default)s)",
    )
    command.add_argument(
        "--task-contexts",
        type=_positive,
        default=Settings.contexts,
        metavar="N",
        help="contexts of each task and length (%(default)s); needle, multikey and tracking ask "
        "five questions about each, at five depths",
    )
    command.add_argument(
        "--seed", type=int, default=Settings.seed, help="of the generated tasks (%(default)s)"
    )
    command.add_argument(
        "--tasks",
        type=Path,
        metavar="FILE.jsonl",
        help="questions in LongBench's format, scored with its metrics",
    )
    command.add_argument(
        "--task-prompts",
        type=Path,
        metavar="FILE.json",
        help="templates by dataset for --tasks: LongBench's own are its config/dataset2prompt.json",
    )
    command.add_argument(
        "--tasks-max-length",
        type=_positive,
        metavar="N",
        help="tokens of a question of --tasks with its answer; of longer ones the middle is left "
        "out (what the model's configuration says)",
    )


def settings(options: argparse.Namespace) -> Settings:
    """What *options*, parsed with :func:`add`, ask for."""
    return Settings(
        () if options.no_tasks else options.task_set,
        options.task_lengths,
        options.task_contexts,
        options.seed,
        options.tasks,
        options.task_prompts,
        options.tasks_max_length,
    )


def _names(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(filter(None, map(str.strip, text.split(",")))))
    if unknown := [name for name in names if name not in TASKS]:
        known = ", ".join(TASKS)
        raise argparse.ArgumentTypeError(f"unknown task {unknown[0]!r}; known are {known}")
    return names


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(sorted({_positive(number) for number in text.split(",")}))


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return number
