"""Inside vLLM's worker: an unquantized engine, some layers of which attend through our KV caches.

A probe takes the place of a layer's attention for one forward pass of a window: K and V go to pages
of the format through the serving implementation of it (:class:`~kvq_plugin.serving.base.KVQImpl`),
store and attend, sealing included. All other layers stay as they are. Layers before the first probe
need not run again: what they passed on is the unquantized run's.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from kvq_plugin.formats import SERVED
from kvq_plugin.logits import divergence_rows
from kvq_plugin.mapping import PLAIN
from kvq_plugin.serving import compat, platforms
from kvq_plugin.serving.pages import BLOCK_SIZE, recent_block_size
from kvq_plugin.serving.scales.keys import NUMBER, layer_number

ROWS = 128  # of logits at a time
#: Bytes of the unquantized run's logits that are kept rather than computed again.
KEPT_LOGITS = 1 << 30


class Probe:
    """Stands for the attention implementation of *layer* and keeps K and V as *name*."""

    def __init__(self, layer: Any, name: str) -> None:
        stock, format = layer.impl, SERVED[name]
        self.stock, self.format = stock, format
        slopes = getattr(stock, "alibi_slopes", None)
        self.impl = platforms.backends()[format].get_impl_cls()(
            layer.num_heads,
            layer.head_size,
            stock.scale,
            layer.num_kv_heads,
            None if slopes is None else slopes.tolist(),
            None,
            name,
            getattr(stock, "logits_soft_cap", 0.0),
            sinks=getattr(stock, "sinks", None),
        )
        self.impl.process_weights_after_loading(layer.dtype)
        self._shape = (layer.num_kv_heads, layer.head_size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["stock"], name)

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping) -> None:
        """Store ``key``, ``value [T, H, D]`` of one whole request in pages of our own."""
        tokens = self.tokens = int((slot_mapping >= 0).sum())
        self._slots = torch.arange(tokens)
        heads, size = self._shape
        self._cache = _pages(tokens, heads, BLOCK_SIZE, self.format, size)
        self._layer = SimpleNamespace(kvq_key_static=None, kvq_value_static=None)
        if self.format.recent is not None:
            block = recent_block_size([self.format], size, BLOCK_SIZE)
            cache = _pages(tokens, heads, block, self.format.recent, size)
            found = (SimpleNamespace(block_table=_table(cache)), cache, self._slots)
            self._layer.kvq_recent = SimpleNamespace(caches=lambda: found)
        self.impl.do_kv_cache_update(
            self._layer, key[:tokens], value[:tokens], self._cache, self._slots
        )

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs):
        """Attend ``query [T, heads, D]`` to those pages."""
        batch = SimpleNamespace(
            num_actual_tokens=self.tokens,
            block_table=_table(self._cache),
            seq_lens=torch.tensor([self.tokens], dtype=torch.int32),
            query_start_loc=torch.tensor([0, self.tokens], dtype=torch.int32),
            causal=True,
        )
        self.impl.forward(self._layer, query, key, value, self._cache, batch, output)
        return output


def _pages(tokens: int, heads: int, block: int, format: Any, size: int) -> torch.Tensor:
    shape = (-(-tokens // block), heads, block, format.bytes_per_token(size, block))
    return torch.zeros(shape, dtype=torch.uint8)


def _table(cache: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(cache), dtype=torch.int32)[None]


class AllocateWorker:
    """Methods for ``LLM.collective_rpc``, mixed into vLLM's worker."""

    def kvq_prepare(self, stride: int) -> tuple[int, list[tuple[int, int, int]]] | str:
        """Look at the model's forward passes from now on, at every *stride*-th position.

        Returns how many layers there are, and (number, kv heads, head size) of each that may be
        given a format: those without a sliding window. Of a model that is refused, why.
        """
        model = self.get_model()
        self._kvq_stride, self._kvq_model = stride, model
        self._kvq_first: int | None = None
        self._kvq_out: torch.Tensor | None = None
        self._kvq_window = 0
        self._kvq_keep = False
        self._kvq_kept: dict[tuple[int, int], Any] = {}
        self._kvq_hidden: dict[int, torch.Tensor] = {}
        self._kvq_base: dict[int, torch.Tensor] = {}
        attention = [m for m in model.modules() if isinstance(m, compat.Attention)]
        if any(layer.kv_sharing_target_layer_name for layer in attention):
            return (
                "layers of this model share their KV caches: expected one for each layer; use one "
                "format for all, as --kv-cache-dtype int8_per_token_head does"
            )
        if not attention:
            return (
                "no layer of this model has a KV cache with K and V of heads (MLA has not): "
                "expected attention layers with them; use --kv-cache-dtype auto"
            )
        self._kvq_layers = {layer_number(x.layer_name): x for x in attention}
        self._watch_blocks(model)
        forward = model.forward

        def watched(*args, **kwargs):
            out = forward(*args, **kwargs)
            if self._kvq_out is None:
                self._kvq_out = out
            return out

        model.forward = watched
        return max(self._kvq_layers) + 1, [
            (n, x.num_kv_heads, x.head_size)
            for n, x in sorted(self._kvq_layers.items())
            if x.sliding_window is None
        ]

    def _watch_blocks(self, model: Any) -> None:
        """Have each decoder layer keep what it passes on, or pass on what was kept."""
        modules = dict(model.named_modules())
        for number, layer in self._kvq_layers.items():
            match = NUMBER.search(layer.layer_name)
            block = modules.get(layer.layer_name[: match.end(1)])
            if block is not None:
                block.forward = self._watched(number, block.forward)

    def _watched(self, number: int, forward: Any) -> Any:
        def watched(*args, **kwargs):
            first, key = self._kvq_first, (self._kvq_window, number)
            if first is not None and number < first and key in self._kvq_kept:
                kept = self._kvq_kept[key]
                return _clone(kept) if number == first - 1 else kept
            out = forward(*args, **kwargs)
            if self._kvq_keep:
                self._kvq_kept[key] = _clone(out)
            return out

        return watched

    def kvq_begin(self, window: int, names: dict[int, str] | None) -> None:
        """Window number *window* comes next: unquantized where *names* is None, which is kept;
        else with these layers' KV caches."""
        self._kvq_window, self._kvq_keep, self._kvq_out = window, names is None, None
        probed = {n: x for n, x in (names or {}).items() if x != PLAIN}
        self._kvq_first = min(probed, default=None)
        for number, name in probed.items():
            layer = self._kvq_layers[number]
            layer.impl = Probe(layer, name)

    @torch.inference_mode()
    def kvq_end(self, tokens: int) -> list[float]:
        """Divergence from the unquantized run at the window's positions; none for that run."""
        for layer in self._kvq_layers.values():
            if isinstance(layer.impl, Probe):
                layer.impl = layer.impl.stock
        hidden = self._kvq_out[: tokens - 1 : self._kvq_stride].contiguous()
        window, self._kvq_out = self._kvq_window, None
        if self._kvq_keep:
            self._kvq_hidden[window] = hidden.clone()
            logits = self._logits(hidden)
            kept = sum(x.nbytes for x in self._kvq_base.values())
            if kept + logits.nbytes <= KEPT_LOGITS:
                self._kvq_base[window] = logits
            return []
        found: list[float] = []
        for begin in range(0, len(hidden), ROWS):
            rows = slice(begin, begin + ROWS)
            base = self._kvq_base.get(window)
            base = self._logits(self._kvq_hidden[window][rows]) if base is None else base[rows]
            q = self._logits(hidden[rows]).float().log_softmax(-1)
            found += dict(divergence_rows(base, q))["kl"].tolist()
        return found

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.cat([self._kvq_model.compute_logits(x) for x in hidden.split(ROWS)])


def _clone(out: Any) -> Any:
    if isinstance(out, torch.Tensor):
        return out.clone()
    if isinstance(out, (tuple, list)):
        return type(out)(_clone(x) for x in out)
    return out
