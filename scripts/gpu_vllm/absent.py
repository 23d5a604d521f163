"""Packages that vLLM imports and a run on token ids never calls: empty modules in their place.

The bundle has a package of each name that puts :class:`Module` in its own place. Whether a finder
is there already is not asked by its class's name: on the machine another's has the same.
"""

import importlib.abc
import importlib.machinery
import sys
import types

NAMES = (
    *("xgrammar", "llguidance", "outlines_core", "lmformatenforcer"),  # structured output
    *("mistral_common", "mcp", "anthropic"),  # tokenizer, tools and an API
)


class Module(types.ModuleType):
    """Has every name, as an empty class."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, type(name, (), {}))
        return getattr(self, name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in NAMES:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return Module(spec.name)

    def exec_module(self, module):
        pass


#: ``__init__.py`` of each.
PACKAGE = """import sys

import absent

sys.modules[__name__] = absent.Module(__name__)
"""

sys.meta_path.append(_Finder())
