"""``--additional-config '{"kvq": {...}}'``: parameters of the plugin.

None of the present formats takes a parameter, so any key is an error; a field added to
:class:`Options` becomes a key users may set.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

KEY = "kvq"


@dataclass(frozen=True)
class Options:
    """Parsed options; one field per key."""


def parse(additional_config: Any, schema: type = Options) -> Any:
    """The *schema* instance that ``additional_config["kvq"]`` describes; defaults without one.

    Raises ValueError for a value that is not a mapping and for unknown keys, naming the
    closest known one.
    """
    if not isinstance(additional_config, Mapping) or KEY not in additional_config:
        return schema()
    given = additional_config[KEY]
    if not isinstance(given, Mapping):
        raise ValueError(
            f'additional_config["{KEY}"] is {given!r}: expected a mapping of option names to '
            "values, such as --additional-config '{\"kvq\": {}}'"
        )
    known = [f.name for f in fields(schema)]
    for key in given:
        if key not in known:
            raise ValueError(
                f'unknown key {key!r} in additional_config["{KEY}"]: {_supported(known)}'
                f"{_suggestion(key, known)}"
            )
    return schema(**given)


def _supported(known: list[str]) -> str:
    return f"supported are {', '.join(known)}" if known else "no options exist; remove it"


def _suggestion(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(str(key), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
