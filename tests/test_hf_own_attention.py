"""Models that have attention of their own whatever they are loaded with: transformers asks ours for
the mask, and nothing else."""

from __future__ import annotations

import importlib

import pytest
import torch
from dequantized import CACHE, DequantizedCache
from test_hf_generate import load, prompts
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    PreTrainedConfig,
)

from kvq_plugin.hf_cache import KVQCache
from kvq_plugin.hf_cache.attention import asks

DEFAULT = "int8_per_token_head"
SMALL = {"vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 128, "initializer_range": 0.1, "is_decoder": True,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
#: model type -> its configuration. BLOOM adds masks to scores; GIT's vision has the interface.
OWN = {
    "bloom": {"vocab_size": 512, "hidden_size": 128, "n_layer": 2, "n_head": 4,
              "initializer_range": 0.1},
    "xglm": {"vocab_size": 512, "d_model": 128, "num_layers": 2, "attention_heads": 4,
             "ffn_dim": 128, "init_std": 0.1},
    "mpt": {"vocab_size": 512, "d_model": 128, "n_layers": 2, "n_heads": 4, "max_seq_len": 512},
    "gpt_neox_japanese": SMALL,
    "megatron-bert": SMALL,
    "git": SMALL | {"vision_config": {"hidden_size": 32, "intermediate_size": 32, "image_size": 32,
                                      "num_hidden_layers": 1, "num_attention_heads": 2}},
}  # fmt: skip
#: Does not load with what it does not know, and lets it be set.
CHANGED_LATER = {"git"}
PEGASUS = {"vocab_size": 512, "d_model": 128, "encoder_layers": 2, "decoder_layers": 2,
           "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 128,
           "decoder_ffn_dim": 128, "init_std": 0.1, "attention_type": "original_full",
           "decoder_start_token_id": 2, "pad_token_id": 0, "eos_token_id": 1}  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """model type -> the model with attention in plain torch, and loaded with ours."""
    folder, made = tmp_path_factory.mktemp("own"), {}

    def get(kind: str):
        if kind not in made:
            torch.manual_seed(0)
            config = AutoConfig.for_model(kind, **OWN[kind])
            AutoModelForCausalLM.from_config(config).save_pretrained(folder / kind)
            plain = load(folder / kind, attn_implementation="eager")
            if kind in CHANGED_LATER:
                ours = load(folder / kind, attn_implementation="eager")
                ours.set_attn_implementation("kvq")
            else:
                ours = load(folder / kind, attn_implementation="kvq")
            made[kind] = plain, ours
        return made[kind]

    return get


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", OWN)
def test_logits_are_those_of_attention_in_plain_torch(pair, kind, padded):
    """Over the same codes, and with transformers' own cache; these saw tokens to come."""
    plain, ours = pair(kind)
    inputs = prompts((9, 40) if padded else (40, 40))
    real = inputs["attention_mask"].bool()
    for of, oracle in (
        (KVQCache(ours.config, DEFAULT), DequantizedCache(plain.config, DEFAULT)),
        (DynamicCache(config=ours.config), DynamicCache(config=plain.config)),
    ):
        got, want = ours(**inputs, **{CACHE: of}).logits, plain(**inputs, **{CACHE: oracle}).logits
        torch.testing.assert_close(got[real], want[real], rtol=0, atol=2e-3)


@torch.no_grad()
def test_recent_rows_are_refused(pair):
    _, ours = pair("bloom")
    with pytest.raises(ValueError, match="BLOOM, say.*cannot read int4.*int8_per_token_head"):
        ours(**prompts((40,)), **{CACHE: KVQCache(ours.config, "int4")})


@torch.no_grad()
def test_a_decoder_that_does_not_call_itself_causal(tmp_path):
    """Its encoder has attention of its own, and its decoder the interface."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("bigbird_pegasus", **PEGASUS)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path)
    inputs = prompts((40, 40))
    asked = inputs["input_ids"]
    plain, ours = (
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path, attn_implementation=x).eval()
        for x in ("eager", "kvq")
    )
    want, got = (model(**inputs, decoder_input_ids=asked).logits for model in (plain, ours))
    torch.testing.assert_close(got, want, rtol=0, atol=2e-3)


def test_who_asks():
    """By configuration; a model that nobody knows counts as one that does not."""

    class Unknown(PreTrainedConfig):
        pass

    class Llama(type(AutoConfig.for_model("llama"))):
        pass

    kinds = ("llama", "gpt_oss", "gemma3", "qwen3_next", "t5", "bart", "whisper")
    for kind in (*kinds, "deepseek_v2", "minicpm3", "moshi"):
        importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
        config = AutoConfig.for_model(kind).get_text_config(decoder=True)
        assert asks(type(config)), kind
    assert asks(Llama)
    assert not asks(Unknown)
