"""Names of KV scales in checkpoints -> names of the parameters of vLLM's attention layer.

Applied to a checkpoint's tensors before the model's own loading code sees them
(:mod:`~kvq_plugin.serving.scales.offers`), because that code differs: most models rename through
vLLM's mapper, others through ``maybe_remap_kv_scale_name``, and neither knows every spelling.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

SCALES = ("q_scale", "k_scale", "v_scale", "prob_scale")
ZERO_POINTS = ("q_zero_point", "k_zero_point", "v_zero_point")

#: (origin, pattern of what follows the attention module's own name, parameter). The first
#: that matches wins.
RULES: tuple[tuple[str, re.Pattern, str], ...] = tuple(
    (origin, re.compile(pattern), parameter)
    for origin, pattern, parameter in (
        # One scale for K and V, duplicated after loading.
        ("AutoFP8", r"(?:\.(?:[kv]|qkv)_proj)?\.kv_scale$", r"k_scale"),
        ("fused", r"\.(?:qkv|qkqkv)_proj\.([qkv])_(scale|zero_point)$", r"\1_\2"),
        ("NemotronH", r"(?<=\.mixer)\.[qkv]_proj\.([qkv])_(scale|zero_point)$", r"\1_\2"),
        ("ModelOpt", r"\.[qkv]_proj\.([qkv])_(scale|zero_point)$", r"\1_\2"),
        # Quark, and checkpoints for vLLM's fp8.
        ("Quark", r"\.([qkv])_proj\.output_scale$", r"\1_scale"),
        ("Quark", r"\.prob_output_scale$", r"prob_scale"),
        ("HYV3", r"(?<=\.self_attn)\.q\.scale$", r"q_scale"),
        ("HYV3", r"(?<=\.self_attn)\.([kv])_cache\.scale$", r"\1_scale"),
        # The offset is the integer code of zero.
        ("msModelSlim", r"\.([kv])_proj\.kv_cache_scale$", r"\1_scale"),
        ("msModelSlim", r"\.([kv])_proj\.kv_cache_offset$", r"\1_zero_point"),
        ("compressed-tensors", r"\.([qkv])_(scale|zero_point)$", r"\1_\2"),
        ("compressed-tensors", r"\.(prob_scale)$", r"\1"),
    )
)

#: Parameters a checkpoint may have for a module that is not an attention layer of ours,
#: beside those vLLM already ignores.
IGNORED_SUFFIXES: tuple[str, ...] = (".prob_scale",)
_ATTENTION = "attn"  # what models call vLLM's layer inside their attention module


@dataclass(frozen=True)
class ScaleName:
    """A checkpoint's name of one scale, taken apart.

    Attributes:
        key: the name in the checkpoint.
        owner: the attention module, ``model.layers.3.self_attn``, or vLLM's layer inside it
            where the checkpoint already names that.
        parameter: one of :data:`SCALES` and :data:`ZERO_POINTS`.
        origin: which tool spells it so.
    """

    key: str
    owner: str
    parameter: str
    origin: str

    def placed(self, layers: Iterable[str] = ()) -> str:
        """Name of the parameter: the owner's attention layer, then the parameter.

        *layers* are the names of the model's attention layers, from which is learnt what
        their modules are called; without them it is ``self_attn.attn`` and the like.
        """
        tails = {tuple(name.rsplit(".", 2)[-2:]) for name in layers}
        tails = {tail for tail in tails if len(tail) == 2}
        last = tuple(self.owner.rsplit(".", 2)[-2:])
        if last in tails or (not tails and last[-1] == _ATTENTION):
            return f"{self.owner}.{self.parameter}"
        return f"{self.owner}.{dict(tails).get(last[-1], _ATTENTION)}.{self.parameter}"


def parse(key: str) -> ScaleName | None:
    """*key* taken apart; None when it is not the name of a KV scale or zero point."""
    for origin, pattern, parameter in RULES:
        if match := pattern.search(key):
            return ScaleName(key, key[: match.start()], match.expand(parameter), origin)
    return None


def layer_number(name: str) -> int | None:
    """The number of the layer a module or tensor belongs to; None without one."""
    match = re.search(r"(?:^|\.)(\d+)\.", name)
    return int(match[1]) if match else None
