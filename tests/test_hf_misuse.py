"""What KVQCache cannot answer is refused, and what is unusual about a model is answered right."""

from __future__ import annotations

import pytest
import torch
from dequantized import CACHE, DequantizedCache
from tiny_models import CONFIGS
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    EncoderDecoderCache,
)

from kvq_plugin.hf_cache import KVQCache

DEFAULT = "int8_per_token_head"
SMALL = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512,
         "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1}  # fmt: skip
BART = {"d_model": 128, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128,
        "vocab_size": 512, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1,
        "decoder_start_token_id": 1}  # fmt: skip


def made(kind=AutoModelForCausalLM, **settings):
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(0)
    model = kind.from_config(config, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    model.set_attn_implementation("kvq")
    return model


@pytest.fixture(scope="module")
def llama():
    return made(**CONFIGS["gqa"])


@pytest.fixture(autouse=True)
def back(llama):
    yield
    llama.set_attn_implementation("kvq")
    llama.zero_grad()


def ids(batch: int, tokens: int):
    torch.manual_seed(4)
    return torch.randint(3, 500, (batch, tokens))


def ours(model):
    return {CACHE: KVQCache(model.config, DEFAULT)}


@torch.no_grad()
def test_attention_that_hands_on_another_v():
    """Differential attention puts V's heads together after the cache has had them."""
    model = made(model_type="diffllama", **SMALL)
    prompt, oracle = ids(2, 40), DequantizedCache(model.config, DEFAULT)
    got = model(prompt, **ours(model)).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(got, model(prompt, **{CACHE: oracle}).logits, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_another_batch_is_refused(llama):
    cache = ours(llama)
    llama(ids(1, 20), **cache)
    for batch in (2, 3):
        with pytest.raises(ValueError, match="expected .1, 2, 20, 32.*reset"):
            llama(ids(batch, 20), **cache)


def test_a_static_cache_is_transformers_own(llama):
    """Its pages have room for tokens to come, which a prompt must not see."""
    asked = {"max_new_tokens": 8, "do_sample": False, "output_logits": True,
             "return_dict_in_generate": True, "cache_implementation": "static",
             "disable_compile": True}  # fmt: skip
    got = llama.generate(ids(1, 40), **asked)
    llama.set_attn_implementation("eager")
    want = llama.generate(ids(1, 40), **asked)
    torch.testing.assert_close(got.logits[0], want.logits[0])
    assert torch.equal(got.sequences, want.sequences)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["kvq", "sdpa"])
def test_autocast(llama, implementation):
    """Rotary embeddings leave K in fp32 and V in bf16."""
    llama.set_attn_implementation(implementation)
    with torch.autocast("cpu", torch.bfloat16):
        got = llama(ids(2, 20), **ours(llama)).logits
        want = llama(ids(2, 20), **{CACHE: DynamicCache(config=llama.config)}).logits
    assert (got - want).abs().mean() < 0.1 * want.float().std()


@torch.no_grad()
@pytest.mark.parametrize("others", ["shown", "hidden"])
def test_positions_shown_too_late_are_refused(llama, others):
    """Nothing is stored of a position that the mask hid when it came."""
    prompt, mask, cache = ids(1, 30), torch.ones(1, 30, dtype=torch.long), ours(llama)
    mask[:, 2:9] = 0
    llama(prompt[:, :20], attention_mask=mask[:, :20], **cache)
    mask[:, 5:9] = 1
    mask[:, 2:5] = int(others == "shown")
    with pytest.raises(ValueError, match="sees positions that the attention mask hid.*reset"):
        llama(prompt[:, 20:], attention_mask=mask, **cache)


@torch.no_grad()
def test_no_mask_is_one_that_shows_all(llama):
    prompt, mask, cache = ids(1, 30), torch.ones(1, 20, dtype=torch.long), ours(llama)
    mask[:, :4] = 0
    llama(prompt[:, :20], attention_mask=mask, **cache)
    with pytest.raises(ValueError, match="pass an attention_mask"):
        llama(prompt[:, 20:], **cache)


@pytest.mark.parametrize("implementation", ["kvq", "sdpa"])
def test_gradients_are_refused_when_asked_for(llama, implementation):
    """They would leave out K, V and all layers before."""
    llama.set_attn_implementation(implementation)
    loss = llama(ids(1, 20), labels=ids(1, 20), **ours(llama)).loss
    assert loss > 0
    with pytest.raises(RuntimeError, match="for inference.*DynamicCache"):
        loss.backward()


@pytest.mark.parametrize("implementation", ["kvq", "sdpa"])
@pytest.mark.parametrize("trained", ["k_proj", "v_proj"])
def test_gradients_of_some_weights_are_refused_too(llama, implementation, trained):
    """None came back, without a word, where only these and the output layer were to be trained."""
    llama.set_attn_implementation(implementation)
    for name, weight in llama.named_parameters():
        weight.requires_grad_(trained in name or "lm_head" in name)
    try:
        loss = llama(ids(1, 20), labels=ids(1, 20), **ours(llama)).loss
        with pytest.raises(RuntimeError, match="for inference.*DynamicCache"):
            loss.backward()
    finally:
        llama.requires_grad_(True)


def test_the_output_layer_alone_may_be_trained(llama):
    llama.requires_grad_(False)
    llama.lm_head.requires_grad_(True)
    try:
        llama(ids(1, 20), labels=ids(1, 20), **ours(llama)).loss.backward()
        assert llama.lm_head.weight.grad.abs().sum() > 0
    finally:
        llama.requires_grad_(True)


@torch.no_grad()
def test_one_graph_is_refused_with_what_to_do(llama):
    compiled = torch.compile(llama.forward, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="compile without fullgraph=True"):
        compiled(ids(1, 20), **ours(llama))


@torch.no_grad()
def test_compiled(llama):
    """Dynamo makes the objects that it traces without their constructors."""
    compiled = torch.compile(llama.forward, backend="eager")
    cache = ours(llama)
    got = [compiled(ids(1, 20)[:, a:b], **cache).logits for a, b in ((0, 19), (19, 20))]
    want = llama(ids(1, 20), **ours(llama)).logits
    torch.testing.assert_close(torch.cat(got, 1), want, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("gqa", DEFAULT), "model.config"),
        ((None, DEFAULT), "model.config"),
        ((..., DEFAULT, {"block_size": "128"}), "block_size='128'.*multiple of 16"),
        ((..., DEFAULT, {"block_size": 16.0}), "block_size=16.0.*multiple of 16"),
    ],
)
def test_arguments(llama, arguments, why):
    config, name, *options = arguments
    with pytest.raises(ValueError, match=why):
        KVQCache(llama.config if config is ... else config, name, **dict(*options))


