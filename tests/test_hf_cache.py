"""KVQCache against transformers' own cache holding the dequantized values: pages and protocol."""

from __future__ import annotations

import random

import pytest
import torch
from dequantized import DequantizedCache
from transformers import AutoConfig, DynamicCache
from transformers.cache_utils import DynamicLayer

from kvq_plugin import reference
from kvq_plugin.formats import SERVED
from kvq_plugin.hf_cache import KVQCache, KVQLayer
from kvq_plugin.hf_cache.paged import Paged
from kvq_plugin.layout import PageLayout

LAYERS, HEADS, SIZE, BLOCK = 2, 2, 32, 16
CONFIG = AutoConfig.for_model(
    "llama", hidden_size=128, num_attention_heads=4, num_key_value_heads=HEADS, head_dim=SIZE,
    num_hidden_layers=LAYERS,
)  # fmt: skip
NAMES = [f.name for f in dict.fromkeys(SERVED.values()) if f.recent is None]
DEFAULT = "int8_per_token_head"


def scales_for(name: str):
    """Static scales where the format takes some; a zero point that codes have room for."""
    if SERVED[name].is_dynamic:
        return None
    torch.manual_seed(1)
    each = [{"k_scale": torch.rand(HEADS, SIZE) * 0.05 + 0.01, "v_scale": torch.tensor(0.04)}
            for _ in range(LAYERS)]  # fmt: skip
    return dict(enumerate(each))


def pair(name=DEFAULT, block_size=BLOCK):
    """Ours, and the oracle."""
    scales = scales_for(name)
    ours = KVQCache(CONFIG, name, scales=scales, block_size=block_size)
    return ours, DequantizedCache(CONFIG, name, scales)


def feed(caches, batch: int, tokens: int, dtype=torch.float32):
    """The same new K and V of every layer to all *caches*."""
    for layer in range(LAYERS):
        key, value = torch.randn(2, batch, HEADS, tokens, SIZE, dtype=dtype).unbind(0)
        for cache in caches:
            cache.update(key, value, layer)


def assert_same(ours, oracle):
    assert ours.get_seq_length() == oracle.get_seq_length()
    for mine, theirs in zip(ours.layers, oracle.layers, strict=True):
        key, value = mine.dequantize()
        assert torch.equal(key, theirs.keys) and torch.equal(value, theirs.values)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pages_hold_what_was_put_in(name, dtype):
    torch.manual_seed(0)
    caches = pair(name)
    for tokens in (37, 1, 1, 20):
        feed(caches, 3, tokens, dtype)
        assert_same(*caches)


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_those_of_the_store_that_vllm_calls(name):
    """One sequence of full blocks: slots 0, 1, 2, ... as vLLM would number them."""
    torch.manual_seed(0)
    cache, _ = pair(name)
    key, value = torch.randn(2, 1, HEADS, 3 * BLOCK, SIZE).unbind(0)
    layer: KVQLayer = cache.layers[0]
    cache.update(key[:, :, :20], value[:, :, :20], 0)
    cache.update(key[:, :, 20:], value[:, :, 20:], 0)
    layer.commit()
    expected = torch.zeros_like(layer.pool)
    rows = [x[0].transpose(0, 1) for x in (key, value)]
    slots = torch.arange(3 * BLOCK)
    reference.store(*rows, expected, slots, cache.format, *layer._static)
    assert torch.equal(layer.pool, expected)
    assert cache.nbytes == 3 * HEADS * PageLayout(cache.format, SIZE, BLOCK).size


