"""Windows, scores and the two ways to get logprobs; then real engines against their limits."""

from __future__ import annotations

import json
import math
import sys
import tempfile
from types import SimpleNamespace

import pytest

from kvq_plugin import evaluate, texts
from kvq_plugin.calibrate.data import sample_windows
from kvq_plugin.evaluate import Score, make_windows
from kvq_plugin.servers import ServerError


class Words:
    """A tokenizer whose tokens are the lengths of words; BOS is 1000 where asked for."""

    def __init__(self, bos: bool = False):
        self.bos = [1000] if bos else []

    def __call__(self, text, add_special_tokens=True, verbose=True):
        ids = [len(word) for word in text.split()]
        return SimpleNamespace(input_ids=self.bos + ids if add_special_tokens else ids)


def test_windows_follow_each_other():
    assert make_windows(Words(), "a bb ccc dddd eeeee", 2, 2) == [[1, 2], [3, 4]]


def test_windows_begin_with_bos_where_the_tokenizer_does():
    assert make_windows(Words(bos=True), "a bb ccc dddd", 2, 3) == [[1000, 1, 2], [1000, 3, 4]]


def test_windows_do_not_begin_with_eos():
    """Of a tokenizer that ends texts with it (add_eos_token) an empty text begins with it."""

    def tokenizer(text, add_special_tokens=True, verbose=True):
        ids = Words()(text).input_ids
        return SimpleNamespace(input_ids=ids + [1001] * add_special_tokens)

    assert make_windows(tokenizer, "a bb ccc dddd", 2, 2) == [[1, 2], [3, 4]]
    assert len(sample_windows(tokenizer, ["a bb"], 1, 2, 0)[0]) == 2
    assert 1001 not in sample_windows(tokenizer, ["a bb"], 1, 2, 0)[0]


def test_short_text_is_refused_with_what_it_holds():
    with pytest.raises(ValueError, match="has 3 tokens, 2 windows of 2 need 4: ask for at most 1"):
        make_windows(Words(), "a bb ccc", 2, 2)


def test_windows_that_nobody_asked_for_are_not_offered():
    text = "a bb ccc dddd eeeee"
    assert len(make_windows(Words(), text, 1, 2, 1)) == 2
    with pytest.raises(ValueError, match="2 windows of 2 and 1 more .* 6: ask for at most 1 or gi"):
        make_windows(Words(), text, 2, 2, 1)
    with pytest.raises(ValueError, match="has 5 tokens, a window of 9 needs 9: give a longer text"):
        make_windows(Words(), text, 1, 9)


@pytest.mark.parametrize("content", [None, "{}", '{"a"'])
def test_no_usable_tokenizer_is_said_as_such(content, tmp_path):
    """Without files transformers makes GPT-2's of no vocabulary, which finds no tokens in a text;
    of what is none it raises any type of error."""
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match="no tokenizer for .*: .*; expected its files") as caught:
        evaluate.load_tokenizer(str(tmp_path))
    if content is None:
        assert "there is no usable one in its folder; expected its files (tokenizer.json," in str(
            caught.value
        )


def test_a_list_of_packages_to_install_is_not_begun(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="no tokenizer for .*: there is no usable one in its fold"):
        evaluate.load_tokenizer(str(tmp_path))


def test_builtin_text_is_the_same_every_time():
    assert texts.builtin_text() == texts.read_text(texts.BUILTIN_TEXT)
    assert len(texts.builtin_text()) > 400_000


def test_a_text_in_another_encoding_is_named(tmp_path):
    file = tmp_path / "latin1.txt"
    file.write_bytes("Bücher".encode("latin-1"))
    with pytest.raises(ValueError, match="latin1.txt: expected UTF-8 text, got .*; convert it"):
        texts.read_text(str(file))


def test_longest_request_counts_each_token_once():
    """After a window and a generation, which are scored, one token; questions count their own."""
    assert evaluate.longest_request({"a": [[1] * 5], "b": [[1] * 7]}, 0, []) == 8
    assert evaluate.longest_request({"a": [[1] * 5]}, 9, []) == 10
    assert evaluate.longest_request({"a": [[1] * 5]}, 0, [([1] * 10, 6), ([1] * 3, 8)]) == 16
    assert evaluate.longest_request({}, 0, [([1] * 10, 6)]) == 16


