"""The import rule: which module may know of which, and where heavy packages may be imported."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "kvq_plugin"

#: Modules of the package from the bottom up; one may import only what stands strictly lower,
#: or its own submodules. Those on the same line do not know each other.
LEVELS = (
    ("disk", "texts"),
    ("formats", "hugepages", "rotation", "tables", "divergence", "logits", "geometry"),
    ("codes", "layout", "mapping"),
    ("sealed",),
    ("reference",),
    ("calls",),
    ("arguments",),
    ("_native", "kernels"),
    ("ops",),
    ("serving", "hub", "model", "servers"),
    ("inspection",),
    ("hf_cache",),
    ("evaluate", "doctor", "tasks"),
    ("evaluate_transformers",),
    ("evaluation_page", "doctor_url"),
    ("report", "inspection_report", "options"),
    ("calibrate",),
    ("allocate",),
    ("demo", "bench", "gpu_check"),
    ("cli",),
    ("__main__",),
)
#: The only modules that may import a package at all, anywhere in the file.
MAY_IMPORT = {
    "triton": {"kernels"},
    "vllm": {"serving", "calibrate", "evaluate", "bench", "allocate"},
    "transformers": {
        "hf_cache",
        "calibrate",
        "evaluate",
        "evaluate_transformers",
        "model",
        "bench",
    },
}
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def top(path: Path) -> str:
    """formats.py -> formats; serving/backend.py -> serving."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Absolute dotted names of everything *path* imports, relative imports resolved."""
    names = set()
    package = ("kvq_plugin", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join((*base, *([node.module] if node.module else [])))
            names |= {f"{source}.{alias.name}" for alias in node.names}
    return names


def test_every_module_has_a_level():
    missing = {top(p) for p in modules()} - set(LEVEL_OF)
    assert not missing, f"say in LEVELS where {sorted(missing)} stand"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_import_downwards(path):
    me = top(path)
    for name in imported(path):
        parts = name.split(".")
        if parts[0] != "kvq_plugin" or len(parts) < 2 or parts[1] not in LEVEL_OF:
            continue
        other = parts[1]
        assert other == me or LEVEL_OF[other] < LEVEL_OF[me], f"{path.name} imports {name}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_packages_stay_where_they_belong(path):
    packages = {name.split(".")[0] for name in imported(path)}
    for heavy, allowed in MAY_IMPORT.items():
        assert heavy not in packages or top(path) in allowed, f"{path.name} imports {heavy}"


def test_package_init_imports_nothing_heavy():
    names = {name.split(".")[0] for name in imported(PACKAGE / "__init__.py")}
    assert not names & set(MAY_IMPORT)


@pytest.mark.parametrize(
    "code",
    (
        "import kvq_plugin",
        "import kvq_plugin.formats, kvq_plugin.layout, kvq_plugin.reference, kvq_plugin.ops",
    ),
)
def test_importing_the_lower_half_loads_no_heavy_package(code):
    check = f"{code}\nimport sys; print([m for m in {sorted(MAY_IMPORT)} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", check], cwd=PACKAGE.parent, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "[]"
