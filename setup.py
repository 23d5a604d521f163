"""Thin driver: metadata lives in pyproject.toml, the build in CMakeLists.txt."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def asked(name: str, to: str) -> bool:
    """Whether the environment variable *name*, 0 or 1, asks to do what *to* says."""
    value = os.environ.get(name, "0")
    if value not in ("0", "1"):
        raise SystemExit(f"{name}={value!r}: expected 1 ({to}) or 0")
    return value == "1"


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        if asked("KVQ_PREBUILT", "package kvq_plugin/*.so as they are"):
            # scripts/build_wheel.py put them there; a build takes minutes, and was tested.
            built = ROOT / "kvq_plugin" / "_kvq.so"
            if not built.exists():
                raise SystemExit(f"KVQ_PREBUILT=1, but {built} is missing; run make install")
            if built.parent != target:
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy2(built, target)
            return
        import torch  # a build requirement; found because of --no-build-isolation

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
        if asked("KVQ_CUDA", "build the CUDA C++ kernels too, which takes nvcc and minutes"):
            source, build = ROOT / "csrc" / "cuda", ROOT / "build" / "cuda"
            output = f"-DKVQ_OUTPUT_DIR={target}"
            configure = ["cmake", "-S", str(source), "-B", str(build), "-G", "Ninja", output]
            subprocess.run(configure, check=True, env=env)
            subprocess.run(["cmake", "--build", str(build)], check=True, env=env)

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"


setup(
    ext_modules=[Extension("kvq_plugin._kvq", [])],
    cmdclass={"build_ext": CMakeBuild},
    # The library calls torch's C shims and no Python at all, so it suits every CPython; the package
    # is written for 3.11 on.
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