@torch.no_grad()
def test_crop_takes_whole_tokens(llama):
    cache = ours(llama)
    llama(ids(1, 20), **cache)
    with pytest.raises(ValueError, match="crop.-1.5.*expected"):
        cache[CACHE].layers[0].crop(-1.5)


@torch.no_grad()
def test_changes_by_what_transformers_own_cache_takes(llama):
    """Tensors of one number, lists and slices."""
    plain, other = ours(llama), ours(llama)
    for cache in (plain, other):
        llama(ids(3, 20), **cache)
    plain[CACHE].crop(-2)
    other[CACHE].crop(torch.tensor(-2))
    plain[CACHE].batch_select_indices(torch.tensor([2, 0]))
    other[CACHE].batch_select_indices([2, 0])
    plain[CACHE].batch_select_indices(torch.tensor([0]))
    other[CACHE].batch_select_indices(slice(0, 1))
    assert type(other[CACHE].get_seq_length()) is int
    want, got = (llama(ids(1, 3), **cache).logits for cache in (plain, other))
    assert torch.equal(got, want)


@torch.no_grad()
@pytest.mark.parametrize(
    ("k_scale", "why"),
    [
        (0.0, "layer 0: cannot use k_scale.*> 0, got.*1 zero"),
        (-1.0, "layer 0: k_scale is -1"),
        (-0.5, "layer 0: cannot use k_scale.*1 negative"),
        (float("nan"), "layer 0: cannot use k_scale.*1 NaN"),
        (torch.ones(2, 31), "layer 0: cannot use k_scale of shape .2, 31.: accepted.*.2, 32."),
        (torch.ones(4), "layer 0: cannot use k_scale of shape .4,.: accepted.*.2,."),
    ],
)
def test_static_scales(llama, k_scale, why):
    one = {"k_scale": torch.as_tensor(k_scale), "v_scale": torch.tensor(0.1)}
    with pytest.raises(ValueError, match=why):
        llama(ids(1, 3), **{CACHE: KVQCache(llama.config, "int8", scales={0: one, 1: one})})


def test_flex_attention(llama):
    llama.set_attn_implementation("flex_attention")
    got = llama.generate(ids(1, 40), **ours(llama), max_new_tokens=3, do_sample=False)
    assert got.shape == (1, 43)


@pytest.mark.parametrize("both", [False, True])
def test_cross_attention(both):
    """The decoder's own tokens may be quantized, those of the encoder not."""
    model = made(AutoModelForSeq2SeqLM, model_type="bart", **BART)

    def new():
        return KVQCache(model.config, DEFAULT)

    cross = new() if both else DynamicCache(config=model.config)
    call = {CACHE: EncoderDecoderCache(new(), cross), "max_new_tokens": 4, "do_sample": False}
    if not both:
        assert model.generate(ids(2, 30), **call).shape == (2, 5)
        return
    with pytest.raises(ValueError, match="cross attention.*EncoderDecoderCache"):
        model.generate(ids(2, 30), **call)


@pytest.mark.parametrize("kind", ("xlstm", "rwkv"))
def test_models_that_would_not_use_the_cache_are_refused(kind):
    config = AutoConfig.for_model(kind)
    for make in (lambda: KVQCache(config, DEFAULT), lambda: KVQCache.like(config, backend="hqq")):
        with pytest.raises(ValueError, match=f"{kind} models keep a recurrent state"):
            make()


def test_the_options_of_a_model_whose_layers_differ_go_by_the_largest_head():
    config = AutoConfig.for_model("gemma4_text")
    assert KVQCache.like(config, backend="quanto", nbits=8, q_group_size=512).format.name == DEFAULT
    with pytest.raises(ValueError, match="q_group_size=256.*the 512 values"):
        KVQCache.like(config, backend="quanto", nbits=8, q_group_size=256)


def test_the_options_of_a_model_without_attention_end_in_words():
    with pytest.raises(ValueError, match="no layer of this mamba model has full attention"):
        KVQCache.like(AutoConfig.for_model("mamba"), backend="quanto", q_group_size=64)
