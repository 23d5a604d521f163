"""Makes the bundle, one archive: vLLM's Python without its libraries, and what it imports that a
machine with torch, triton and transformers alone lacks. For CPython 3.12 on x86-64."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import absent

HERE = Path(__file__).parent
VLLM = "0.33.0"
#: Imported by ``LLM(...)`` and ``generate`` and not on the machine (which has numpy, httpx, ...).
NEEDS = (
    *(
        "annotated-types",
        "pydantic==2.14.4",
        "pydantic-core==2.50.5",
        "typing-extensions",
        "typing-inspection",
    ),
    *("cachetools", "blake3", "cbor2", "dill", "depyf==0.20.0", "astor", "loguru", "msgspec"),
    *("orjson", "partial-json-parser", "pybase64", "python-json-logger", "pyzmq", "setproctitle"),
    *("compressed-tensors==0.17.0", "openai", "jiter", "distro", "sniffio", "httpx2", "httpcore2"),
    *(
        "truststore",
        "oss-harmony",
        "fastapi>=0.133,<0.137",
        "starlette>=1.0.1,<1.1",
        "annotated-doc",
    ),
    *("jsonschema", "jsonschema-specifications", "referencing", "rpds-py"),
)
#: What is left out of vLLM's wheel: libraries, headers and a server in Rust, 0.9 GB.
LEFT_OUT = (".so", ".cuh", ".hpp", ".h", ".inl", ".cu", ".js", ".jpg", "/vllm-rs", "/RECORD")
#: Lines of vLLM's that insist on what was left out, and what they become.
PATCHES = {
    "vllm/vllm_flash_attn/__init__.py": (
        "if not (FA2_AVAILABLE or FA3_AVAILABLE):",
        "if False:  # kvq_plugin's bundle has neither library",
    ),
}
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux1",
             "manylinux_2_24", "manylinux_2_31", "manylinux_2_34", "manylinux_2_35")  # fmt: skip


def make(target: Path, cache: Path | None = None) -> None:
    """Write the archive *target*, with the folder *cache* as Triton's, if there is one."""
    with tempfile.TemporaryDirectory() as work:
        site, wheels = Path(work) / "site", Path(work) / "wheels"
        site.mkdir()
        _download(wheels, f"vllm=={VLLM}")
        _unpack_vllm(next(wheels.glob("vllm-*.whl")), site)
        shutil.rmtree(wheels)
        _download(wheels, *NEEDS)
        for wheel in wheels.glob("*.whl"):
            with zipfile.ZipFile(wheel) as z:
                z.extractall(site)
        shutil.copy2(HERE / "custom_ops.py", site / "vllm" / "_C_stable_libtorch.py")
        shutil.copy2(HERE / "absent.py", site)
        for name in absent.NAMES:
            (site / name).mkdir()
            (site / name / "__init__.py").write_text(absent.PACKAGE)
        _describe_plugin(site)
        if cache is not None:
            stages = shutil.ignore_patterns("*.source", "*.ttir", "*.ttgir", "*.llir", "*.ptx")
            shutil.copytree(cache, site / "triton-cache", ignore=stages)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(target, "w:xz", preset=6) as archive:
            archive.add(site, "site")
    print(f"{target}: {target.stat().st_size / 2**20:.1f} MiB")


def _unpack_vllm(wheel: Path, site: Path) -> None:
    with zipfile.ZipFile(wheel) as z:
        z.extractall(site, [n for n in z.namelist() if not n.endswith(LEFT_OUT)])
    for name, (old, new) in PATCHES.items():
        text = (site / name).read_text()
        assert text.count(old) == 1, f"{name} of vLLM {VLLM}: expected one line {old!r}"
        (site / name).write_text(text.replace(old, new))


def _describe_plugin(site: Path) -> None:
    """Metadata by which vLLM finds the plugin's entry point; its code is the checkout's."""
    info = site / "kvq_plugin-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kvq-plugin\nVersion: 0\n")
    entry = "[vllm.general_plugins]\nkvq = kvq_plugin.serving:register\n"
    (info / "entry_points.txt").write_text(entry)


def _download(folder: Path, *requirements: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir",
               "--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp",
               "--abi", "cp312", "--abi", "abi3", "--abi", "none",
               "--dest", str(folder)]  # fmt: skip
    for name in PLATFORMS:
        command += ["--platform", f"{name}_x86_64"]
    done = subprocess.run([*command, *requirements], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"no bundle: {' '.join(done.stderr.split())[-800:]}")
