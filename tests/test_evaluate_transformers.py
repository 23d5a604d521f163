"""``kvq eval --driver transformers``: the figures of the vLLM driver, of KVQCache."""

from __future__ import annotations

import json
import math
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from exact_model import exact_products
from scaled import add_scales
from tiny_models import VOCAB, make, make_multimodal

from kvq_plugin import cli, evaluation_page, report
from kvq_plugin.evaluate import BASELINE, OWN, agreement, floor_chunk
from kvq_plugin.evaluate_transformers import MEMORY, TransformersDriver, _config
from kvq_plugin.formats import SERVED
from kvq_plugin.logits import Seen
from kvq_plugin.serving.scales.declared import quantization_section

FORMATS = [f.name for f in dict.fromkeys(SERVED.values()) if f.default_scale or f.is_dynamic]
LENGTH = 200


@pytest.fixture(scope="module")
def gqa(tmp_path_factory):
    return make(tmp_path_factory.mktemp("models"), "gqa")


@pytest.fixture(scope="module")
def windows():
    rng = random.Random(1)
    return [[rng.randrange(3, VOCAB) for _ in range(LENGTH)] for _ in range(2)]


@pytest.mark.parametrize("changes", [{}, {"final_logit_softcapping": 5.0}], ids=["gqa", "softcap"])
def test_against_the_unquantized_cache(tmp_path, windows, changes):
    """The same cache: 0 to the last bit, also where the output layer is not the last to act. In
    other chunks: noise at most. Quantized: more."""
    driver = TransformersDriver(str(make(tmp_path, "softcap" if changes else "gqa", **changes)))
    common = {"prompts": [w[:20] for w in windows], "length": 100}
    auto = driver.evaluate(BASELINE, {"random": windows}, keep=tmp_path, **common)
    assert auto.scores["random"].divergence is None
    assert [len(window) for window in auto.generations] == [100, 100]
    texts = {"random": windows, OWN: auto.generations}

    def of(dtype: str, **options):
        return driver.evaluate(dtype, texts, reference=tmp_path, **(common | options))

    def agree(other) -> list[int]:
        pairs = zip(other.generations, auto.generations, strict=True)
        return [agreement(*pair, 20) for pair in pairs]

    again, floor = of(BASELINE), of(BASELINE, chunk=floor_chunk(windows))
    quantized = of("int4_per_token_head")
    for text in texts:
        assert again.scores[text].logprobs == auto.scores[text].logprobs
        assert set(again.scores[text].divergence.kl) == {0.0}
        mean = quantized.scores[text].divergence.mean
        assert 0 <= floor.scores[text].divergence.mean < mean / 3
    assert agree(again) == [80, 80]
    assert changes or min(agree(quantized)) < 80
    assert len(quantized.scores["random"].divergence.kl) == 2 * (LENGTH - 1)


