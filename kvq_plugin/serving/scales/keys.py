"""A checkpoint's key -> which layer and which scale.

Applied to a checkpoint's tensors before the model's own loading code sees them
(:meth:`~kvq_plugin.serving.scales.load.ScaleLoad.rename`), because that code differs: most
models rename through vLLM's mapper, others through ``maybe_remap_kv_scale_name``, and neither
knows every spelling.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

SCALES = ("q_scale", "k_scale", "v_scale", "prob_scale")
#: Tensors of a stack of layers for multi-token prediction begin so; what counts such layers where
#: they lie behind the model's own, in its configuration.
PREDICTION = "mtp."
PREDICTION_COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "n_predict")
ZERO_POINTS = ("q_zero_point", "k_zero_point", "v_zero_point")

#: (origin, pattern of what follows the attention module's own name, parameters it is the value
#: of). The first that matches wins.
RULES: tuple[tuple[str, re.Pattern, tuple[str, ...]], ...] = tuple(
    (origin, re.compile(pattern), tuple(parameters.split()))
    for origin, pattern, parameters in (
        ("AutoFP8", r"(?:\.(?:[kv]|qkv)_proj)?\.kv_scale$", r"k_scale v_scale"),
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
#: A layer number among the dotted parts of a name.
NUMBER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


@dataclass(frozen=True)
class ScaleKey:
    """A checkpoint's name of one scale, taken apart.

    Attributes:
        key: the name in the checkpoint.
        owner: the attention module, ``model.layers.3.self_attn``, or vLLM's layer inside it
            where the checkpoint already names that.
        parameters: what it is the value of, out of :data:`SCALES` and :data:`ZERO_POINTS`: one,
            or K's and V's scale.
        origin: which tool spells it so.
    """

    key: str
    owner: str
    parameters: tuple[str, ...]
    origin: str

    def targets(self, layers: Iterable[str] = ()) -> list[str]:
        """Names of the parameters in the model: the owner's attention layer, then each.

        *layers* are the names of the model's attention layers, from which is learnt what
        their modules are called; without them it is ``self_attn.attn`` and the like.
        """
        tails = {tuple(name.rsplit(".", 2)[-2:]) for name in layers}
        tails = {tail for tail in tails if len(tail) == 2}
        last = tuple(self.owner.rsplit(".", 2)[-2:])
        layer = self.owner
        if last not in tails and (tails or last[-1] != _ATTENTION):
            layer = f"{layer}.{dict(tails).get(last[-1], _ATTENTION)}"
        return [f"{layer}.{parameter}" for parameter in self.parameters]


def parse(key: str) -> ScaleKey | None:
    """*key* taken apart; None when it is not the name of a KV scale or zero point."""
    for origin, pattern, parameters in RULES:
        if match := pattern.search(key):
            found = tuple(match.expand(parameter) for parameter in parameters)
            return ScaleKey(key, key[: match.start()], found, origin)
    return None


def layer_number(name: str) -> int | None:
    """The number of the layer that a module or tensor belongs to, by which vLLM's
    ``--kv-cache-dtype-skip-layers`` goes: the first among the dotted parts; None without one."""
    match = NUMBER.search(name)
    return int(match[1]) if match else None
