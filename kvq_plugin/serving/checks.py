"""Refusals at start-up: what cannot work is said before anything is loaded.

Every message names what was asked, what is supported and what to use instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kvq_plugin import hugepages
from kvq_plugin.formats import SERVED, KVFormat
from kvq_plugin.mapping import LAYERS, MIXED, NAMES, SECTION
from kvq_plugin.serving import compat, platforms, unserved
from kvq_plugin.serving.defaults import DRAFT_DTYPE, is_drafts
from kvq_plugin.serving.mapped import run_formats
from kvq_plugin.serving.pages import min_block_size
from kvq_plugin.serving.scales import keys
from kvq_plugin.serving.scales.declared import declared_scheme, tensor_names
from kvq_plugin.serving.selection import chosen_backends, is_ours_alone, serves

#: Cache dtypes vLLM's CPU backend stores unquantized, and the model dtype each one needs
#: (vLLM 0.32 picks its kernel by the model's dtype, whatever the cache's is).
_UNQUANTIZED = {"auto": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SKIP_KINDS = ("sliding_window",)
#: Ways to draft that need no layers of their own.
_WITHOUT_LAYERS = ("ngram", "ngram_gpu", "suffix")
_WITHOUT_ATTENTION = ("medusa", "mlp_speculator")  # methods whose draft model has no KV cache


def check(vllm_config: Any) -> None:
    """Raise ValueError when *vllm_config* asks for a KV cache that cannot be served.

    A KV cache that is vLLM's own (:func:`~kvq_plugin.serving.selection.serves`) is its business,
    but for dtypes that its CPU platform takes and has no kernels for.
    """
    asked = vllm_config.cache_config.cache_dtype
    if not is_drafts(vllm_config):  # beside a mapping, which is the target's
        _check_options(vllm_config.additional_config, asked)
    model = vllm_config.model_config
    if model is None:
        return
    _check_dtype(asked, "--kv-cache-dtype", model.dtype)
    ours = serves(vllm_config)
    if ours or compat.is_cpu():
        _check_speculation(asked, vllm_config.speculative_config, model)
    if asked not in NAMES:
        return
    if not ours:
        _say_who_serves(asked, vllm_config)
        return
    if asked == MIXED and not compat.is_cpu():
        what, instead = "a GPU", "use one KV cache for all layers, int4 for one"
        _refuse(asked, what, "CPUs", instead)
    formats = run_formats(vllm_config)
    hugepages.enabled()  # raises for a bad value, here rather than in a worker
    _check_device(asked)
    _check_backends(asked, vllm_config)
    _check_served(asked, vllm_config)
    for format in formats:
        _check_shape(asked, format, model)
    _check_attention(asked, model)
    _check_method(asked, vllm_config.speculative_config)
    for format in formats:
        _check_engine(asked, format, vllm_config)
    _check_skip_layers(vllm_config)
    for format in formats:
        if format.recent is not None:
            _check_recent(asked, format, vllm_config)
        _check_static_scales(asked, format, vllm_config)


def _refuse(asked: str, what: str, supported: str, instead: str) -> None:
    raise ValueError(
        f"--kv-cache-dtype {asked} was asked for {what}: supported are {supported}; {instead}"
        f"{platforms.backend_class().elsewhere(asked)}"
    )


def _check_options(additional_config: Any, asked: str) -> None:
    """``--additional-config '{"kvq": {...}}'`` is the plugin's: a layer mapping, or nothing."""
    given = additional_config.get(SECTION) if isinstance(additional_config, Mapping) else None
    if not given:
        return
    if not isinstance(given, Mapping) or set(given) != {LAYERS}:
        raise ValueError(
            f'additional_config["{SECTION}"] is {given!r}: expected {{"{LAYERS}": {{...}}}}, the '
            "only option, or nothing: remove it (--kv-cache-dtype and the checkpoint say all else)"
        )
    if asked != MIXED:
        raise ValueError(
            f'additional_config["{SECTION}"] maps layers to KV caches, and --kv-cache-dtype is '
            f"{asked}: expected {MIXED}; pass --kv-cache-dtype {MIXED}, or remove the mapping"
        )


