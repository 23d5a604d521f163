"""``generate`` with KVQCache: the tokens of transformers' own cache holding the same values.

In float32, with models so small and so random that a wrong mask, window or page changes them.
"""

from __future__ import annotations

import logging

import pytest
import torch
from dequantized import CACHE, DequantizedCache
from scaled import add_scales
from tiny_models import CONFIGS, make
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from kvq_plugin import inspection
from kvq_plugin.hf_cache import KVQCache, layer, paged

DEFAULT = "int8_per_token_head"
NEW = 24
LENGTHS = (5, 70, 33)
_LFM2 = {
    "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 512,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1,
    "layer_types": ["conv", "full_attention", "conv"], "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
#: Without its own attention in plain torch, transformers' alibi goes through no interface at all.
FEATURES = (
    "gqa", "mqa", "head_size_80", "softcap", "window_and_full_layers", "sinks", "kv_sharing",
    "alibi",
)  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """feature -> the model, made once, in float32."""
    folder, made = tmp_path_factory.mktemp("models"), {}

    def get(feature: str, implementation: str = "kvq"):
        if feature not in made:
            made[feature] = load(make(folder, feature))
        if feature != "alibi":
            made[feature].set_attn_implementation(implementation)
        return made[feature]

    return get


def load(path, **options):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options).eval()
    model.generation_config.eos_token_id = None  # every answer has the length asked for
    return model


def prompts(lengths=LENGTHS, side="left"):
    """input_ids and attention_mask of random prompts, padded on the left."""
    torch.manual_seed(4)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        where = slice(-length, None) if side == "left" else slice(0, length)
        ids[row, where] = torch.randint(3, 500, (length,))
        mask[row, where] = 1
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, cache, inputs=None, **options):
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    return model.generate(**(inputs or prompts()), **{CACHE: cache}, **options)


def both(models, feature, name=DEFAULT, implementation="kvq", **options):
    """Tokens by ours, and by the oracle with attention in plain torch."""
    model = models(feature, "eager")
    torch.manual_seed(7)
    expected = generate(model, DequantizedCache(model.config, name), **options)
    model = models(feature, implementation)
    torch.manual_seed(7)
    ours = generate(model, KVQCache(model.config, name, block_size=16), **options)
    return ours, expected


@pytest.mark.parametrize("feature", FEATURES)
def test_same_tokens(models, feature):
    ours, expected = both(models, feature)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("feature", ["softcap", "sinks", "window_and_full_layers"])
