"""Texts that models read: the one that Python carries, and files."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

BUILTIN_TEXT = "builtin"


def builtin_text() -> str:
    """Technical prose that every Python carries: the language reference of ``pydoc_data``.

    All topics in the order of their names, an empty line between two: 470,000 characters,
    113,000 SmolLM2 tokens. The text changes with Python's minor version, so only figures of
    one interpreter compare.
    """
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def read_text(name: str) -> str:
    """The text called ``builtin``, else the UTF-8 file *name*.

    Raises FileNotFoundError where there is none, and ValueError for another encoding or what is no
    file.
    """
    if name == BUILTIN_TEXT:
        return builtin_text()
    if not name.strip():
        raise ValueError(
            "expected a file of UTF-8 text, got an empty name: is a shell variable unset? "
            f"{BUILTIN_TEXT!r} is the text that Python carries"
        )
    try:
        return decoded(Path(name))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"no such text: {name} is no file: expected one of UTF-8 text, or {BUILTIN_TEXT!r}"
        ) from None
    except IsADirectoryError:
        raise ValueError(
            f"{name} is a directory: expected a file of UTF-8 text, or {BUILTIN_TEXT!r}"
        ) from None


def decoded(path: Path) -> str:
    """The UTF-8 file *path*, without the mark that some editors begin one with, its lines ending in
    ``\\n``. Raises ValueError for another encoding.
    """
    content = path.read_bytes()  # once: <(command) is a pipe
    # Two bytes a letter: in English every other one is 0, which is UTF-8, too, and no text.
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content
    try:
        if wide:
            raise ValueError("two bytes a letter, or no text at all")
        return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig").read()
    except ValueError as error:  # UnicodeDecodeError is one
        raise ValueError(
            f"{path}: expected UTF-8 text, got other bytes ({error}); convert it, as "
            f"`iconv -f {'utf-16' if wide else 'latin1'} -t utf-8` does"
        ) from None


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Within the block what is wrong with the text *name* is said of it: there may be several."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def labels(names: Iterable[str]) -> dict[str, str]:
    """What tables call texts: the file's name, or all of the path where others have that name."""
    short = {name: Path(name).name for name in names}
    told = list(short.values())
    return {name: own if told.count(own) == 1 else name for name, own in short.items()}
