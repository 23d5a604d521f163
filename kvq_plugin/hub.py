"""Where a checkpoint lies: in a directory, or on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

#: Weights in forms that nothing here reads.
_FOREIGN = ["*.bin", "*.pth", "*.gguf"]


def checkpoint_folder(model: str | Path, only: Sequence[str] | None = None) -> Path:
    """The directory *model*, or that of the hub's model of this name: downloaded, or cached.

    *only* are patterns of the files that are needed; without, all but weights of other
    libraries. Raises FileNotFoundError where there is no such checkpoint, and ValueError for a
    directory that holds none.
    """
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} has no config.json: expected a model's directory")
        return folder
    if folder.exists() or str(model).count("/") > 1 or str(model).startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"no such model: {model} is no directory: expected a checkpoint's directory, or the "
            "name of a model on the hub"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(model), allow_patterns=only, ignore_patterns=_FOREIGN))
    except Exception as error:  # network, authorization, names that cannot be
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(
            f"no such model: {model} is neither a directory nor on the hub ({reason})"
        ) from None