def test_same_logits(models, feature):
    """What moves no greedy token shows here: without its softcap or sinks a model is over 1 off."""
    inputs = prompts((70, 70))
    model = models(feature, "eager")
    expected = logits(model, DequantizedCache(model.config, DEFAULT), inputs)
    model = models(feature)
    ours = logits(model, KVQCache(model.config, DEFAULT, block_size=16), inputs, (40, 29, 1))
    torch.testing.assert_close(ours, expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("name", ["int4_per_token_head", "fp8_per_token_head", "fp8"])
def test_same_tokens_in_other_formats(models, name):
    """But where a token led by less than one more code of 4 bits, here and there, makes up for."""
    details = {"output_scores": True, "return_dict_in_generate": True}
    ours, expected = both(models, "gqa", name, **details)
    start = expected.sequences.shape[1] - NEW
    for row, (a, b) in enumerate(zip(ours.sequences, expected.sequences, strict=True)):
        differ = (a != b).nonzero()
        if len(differ):
            first, second = expected.scores[int(differ[0]) - start][row].topk(2).values
            assert name == "int4_per_token_head" and first - second < 0.3
    plain = generate(models("gqa", "eager"), DynamicCache(config=models("gqa", "eager").config))
    assert name != "int4_per_token_head" or not torch.equal(ours.sequences, plain)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("feature", ["gqa", "window_and_full_layers"])
def test_other_attention_dequantizes_and_says_so_once(
    models, feature, implementation, caplog, monkeypatch
):
    paged.say_once.cache_clear()
    with caplog.at_level(logging.WARNING, paged.logger.name):
        ours, expected = both(models, feature, implementation=implementation)
    assert torch.equal(ours, expected)
    [said] = [r.getMessage() for r in caplog.records if r.name == paged.logger.name]
    assert 'attn_implementation="kvq"' in said


@pytest.mark.parametrize("feature", ["window_and_full_layers", "kv_sharing"])
def test_attention_on_codes_never_dequantizes(models, monkeypatch, feature):
    monkeypatch.setattr(layer.KVQLayer, "dequantize", None)
    model = models(feature)
    generate(model, KVQCache(model.config, DEFAULT))


@pytest.mark.parametrize("feature", ["gqa", "window_and_full_layers", "kv_sharing"])
@pytest.mark.parametrize("beams", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_beams(models, feature, beams):
    ours, expected = both(models, feature, **beams)
    assert torch.equal(ours, expected)


def test_sampling(models):
    ours, expected = both(models, "gqa", do_sample=True, temperature=0.7, num_return_sequences=2)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("feature", ["gqa", "window_and_full_layers"])
def test_assisted_decoding(models, feature):
    """Five tokens drafted each time and wrong mostly, so that every step takes some back."""
    assistant = models("mqa", "sdpa")
    assistant.generation_config.update(
        num_assistant_tokens=5,
        num_assistant_tokens_schedule="constant",
        assistant_confidence_threshold=0.0,
    )
    inputs = prompts((60,))
    drafts = {"assistant_model": assistant, "inputs": inputs}
    ours, expected = both(models, feature, **drafts)
    assert torch.equal(ours, expected)
    model = models(feature)
    alone = generate(model, KVQCache(model.config, DEFAULT), inputs)
    assert torch.equal(ours, alone)


def test_prompt_lookup(models):
    inputs = prompts((40,))
    inputs = {name: x.repeat(1, 2) for name, x in inputs.items()}
    ours, expected = both(models, "gqa", prompt_lookup_num_tokens=4, inputs=inputs)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("implementation", ["kvq", "sdpa"])
def test_hybrid_layers(implementation):
    """LFM2: convolutions keep transformers' own states."""
    config = AutoConfig.for_model("lfm2", **_LFM2)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    expected = generate(model, DequantizedCache(config, DEFAULT))
    model.set_attn_implementation(implementation)
    assert torch.equal(generate(model, KVQCache(config, DEFAULT)), expected)


# --- masks -----------------------------------------------------------------------------


def logits(model, cache, inputs, chunks=(None,), **more):
    """Of all positions, by one forward pass or by several over *chunks* of the tokens."""
    out, start = [], 0
    for size in chunks:
        stop = inputs["input_ids"].shape[1] if size is None else start + size
        mask = inputs["attention_mask"][:, :stop] if inputs["attention_mask"].dim() == 2 else None
        with torch.inference_mode():
            done = model(
                input_ids=inputs["input_ids"][:, start:stop],
                attention_mask=inputs["attention_mask"] if mask is None else mask,
                **{CACHE: cache},
                **more,
            )
        out.append(done.logits)
        start = stop
    return torch.cat(out, 1)


@pytest.mark.parametrize("kind", ["left", "right", "holes"])
@pytest.mark.parametrize("feature", ["gqa", "window_and_full_layers"])
def test_masks_of_padding(models, kind, feature):
    """Wherever the padding is, what remains sees what it should; in one pass and in several.

    One more code, where sums differ by a bit, moves a logit by up to 0.007 here, padding by over 1.
    """
    inputs = prompts(side="right" if kind == "right" else "left")
    if kind == "holes":
        inputs["attention_mask"][1, 20:40] = 0
    model = models(feature, "eager")
    expected = logits(model, DequantizedCache(model.config, DEFAULT), inputs)
    model = models(feature)
    real = inputs["attention_mask"].bool()
    for chunks in ((None,), (40, 29, 1)):
        ours = logits(model, KVQCache(model.config, DEFAULT, block_size=16), inputs, chunks)
        torch.testing.assert_close(ours[real], expected[real], rtol=0, atol=0.02)
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    unmasked = logits(model, KVQCache(model.config, DEFAULT), inputs)
    if kind != "right":  # where nothing but padding sees padding
        assert (unmasked[real] - expected[real]).abs().max() > 1


def test_padding_is_not_stored(models):
    model = models("gqa")
    cache = KVQCache(model.config, DEFAULT, block_size=16)
    logits(model, cache, prompts((5, 70, 33)))
    assert cache.layers[0].last.lengths.tolist() == [5, 70, 33]
    assert cache.get_seq_length() == 70


def test_a_mask_of_its_own_is_honoured(models, caplog):
    """One that is no padding: pages cannot, so transformers' attention does, over their values."""
    inputs = prompts((30, 30))
    allowed = torch.ones(30, 30, dtype=torch.bool).tril()
    allowed[20:, 3:9] = False
    inputs["attention_mask"] = allowed.expand(2, 1, 30, 30)
    position = {"position_ids": torch.arange(30).expand(2, 30)}
    model = models("gqa", "sdpa")
    expected = logits(model, DequantizedCache(model.config, DEFAULT), inputs, **position)
    model = models("gqa")
    paged.say_once.cache_clear()
    ours = logits(model, KVQCache(model.config, DEFAULT), inputs, **position)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
    assert "more than padding" in caplog.text


def test_a_token_masked_after_it_was_stored_is_not_seen(models):
    inputs = prompts((30, 30))
    later = {name: x.clone() for name, x in inputs.items()}
    later["attention_mask"][0, 5:9] = 0
    results = []
    for implementation, cls in (("eager", DequantizedCache), ("kvq", KVQCache)):
        model = models("gqa", implementation)
        cache = cls(model.config, DEFAULT)
        logits(model, cache, {name: x[:, :20] for name, x in inputs.items()})
        rest = {"input_ids": later["input_ids"][:, 20:], "attention_mask": later["attention_mask"]}
        with torch.inference_mode():
            results.append(model(**rest, **{CACHE: cache}).logits)
    torch.testing.assert_close(*results, rtol=0, atol=0.02)


def test_without_a_quantized_cache(models):
    """``kvq`` attention over transformers' own cache is transformers' own attention."""
    results = []
    for implementation in ("sdpa", "kvq"):
        model = models("gqa", implementation)
        results.append(generate(model, DynamicCache(config=model.config)))
    assert torch.equal(*results)


def test_dropout_is_refused(models):
    model = models("gqa")
    model.config.attention_dropout = 0.5
    for block in model.model.layers:
        block.self_attn.attention_dropout = 0.5
    try:
        with pytest.raises(ValueError, match="no dropout.*model.eval"):
            model.train()(**prompts(), **{CACHE: KVQCache(model.config, DEFAULT)})
    finally:
        model.eval()
        model.config.attention_dropout = 0.0
        for block in model.model.layers:
            block.self_attn.attention_dropout = 0.0


# --- static scales ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def scaled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scaled")
    base = make(folder, "gqa")
    calibration = [prompts((80,))["input_ids"][0].tolist()]
    forms = [("channel", "tensor"), ("attn_head", "channel")]
    return add_scales(base, folder / "int8", calibration, "int", forms)


def test_scales_of_the_checkpoint_the_model_is_from(scaled):
    layers = inspection.read(scaled).layers
    scales = {x.number: x.values for x in layers}
    config = AutoConfig.from_pretrained(scaled)
    del config.quantization_config  # transformers' compressed-tensors knows no channels there
    model = load(scaled, config=config)
    expected = generate(model, DequantizedCache(model.config, "int8", scales))
    model.set_attn_implementation("kvq")
    for given in (None, scaled, scales):
        assert torch.equal(generate(model, KVQCache(model.config, "int8", scales=given)), expected)
    one = [{"k_scale": torch.tensor(0.5), "v_scale": torch.tensor(0.5)}] * 2
    other = generate(model, KVQCache(model.config, "int8", scales=dict(enumerate(one))))
    assert not torch.equal(other, expected)


def test_scales_for_another_code_are_refused(scaled):
    config = AutoConfig.from_pretrained(scaled)
    with pytest.raises(ValueError, match="scales are for another code"):
        KVQCache(config, "fp8", scales=scaled)


assert set(FEATURES) <= set(CONFIGS)