def test_perplexity_of_a_uniform_guess():
    assert Score((math.log(1 / 50),) * 7).perplexity == pytest.approx(50)


def test_change_is_that_of_the_perplexities():
    before, after = Score((-1.0, -2.0, -3.0)), Score((-1.1, -2.0, -3.2))
    change, error = after.change(before)
    assert change == pytest.approx(100 * (after.perplexity / before.perplexity - 1))
    # Differences 0.1, 0, 0.2: sample deviation 0.1, mean 0.1.
    assert error == pytest.approx(100 * math.exp(0.1) * 0.1 / math.sqrt(3))


def test_change_needs_the_same_tokens():
    with pytest.raises(ValueError):
        Score((-1.0,)).change(Score((-1.0, -2.0)))


def test_offline_reads_the_logprob_of_each_token(monkeypatch):
    fake = SimpleNamespace(SamplingParams=lambda **given: SimpleNamespace(**given))
    monkeypatch.setitem(sys.modules, "vllm", fake)
    # vLLM lists the token itself and, where they differ, the most likely one.
    rows = [None, {7: SimpleNamespace(logprob=-1.0), 9: SimpleNamespace(logprob=-0.5)}]
    rows.append({8: SimpleNamespace(logprob=-2.0)})
    asked = []

    def generate(prompt, params, use_tqdm):
        asked.append((prompt, params.prompt_logprobs, params.max_tokens))
        return [SimpleNamespace(prompt_logprobs=rows)]

    llm = SimpleNamespace(generate=generate)
    ticks = []
    score = evaluate.perplexity_offline(llm, [[6, 7, 8]] * 2, lambda: ticks.append(1))
    assert score.logprobs == (-1.0, -2.0) * 2
    assert asked == [({"prompt_token_ids": [6, 7, 8]}, 0, 1)] * 2
    assert len(ticks) == 2


def test_http_reads_the_logprob_of_each_token():
    rows = [None, {"9": {"logprob": -0.5}, "7": {"logprob": -1.0}}, {"8": {"logprob": -2.0}}]
    reply = SimpleNamespace(choices=[SimpleNamespace(prompt_logprobs=rows)])
    completions = SimpleNamespace(create=lambda **_: reply)
    client = SimpleNamespace(completions=completions)
    assert evaluate.perplexity_http(client, "m", [[6, 7, 8]]).logprobs == (-1.0, -2.0)


@pytest.fixture(scope="module")
def reference(smollm2):
    """Eight windows of the built-in text: the length the limits below are stated for."""
    tokenizer = evaluate.load_tokenizer(str(smollm2))
    return {"builtin": make_windows(tokenizer, texts.builtin_text(), 8)}


@pytest.fixture(scope="module")
def unquantized(smollm2, reference) -> Score:
    return evaluate.evaluate(str(smollm2), evaluate.BASELINE, reference).scores["builtin"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_unquantized_perplexity(unquantized):
    """11.60 was measured with another engine build; far off would mean a broken conversion."""
    assert unquantized.perplexity == pytest.approx(11.6, rel=0.02)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_engine_that_refuses_is_reported(smollm2, reference, monkeypatch, tmp_path):
    """Static int8 without scales: the engine's own words reach the caller."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(ServerError, match="int8_per_token_head"):
        evaluate.evaluate(str(smollm2), "int8", reference)


def test_baseline_is_unquantized_even_where_the_checkpoint_asks_otherwise(tmp_path):
    config = {"model_type": "llama", "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert evaluate.cache_dtype(str(tmp_path), "auto") == "auto"
    scheme = {"num_bits": 8, "type": "int"}
    quantization = {"quant_method": "compressed-tensors", "kv_cache_scheme": scheme}
    for dtype in ("bfloat16", "float16"):
        config |= {"quantization_config": quantization, "dtype": dtype}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert evaluate.cache_dtype(str(tmp_path), "auto") == dtype
    assert evaluate.cache_dtype(str(tmp_path), "int8") == "int8"


def test_what_does_not_exist_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such text: /nope is no file: expected"):
        texts.read_text("/nope")
    with pytest.raises(FileNotFoundError, match="no such model: /nope is no directory"):
        evaluate.load_tokenizer("/nope")
    with pytest.raises(ValueError, match="has no config.json: expected a model's directory"):
        evaluate.load_tokenizer(str(tmp_path))
