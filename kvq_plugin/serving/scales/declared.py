"""What a checkpoint declares about its KV cache.

:func:`declared_scheme` is the one answer, for serving, ``kvq inspect``, ``kvq calibrate`` and
``kvq eval``; it imports no vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import safe_open

from kvq_plugin.formats import SERVED, Code, Kind, KVFormat
from kvq_plugin.mapping import MIXED, SECTION, declared_mapping
from kvq_plugin.serving.scales.keys import PREDICTION_COUNTS

INDEX = "model.safetensors.index.json"
#: compressed-tensors' ``type`` -> how such codes decode. Its int4 is symmetric, unlike ours.
_KINDS = {"float": Kind.FLOAT, "int": Kind.SIGNED}
#: ModelOpt's ``kv_cache_quant_algo`` -> the same in compressed-tensors' words. What is not here
#: vLLM does not know either, and leaves the cache unquantized.
_MODELOPT = {"FP8": ("float", 8), "NVFP4": ("float", 4)}
#: Where it is in ModelOpt's files, and what vLLM's own config objects call it.
_ALGORITHM = ("kv_cache_quant_algo", "kv_cache_quant_method")
_SIDECAR = "hf_quant_config.json"  # ModelOpt's, until config.json held the same
NO_SCALES_NEEDED = ", ".join(sorted(n for n, f in SERVED.items() if f.is_dynamic))
#: What a layer's largest code may stand for without a word. Keys of Qwen2 reach 400; fp8_e5m2's
#: codes 128 times as far as the e4m3 ones that scales are made for.
LIKELY_REACH = 1e-3, 1e7


@dataclass(frozen=True)
class KVScheme:
    """A checkpoint's ``kv_cache_scheme`` in compressed-tensors' schema.

    Attributes:
        type, num_bits: the code its scales were computed for.
        dynamic: no static scales are in the checkpoint.
        every_layer: the scheme promises scales for every layer. False for ModelOpt, whose
            exporters leave out scales equal to 1.
    """

    type: str
    num_bits: int
    dynamic: bool = False
    every_layer: bool = True

    @classmethod
    def from_section(cls, section: Any) -> KVScheme | None:
        """From a checkpoint's quantization *section*, a mapping; None when it declares nothing.

        Of ``kv_cache_scheme`` (QuantizationArgs, whose defaults are int, 8 bits, static) and
        ModelOpt's name of an algorithm, the first wins.
        """
        modelopt = str(section.get("quant_method")).startswith("modelopt")
        for part in (section, section.get("quantization")):
            if not isinstance(part, Mapping):
                continue
            if isinstance(scheme := part.get("kv_cache_scheme"), Mapping) and scheme:
                return cls(
                    type=str(scheme.get("type") or "int"),
                    num_bits=int(scheme.get("num_bits") or 8),
                    dynamic=bool(scheme.get("dynamic")),
                    every_layer=not modelopt,
                )
            for key in _ALGORITHM:
                if code := _MODELOPT.get(str(part.get(key)).upper()):
                    return cls(*code, every_layer=False)
        return None

    def __str__(self) -> str:
        return f"num_bits={self.num_bits}, type={self.type}, dynamic={self.dynamic}"

    @property
    def is_complete(self) -> bool:
        """True when a layer without static scales contradicts the checkpoint's own word."""
        return self.every_layer and not self.dynamic

    def fits(self, code: Code) -> bool:
        """True when scales made for this scheme mean the same for *code*.

        Float codes of one width count as equal: e5m2 reaches further than e4m3, and a
        float's relative precision does not depend on its scale.
        """
        return _KINDS.get(self.type) is code.kind and self.num_bits == code.bits

    def dtype(self) -> str:
        """The ``--kv-cache-dtype`` this scheme stands for when the user leaves it at auto.

        Float-8 is ``fp8`` whether dynamic or not, as in vLLM. ValueError when no format fits.
        """
        for format in SERVED.values():
            dynamic = self.dynamic and format.key.code.kind is not Kind.FLOAT
            if self.fits(format.key.code) and format.is_dynamic is dynamic:
                return (*format.aliases, format.name)[0]
        raise ValueError(
            f"the checkpoint's kv_cache_scheme ({self}) is not one kvq_plugin serves: expected "
            "num_bits=8 with type int or float; pass a --kv-cache-dtype that needs no static "
            f"scales ({NO_SCALES_NEEDED}), or bfloat16"
        )

    def check(self, format: KVFormat, asked: str) -> None:
        """Raise ValueError when *format* would read scales that were made for another code.

        A scale is amax/127 for int8 and amax/448 for fp8: taken for the other, int8 would
        clip at 28 % of the range.
        """
        if format.is_dynamic or self.dynamic or self.fits(format.key.code):
            return
        remedy = "use --kv-cache-dtype auto" if _KINDS.get(self.type) else "use another dtype"
        raise ValueError(
            f"--kv-cache-dtype {asked} was asked, but the checkpoint's KV scales are for another "
            f"code (kv_cache_scheme: {self}); {remedy}, or a dtype that needs no static scales: "
            f"{NO_SCALES_NEEDED}"
        )


