"""The documentation says what is so: links, figures, messages, tests, workflows."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

from kvq_plugin.formats import SERVED

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
TOOLS = Path(os.environ.get("KVQ_TOOLS") or Path(sys.prefix, "tools")) / "bin"
sys.path.insert(0, str(ROOT / "scripts"))
import make_docs  # noqa: E402


def tool(name: str, *arguments: str | Path) -> str:
    """Run a tool of ``.venv/tools``; its output."""
    if not (TOOLS / name).exists():
        pytest.skip(f"no {name}: make test installs it in .venv/tools")
    done = subprocess.run(
        [TOOLS / name, *arguments],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


# --- the site ------------------------------------------------------------------------------------


def test_the_site_builds_without_a_warning(tmp_path):
    """No broken link or anchor. (--quiet would hide warnings from --strict, too.)"""
    tool("mkdocs", "build", "--strict", "--site-dir", tmp_path / "site")
    assert (tmp_path / "site" / "formats.html").exists()


def test_links_of_the_readme_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", text)
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]


def test_scripts_and_examples_that_are_named_exist():
    pages = [*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "examples" / "README.md"]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    named = set(re.findall(r"`((?:examples|scripts|tests|docs)/[\w./-]+)`", text))
    assert len(named) > 8
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


# --- data ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", make_docs.formats(), ids=lambda row: row["name"])
def test_every_figure_of_the_picture_is_where_it_says(row):
    for figure in ("tokens", "perplexity", "speed"):
        page, _, quoted = row[f"{figure}_source"].partition(": ")
        assert row[figure] in quoted
        text = (ROOT / page).read_text(encoding="utf-8")
        assert quoted in text and row["name"] in text, f"{page} does not say {quoted!r}"


def test_the_picture_has_every_name_and_no_other():
    shown = {row["name"] for row in make_docs.formats()}
    # fp8 is e4m3; e5m2 is coarser, and was not measured in the same runs.
    assert shown == set(SERVED) - {"fp8_e4m3", "fp8_e5m2"}


def test_the_support_matrix_is_what_the_data_say():
    _, is_, should_be = make_docs.page()
    assert is_ == should_be, "run scripts/make_docs.py"


def references() -> list[str]:
    found = []
    for table in make_docs.tables():
        for _, *cells in table["rows"]:
            found += [word for text in cells for word in text.split() if "/" in word]
    return sorted(set(found))


@pytest.mark.parametrize("reference", references())
def test_every_test_of_the_matrix_exists(reference):
    path, _, test = reference.partition("::")
    assert (ROOT / path).exists()
    if not test:
        return
    name, _, case = test.rstrip("]").partition("[")
    source = (ROOT / path).read_text(encoding="utf-8")
    functions = [n.name for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)]
    assert name in functions
    models = (ROOT / "tests" / "tiny_models.py").read_text(encoding="utf-8")
    assert not case or f'"{case}"' in source + models


# --- messages ------------------------------------------------------------------------------------


@cache
def messages() -> list[str]:
    """Every string of the package, with … for what an f-string fills in."""
    found = []
    for path in (ROOT / "kvq_plugin").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%s|\{[^{}]*\}", "…", node.value))
    return found


FOREIGN = (
    "PackageNotFoundError", "torchvision::nms", "InvalidCxxCompiler", "desired CPU memory",
    "CPU Generator",
)  # fmt: skip
HEADINGS = re.findall(
    r"^### (`.+`)$", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.M
)


@pytest.mark.parametrize("heading", [h for h in HEADINGS if not any(f in h for f in FOREIGN)])
def test_every_message_is_one_of_ours(heading):
    wanted = heading.strip("`")
    pattern = ".*".join(re.escape(part) for part in wanted.split("…"))
    held = [m for m in messages() if re.search(pattern, m, re.S)]
    assert held, f"no string of the package is like {wanted!r}"


def test_there_are_headings():
    assert len(HEADINGS) > 20


# --- release -------------------------------------------------------------------------------------


def test_workflows_have_the_form_that_github_wants():
    """Their schema; they have not run there."""
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert [w.stem for w in workflows] == ["docs", "lint", "tests", "wheels"]
    tool("check-jsonschema", "--builtin-schema", "vendor.github-workflows", *workflows)


def test_what_workflows_run_exists():
    text = "".join(w.read_text() for w in (ROOT / ".github" / "workflows").glob("*.yml"))
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert set(re.findall(r"make ([a-z-]+)", text)) <= set(targets)
    for path in re.findall(r"(?:python|pytest|run:) ((?:scripts|tests|\.ci)/[\w./]+)", text):
        assert (ROOT / path).exists()
    dev = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for pinned in re.findall(r"(?:ruff|clang-format)==[\d.]+", text):
        assert pinned in dev["dev"]
    for pinned in re.findall(r"mkdocs-material==[\d.]+", text):
        assert pinned in (ROOT / "Makefile").read_text()


def test_the_dockerfile_is_clean_and_copies_what_is_there():
    dockerfile = ROOT / "docker" / "Dockerfile"
    copied = re.findall(r"^COPY (\S+)", dockerfile.read_text(), re.M)
    assert copied == ["scripts/vllm_cpu_metadata", "dist/*.whl"]
    assert (ROOT / copied[0]).exists()
    tool("hadolint", dockerfile)
