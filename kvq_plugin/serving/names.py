"""Names of KV scales in checkpoints -> names of the parameters of vLLM's attention layer.

Applied by vLLM's ``AutoWeightsLoader`` to every tensor name, once for the whole model and
again for its inner module, so each rule leaves its own result alone.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper

#: (pattern, replacement), applied in this order. All are regular expressions because vLLM
#: applies those first: a later kind of rule would see ``qkv_proj`` where ``k_proj`` stood.
RULES: tuple[tuple[str, str], ...] = (
    # AutoFP8: one scale for K and V, duplicated after loading.
    (r"(?:\.(?:[kv]|qkv)_proj)?\.kv_scale$", r".attn.k_scale"),
    # ModelOpt (k_proj.k_scale), NemotronH (mixer.k_proj.k_scale), fused (qkv_proj.k_scale).
    (r"\.(?:[qkv]|qkv|qkqkv)_proj\.([qkv])_(scale|zero_point)$", r".attn.\1_\2"),
    # Quark and vLLM's fp8.
    (r"\.([qkv])_proj\.output_scale$", r".attn.\1_scale"),
    (r"\.prob_output_scale$", r".attn.prob_scale"),
    # HYV3.
    (r"\.self_attn\.q\.scale$", r".self_attn.attn.q_scale"),
    (r"\.self_attn\.([kv])_cache\.scale$", r".self_attn.attn.\1_scale"),
    # Ascend msModelSlim: the offset is the integer code of zero.
    (r"\.([kv])_proj\.kv_cache_scale$", r".attn.\1_scale"),
    (r"\.([kv])_proj\.kv_cache_offset$", r".attn.\1_zero_point"),
    # compressed-tensors and everyone else; already in place when `.attn` precedes.
    (r"(?<!\.attn)\.([qkv])_(scale|zero_point)$", r".attn.\1_\2"),
    (r"(?<!\.attn)\.prob_scale$", r".attn.prob_scale"),
)

#: Mapped names that may have no parameter to go to (a layer that is not an attention layer
#: of ours), beside those vLLM already ignores.
IGNORED_SUFFIXES: tuple[str, ...] = (".prob_scale",)


def scale_mapper() -> WeightsMapper:
    """:data:`RULES` as vLLM's ``WeightsMapper``."""
    from kvq_plugin.serving.compat import WeightsMapper

    return WeightsMapper(orig_to_new_regex={re.compile(p): new for p, new in RULES})
