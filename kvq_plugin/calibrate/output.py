"""The checkpoint with scales: built beside its place and renamed, so that it is there whole or
not at all. Weights are hard links where the file system allows it.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from kvq_plugin.calibrate.checkpoint import CONFIG, Source, is_kv_scale
from kvq_plugin.disk import room_for
from kvq_plugin.formats import SERVED
from kvq_plugin.mapping import LAYERS, SECTION, declared_mapping
from kvq_plugin.serving.scales.declared import INDEX, quantization_section

SCALES = "kv_scales.safetensors"
#: What `kvq allocate` leaves beside a mapping; it tells its earlier outputs by the first.
FIGURES, PLOT = "kvq_allocation.json", "kvq_allocation.png"
_KEPT = "kvq_allocation"  # in the header of SCALES: digest of the FIGURES that were kept
_SPARE = 64 << 20  # bytes to leave free
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")


@dataclass(frozen=True)
class Target:
    """Where the output goes. ``force`` replaces an earlier output; ``copy`` copies weights."""

    folder: Path
    force: bool = False
    copy: bool = False

    @property
    def place(self) -> Path:
        """Where the output comes to lie: through a link, what it points to is replaced."""
        return self.folder.resolve()

    def check(self, source: Source, command: str = "kvq calibrate", mark: str = SCALES) -> None:
        """ValueError when the output cannot be written there: before hours of calibration.

        *mark* is the file by which an earlier output of *command* is told.
        """
        out, model = self.place, source.folder.resolve()
        if out == model or out in model.parents:
            raise ValueError(f"the output {self.folder} would replace the model: name another")
        if model in out.parents:
            raise ValueError(f"the output {self.folder} lies inside the model: name another")
        self._check_free(command, mark)
        parent = out.parent
        if not parent.is_dir():
            raise ValueError(f"{parent} is not a directory: create it, or name another output")
        if not os.access(parent, os.W_OK):
            raise ValueError(f"{parent} is not writable: name another output")
        self._check_room(source, parent)

    def _check_free(self, command: str, mark: str) -> None:
        if not self.folder.exists() and not self.folder.is_symlink():
            return
        if not self.force:
            raise ValueError(f"{self.folder} exists: name another output, or pass --force")
        if not (self.folder / mark).is_file():
            why = f"has no {mark}"
        elif (writer := _writer(self.folder)) != command:
            why = f"was written by `{writer}`, which keeps the {mark} of its model"
        else:
            return
        raise ValueError(
            f"--force replaces what `{command}` wrote, and {self.folder} {why}: remove it "
            "yourself, or name another output"
        )

    def _check_room(self, source: Source, parent: Path) -> None:
        linked = not self.copy and _can_link(source.folder, parent)
        needed = sum(
            (source.folder / file).stat().st_size
            for file, names in source.shards.items()
            if not linked or any(map(is_kv_scale, names))
        )
        free = shutil.disk_usage(parent).free
        if free < needed + _SPARE:
            raise ValueError(
                f"no room on disk: the output takes {(needed + _SPARE) / 2**20:,.0f} MiB, and "
                f"{parent} has {free / 2**20:,.0f} MiB free"
            )

    @contextmanager
    def being_written(self, command: str, mark: str) -> Iterator[Path]:
        """A scratch directory that becomes the output when the block ends without an error.

        ValueError, and nothing is written, when by then something lies at the output that
        :meth:`check` would refuse: hours may have passed since.
        """
        place = self.place
        # A temporary directory is its owner's alone; one made within it follows the umask.
        private = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
        scratch, old = private / "new", private / "old"
        try:
            with room_for(self.folder, "name another output"):
                scratch.mkdir()
                yield scratch
            self._check_still_free(command, mark)
            try:
                if place.exists():
                    place.rename(old)
                scratch.rename(place)  # replaces an empty folder, and nothing else
            except BaseException as error:
                if old.exists() and not place.exists():
                    old.rename(place)
                if isinstance(error, OSError):  # something may have appeared just now
                    kept = f"; the earlier output is in {old}" if old.exists() else ""
                    self._check_still_free(command, mark, kept)
                raise
            shutil.rmtree(old, ignore_errors=True)
        finally:
            # Never the only copy of an earlier output.
            shutil.rmtree(scratch if old.exists() else private, ignore_errors=True)

    def _check_still_free(self, command: str, mark: str, kept: str = "") -> None:
        try:
            self._check_free(command, mark)
        except ValueError as error:
            raise ValueError(
                f"{self.folder} appeared or changed while `{command}` ran, and was left as it is; "
                f"the new output was removed{kept}. {error}"
            ) from None


def _writer(folder: Path) -> str:
    """The command that wrote *folder*, which has SCALES or FIGURES. Each keeps the other's file of
    its model, and scales say which figures came with them."""
    scales, figures = folder / SCALES, folder / FIGURES
    if not figures.is_file():
        return "kvq calibrate"
    kept = None
    with suppress(SafetensorError, OSError), safe_open(scales, framework="pt") as header:
        kept = (header.metadata() or {}).get(_KEPT)
    return "kvq calibrate" if kept == _digest(figures) else "kvq allocate"


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _can_link(folder: Path, parent: Path) -> bool:
    return folder.resolve().stat().st_dev == parent.stat().st_dev


def write(
    source: Source,
    target: Target,
    tensors: Mapping[str, torch.Tensor],
    scheme: Mapping[str, Any],
    skipped: list[int],
    metadata: Mapping[str, str],
) -> None:
    """Write *source* with the scales *tensors* and the KV *scheme* to *target*.

    *skipped* are numbers of layers without scales; *metadata* goes to the header of the shard
    with the scales. Scales the source had are left out. OSError when the disk is full.
    """
    with target.being_written("kvq calibrate", SCALES) as folder:
        weight_map = {}
        for file, names in source.shards.items():
            kept = [name for name in names if not is_kv_scale(name)]
            name = _shard_name(source, file)
            if kept:
                put(source.folder / file, folder / name, None if kept == names else kept, target)
            weight_map |= dict.fromkeys(kept, name)
        without = (FIGURES, PLOT) if drops_mapping(source.config) else ()
        if (figures := source.folder / FIGURES).is_file() and not without:
            metadata = {**metadata, _KEPT: _digest(figures)}
        _save(dict(tensors), folder / SCALES, {"format": "pt", **metadata})
        weight_map |= dict.fromkeys(tensors, SCALES)
        size = sum((folder / file).stat().st_size for file in set(weight_map.values()))
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_json(folder / INDEX, index)
        write_json(folder / CONFIG, with_scheme(source, scheme, skipped))
        copy_rest(source, folder, without)


def _shard_name(source: Source, file: str) -> str:
    # transformers takes a file of this name for the whole model, and would not read the index.
    return "model-weights.safetensors" if file == "model.safetensors" else file


def put(old: Path, new: Path, only: list[str] | None, target: Target) -> None:
    """Link or copy *old* to *new*, which must not exist; with *only* these of its tensors."""
    if new.exists():
        raise ValueError(
            f"two weight files of {old.parent} would become {new.name}: expected names of their "
            f"own; rename {old.name}"
        )
    new.parent.mkdir(parents=True, exist_ok=True)
    if only is not None:
        tensors = load_file(old)
        with safe_open(old, framework="pt") as header:
            _save({n: tensors[n] for n in only}, new, header.metadata())
        return
    if not target.copy:
        try:
            os.link(old.resolve(), new)
            return
        except OSError:  # another file system, or one without links
            pass
    shutil.copyfile(old, new)


def _save(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None) -> None:
    if path.exists():
        raise ValueError(
            f"the model has weights in a {path.name}, which the output would lose to a file of "
            "that name: expected another name; rename it, there and in the index"
        )
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:  # a full disk, for one, is no OSError there
        raise OSError(f"cannot write {path.name}: {error}") from None
    # safetensors makes its files 0600, whatever the umask that made the folder.
    path.chmod(path.parent.stat().st_mode & 0o666)


def copy_rest(source: Source, folder: Path, without: Collection[str] = ()) -> None:
    """Copy the small files: tokenizer, generation settings, code, licence; and folders of such
    files, but for those that :func:`left_out` names, and for *without*."""
    left = {*left_out(source), *without}
    for entry in source.folder.iterdir():
        if entry.name not in left:
            _copy_small(entry, folder / entry.name)


def _copy_small(old: Path, new: Path) -> None:
    if old.suffix in _WEIGHTS or _is_passing(old.name):
        return
    if old.is_dir() and not old.is_symlink():
        for entry in old.iterdir():
            _copy_small(entry, new / entry.name)
    elif old.is_file() and not new.exists():
        new.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(old, new)


def _is_passing(name: str) -> bool:
    """Whether *name* is that of a hidden entry or of a cache, which no checkpoint needs."""
    return name.startswith(".") or name == "__pycache__"


def left_out(source: Source) -> list[str]:
    """Names of the source's folders that outputs go without: they hold the weights once more, as
    ``original`` and ``onnx`` do, or are links."""
    mine = {Path(file).parts[0] for file in source.shards}
    folders = [e for e in source.folder.iterdir() if e.is_dir() and not _is_passing(e.name)]
    return sorted(
        folder.name
        for folder in folders
        if folder.name not in mine and (folder.is_symlink() or _has_weights(folder))
    )


def _has_weights(folder: Path) -> bool:
    return any(file.suffix in _WEIGHTS for file in folder.rglob("*"))


def with_scheme(source: Source, scheme: Mapping[str, Any], skipped: list[int]) -> dict[str, Any]:
    """The source's configuration with the KV scheme added to its quantization, and without a
    mapping that :func:`drops_mapping` names.

    Raises ValueError for a checkpoint that declares its quantization elsewhere.
    """
    config = copy.deepcopy(source.config)
    if drops_mapping(config):
        rest = {key: value for key, value in config.pop(SECTION).items() if key != LAYERS}
        config |= {SECTION: rest} if rest else {}
    section = quantization_section(config)
    if not section:
        if (source.folder / "hf_quant_config.json").is_file():
            raise ValueError(
                f"{source.folder} declares its quantization in hf_quant_config.json alone: "
                f"expected quantization_config in {CONFIG}, as ModelOpt 0.29 and later write"
            )
        section = config["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": "dense",
            "quantization_status": "compressed",
            "config_groups": {},
            "ignore": [],
        }
    for part in (section, section.get("quantization")):
        if isinstance(part, dict):  # ModelOpt's, of the scales that are replaced
            part.pop("kv_cache_quant_algo", None)
    section["kv_cache_scheme"] = dict(scheme)
    section.pop("kv_cache_skip_layers", None)
    if skipped:
        section["kv_cache_skip_layers"] = skipped
    return config


def drops_mapping(config: Mapping[str, Any]) -> bool:
    """Whether the output goes without the mapping of layers to KV caches in *config*: ``auto``
    would follow it, and none of its KV caches takes scales."""
    mapping = declared_mapping(config)
    if mapping is None:
        return False
    names = mapping.values() if isinstance(mapping, Mapping) else ()
    return all(name not in SERVED or SERVED[name].is_dynamic for name in names)


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
