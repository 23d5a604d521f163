"""What a checkpoint declares about its KV cache.

:func:`declared_scheme` is the one answer, for serving, ``kvq inspect``, ``kvq calibrate`` and
``kvq eval``; it imports no vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from kvq_plugin.formats import SERVED, Code, Kind, KVFormat
from kvq_plugin.mapping import MIXED, declared_mapping

#: compressed-tensors' ``type`` -> how such codes decode. Its int4 is symmetric, unlike ours.
_KINDS = {"float": Kind.FLOAT, "int": Kind.SIGNED}
#: ModelOpt's ``kv_cache_quant_algo`` -> the same in compressed-tensors' words. What is not here
#: vLLM does not know either, and leaves the cache unquantized.
_MODELOPT = {"FP8": ("float", 8), "NVFP4": ("float", 4)}
#: Where it is in ModelOpt's files, and what vLLM's own config objects call it.
_ALGORITHM = ("kv_cache_quant_algo", "kv_cache_quant_method")
_SIDECAR = "hf_quant_config.json"  # ModelOpt's, until config.json held the same
NO_SCALES_NEEDED = ", ".join(sorted(n for n, f in SERVED.items() if f.is_dynamic))


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
        return read_json(folder / _SIDECAR)
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


def _get(holder: Any, key: str) -> Any:
    return holder.get(key) if isinstance(holder, Mapping) else getattr(holder, key, None)


def tensor_names(folder: Path) -> set[str] | None:
    """Names of the tensors in *folder*'s safetensors files; None when it has no such file."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return set(json.loads(index.read_text())["weight_map"])
    files = sorted(folder.glob("*.safetensors"))
    return {name for file in files for name in _header(file)} if files else None


def _header(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())
