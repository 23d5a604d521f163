"""The arguments of ``kvq eval`` that concern tasks."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from kvq_plugin.tasks.asked import Settings
from kvq_plugin.tasks.items import TASKS

#: Field of Settings -> the option for it: of generated tasks, and of a file's questions.
_GENERATED = {
    "names": "task_set",
    "lengths": "task_lengths",
    "contexts": "task_contexts",
    "seed": "seed",
}
_READ = {"prompts": "task_prompts", "room": "tasks_max_length"}


def add(command: argparse.ArgumentParser) -> None:
    """Add them to *command*."""
    every, lengths = ",".join(TASKS), ",".join(map(str, Settings.lengths))
    command.add_argument(
        "--task-set",
        type=_names,
        metavar="NAME,NAME,...",
        help=f"tasks generated from a seed, whose answer is in the prompt ({every})",
    )
    command.add_argument("--no-tasks", action="store_true", help="no generated tasks")
    command.add_argument(
        "--task-lengths",
        type=positives,
        metavar="N,N,...",
        help=f"tokens of each question with its answer ({lengths})",
    )
    command.add_argument(
        "--task-contexts",
        type=positive,
        metavar="N",
        help=f"contexts of each task and length ({Settings.contexts}); needle, multikey and "
        "tracking ask five questions about each, at five depths",
    )
    command.add_argument("--seed", type=int, help=f"of the generated tasks ({Settings.seed})")
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
        type=positive,
        metavar="N",
        help="tokens of a question of --tasks with its answer; of longer ones the middle is left "
        "out (what the model's configuration says)",
    )


def settings(options: argparse.Namespace) -> Settings:
    """What *options*, parsed with :func:`add`, ask for.

    Raises ValueError for options that nothing that is asked would heed, and FileNotFoundError for
    files that do not exist.
    """
    if options.no_tasks:
        why = "no tasks are generated; leave it out, or --no-tasks"
        _refuse(options, _GENERATED, f"with --no-tasks {why}")
    if options.tasks is None:
        _refuse(
            options, _READ, "without --tasks there is no file to ask of; name one, or leave it out"
        )
    _check_file("--tasks", options.tasks, "questions in LongBench's format, an object a line")
    _check_file("--task-prompts", options.task_prompts, "a JSON object of templates by dataset")
    given = {
        field: value
        for field, name in (_GENERATED | _READ | {"file": "tasks"}).items()
        if (value := getattr(options, name)) is not None
    }
    return Settings(**given | ({"names": ()} if options.no_tasks else {}))


def _check_file(option: str, file: Path | None, holds: str) -> None:
    if file is not None and not file.exists():
        raise FileNotFoundError(f"{option} {file}: no such file: expected one with {holds}")
    if file is not None and file.is_dir():  # not "is no file": <(command) is a pipe
        raise ValueError(f"{option} {file}: is a directory: expected a file with {holds}")


def _refuse(options: argparse.Namespace, names: Mapping[str, str], why: str) -> None:
    """ValueError, which says *why*, when one of *names* was given."""
    for name in names.values():
        if getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} was asked: {why}")


def _names(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(filter(None, map(str.strip, text.split(",")))))
    if not names:
        raise argparse.ArgumentTypeError(
            f"expected tasks of {', '.join(TASKS)}, got {text!r}; --no-tasks is for none"
        )
    if unknown := [name for name in names if name not in TASKS]:
        known = ", ".join(TASKS)
        raise argparse.ArgumentTypeError(f"unknown task {unknown[0]!r}; known are {known}")
    return names


def positive(text: str) -> int:
    """``"3"`` -> 3, at least 1."""
    number = _whole(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text}")
    return number


def positives(text: str) -> tuple[int, ...]:
    """``"4000,1000"`` -> ``(1000, 4000)``, each once and in order."""
    numbers = {_whole(number) for number in text.split(",")}
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(
            "expected positive whole numbers with commas between them, such as 1000,4000; got "
            f"{text!r}"
        )
    return tuple(sorted(numbers))


def _whole(text: str) -> int:
    """The number, or 0. argparse would tell of a ValueError with the function's name."""
    try:
        return int(text)
    except ValueError:
        return 0
