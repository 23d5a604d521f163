"""Options that several commands of ``kvq`` have."""

from __future__ import annotations

import argparse
import math

from kvq_plugin.evaluate import BASELINE
from kvq_plugin.mapping import NAMES
from kvq_plugin.tasks.arguments import positive as positive
from kvq_plugin.tasks.arguments import positives as positives

KV_MEMORY_GIB = 1.0  # of each engine, unless the user says otherwise
#: Beyond it somebody gave bytes: no machine has a PiB of memory.
MOST_GIB = 1 << 20


def add_dtypes(command: argparse.ArgumentParser, default: str) -> None:
    """Add ``--dtypes`` to *command*."""
    command.add_argument(
        "--dtypes",
        type=parse_dtypes,
        default=default,
        metavar="NAME,NAME,...",
        help=f"KV caches to compare (%(default)s); {BASELINE} is always measured, first",
    )


def add_kv_memory(command: argparse.ArgumentParser, default: float = KV_MEMORY_GIB) -> None:
    """Add ``--kv-memory-gib`` to *command*."""
    command.add_argument(
        "--kv-memory-gib",
        type=gib,
        default=default,
        help=f"memory for each engine's KV cache ({default:g})",
    )


def parse_dtypes(text: str) -> list[str]:
    """``"fp8,int8"`` → ``["auto", "fp8", "int8"]``; argparse's error names the known ones."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError(
            f"expected names with commas between them, of {BASELINE}, {', '.join(NAMES)}; got "
            f"{text!r}, which has none"
        )
    for name in names:
        if name != BASELINE and name not in NAMES:
            raise argparse.ArgumentTypeError(
                f"unknown KV-cache dtype {name!r}; known are {BASELINE}, {', '.join(NAMES)}"
            )
    return list(dict.fromkeys([BASELINE, *names]))


def gib(text: str) -> float:
    """``"0.5"`` -> 0.5: a byte or more, MOST_GIB or less."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 1 / 2**30 <= number < math.inf:  # NaN neither
        raise argparse.ArgumentTypeError(f"expected a finite number above 0, got {text}")
    if number > MOST_GIB:
        raise argparse.ArgumentTypeError(
            f"expected at most {MOST_GIB} GiB, got {text}: the number counts GiB, not bytes"
        )
    return number


def model_or_builtin(name: str | None) -> str:
    """*name*, or the directory of the built-in model, which is made on first use.

    Raises ValueError for a name that is empty, and where the model cannot be written.
    """
    if name is not None:
        if not name.strip():
            raise ValueError(
                "expected the directory or hub name of a model, got an empty one; is a shell "
                "variable unset? Without a name it is the built-in model"
            )
        return name
    from kvq_plugin.model import builtin_model

    try:
        return str(builtin_model())
    except OSError as error:
        if error.errno is None:  # the package that carries it is missing, as the message says
            raise
        raise ValueError(
            f"the built-in model cannot be written where caches are kept ({error}): set "
            "XDG_CACHE_HOME to a folder that you may write to, or name a model of your own"
        ) from error
    except RuntimeError as error:  # a user without a home
        if "home" not in str(error):
            raise
        raise ValueError(
            f"the built-in model has no place ({error}): set XDG_CACHE_HOME to a folder that you "
            "may write to, or name a model of your own"
        ) from error
