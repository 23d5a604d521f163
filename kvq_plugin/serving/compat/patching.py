"""Changes to vLLM's modules that can be taken back.

Each takes an ExitStack *undo* and puts the way back onto it before it changes anything.
"""

from __future__ import annotations

import functools
import inspect
from contextlib import ExitStack
from typing import Any

_ABSENT = object()


def put(undo: ExitStack, owner: Any, name: str, value: Any) -> None:
    """``setattr`` on a module, class or object."""
    before = vars(owner).get(name, _ABSENT)
    if before is _ABSENT:
        undo.callback(delattr, owner, name)
    else:
        undo.callback(setattr, owner, name, before)
    setattr(owner, name, value)


def wrap_function(
    undo: ExitStack, owner: Any, name: str, parameters: tuple[str, ...], wrap, kind
) -> None:
    """Replace the function *name* of *owner* by ``kind(wrap(it))``, once.

    Raises TypeError when it does not take *parameters*, which the wrapper relies on.
    """
    stock = getattr(owner, name)
    if getattr(stock, "_kvq_wrapped", False):
        return
    found = list(inspect.signature(stock).parameters)[: len(parameters)]
    if found != list(parameters):
        raise TypeError(f"{owner.__name__}.{name} takes {found}: expected {list(parameters)}")
    wrapper = functools.wraps(stock)(wrap(stock))
    wrapper._kvq_wrapped = True
    put(undo, owner, name, kind(wrapper))


def keep(undo: ExitStack, mapping: dict, key: Any) -> None:
    """What *key* of *mapping* is now, or that it is absent."""
    if key in mapping:
        undo.callback(mapping.__setitem__, key, mapping[key])
    else:
        undo.callback(mapping.pop, key, None)


def discard(values: list, value: Any) -> None:
    if value in values:
        values.remove(value)
