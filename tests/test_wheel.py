"""The wheel and the sdist of ``make wheel``: what is in them, and use without a compiler.

Both package the library that is built already. That the sdist's sources are complete is seen by
having the compiler look for every file they include: seconds, where a build takes minutes.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
import wheels

from kvq_plugin import __version__, _native, cli

ROOT = Path(__file__).parents[1]
TAG = "cp311-abi3-manylinux_2_28_x86_64"

needs_auditwheel = pytest.mark.skipif(
    wheels.auditwheel() is None, reason="no auditwheel: make test installs it in .venv/tools"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """sdist and wheel."""
    return wheels.build(tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def environment(built, tmp_path_factory):
    """Variables of an environment with the wheel and no compiler."""
    return wheels.installed(built[1], tmp_path_factory.mktemp("fresh"))


# --- versions ------------------------------------------------------------------------------------


def test_the_changelog_begins_with_this_version_or_what_is_unreleased():
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert headings[0] == "Unreleased" or headings[0].split()[0] == __version__


@pytest.mark.parametrize("tag", ["v9.9.9", "0.1"])
def test_a_tag_of_another_version_is_refused(tag):
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "check_tag.py", tag], capture_output=True, text=True
    )
    assert done.returncode == 1 and __version__ in done.stderr


def test_version_names_the_kernels(capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(["--version"])
    assert done.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"kvq {__version__}\n")
    assert ", ".join(_native.compiled_isas()) in printed and (
        "CUDA C++" in printed or "_kvq_cuda.so" in printed
    )


def test_compiled_kernels_include_those_that_run_here():
    assert [isa for isa in _native.compiled_isas() if isa in _native.supported_isas()] == (
        _native.supported_isas()
    )


# --- what is in them -----------------------------------------------------------------------------


@needs_auditwheel
def test_the_wheel_has_the_name_and_the_library(built):
    _, wheel = built
    assert wheel.name == f"kvq_plugin-{__version__}-{TAG}.whl"
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read("kvq_plugin/_kvq.so") == _native.LIBRARY.read_bytes()
        names = archive.namelist()
    of_package = (p.relative_to(ROOT).as_posix() for p in (ROOT / "kvq_plugin").rglob("*.py"))
    assert set(of_package) <= set(names)
    assert not [name for name in names if not name.startswith(("kvq_plugin/", "kvq_plugin-"))]


@needs_auditwheel
def test_no_symbol_is_newer_than_manylinux_2_28(built):
    """As auditwheel sees it; libtorch_cpu, which torch brings, is no system's library."""
    shown = subprocess.run(
        [wheels.auditwheel(), "show", built[1]], capture_output=True, text=True, check=True
    )
    said = " ".join(shown.stdout.split())
    glibc = re.search(r'constrains the platform tag to "manylinux_2_(\d+)_x86_64"', said)
    assert glibc and int(glibc[1]) <= 28, said


def test_the_library_uses_no_python_and_exports_its_own_names_alone():
    """Hence abi3: any CPython does. Hidden, its copies of libstdc++'s functions meet no others."""
    if not shutil.which("nm"):
        pytest.skip("needs nm")
    listed = subprocess.run(
        ["nm", "-D", _native.LIBRARY], capture_output=True, text=True, check=True
    ).stdout
    symbols = [line.split()[-2:] for line in listed.splitlines()]
    assert not [name for kind, name in symbols if kind == "U" and re.match("_?Py", name)]
    assert not [name for kind, name in symbols if kind in "TDBVWu" and name[:4] != "kvq_"
                and "@" not in name]  # fmt: skip


@needs_auditwheel
def test_the_sdist_has_all_that_a_build_reads(built, tmp_path):
    """Configured by its own CMakeLists; every source is asked which files it includes."""
    if not shutil.which("g++") or not (cmake := shutil.which("cmake", path=_beside_python())):
        pytest.skip("needs g++ and cmake")
    with tarfile.open(built[0]) as archive:
        archive.extractall(tmp_path, filter="data")
    [source] = tmp_path.iterdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc/cuda/api.cu"):
        assert (source / name).exists(), name
    assert not list(source.rglob("*.so"))
    output = tmp_path / "build"
    configure = [cmake, "-S", source, "-B", output, "-G", "Ninja"]
    configure += [f"-DKVQ_TORCH_DIR={Path(torch.__file__).parent}", f"-DKVQ_OUTPUT_DIR={output}"]
    configure += ["-DCMAKE_EXPORT_COMPILE_COMMANDS=1"]
    configure += [f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja', path=_beside_python())}"]
    subprocess.run(configure, check=True, capture_output=True, timeout=100)
    commands = json.loads((output / "compile_commands.json").read_text())
    assert len(commands) > 20
    seen = set()
    for entry in commands:
        if (file := entry["file"]) in seen:
            continue  # the same source for the next instruction set
        seen.add(file)
        command = shlex.split(entry["command"])
        command[command.index("-o") : command.index("-o") + 2] = []
        done = subprocess.run([*command, "-M"], capture_output=True, text=True, timeout=100,
                              cwd=entry["directory"])  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        assert str(ROOT / "csrc") not in done.stdout
    assert seen >= {str(path) for path in (source / "csrc" / "cpu").glob("*.cpp")}
    files = [{p.relative_to(d) for p in (d / "csrc").rglob("*.*")} for d in (ROOT, source)]
    assert files[0] == files[1]  # CUDA's too, and the linker's map


def _beside_python() -> str:
    return f"{Path(sys.executable).parent}:{os.environ['PATH']}"


# --- without a compiler --------------------------------------------------------------------------


@needs_auditwheel
def test_no_compiler_and_nothing_of_the_checkout_is_seen(environment):
    assert not [name for name in wheels.COMPILERS if shutil.which(name, path=environment["PATH"])]
    where = "import kvq_plugin, torch; print(kvq_plugin.__file__)"
    assert wheels.run(environment, "python", "-c", where).startswith(environment["VIRTUAL_ENV"])
    points = (
        "from importlib.metadata import entry_points as e, distributions as d\n"
        "print([p.dist.version for p in e(group='vllm.general_plugins', name='kvq')],"
        "len([x for x in d() if x.name == 'kvq-plugin']))"
    )
    assert wheels.run(environment, "python", "-c", points).split() == [f"['{__version__}']", "1"]


@needs_auditwheel
def test_the_command_works_from_the_wheel(environment):
    printed = wheels.run(environment, "kvq", "--version")
    assert f"kvq {__version__}" in printed and "avx512" in printed
    assert "this installation has CPU kernels for" in wheels.run(environment, "kvq", "doctor")


@pytest.mark.slow
@pytest.mark.timeout(600)
@needs_auditwheel
def test_the_wheel_serves_without_a_compiler(environment, smollm2):
    """The example of a server and a client, as a user who has no compiler runs it."""
    example = ROOT / "examples" / "server_and_client.py"
    printed = wheels.run(environment, "python", example, smollm2, timeout=500)
    assert "100" in printed and "holds" in printed