def test_any_order_of_changes_equals_transformers():
    """300 random changes of the batch, each against DynamicCache's own."""
    rng = random.Random(0)
    torch.manual_seed(0)
    for _ in range(12):
        caches = pair()
        batch = rng.randint(1, 4)
        for _ in range(25):
            length = caches[0].get_seq_length()
            change = rng.choice(["feed", "feed", "token", "reorder", "crop", "repeat", "select"])
            if change == "feed" or (change != "token" and not length):
                feed(caches, batch, rng.randint(1, 40))
            elif change == "token":
                feed(caches, batch, 1)
            elif change == "reorder":
                beams = torch.tensor([rng.randrange(batch) for _ in range(batch)])
                for cache in caches:
                    cache.reorder_cache(beams)
            elif change == "crop":
                back = min(rng.randint(0, 20), length - 1)
                for cache in caches:
                    cache.crop(-back)
            elif change == "repeat" and batch < 5:
                batch *= 2
                for cache in caches:
                    cache.batch_repeat_interleave(2)
            elif change == "select":
                chosen = torch.tensor(sorted(rng.sample(range(batch), rng.randint(1, batch))))
                batch = len(chosen)
                for cache in caches:
                    cache.batch_select_indices(chosen)
            if rng.random() < 0.5:  # otherwise the next change meets tokens not stored yet
                assert_same(*caches)
        assert_same(*caches)


def test_beams_share_pages():
    """Four beams of one past of 64 blocks cost their own last blocks, not four pasts."""
    cache, _ = pair()
    feed([cache], 1, 64 * BLOCK)
    cache.batch_repeat_interleave(4)
    one = HEADS * PageLayout(cache.format, SIZE, BLOCK).size * LAYERS
    for _ in range(10):
        feed([cache], 4, 1)
        cache.reorder_cache(torch.tensor([0, 0, 2, 1]))
    cache.layers[0].dequantize()
    assert cache.nbytes < (64 + 3 * 4) * one


def test_growing_keeps_little_to_spare():
    """At 4,000 tokens the pages are at most 0.55 of an unquantized bf16 cache (head size 64)."""
    config = AutoConfig.for_model(
        "llama", hidden_size=576, num_attention_heads=9, num_key_value_heads=3, num_hidden_layers=1
    )
    cache = KVQCache(config, DEFAULT)
    x = torch.zeros(1, 3, 4000, 64, dtype=torch.bfloat16)
    cache.update(x, x, 0)
    peak = 0
    for _ in range(100):
        cache.update(x[:, :, :1], x[:, :, :1], 0)
        cache.layers[0].commit()
        peak = max(peak, cache.nbytes / (cache.get_seq_length() * 3 * 64 * 2 * 2))
    assert peak <= 0.55


def test_reset_takes_another_batch():
    torch.manual_seed(0)
    caches = pair()
    feed(caches, 3, 20)
    for cache in caches:
        cache.reset()
    assert caches[0].get_seq_length() == 0 and caches[0].nbytes == 0
    feed(caches, 2, 7)
    assert_same(*caches)


def test_protocol_before_the_first_token():
    cache, _ = pair()
    assert (cache.get_seq_length(), cache.get_max_length()) == (0, -1)
    assert cache.get_mask_sizes(5, 0) == (5, 0)
    assert cache.is_croppable and not cache.is_compileable and not cache.is_initialized
    cache.reorder_cache(torch.tensor([0]))
    cache.crop(-3)
    cache.reset()
    cache.early_initialization(2, HEADS, SIZE, torch.float32, torch.device("cpu"))
    assert cache.is_initialized and cache.get_seq_length() == 0
    assert cache.layers[0].dequantize()[0].shape == (2, HEADS, 0, SIZE)
    feed([cache], 2, 3)
    assert cache.get_mask_sizes(5, 0) == (8, 0)


def test_offload_and_prefetch():
    torch.manual_seed(0)
    caches = pair()
    feed(caches, 2, 20)
    for layer in caches[0].layers:
        layer.offload()
        layer.prefetch()
    feed(caches, 2, 20)
    assert_same(*caches)


def test_who_insists_on_a_tensor_gets_one():
    """What ``update`` returns is usable as K and V by code that knows nothing of pages."""
    torch.manual_seed(0)
    ours, oracle = pair()
    feed([ours, oracle], 2, 9)
    x = torch.randn(2, 2, HEADS, 1, SIZE)
    (key, value), (k, v) = ours.update(*x, 0), oracle.update(*x, 0)
    assert type(key) is Paged
    q = torch.randn(2, HEADS, 1, SIZE)
    attend = torch.nn.functional.scaled_dot_product_attention
    assert torch.equal(attend(q, key, value), attend(q, k, v))
    assert torch.equal(torch.cat([key, value], dim=0), torch.cat([k, v], dim=0))
    assert key.shape == k.shape and key.dtype == k.dtype and len(key) == 2
    assert torch.equal(key.transpose(2, 3), k.transpose(2, 3))
    assert torch.equal(key[:, :, -1], k[:, :, -1])
    assert torch.equal(2 * key + value, 2 * k + v) and torch.equal(q @ key.mT, q @ k.mT)