def quantization_section(config: Any, folder: Path | None = None) -> Any:
    """The part of a checkpoint's configuration that is about quantization; {} without one.

    *config* is config.json's content or transformers' object for it; the section is the very one
    inside. As in vLLM, ModelOpt's sidecar in *folder* counts where config.json has none.
    """
    text = _get(config, "text_config")
    for key in ("quantization_config", "compression_config"):
        for holder in (config, text):
            if section := _get(holder, key):
                return section if isinstance(section, Mapping) else section.to_dict()
    if folder is not None and (folder / _SIDECAR).is_file():
        return read_config(folder / _SIDECAR)
    return {}


def put_section(config: Any, section: dict[str, Any] | None) -> None:
    """Put *section* where :func:`quantization_section` finds one in transformers' *config*; None
    removes that one."""
    for key in ("quantization_config", "compression_config"):
        for holder in (config, getattr(config, "text_config", None)):
            if getattr(holder, key, None):
                delattr(holder, key) if section is None else setattr(holder, key, section)
                return


def declared_scheme(config: Any, folder: Path | None = None) -> KVScheme | None:
    """What a checkpoint declares about its KV cache; None when it declares nothing.

    Arguments as for :func:`quantization_section`.
    """
    return KVScheme.from_section(quantization_section(config, folder))


def scheme_of(quant_config: Any, model_config: Any) -> KVScheme | None:
    """What a checkpoint that vLLM serves declares, by its configuration or by what vLLM made of it:
    some of its weight quantizations drop the KV scheme, and some read files of their own."""
    if hasattr(quant_config, "kvq_scheme"):  # scales/config.py's
        return quant_config.kvq_scheme
    declared = declared_scheme(model_config.hf_config)
    if declared is None and quant_config is not None:
        declared = KVScheme.from_section(vars(quant_config))
    return declared


def declared_dtype(vllm_config: Any) -> str | None:
    """The dtype that the checkpoint's layer mapping or KV scheme stands for; None without.

    Raises ValueError for a scheme that no format serves.
    """
    if vllm_config.model_config is None:
        return None
    if declared_mapping(vllm_config.model_config.hf_config) is not None:
        return MIXED
    scheme = scheme_of(vllm_config.quant_config, vllm_config.model_config)
    return None if scheme is None else scheme.dtype()


def unquantized_dtype(config: Any, folder: Path | None = None) -> str:
    """The ``--kv-cache-dtype`` that quantizes nothing: ``auto``, but for a checkpoint that declares
    a KV scheme or a mapping of layers, which ``auto`` follows; there the name of a dtype the model
    runs in."""
    if declared_scheme(config, folder) is None and declared_mapping(config) is None:
        return "auto"
    holders = (config, _get(config, "text_config"))
    stated = (_get(h, key) for key in ("dtype", "torch_dtype") for h in holders)
    found = next((str(dtype) for dtype in stated if dtype), "")
    return "float16" if found.endswith("float16") and "bfloat16" not in found else "bfloat16"


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in *file*. ValueError when it is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object")
    return content


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


