"""Layers of a mapping before they have their formats: what is refused of them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from kvq_plugin.serving import pending  # noqa: E402


def test_a_refusal_tells_models_with_a_cache_and_those_without_what_to_use():
    """A quantized cache would be none where vLLM keeps no cache at all."""
    layer = SimpleNamespace(
        impl=pending.PendingImpl(4, 64, 1.0, 2, None, None, "kvq_mixed"),
        attn_backend=type("EncoderOnlyAttentionBackend", (), {}),
        layer_name="layers.0.attn",
    )
    with pytest.raises(ValueError, match="layers.0.attn is EncoderOnly") as refused:
        pending.settle(layer, None)
    cached, without = str(refused.value).rsplit(", or, for a model without causal attention", 1)
    assert cached.endswith("--kv-cache-dtype int8_per_token_head")
    assert without.endswith("--kv-cache-dtype auto")
