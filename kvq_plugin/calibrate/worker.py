"""Inside vLLM's workers: K, V and Q on their way to the cache pass an observer.

vLLM mixes :class:`ObservingWorker` into its worker class (``worker_extension_cls``), so its
methods can be called on every worker of an engine, whatever its parallelism.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from safetensors.torch import save_file

from kvq_plugin.calibrate.names import load_name
from kvq_plugin.calibrate.observers import Observers
from kvq_plugin.calibrate.settings import Settings, Strategy
from kvq_plugin.serving import compat
from kvq_plugin.serving.scales.keys import layer_number
from kvq_plugin.serving.scales.shapes import HeadShard, own_kv_heads

PATH = f"{__name__}.ObservingWorker"


class ObservingWorker:
    """Methods for ``LLM.collective_rpc``; arguments and results are plain lists and dicts."""

    def kvq_attach(self, settings: dict[str, Any]) -> list[str]:
        """Observe every attention layer that writes a KV cache; their names, in model order.

        Layers that ``settings["ignore"]`` names are left alone.
        """
        self._kvq_observers = Observers(unpacked(settings))
        config = self.vllm_config
        names = []
        for name, layer in config.compilation_config.static_forward_context.items():
            if not isinstance(layer, compat.Attention) or not _writes_cache(layer):
                continue
            names.append(name)
            if layer_number(name) not in self._kvq_observers.settings.ignore:
                _tap(layer, name, self._kvq_observers)
        return names

    def kvq_load_names(self, probes: list[str]) -> list[str | None]:
        """What the model's loader would call each tensor of the checkpoint."""
        layers = list(self.vllm_config.compilation_config.static_forward_context)
        placed = [load_name(probe, layers) for probe in probes]
        mapper = getattr(self.get_model(), "hf_to_vllm_mapper", None)
        return placed if mapper is None else [mapper.map_name(name) for name in placed]

    def kvq_broken(self) -> list[list]:
        """[layer, kind, values] wherever NaN or infinity was seen."""
        return [list(entry) for entry in self._kvq_observers.broken()]

    def kvq_save(self, folder: str) -> None:
        """Write this worker's statistics to a file in *folder*.

        Tensors are named ``layer|kind|statistic``; ``first_head`` says which heads they are of.
        """
        rank, world = 0, 1
        if compat.model_parallel_is_initialized():
            rank = compat.get_tensor_model_parallel_rank()
            world = compat.get_tensor_model_parallel_world_size()
        total = self.vllm_config.model_config.get_total_num_kv_heads()
        own = own_kv_heads(self.get_model())
        tensors = {}
        for (layer, kind), observer in self._kvq_observers.items():
            heads = observer.low.shape[0]
            # Query heads are always divided; kv heads may be held by several ranks.
            stated = (None, None) if kind == "q" else (total, own.get(layer))
            shard = HeadShard.of(heads, stated[0], rank, world, stated[1])
            state = observer.state() | {"first_head": torch.tensor(shard.first)}
            tensors |= {f"{layer}|{kind}|{name}": t.contiguous() for name, t in state.items()}
        save_file(tensors, f"{folder}/{self.rank}.safetensors")


def packed(settings: Settings) -> dict[str, Any]:
    """*settings* as plain values, to travel to the workers."""
    plain = {name: getattr(settings, name) for name in settings.__dataclass_fields__}
    return plain | {"strategy": settings.strategy.value, "ignore": sorted(settings.ignore)}


def unpacked(plain: dict[str, Any]) -> Settings:
    """The inverse of :func:`packed`."""
    changed = {"strategy": Strategy(plain["strategy"]), "ignore": frozenset(plain["ignore"])}
    return Settings(**(plain | changed))


def _writes_cache(layer: Any) -> bool:
    encoder = (compat.AttentionType.ENCODER, compat.AttentionType.ENCODER_ONLY)
    shared = getattr(layer, "kv_sharing_target_layer_name", None)
    return layer.attn_type not in encoder and shared is None


def _tap(layer: Any, name: str, observers: Observers) -> None:
    """Let *observers* see what the layer's implementation is given, as layer *name*."""
    impl, forward = layer.impl, layer.impl.forward
    observe = partial(observers.observe, name)
    sees_kv = layer.attn_backend.forward_includes_kv_cache_update

    def tapped_forward(layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs):
        if attn_metadata is not None:  # None while vLLM measures memory
            tokens = attn_metadata.num_actual_tokens
            if observers.settings.q_scale:
                observe("q", _rows(query, layer.num_heads, tokens))
            if sees_kv:
                observe("k", _rows(key, layer.num_kv_heads, tokens))
                observe("v", _rows(value, layer.num_kv_heads, tokens))
        return forward(layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs)

    impl.forward = tapped_forward
    if sees_kv:
        return
    update = impl.do_kv_cache_update

    def tapped_update(layer, key, value, kv_cache, slot_mapping):
        count = slot_mapping.shape[0]
        written = slot_mapping >= 0  # padding has no slot
        for kind, x in (("k", key), ("v", value)):
            rows = _rows(x, layer.num_kv_heads, count)
            observe(kind, rows if bool(written.all()) else rows[written])
        update(layer, key, value, kv_cache, slot_mapping)

    impl.do_kv_cache_update = tapped_update


def _rows(x: torch.Tensor, heads: int, tokens: int) -> torch.Tensor:
    """The first *tokens* of ``[T, H, D]`` or ``[T, H * D]`` as ``[tokens, H, D]``."""
    return x[:tokens].reshape(tokens, heads, -1)
