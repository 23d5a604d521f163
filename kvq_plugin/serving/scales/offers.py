"""Which tensor of a checkpoint became which scale; and those that became none.

:func:`follow` gives a freshly built model's ``load_weights`` the names it understands, and
:class:`ScaleKeys`, one per quantization config, remembers what was offered and what was taken.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from kvq_plugin.serving.scales import keys

_TAG = "kvq_key"  # attribute of a loaded tensor: its name in the checkpoint
_TAIL = 4  # parts of a name that survive a model's own renaming: 3.self_attn.attn.k_scale


class ScaleKeys:
    """The scales of one checkpoint, by key."""

    def __init__(self) -> None:
        self._offered: dict[str, str] = {}  # key -> the parameter it should become
        self._taken: dict[str, dict[str, str]] = {}  # layer -> parameter -> key

    def rename(
        self,
        weights: Iterable[tuple[str, torch.Tensor]],
        layers: Iterable[str],
        expected: Callable[[str], bool] = lambda key: True,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """*weights* with every KV scale under its parameter's name, and remembered.

        *layers* are the names of the model's attention layers. A key for which
        ``expected(key)`` is false may go unused. Any other of a layer that the model does not
        have is held back, because models raise errors of their own about those.
        """
        layers = list(layers)
        numbers = {keys.layer_number(layer) for layer in layers} | {None}
        for key, tensor in weights:
            found = keys.parse(key)
            if found is None:
                yield key, tensor
                continue
            target = found.placed(layers)
            if not hasattr(tensor, _TAG):  # else a model inside another one, loading its part
                setattr(tensor, _TAG, key)
                if expected(key):
                    self._offered[key] = target
                    if keys.layer_number(key) not in numbers:
                        continue
            yield target, tensor

    def take(self, layer: str, parameter: str, tensor: torch.Tensor) -> None:
        """*tensor* is being loaded as *parameter* of *layer*.

        Raises ValueError when the checkpoint gives that parameter under another key too.
        """
        target = f"{layer}.{parameter}"
        key = getattr(tensor, _TAG, None) or self._key_for(target) or target
        self._offered.pop(key, None)
        before = self._taken.setdefault(layer, {}).setdefault(parameter, key)
        if before != key:
            raise ValueError(
                f"{layer}: the checkpoint gives {parameter} twice, as {before} and as {key}: "
                "expected one of them; remove the other from the checkpoint"
            )

    def _key_for(self, target: str) -> str | None:
        """The offered key that goes to *target*, for a loader that copied the tensor."""
        return next((k for k, t in self._offered.items() if _tail(t) == _tail(target)), None)

    def taken(self, layer: str) -> dict[str, str]:
        """parameter -> key, of what *layer* was given since it was last asked about."""
        return self._taken.pop(layer, {})

    def leftovers(self) -> list[str]:
        """Keys that no layer took since this was last asked, in the checkpoint's order."""
        left, self._offered = list(self._offered), {}
        return left


def _tail(name: str) -> tuple[str, ...]:
    return tuple(name.split(".")[-_TAIL:])


def follow(model: torch.nn.Module, vllm_config: Any, model_config: Any) -> None:
    """Make ``model.load_weights`` hand the scales it reads to the layers' :class:`ScaleKeys`.

    A model whose attention layers are not ours is left as it is. Scales of layers that live
    elsewhere may go unused: on other pipeline ranks, in the multi-token-prediction layers
    behind the model's own, and all of a target's that a draft model reads past.
    """
    layers = [m for m in model.modules() if hasattr(getattr(m, "quant_method", None), "kvq_keys")]
    if not layers:
        return
    scale_keys: ScaleKeys = layers[0].quant_method.kvq_keys
    layer_names = [layer.layer_name for layer in layers]
    main = model_config is None or model_config is vllm_config.model_config
    whole = main and vllm_config.parallel_config.pipeline_parallel_size == 1
    count = vllm_config.model_config.get_total_num_hidden_layers()
    beyond = range(count, count + _prediction_layers(vllm_config.model_config))

    def expected(key: str) -> bool:
        waiting = any(hasattr(layer, keys.SCALES[0]) for layer in layers)
        elsewhere = keys.layer_number(key) in beyond or key.startswith("mtp.")
        return waiting and whole and not elsewhere

    stock = model.load_weights

    @functools.wraps(stock)
    def load_weights(weights, *args, **kwargs):
        return stock(scale_keys.rename(weights, layer_names, expected), *args, **kwargs)

    model.load_weights = load_weights


def _prediction_layers(model_config: Any) -> int:
    """Layers for multi-token prediction that checkpoints carry after the model's own."""
    config = model_config.hf_config
    config = getattr(config, "text_config", None) or config
    counts = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "n_predict")
    return max(int(getattr(config, name, None) or 0) for name in counts)
