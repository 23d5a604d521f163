"""Offline vLLM on the built-in model: every format answers sensibly, and how a request is
scheduled (chunks, cache hits, preemption, speculation) does not change a bit of its answer.

For the latter engines run with products that do not depend on the batch (`exact_engine`);
vLLM's own do, and ``auto`` in bf16 parts ways as often.
"""

from __future__ import annotations

import os
from pydoc_data.topics import topics

import exact_engine
import pytest
from engine_jobs import Batch, Job, Output, only, run

from kvq_plugin.formats import FORMATS, SERVED

# Engines start in fixtures, one after another, and a loaded machine takes minutes for it.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

#: Formats that need no scales from a checkpoint, one name each.
READY = [f.name for f in dict.fromkeys(FORMATS.values()) if f.is_dynamic or f.default_scale]
#: And those whose schedules test_engine_recent.py runs.
SCORING = [*READY, *(name for name in SERVED if name not in FORMATS)]
#: Largest rise of the mean negative log-probability of the prompts over the unquantized
#: run's, in nats. Measured, in this order: 0.003, 0.050, -0.005, 0.007, 0.179.
MAX_LOSS = {
    "fp8_e4m3": 0.05,
    "fp8_e5m2": 0.15,
    "int8_per_token_head": 0.02,
    "fp8_per_token_head": 0.05,
    "int4_per_token_head": 0.35,
    "k8v4": 0.05,
    "int4": 0.02,
    "k3v2": 0.10,
}
#: Formats run with every schedule.
SCHEDULED = ("int8_per_token_head", "int4_per_token_head")
ENGINE = {"max_model_len": 512, "kv_cache_memory_bytes": 256 << 20}
#: Schedules are run in small blocks, so that prompts can be short: float64 takes 30 ms a token.
SMALL = {"max_model_len": 256, "kv_cache_memory_bytes": 64 << 20, "block_size": 32}
SMALL_LENGTHS = (28, 30, 31, 27, 100)
#: vLLM keeps one core for itself otherwise, and products in float64 take a while.
CORES = {"VLLM_CPU_OMP_THREADS_BIND": f"0-{os.cpu_count() - 1}"}
LONG = {"max_tokens": 32}
SCORED = {"prompt_logprobs": 0, "max_tokens": 1}
#: How one engine may differ from the plain one without changing any answer.
SCHEDULES = {
    "chunks": {"max_num_batched_tokens": 16, "max_num_seqs": 8},
    # 8 usable blocks of 32 tokens for 5 requests that need 2 and 5 of them.
    "preempted": {"num_gpu_blocks_override": 9, "enable_prefix_caching": False},
    "ngram": {
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_max": 4,
        }
    },
}


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def texts(tokenizer) -> list[list[int]]:
    """Five prompts, most just short of a block of 128 tokens, one of several blocks."""
    names = sorted(name for name, text in topics.items() if len(text) > 3000)[::7]
    lengths = (120, 125, 127, 110, 400)
    return [tokenizer(topics[n])["input_ids"][:t] for n, t in zip(names, lengths, strict=False)]


@pytest.fixture(scope="module")
def question(tokenizer) -> list[int]:
    """One whose answer leads by nats; as a chat, the first token is a coin toss in bf16."""
    text = "Paris is the capital of France. Berlin is the capital of Germany. Rome is the capital"
    return tokenizer(text + " of")["input_ids"]


# --- formats ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_format(smollm2, texts, question):
    """Result of every format and of ``auto``: texts scored, question."""
    batches = [Batch(texts, SCORED), Batch([question], {"max_tokens": 2})]
    names = ["auto", *SCORING]
    jobs = [Job({**ENGINE, "model": str(smollm2), "kv_cache_dtype": n}, batches) for n in names]
    return dict(zip(names, only(run(jobs)), strict=True))


def _mean_logprob(outputs: list[Output]) -> float:
    scores = [x for o in outputs for x in o.prompt_logprobs]
    return sum(scores) / len(scores)


@pytest.mark.parametrize("name", SCORING)
def test_format_scores_close_to_auto(by_format, name):
    loss = _mean_logprob(by_format["auto"].batches[0]) - _mean_logprob(by_format[name].batches[0])
    print(f"{name}: {loss:+.4f} nats")
    assert abs(loss) < MAX_LOSS[name]


@pytest.mark.parametrize("name", SCORING)
def test_format_answers_the_question(by_format, tokenizer, name):
    assert "Italy" in tokenizer.decode(by_format[name].batches[1][0].tokens)


# --- schedules -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_schedule(smollm2, texts):
    """format -> schedule -> result: the texts, and for the plain schedule the texts again."""
    base = {**SMALL, "model": str(smollm2)}
    prompts = [text[:n] for text, n in zip(texts, SMALL_LENGTHS, strict=True)]
    asked = [(name, schedule) for name in SCHEDULED for schedule in ("plain", *SCHEDULES)]
    asked += [(name, "plain") for name in READY if name not in SCHEDULED]
    jobs = [
        Job(
            {**base, "kv_cache_dtype": name, **SCHEDULES.get(schedule, {})},
            [Batch(prompts, LONG)] * (2 if schedule == "plain" else 1),
        )
        for name, schedule in asked
    ]
    # An engine after one with n-gram drafts, in one process, ends in an error of vLLM's.
    alone = [i for i, (_, schedule) in enumerate(asked) if schedule == "ngram"]
    rest = [i for i in range(len(asked)) if i not in alone]
    results: dict = {name: {} for name in READY}
    order, found = [], []
    for part in (rest, *([i] for i in alone)):
        order += part
        found += only(run([jobs[i] for i in part], script=exact_engine.__file__, env=CORES))
    for i, result in zip(order, found, strict=True):
        name, schedule = asked[i]
        results[name][schedule] = result
    return results


def _assert_same(expected: list[Output], got: list[Output]) -> None:
    for a, b in zip(expected, got, strict=True):
        assert a.tokens == b.tokens
        assert a.logprobs == b.logprobs


@pytest.mark.parametrize("name", READY)
def test_cache_hit_equals_miss(by_schedule, name):
    miss, hit = by_schedule[name]["plain"].batches
    assert not any(o.cached for o in miss)
    assert any(o.cached for o in hit)
    _assert_same(miss, hit)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", SCHEDULED)
def test_schedule_does_not_change_answers(by_schedule, name, schedule):
    results = by_schedule[name]
    _assert_same(results["plain"].batches[0], results[schedule].batches[0])


@pytest.mark.parametrize("name", SCHEDULED)
def test_the_schedules_happened(by_schedule, name):
    results = by_schedule[name]
    assert results["preempted"].counters["vllm:num_preemptions"] > 0
    assert results["ngram"].counters["vllm:spec_decode_num_accepted_tokens"] > 0
    assert results["plain"].counters["vllm:num_preemptions"] == 0
