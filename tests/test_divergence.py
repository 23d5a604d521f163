"""KL divergence and its like: the formulas, the worker that sees logits, and real engines."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace

import pytest
import torch
from tiny_models import VOCAB, make

from kvq_plugin import logits
from kvq_plugin.divergence import Divergence, percentile
from kvq_plugin.evaluate import (
    BASELINE,
    OWN,
    agreement,
    check_seen,
    evaluate,
    floor_chunk,
    load_tokenizer,
)


def rows(base: torch.Tensor, other: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(logits.divergence_rows(base, other.float().log_softmax(-1)))


def test_divergence_of_two_distributions_by_hand():
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    found = rows(p.log() + 3.0, q.log() - 1.0)  # logits know no constant
    assert found["kl"].item() == pytest.approx(0.25 * math.log(2), rel=1e-5)
    assert found["tv"].item() == pytest.approx(0.25, rel=1e-5)
    assert found["same"].tolist() == [False]


def test_kl_weighs_by_the_reference():
    """KL(p || q), not KL(q || p)."""
    p, q = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.5, 0.5]])
    expected = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert rows(p.log(), q.log())["kl"].item() == pytest.approx(expected, rel=1e-5)


def test_tokens_that_cannot_be_add_nothing():
    x = torch.tensor([[1.0, -math.inf, 0.0]])
    found = rows(x, x)
    assert (found["kl"].item(), found["tv"].item(), found["same"].item()) == (0.0, 0.0, True)
    far = torch.tensor([[1.0, 200.0, 0.0]])  # all of q where p has nothing
    assert rows(x, far)["kl"].item() == pytest.approx(198.687, rel=1e-5)
    assert rows(far, x + 0.5)["kl"].item() == math.inf  # what is certain became impossible


def test_divergence_against_float64():
    torch.manual_seed(0)
    base = 4 * torch.randn(64, 500)
    other = base + 0.01 * torch.randn(64, 500)
    p, q = base.double().log_softmax(-1), other.double().log_softmax(-1)
    found = rows(base, other)
    torch.testing.assert_close(
        found["kl"].double(), (p.exp() * (p - q)).sum(-1), rtol=1e-3, atol=1e-9
    )
    torch.testing.assert_close(
        found["tv"].double(), (p.exp() - q.exp()).abs().sum(-1) / 2, rtol=1e-3, atol=1e-7
    )
    assert found["same"].tolist() == (p.argmax(-1) == q.argmax(-1)).tolist()


def test_percentiles():
    values = list(range(100, -1, -1))
    assert [percentile(values, p) for p in (0, 50, 99, 99.5, 100)] == [0, 50, 99, 99.5, 100]


def test_summary():
    figures = Divergence((0.0, 2.0), (0.0, 0.5), (True, False)).summary()
    assert figures == {
        "kl": 1.0,
        "kl_error": 1.0,
        "kl_p50": 1.0,
        "kl_p99": pytest.approx(1.98),
        "kl_p99.9": pytest.approx(1.998),
        "tv": 0.25,
        "top1": 0.5,
    }


# --- the worker, with a model that is one matrix ------------------------------------------

HIDDEN, WORDS = 8, 50


class Worker(logits.LogitsWorker):
    """A rank whose model's logits are *noise* away from hidden states times a matrix."""

    def __init__(self, noise: float = 0.0):
        torch.manual_seed(0)
        head = torch.randn(HIDDEN, WORDS)
        self.model = SimpleNamespace(compute_logits=lambda hidden: hidden @ head)
        self.rank, self.device, self.noise = 0, "cpu", noise
        self.kvq_watch()

    def get_model(self):
        return self.model

    def run(self, tokens, chunks, reference=None, keep=None, last_row=False):
        """As vLLM calls it: each chunk's rows, a sampler's row after it."""
        torch.manual_seed(1)
        hidden = torch.randn(len(tokens), HIDDEN) + self.noise
        self.kvq_begin(tokens, reference and str(reference), keep and str(keep))
        scored = len(tokens) - (not last_row)
        for begin, end in chunks:
            self.model.compute_logits(hidden[end - 1 : end])
            self.model.compute_logits(hidden[begin : min(end, scored)])
        return self.kvq_end()


TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]


def test_worker_sees_every_row_once(tmp_path):
    whole = Worker().run(TOKENS, [(0, 8)], keep=tmp_path / "a")
    assert set(whole) == {"logprobs"} and len(whole["logprobs"]) == 7
    for chunks, last_row in (([(0, 3), (3, 8)], False), ([(0, 8)], True), ([(0, 5), (5, 8)], True)):
        assert Worker().run(TOKENS, chunks, last_row=last_row)["logprobs"] == pytest.approx(
            whole["logprobs"], abs=1e-5
        )


def test_worker_compares_with_what_another_kept(tmp_path):
    Worker().run(TOKENS, [(0, 8)], keep=tmp_path / "a")
    same = Worker().run(TOKENS, [(0, 8)], reference=tmp_path / "a")
    assert same["kl"] == [0.0] * 7 and same["same"] == [True] * 7
    other = Worker(noise=0.1).run(TOKENS, [(0, 3), (3, 8)], reference=tmp_path / "a")
    assert all(kl > 1e-4 for kl in other["kl"]) and len(other["tv"]) == 7


def test_logits_of_other_rows_are_refused():
    right = {"logprobs": [-1.0, -2.0], "kl": [0.0] * 2, "tv": [0.0] * 2, "same": [True] * 2}
    check_seen([1, 2, 3], [-1.0, -2.0], right, True)
    for broken in (
        {**right, "logprobs": [-2.0, -1.0]},
        {**right, "kl": [0.0]},
        {"logprobs": right["logprobs"]},
        {},
    ):
        with pytest.raises(ValueError, match="use --no-divergence"):
            check_seen([1, 2, 3], [-1.0, -2.0], broken, True)
    check_seen([1, 2, 3], [-1.0, -2.0], {"logprobs": right["logprobs"]}, False)


def test_agreement_counts_from_the_prompt():
    assert agreement([1, 2, 3, 4], [1, 2, 3, 4], 2) == 2
    assert agreement([1, 2, 3, 5], [1, 2, 3, 4], 2) == 1
    assert agreement([1, 2, 9, 4], [1, 2, 3, 4], 2) == 0


# --- engines ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_engines_against_the_unquantized_one(tmp_path, smollm2):
    """The same engine: 0 to the last bit. In other chunks: noise at most. Quantized: more."""
    model = str(make(tmp_path, "gqa"))
    load_tokenizer(str(smollm2)).save_pretrained(model)  # any: prompts are tokens
    random.seed(1)
    windows = [[random.randrange(3, VOCAB) for _ in range(300)] for _ in range(2)]
    texts, folder = {"random": windows}, tmp_path / "kept"
    folder.mkdir()
    common = {"kv_memory_bytes": 64 << 20, "prompts": [w[:20] for w in windows], "length": 300}
    auto = evaluate(model, BASELINE, texts, keep=folder, **common)
    assert auto.scores["random"].divergence is None and auto.kv_tokens > 0
    assert [len(window) for window in auto.generations] == [300, 300]
    texts = {"random": windows, OWN: auto.generations}

    def of(dtype: str, **options):
        return evaluate(model, dtype, texts, reference=folder, **(common | options))

    def agree(other) -> list[int]:
        pairs = zip(other.generations, auto.generations, strict=True)
        return [agreement(*pair, 20) for pair in pairs]

    again = of(BASELINE)
    for text in texts:
        assert again.scores[text].logprobs == auto.scores[text].logprobs
        assert set(again.scores[text].divergence.kl) == {0.0}
    assert agree(again) == [280, 280]
    floor = of(BASELINE, chunk=floor_chunk(windows), prompts=())
    assert not floor.generations
    quantized = of("int4_per_token_head")
    for text in texts:
        mean = quantized.scores[text].divergence.mean
        assert len(quantized.scores[text].divergence.kl) == 2 * 299
        # Products this small do not depend on the chunk; the built-in model has 0.0015 nats here.
        assert 0 <= floor.scores[text].divergence.mean < mean / 3
    assert min(agree(quantized)) < 280
    assert quantized.kv_tokens > 2 * auto.kv_tokens
