"""Options that several commands of ``kvq`` have."""

from __future__ import annotations

import argparse
import math

from kvq_plugin.evaluate import BASELINE
from kvq_plugin.mapping import NAMES

KV_MEMORY_GIB = 1.0  # of each engine, unless the user says otherwise


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
    for name in names:
        if name != BASELINE and name not in NAMES:
            raise argparse.ArgumentTypeError(
                f"unknown KV-cache dtype {name!r}; known are {BASELINE}, {', '.join(NAMES)}"
            )
    return list(dict.fromkeys([BASELINE, *names]))


def positive(text: str) -> int:
    """``"3"`` -> 3, at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return number


def gib(text: str) -> float:
    """``"0.5"`` -> 0.5, finite and above 0."""
    number = float(text)
    if not 0 < number < math.inf:  # NaN neither
        raise argparse.ArgumentTypeError(f"expected a finite number above 0, got {text}")
    return number


def model_or_builtin(name: str | None) -> str:
    """*name*, or the directory of the built-in model, which is made on first use."""
    from kvq_plugin.model import builtin_model

    return name or str(builtin_model())


def positives(text: str) -> list[int]:
    """``"1000,4000"`` -> ``[1000, 4000]``, each once and in order."""
    return sorted({positive(number) for number in text.split(",")})
