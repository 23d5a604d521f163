"""Thin driver: metadata lives in pyproject.toml, the build in CMakeLists.txt."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def wants_cuda() -> bool:
    """KVQ_CUDA=1: build the CUDA C++ kernels too, which takes nvcc and a few minutes."""
    asked = os.environ.get("KVQ_CUDA", "0")
    if asked not in ("0", "1"):
        raise SystemExit(f"KVQ_CUDA={asked!r}: expected 1 (build the CUDA C++ kernels) or 0")
    return asked == "1"


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import torch  # a build requirement; found because of --no-build-isolation

        target = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        build = ROOT / "build" / "cmake"  # kept, so that the next build compiles what changed
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            *("-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DKVQ_TORCH_DIR={Path(torch.__file__).parent}",
            f"-DKVQ_OUTPUT_DIR={target}",
        ]
        # pip's cmake and ninja lie beside the interpreter, which need not be on PATH.
        env = dict(os.environ, PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        subprocess.run(configure, check=True, env=env)
        subprocess.run(["cmake", "--build", str(build)], check=True, env=env)
        if wants_cuda():
            source, build = ROOT / "csrc" / "cuda", ROOT / "build" / "cuda"
            output = f"-DKVQ_OUTPUT_DIR={target}"
            configure = ["cmake", "-S", str(source), "-B", str(build), "-G", "Ninja", output]
            subprocess.run(configure, check=True, env=env)
            subprocess.run(["cmake", "--build", str(build)], check=True, env=env)

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"


setup(ext_modules=[Extension("kvq_plugin._kvq", [])], cmdclass={"build_ext": CMakeBuild})