def test_other_layers_stay_transformers_own():
    config = AutoConfig.for_model("gemma3_text", num_hidden_layers=6, sliding_window=8)
    theirs = DynamicCache(config=config)
    for mine, layer in zip(KVQCache(config, DEFAULT).layers, theirs.layers, strict=True):
        assert type(mine) is (KVQLayer if type(layer) is DynamicLayer else type(layer))


# --- what is refused -------------------------------------------------------------------


def test_errors_name_what_to_do():
    with pytest.raises(ValueError, match="unknown KV-cache format 'int5'; kvq_plugin knows"):
        KVQCache(CONFIG, "int5")
    with pytest.raises(ValueError, match="int8 needs calibrated scales.*kvq calibrate"):
        KVQCache(CONFIG, "int8")
    with pytest.raises(ValueError, match="computes its scales while writing"):
        KVQCache(CONFIG, DEFAULT, scales=scales_for("int8"))
    with pytest.raises(ValueError, match="layer 1 lacks k_scale and v_scale"):
        KVQCache(CONFIG, "int8", scales={0: scales_for("int8")[0]})
    with pytest.raises(ValueError, match="block_size=20: expected a multiple of 16"):
        KVQCache(CONFIG, DEFAULT, block_size=20)
    windows = AutoConfig.for_model("mistral", sliding_window=8, num_hidden_layers=2)
    with pytest.raises(ValueError, match="nothing to quantize"):
        KVQCache(windows, DEFAULT)
    cache, _ = pair()
    feed([cache], 2, 4)
    with pytest.raises(ValueError, match="expected minus the number"):
        cache.crop(3)
    cache.reset()
    with pytest.raises(
        ValueError, match=r"K \[1, 2, 3, 192\] and V \[1, 2, 3, 128\].*DynamicCache"
    ):
        cache.update(torch.zeros(1, 2, 3, 192), torch.zeros(1, 2, 3, 128), 0)


@pytest.mark.parametrize(
    ("asked", "name"),
    (
        ({"backend": "quanto", "nbits": 4}, "int4_per_token_head"),
        ({"backend": "quanto"}, "int4_per_token_head"),
        ({"backend": "hqq", "nbits": 8, "axis_key": 1, "axis_value": 1}, "int8_per_token_head"),
        ({"backend": "hqq", "nbits": 8, "q_group_size": 64}, "int8_per_token_head"),
        ({"backend": "quanto", "axis_key": -1, "residual_length": 0}, "int4_per_token_head"),
        ({"backend": "fp8"}, "fp8_per_token_head"),
        ({"backend": "hqq", "nbits": 8, "axis_key": 0, "scales": scales_for("int8")}, "int8"),
    ),
)
def test_like_quantized_cache(asked, name):
    assert KVQCache.like(CONFIG, **asked).format.name == name


@pytest.mark.parametrize(
    ("asked", "named"),
    (
        ({"backend": "other"}, "backend='other'"),
        ({"nbits": 2}, "nbits=2 has no equivalent: nbits=8 is"),
        ({"axis_key": 0}, "axis_key=0.*kvq calibrate"),
        ({"axis_value": 0}, "axis_value=0"),
        ({"axis_key": 3}, "axis_key=3"),
        ({"q_group_size": 16}, "q_group_size=16"),
        ({"residual_length": 128}, "residual_length=128"),
        ({"backend": "fp8", "nbits": 4}, "nbits=4"),
        ({"scales": {0: {}}}, "scales="),
    ),
)
def test_like_names_the_option_without_equivalent(asked, named):
    with pytest.raises(ValueError, match=named):
        KVQCache.like(CONFIG, **{"backend": "quanto", **asked})
