"""The transformers driver: the model runs as transformers has it, its cache observes.

For models that vLLM does not serve on this machine. Memory is that of the whole model in the
dtype asked for, and of one sample's activations.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache, DynamicLayer

from kvq_plugin.calibrate.checkpoint import Source
from kvq_plugin.calibrate.engine import Load, Tick, broken_message, check_ignored
from kvq_plugin.calibrate.names import checkpoint_names, load_name, probes
from kvq_plugin.calibrate.observers import Observers
from kvq_plugin.calibrate.settings import Settings
from kvq_plugin.serving.scales.keys import layer_number

Observe = Callable[[int, str, torch.Tensor], None]


class ObservingCache(Cache):
    """A ``Cache`` that hands K and V to *observe(layer index, kind, x)* and keeps none of them.

    Right for whole sequences in one forward pass, where attention needs no past.
    """

    def __init__(self, observe: Observe) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self._observe = observe

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """``[B, H, T, D]`` in, the same out."""
        self._observe(layer_idx, "k", key_states)
        self._observe(layer_idx, "v", value_states)
        return key_states, value_states


def observe(
    source: Source,
    settings: Settings,
    load: Load,
    windows: Sequence[list[int]],
    tick: Tick = lambda: None,
) -> Observers:
    """As :func:`kvq_plugin.calibrate.engine.observe`, through transformers: without q scales and
    on one rank."""
    model, loading = AutoModelForCausalLM.from_pretrained(
        source.folder,
        dtype="auto" if load.dtype == "auto" else getattr(torch, load.dtype),
        trust_remote_code=load.trust_remote_code,
        output_loading_info=True,
        **source.without_kv_scheme(load.trust_remote_code),
    )
    model.eval()
    _require_decoder(model, source)
    if not source.has_quantized_weights:  # of which the names that transformers misses are others
        _require_complete(loading["missing_keys"], source)
    modules = _attention_modules(model)
    if not modules:
        raise ValueError(
            f"{type(model).__name__} has no attention layers that transformers numbers: expected "
            "modules with k_proj and a layer_idx; use --driver engine"
        )
    check_ignored(settings, list(modules.values()))
    loaded = {p: load_name(p) for p in probes(source.tensor_names())}
    vllm_like = {index: f"{name}.attn" for index, name in modules.items()}
    found = checkpoint_names(vllm_like.values(), loaded)
    names = {index: found[name] for index, name in vllm_like.items()}
    observers = Observers(settings)

    def hand_over(index: int, kind: str, x: torch.Tensor) -> None:
        if index in names and layer_number(modules[index]) not in settings.ignore:
            observers.observe(names[index], kind, x)

    tick()
    for number, window in enumerate(windows, 1):
        with torch.inference_mode():
            ids = torch.tensor([window], device=model.device)
            model.base_model(input_ids=ids, past_key_values=ObservingCache(hand_over))
        if broken := observers.broken():
            raise ValueError(broken_message({}, broken, number))
        tick()
    return observers


def _require_decoder(model: torch.nn.Module, source: Source) -> None:
    """ValueError for an encoder, which keeps no KV cache, and which transformers loads as a causal
    language model all the same."""
    attention = [m for m in model.modules() if isinstance(getattr(m, "layer_idx", None), int)]
    if attention and not any(getattr(module, "is_causal", True) for module in attention):
        raise ValueError(
            f"{source.folder}: {type(model).__name__} attends in both directions, as encoders do, "
            "and has no KV cache to calibrate: expected a decoder; name another model"
        )


def _require_complete(missing: Collection[str], source: Source) -> None:
    """ValueError where transformers made up weights that the checkpoint lacks: activations of
    random weights say nothing."""
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"{source.folder} has no weights for {min(missing)}{more}, and transformers would take "
            "random ones: expected all weights of a causal language model; save them with "
            "save_pretrained, or use --driver engine"
        )


def _attention_modules(model: torch.nn.Module) -> dict[int, str]:
    """layer_idx -> name of the attention module, as transformers numbers cache layers."""
    return {
        module.layer_idx: name
        for name, module in model.named_modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and any(part in type(module).__name__ for part in ("Attention", "Attn"))
    }
