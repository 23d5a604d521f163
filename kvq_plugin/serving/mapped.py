"""What a run keeps: one format in all layers, or a mapping's.

Light on imports: nothing of vLLM's but the config it is given. :mod:`kvq_plugin.serving.pending`
gives the layers of a mapping their formats.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from kvq_plugin.formats import SERVED, KVFormat
from kvq_plugin.mapping import LAYERS, MIXED, SECTION, LayerMapping, declared_mapping, parse
from kvq_plugin.serving.scales.keys import layer_number

#: The one order of vLLM's in which pages of several sizes lie side by side in a block, whatever
#: groups of layers share the blocks: blocks outermost, then layers.
PACKED_LAYOUT = "BLHNC"
_LAYOUT_VARIABLE = "VLLM_KV_CACHE_LAYOUT"
#: For messages.
EXAMPLE = json.dumps({SECTION: {LAYERS: {"0": "int8_per_token_head", "default": "int4"}}})


def given_mapping(additional_config: Any) -> Any:
    """The mapping in ``--additional-config``, as it is written; None without one."""
    given = additional_config.get(SECTION) if isinstance(additional_config, Mapping) else None
    return given.get(LAYERS) if isinstance(given, Mapping) else None


def run_mapping(vllm_config: Any) -> LayerMapping:
    """The mapping of a run of MIXED: the user's own, else the checkpoint's.

    Raises ValueError for a bad one, and where there is none.
    """
    model = vllm_config.model_config
    given = given_mapping(vllm_config.additional_config)
    if given is None:
        given = declared_mapping(model.hf_config)
    if given is None:
        raise ValueError(
            f"--kv-cache-dtype {MIXED} needs to know each layer's KV cache, and neither "
            f"--additional-config nor {model.model} says: pass --additional-config '{EXAMPLE}', or "
            "serve what `kvq allocate` wrote"
        )
    return parse(given, model.get_total_num_hidden_layers())


def run_formats(vllm_config: Any) -> tuple[KVFormat, ...]:
    """The formats of ours that the run's own dtype stands for; none for a dtype of vLLM's."""
    asked = vllm_config.cache_config.cache_dtype
    if asked == MIXED:
        return run_mapping(vllm_config).formats
    return (SERVED[asked],) if asked in SERVED else ()


def layer_name(mapping: LayerMapping, layer: Any) -> str:
    """The name of an attention *layer* of vLLM's, by its number and its window.

    Raises ValueError for a layer without a number, and where nothing names it.
    """
    number = layer_number(layer.layer_name)
    if number is None:
        raise ValueError(
            f"{layer.layer_name} has no number, by which --kv-cache-dtype {MIXED} goes: use one of "
            f"{', '.join(SERVED)}"
        )
    return mapping.name(number, layer.sliding_window is not None)


def settle_layout(vllm_config: Any) -> None:
    """Pages side by side, where layers of a mapping have recent rows.

    vLLM would make all pages as large as the largest, otherwise, and groups of as many layers as
    the rarest kind has. Without recent rows there is one group, which any layout serves.

    Raises ValueError where the user asked for another layout, which vLLM would not look at then.
    """
    cache = vllm_config.cache_config
    if cache.cache_dtype != MIXED or not any(f.recent for f in run_formats(vllm_config)):
        return
    asked = os.environ.get(_LAYOUT_VARIABLE)
    if asked and asked != PACKED_LAYOUT:
        raise ValueError(
            f"{_LAYOUT_VARIABLE}={asked} was asked for beside a mapping of layers that have recent "
            f"rows: supported is {PACKED_LAYOUT}; unset it, or use one KV cache for all layers"
        )
    cache.kv_cache_layout = PACKED_LAYOUT