#: What is expected of a value -> whether it is that. Absent values are, and most that are null.
_EXPECTED = {
    "a whole number from 1 on": _is_count,
    "a whole number from 1 on, or one for each layer": lambda x: (
        _is_count(x) or (isinstance(x, list) and all(n == 0 or _is_count(n) for n in x))
    ),
    "a whole number": lambda x: isinstance(x, int) and not isinstance(x, bool),
    "an object": lambda x: isinstance(x, dict),
    "a list": lambda x: isinstance(x, list),
}
_COUNT, _COUNTS, _WHOLE, _OBJECT, _LIST = _EXPECTED
#: Key of config.json, or of a section of it -> what is expected. Keys that nothing here reads are
#: the model's own business.
_FIELDS = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers"), _COUNT),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads"), _COUNTS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_head_kv"), _COUNTS),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "head_dim"), _COUNTS),
    **dict.fromkeys(("max_position_embeddings", *PREDICTION_COUNTS), _WHOLE),
    **dict.fromkeys(("quantization_config", "compression_config", "text_config"), _OBJECT),
    SECTION: _OBJECT,
    **dict.fromkeys(("kv_cache_skip_layers", "layer_types"), _LIST),
}
_SCHEME_FIELDS = {"num_bits": _COUNT}
#: Where such keys are; a section is passed over where it is another tool's and no object.
_SECTIONS = (
    *("text_config", "quantization_config", "compression_config"),
    *("quantization", "kv_cache_scheme"),
)


def read_config(file: Path) -> dict[str, Any]:
    """As :func:`read_json`, of a model's configuration: ValueError too where a value that we read
    is of another type than it must be."""
    config = read_json(file)
    _check_fields(config, file, "")
    return config


def _check_fields(section: Mapping[str, Any], file: Path, path: str) -> None:
    fields = _SCHEME_FIELDS if path.endswith("kv_cache_scheme.") else _FIELDS
    for key, value in section.items():
        if (what := fields.get(key)) is None:
            continue
        if value is None and key != "num_hidden_layers":  # which transformers insists on
            continue
        if not _EXPECTED[what](value):
            raise ValueError(
                f"{file}: {path}{key} is {_short(value)}: expected {what}; correct the file, or "
                "download it again"
            )
    for key in _SECTIONS:
        if isinstance(inner := section.get(key), dict):
            _check_fields(inner, file, f"{path}{key}.")


def weight_map(index: Path, present: bool = True) -> dict[str, str]:
    """The index's tensor -> weight file, a name relative to its folder.

    ValueError when it says no such thing, when a name leads out of the folder, which would have
    outputs written there, and, with *present*, when a file is not there.
    """
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise ValueError(
            f"{index}: weight_map is {_short(found)}: expected an object, the name of each tensor "
            "-> its file; download it again, or save the model with save_pretrained"
        )
    files: dict[str, str] = {}
    for tensor, file in found.items():
        if not isinstance(file, str) or not _is_inside(file):
            raise ValueError(
                f"{index}: weight_map has tensor {tensor} in {_short(file)}: expected the name of "
                "a .safetensors file in the index's own folder, or in one below it; correct it"
            )
        files[tensor] = str(PurePosixPath(file))
    if present:
        missing = sorted({f for f in files.values() if not (index.parent / f).is_file()})
        if missing:
            raise ValueError(
                f"{index} names files that are not there: {', '.join(missing)}: expected every "
                "weight file beside it; download the model again"
            )
    return files


def _is_inside(file: str) -> bool:
    path = PurePosixPath(file)
    return path.suffix == ".safetensors" and not path.is_absolute() and ".." not in path.parts


def _short(value: Any) -> str:
    """*value* as JSON has it, or the beginning of that."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _get(holder: Any, key: str) -> Any:
    return holder.get(key) if isinstance(holder, Mapping) else getattr(holder, key, None)


def tensor_names(folder: Path) -> set[str] | None:
    """Names of the tensors in *folder*'s safetensors files; None when it has no such file."""
    index = folder / INDEX
    if index.is_file():
        return set(weight_map(index, present=False))
    files = sorted(folder.glob("*.safetensors"))
    return {name for file in files for name in _header(file)} if files else None


def _header(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())