def test_logprobs_are_those_of_the_model(gqa, windows):
    """By transformers alone, without a cache."""
    driver = TransformersDriver(str(gqa))
    score = driver.evaluate(BASELINE, {"random": windows[:1]}).scores["random"]
    ids = torch.tensor(windows[:1])
    with torch.inference_mode():
        expected = driver.model(ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    expected = expected.gather(-1, ids[0, 1:, None])[:, 0]
    assert len(score.logprobs) == LENGTH - 1
    assert score.logprobs == pytest.approx(expected.tolist(), abs=0.05)  # bfloat16's noise
    assert score.perplexity == pytest.approx(math.exp(-float(expected.mean())), rel=0.01)


@pytest.mark.parametrize("dtype", FORMATS)
def test_prefill_and_decode_give_the_same_figures(tmp_path, gqa, windows, monkeypatch, dtype):
    """Teacher-forced in one pass, in several and token by token: every figure at every position is
    the same to the last bit, with products that do not depend on the batch."""
    exact_products(monkeypatch)
    passes, see = [], Seen.see
    monkeypatch.setattr(Seen, "see", lambda *args: passes.append(len(args[1])) or see(*args))
    driver = TransformersDriver(str(gqa))
    texts = {"random": windows[:1]}
    driver.evaluate(BASELINE, texts, keep=tmp_path)
    whole, *others = (
        driver.evaluate(dtype, texts, reference=tmp_path, chunk=chunk).scores["random"]
        for chunk in (None, 77, 1)
    )
    assert passes == 2 * [LENGTH - 1, 1] + [77, 77, 45, 1] + LENGTH * [1]
    assert whole.divergence.mean > 0
    for other in others:
        assert other.logprobs == whole.logprobs
        assert other.divergence == whole.divergence


@pytest.mark.parametrize("dtype", ["int8_per_token_head", "int4"])
def test_questions(gqa, windows, monkeypatch, dtype):
    """Of several lengths at once: each is answered as if alone."""
    exact_products(monkeypatch)
    driver = TransformersDriver(str(gqa))
    driver._tokenizer = SimpleNamespace(
        decode=lambda ids, skip_special_tokens: " ".join(str(token) for token in ids)
    )
    questions = [(windows[0][:90], 20), (windows[1][:64], 7), (windows[1][:3], 12)]
    together, *alone = (
        driver._answers(dtype, asked) for asked in (questions, *([q] for q in questions))
    )
    assert together == [answer for [answer] in alone]
    assert [len(answer.split()) for answer in together] == [20, 7, 12]


def test_greedy_is_without_the_models_penalties(tmp_path, windows):
    """As through vLLM, which is given sampling parameters of its own."""
    plain = make(tmp_path, "gqa")
    driver = TransformersDriver(str(plain))
    common = {"prompts": [windows[0][:20]], "length": 80}
    expected = driver.evaluate(BASELINE, {}, **common).generations
    file = plain / "generation_config.json"
    config = json.loads(file.read_text()) if file.exists() else {}
    penalties = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "min_new_tokens": 7}
    file.write_text(json.dumps(config | penalties | {"eos_token_id": [2, 5]}))
    driver = TransformersDriver(str(plain))
    assert driver.evaluate(BASELINE, {}, **common).generations == expected
    assert driver._end == [2, 5]  # answers still end there


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_kv_scheme_is_set_aside_wherever_it_is(tmp_path, gqa, key, nested):
    scheme = {"num_bits": 8, "type": "int", "strategy": "tensor", "symmetric": True}
    section = {"quant_method": "compressed-tensors", "kv_cache_scheme": scheme}
    shutil.copytree(gqa if not nested else make_multimodal(tmp_path), tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    config = json.loads(file.read_text())
    (config["text_config"] if nested else config)[key] = section
    file.write_text(json.dumps(config))
    assert quantization_section(_config(tmp_path / "m")) == {}


def test_memory_is_what_a_token_takes(gqa, windows):
    """Of 2 layers, 2 kv heads of 32: 512 bytes a token in bfloat16, in pages of 128 tokens for
    ours, which 200 tokens fill by 78 %."""
    driver = TransformersDriver(str(gqa))
    texts = {"random": windows[:1]}
    held = {d: driver.evaluate(d, texts).kv_tokens for d in (BASELINE, "int8_per_token_head")}
    assert held[BASELINE] == MEMORY // 512
    ours = 4 * SERVED["int8_per_token_head"].bytes_per_token(32)
    assert held["int8_per_token_head"] == MEMORY * LENGTH // (256 * ours)


def test_calibrated_checkpoint(tmp_path, gqa, windows):
    """Whose declaration of a quantized KV cache transformers itself does not read."""
    forms = [("channel", "tensor"), ("attn_head", "channel")]
    driver = TransformersDriver(str(add_scales(gqa, tmp_path / "int8", windows[:1], "int", forms)))
    texts, kept = {"random": windows[:1]}, tmp_path / "kept"
    kept.mkdir()
    driver.evaluate(BASELINE, texts, keep=kept)
    score = driver.evaluate("int8", texts, reference=kept).scores["random"]
    assert 0 < score.divergence.mean < 0.01


def test_report_says_what_ran(tmp_path, gqa, monkeypatch, capsys):
    rng = random.Random(2)

    def windows(tokenizer, text, count, length=report.WINDOW):
        return [[rng.randrange(3, VOCAB) for _ in range(min(length, 60))] for _ in range(count)]

    monkeypatch.setattr(report, "load_tokenizer", lambda model: SimpleNamespace())
    monkeypatch.setattr(report, "make_windows", windows)
    monkeypatch.setattr(report, "WINDOW", 60)
    page = tmp_path / "page"
    arguments = ["--driver", "transformers", "--dtypes", "int4", "--windows", "2", "--no-tasks"]
    assert cli.main(["eval", str(gqa), *arguments, "--report", str(page)]) == 0
    printed = capsys.readouterr().out
    assert "Perplexity through transformers" in printed and "noise floor" in printed
    written = json.loads((page / evaluation_page.FIGURES).read_text())
    assert written["about"]["driver"] == "transformers"
    assert written["dtypes"]["int4"]["texts"]["builtin"]["divergence"]["kl"] > 0
    assert "transformers" in (page / evaluation_page.PAGE).read_text()


@pytest.mark.parametrize(
    ("feature", "changes"),
    [
        ("falcon", {}),
        (
            "gpt2",
            {"model_type": "gptj", "rotary_dim": 16, "bos_token_id": 1, "eos_token_id": 2},
        ),
    ],
)
def test_attention_that_cannot_be_replaced(tmp_path, feature, changes):
    """Classes of transformers that look their attention up by name know nothing of ours."""
    model = make(tmp_path, feature, **changes)
    name = changes.get("model_type", feature)
    with pytest.raises(ValueError, match=f"^{name} models have attention .* use --driver vllm$"):
        TransformersDriver(str(model))


def test_what_the_driver_does_not_take_is_refused(gqa, capsys):
    asked = ["eval", str(gqa), "--driver", "transformers", "--kv-memory-gib", "2"]
    assert cli.main(asked) == 1
    message = capsys.readouterr().err
    assert "--kv-memory-gib 2 was asked" in message and "use --driver vllm" in message
    with pytest.raises(SystemExit):
        cli.main(["eval", "--driver", "hf"])
    assert "'vllm', 'transformers'" in capsys.readouterr().err.replace("vllm, t", "'vllm', 't")


@pytest.mark.parametrize("driver", report.DRIVERS)
def test_a_dtype_without_its_scales_is_refused_first(gqa, driver, monkeypatch, capsys):
    monkeypatch.setattr(report, "load_tokenizer", lambda model: SimpleNamespace())
    monkeypatch.setattr(report, "_engine", lambda *_: pytest.fail("started"))
    assert cli.main(["eval", str(gqa), "--dtypes", "int8", "--driver", driver]) == 1
    message = capsys.readouterr().err
    assert "int8 was asked of" in message and "`kvq calibrate`" in message


@pytest.mark.parametrize("option", ["--tasks", "--task-prompts"])
def test_task_files_that_do_not_exist_are_named(option, gqa, tmp_path, capsys):
    (tmp_path / "q.jsonl").write_text("")
    files = ["--tasks", str(tmp_path / "q.jsonl"), option, "/nope"]
    assert cli.main(["eval", str(gqa), *files]) == 1
    assert f"{option} /nope: no such file: expected" in capsys.readouterr().err
