"""The machine, and ``_kvq_cuda.so`` on it: from a bundle made elsewhere, else built in place.

``python -m kvq_plugin.gpu_check.library --bundle DIR`` makes that bundle (``make gpu-bundle``).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from kvq_plugin.gpu_check.evidence import put

ROOT = Path(__file__).parent.parent.parent
NAME = "_kvq_cuda.so"
#: What a bundle serves: Ampere, Hopper, Blackwell.
ARCHITECTURES = ("80", "90a", "100")
_LOAD = """
import sys, torch
from kvq_plugin.kernels import cuda
library = cuda.open_library(sys.argv[1])
torch.zeros(1, device="cuda")
error = library.kvq_cuda_load()
sys.exit(library.kvq_cuda_error(error).decode() if error else 0)
"""


def machine(candidate, context) -> Iterator:
    """The step that says what machine this is; it fails without a GPU."""

    def look() -> dict:
        import torch

        found = {"device": context.device.type, "torch": torch.__version__,
                 "triton": _version("triton"), "python": platform.python_version(),
                 "cpus": os.cpu_count() or 1}  # fmt: skip
        if context.device.type == "cpu":
            return found
        if not torch.cuda.is_available() or torch.version.hip is not None:
            raise ValueError(
                f"no CUDA GPU for PyTorch {torch.__version__}: gpu-check needs one, and a CUDA "
                f"build of PyTorch (set GPU_PYTHON to its Python); make test checks what needs none"
            )
        properties = torch.cuda.get_device_properties(context.device)
        found |= {"device": properties.name, "compute": f"{properties.major}.{properties.minor}",
                  "multiprocessors": properties.multi_processor_count,
                  "free_memory": torch.cuda.mem_get_info()[0]}  # fmt: skip
        return found

    yield "machine", look


def _version(package: str) -> str:
    if find_spec(package) is None:
        return "not installed"
    from importlib.metadata import version

    return version(package)


def digest() -> str:
    """Of all that the library is made from."""
    found = hashlib.sha256()
    for path in sorted((*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cuda/*"))):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def unusable(library: Path) -> str:
    """Why *library* does not load its kernels on this machine's GPU; empty if it does. Asked in a
    process of its own, which is what a library that crashes takes with it."""
    if not library.exists():
        return f"{library} is missing"
    command = [sys.executable, "-c", _LOAD, str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    return "" if done.returncode == 0 else f"status {done.returncode}: {done.stderr[-500:].strip()}"


def stale(bundle: Path) -> str:
    """Why *bundle* is not of this checkout; empty if it is."""
    try:
        made = json.loads((bundle / "manifest.json").read_text())
    except (OSError, ValueError) as e:
        return f"no readable manifest: {e}"
    if (ROOT / "csrc").exists() and made.get("sources") != digest():
        return "it was made from other sources than this checkout's: run make gpu-bundle again"
    return ""


def cases(candidate, context) -> Iterator:
    """One case, which passes once there is a library that loads."""

    def provide() -> dict:
        target, reason = ROOT / "kvq_plugin" / NAME, "none was given"
        if context.bundle is not None:
            reason = stale(context.bundle) or unusable(context.bundle / NAME)
            if not reason:
                shutil.copy2(context.bundle / NAME, target)
                return {"library": "from the bundle"}
        import torch

        capability = (9, 0)  # of a dry run
        if context.device.type == "cuda":
            capability = torch.cuda.get_device_capability()
        try:
            build(("".join(map(str, capability)),), target.parent)
            broken = unusable(target)
            assert not broken, f"the library built here does not load: {broken}"
        except AssertionError as e:
            raise AssertionError(f"{e}\nthe bundle was not used: {reason}") from None
        return {"library": f"built here; the bundle was not used: {reason}"}

    yield "library", provide


def build(architectures: tuple[str, ...], output: Path) -> None:
    """Build into *output*. Raises AssertionError with the compiler's words."""
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    missing = [n for n, at in (("nvcc", nvcc), ("cmake", shutil.which("cmake"))) if at is None]
    assert not missing, f"no {' and no '.join(missing)} to build the CUDA C++ kernels with"
    source = ROOT / "csrc" / "cuda"
    assert source.exists(), f"{source} is missing: build in a checkout of the project"
    folder = ROOT / "build" / f"cuda-{'-'.join(architectures)}"
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    commands = (
        ["cmake", "-S", str(source), "-B", str(folder), *generator,
         f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(f'{a}-real' for a in architectures)}",
         f"-DKVQ_OUTPUT_DIR={output.resolve()}"],
        ["cmake", "--build", str(folder), "--parallel", str(os.cpu_count() or 2)],
    )  # fmt: skip
    for command in commands:
        done = subprocess.run(
            command, capture_output=True, text=True, env=dict(os.environ, CUDACXX=nvcc)
        )
        said = (done.stdout + done.stderr)[-3000:]
        assert done.returncode == 0, f"{' '.join(command)}\n{said}"


def main(argv=None) -> int:
    p = argparse.ArgumentParser(prog="make gpu-bundle", description=__doc__)
    p.add_argument("--bundle", type=Path, required=True)
    bundle = p.parse_args(argv).bundle
    bundle.mkdir(parents=True, exist_ok=True)
    try:
        build(ARCHITECTURES, bundle)
    except AssertionError as e:
        print(f"no bundle: {e}", file=sys.stderr)
        return 1
    tests = ROOT / "tests"
    shutil.copy2(tests / "golden_cases.py", bundle)
    shutil.copytree(tests / "golden", bundle / "golden", dirs_exist_ok=True)
    made = {"sources": digest(), "architectures": ARCHITECTURES}
    put(bundle / "manifest.json", json.dumps(made, indent=1) + "\n")
    size = sum(p.stat().st_size for p in bundle.rglob("*") if p.is_file())
    print(f"{bundle}: {size / 2**20:.1f} MiB, for sm_{', sm_'.join(ARCHITECTURES)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