def _check_dtype(asked: str, flag: str, model_dtype: torch.dtype) -> None:
    if asked in NAMES or not compat.is_cpu():  # vLLM checks its own dtypes on GPUs
        return
    if asked not in _UNQUANTIZED:
        known = ", ".join((*_UNQUANTIZED, *NAMES))
        raise ValueError(
            f"{flag} {asked} is not implemented on the CPU platform, neither by vLLM nor by "
            f"kvq_plugin: supported are {known}; use int8_per_token_head for a quantized cache "
            "without calibration"
        )
    needed = _UNQUANTIZED[asked]
    if needed is not None and needed != model_dtype:
        raise ValueError(
            f"{flag} {asked} was asked for a model running in {_name(model_dtype)}: on the CPU "
            f"platform an unquantized cache has the model's dtype; use {flag} auto, or --dtype "
            f"{asked}"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_speculation(asked: str, speculation: Any, model: Any) -> None:
    """The draft model's KV cache: its own dtype, or else the target's *asked*."""
    draft = getattr(speculation, "kv_cache_dtype", None)
    if draft == MIXED:
        raise ValueError(
            f"the draft model's kv_cache_dtype {MIXED} was asked for, and the mapping is the "
            f'target\'s: supported is one KV cache; use {DRAFT_DTYPE} as "kv_cache_dtype" in '
            "--speculative-config, or leave it out"
        )
    drafter = getattr(speculation, "draft_model_config", None)
    if draft is not None:
        _check_dtype(draft, "the draft model's kv_cache_dtype", model.dtype)
    elif drafter is None or drafter.model == model.model:
        return  # n-grams, or layers of the target itself
    else:
        scales = declared_scheme(drafter.hf_config, Path(drafter.model))
        if scales or speculation.method in _WITHOUT_ATTENTION:
            return
    format = SERVED.get(draft or asked)
    if format is not None and not format.is_dynamic and format.default_scale is None:
        raise ValueError(
            f"the draft model's kv_cache_dtype {draft or asked} needs calibrated scales, which "
            "draft checkpoints do not carry: use int8_per_token_head or auto, as "
            '"kv_cache_dtype" in --speculative-config'
        )


def _check_device(asked: str) -> None:
    capability = compat.current_platform.get_device_capability()
    if capability is None or platforms.backend_class().supports_compute_capability(capability):
        return  # None on CPUs, and in a process that sees no device
    from kvq_plugin.serving.gpu import MIN_CAPABILITY

    _refuse(
        asked,
        f"{compat.current_platform.get_device_name()}, a GPU of compute capability "
        f"{capability.major}.{capability.minor}",
        "GPUs from {}.{} on".format(*MIN_CAPABILITY),
        "use --kv-cache-dtype auto",
    )


def _check_backends(asked: str, vllm_config: Any) -> None:
    """What the user named for the layers, where it would not be what they get: on CPUs vLLM has one
    backend beside ours, and tells those who name another."""
    if not compat.is_cpu():
        return  # there the layers' selection looks at it
    stock = compat.AttentionBackendEnum.CPU_ATTN
    chosen, *kinds = chosen_backends(vllm_config)
    if stock in kinds and not is_ours_alone(asked):
        _refuse(
            asked,
            f"{stock.name} for some kinds of layers (backend_per_kind)",
            "one backend for all of them",
            f"use --attention-backend {stock.name} for vLLM's own KV cache, or name none",
        )
    for other in {chosen, *kinds} - {None, stock}:
        compat.init_logger(f"vllm.{__name__}").warning_once(
            "There is no attention backend %s on CPUs: --kv-cache-dtype %s is kvq_plugin's own.",
            other.name,
            asked,
        )


def _check_served(asked: str, vllm_config: Any) -> None:
    why = unserved.reason(vllm_config)
    if why is not None:
        _refuse(asked, why.what, why.supported, why.instead)


def _say_who_serves(asked: str, vllm_config: Any) -> None:
    """On CPUs, where the name alone does not tell. On GPUs it does."""
    if compat.is_cpu():
        why = unserved.reason(vllm_config)
        compat.init_logger(f"vllm.{__name__}").warning_once(
            "The KV cache of dtype %s is vLLM's own here, not kvq_plugin's, because %s.",
            asked,
            "CPU_ATTN was chosen" if why is None else f"this is {why.what}",
        )


def _check_attention(asked: str, model: Any) -> None:
    """What vLLM's CPU platform never asks its backends: they would attend causally, silently."""
    if model.is_mm_prefix_lm:
        _refuse(
            asked,
            "a model that attends to images in both directions",
            "causal attention",
            'serve text alone (--limit-mm-per-prompt \'{"image": 0, "video": 0}\'), or use '
            "--kv-cache-dtype auto",
        )
    if model.rswa_window is not None:
        _refuse(
            asked,
            "a model with a window over generated tokens alone (R-SWA)",
            "full attention and sliding windows",
            "use --kv-cache-dtype auto",
        )


def _check_method(asked: str, speculation: Any) -> None:
    """The one speculative method whose layer has a cache that holds no keys and values: vLLM ends
    in an AssertionError there, once the weights are loaded."""
    if getattr(speculation, "method", None) == "extract_hidden_states":
        _refuse(
            asked,
            "the speculative method extract_hidden_states, which keeps hidden states in a cache "
            "like the layers'",
            "methods that draft",
            "use another method in --speculative-config, or --kv-cache-dtype auto",
        )


def _check_engine(asked: str, format: KVFormat, vllm_config: Any) -> None:
    # Only what the user chose is final here. vLLM chooses later (0.33: once the model has its
    # backends) out of get_supported_kernel_block_sizes, and refuses there what does not fit.
    cache = vllm_config.cache_config
    backend = platforms.backends()[format]
    if cache.user_specified_block_size and cache.block_size % backend.block_multiple:
        _refuse(
            asked,
            f"blocks of {cache.block_size} tokens",
            f"multiples of {backend.block_multiple}",
            f"use --block-size {backend.default_block_size}",
        )


def _check_skip_layers(vllm_config: Any) -> None:
    speculation = vllm_config.speculative_config
    if speculation is not None and speculation.method not in _WITHOUT_LAYERS:
        return  # a draft model numbers its layers after the target's
    layers = vllm_config.model_config.get_total_num_hidden_layers()
    for entry in vllm_config.cache_config.kv_cache_dtype_skip_layers:
        if entry in _SKIP_KINDS or entry in map(str, range(layers)):  # vLLM compares texts too
            continue
        raise ValueError(
            f"--kv-cache-dtype-skip-layers names {entry!r}, which the model does not have: "
            f"supported are layer numbers 0 to {layers - 1} and {', '.join(_SKIP_KINDS)}"
        )


def _check_shape(asked: str, format: KVFormat, model: Any) -> None:
    head_size, step = model.get_head_size(), format.head_size_step
    if head_size % step:
        instead = "use another KV cache, or --kv-cache-dtype auto"
        _refuse(asked, f"head size {head_size}", f"multiples of {step}", instead)


def _check_recent(asked: str, format: KVFormat, vllm_config: Any) -> None:
    """What a format needs whose newest rows lie in a cache of their own (serving/recent.py)."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    lacking = platforms.backend_class().lacking(format, model.get_head_size())
    if lacking is not None:
        raise ValueError(
            f"--kv-cache-dtype {asked} needs GPU kernels: {lacking}; use "
            "--kv-cache-dtype k8v4, int4_per_token_head or int8_per_token_head"
        )
    smallest = min_block_size(format, model.get_head_size())
    if cache.user_specified_block_size and cache.block_size < smallest:
        size = platforms.backends()[format].default_block_size
        what = f"blocks of {cache.block_size} tokens with head size {model.get_head_size()}"
        _refuse(asked, what, f"{smallest} and more", f"use --block-size {size}")
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        _refuse(
            asked,
            "an engine without the hybrid KV cache manager, which frees the recent rows",
            "engines with it",
            "drop --disable-hybrid-kv-cache-manager, or use --kv-cache-dtype int8_per_token_head",
        )
    if asked == MIXED and vllm_config.parallel_config.pipeline_parallel_size > 1:
        # A stage without such layers has an empty group of them, whose cache vLLM looks for.
        _refuse(
            asked,
            f"pipeline stages with {format.name} in the mapping, which has recent rows",
            "one stage, and mappings to formats without",
            "drop --pipeline-parallel-size, or use one KV cache for all layers, int4 for one",
        )
    if getattr(model, "attention_chunk_size", None) is not None:  # set late
        _refuse(
            asked,
            "a model with chunked local attention",
            "full attention and sliding windows",
            "use --kv-cache-dtype int8_per_token_head",
        )
    _check_drafts(asked, format, vllm_config)


def _check_drafts(asked: str, format: KVFormat, vllm_config: Any) -> None:
    speculation = vllm_config.speculative_config
    if speculation is None:
        return
    if vllm_config.num_speculative_tokens > format.window:
        _refuse(
            asked,
            f"{vllm_config.num_speculative_tokens} speculative tokens",
            f"up to {format.window}, the rows that are not sealed yet when drafts are rejected",
            f'use at most {format.window} as "num_speculative_tokens" in --speculative-config',
        )
    if speculation.method == "draft_model" and not vllm_config.use_v2_model_runner:
        _refuse(
            asked,
            "a draft model of its own, which vLLM's V1 model runner gives the block table of the "
            "target's first layers",
            "ngram, EAGLE and multi-token prediction",
            "use another method in --speculative-config, or --kv-cache-dtype int8_per_token_head",
        )
    draft = SERVED.get(speculation.kv_cache_dtype)
    if draft is not None and draft.recent is not None:
        raise ValueError(
            f"the draft model's kv_cache_dtype {speculation.kv_cache_dtype} was asked for: "
            "supported are KV caches without recent rows, since vLLM has all layers of a draft "
            f'model share one block table; use {DRAFT_DTYPE} as "kv_cache_dtype" in '
            "--speculative-config, or leave it out"
        )


# --- static scales ---------------------------------------------------------------------


def _check_static_scales(asked: str, format: KVFormat, vllm_config: Any) -> None:
    """Refuse a format without default scales on a checkpoint that visibly has none.

    A checkpoint that is not a local folder of safetensors is left to the loader, which
    lists the layers without scales once it has read them.
    """
    if format.is_dynamic or format.default_scale is not None:
        return
    folder = Path(vllm_config.model_config.model)
    if declared_scheme(vllm_config.model_config.hf_config, folder):
        return
    tensors = tensor_names(folder)
    if tensors is None or any(_is_scale(name) for name in tensors):
        return
    raise ValueError(
        f"--kv-cache-dtype {asked} needs calibrated scales, and {folder} has none: no KV scheme "
        "in its configuration and no k_scale or v_scale in its safetensors files. Supported "
        "without scales are "
        f"{', '.join(n for n, f in SERVED.items() if f.is_dynamic or f.default_scale)}; run "
        "`kvq calibrate` to add scales, or use --kv-cache-dtype int8_per_token_head"
    )


def _is_scale(name: str) -> bool:
    """Whether the loader will take tensor *name* for a scale of K or V."""
    found = keys.parse(name)
    return found is not None and not {"k_scale", "v_scale"}.isdisjoint(found.parameters)
