"""Formats with recent rows through engines: no schedule changes a bit of an answer, every way of
running an engine works, and a full pool holds what was promised.

Tiny models, and products in float64 (`exact_engine`): at 4 bits a bit of K that depends on the
batch becomes 0.3 nats.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys

import exact_engine
import fuzz_engine
import pytest
import saturated_engine
from engine_jobs import Batch, Job, Output, only, run
from tiny_models import make

from kvq_plugin.formats import SERVED

# Engines start in fixtures, one after another, and a loaded machine takes minutes for it.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LOWBIT = ["int4", "k3v2", "k8v4"]
WINDOWED = [name for name in LOWBIT if SERVED[name].recent is not None]
CORES = {"VLLM_CPU_OMP_THREADS_BIND": f"0-{os.cpu_count() - 1}"}
random.seed(2)
#: Across blocks of 128 and of 64, short of them, and shorter than the window.
PROMPTS = [[random.randrange(3, 500) for _ in range(n)] for n in (300, 127, 121, 124, 64, 33, 5)]
ASKED = {"max_tokens": 40}
TOO_FEW_BLOCKS = {"int4": 18, "k3v2": 16, "k8v4": 12}
#: How an engine may differ from the plain one without changing any answer.
SCHEDULES = {
    "plain": {"max_num_batched_tokens": 2048},
    "chunks": {"max_num_batched_tokens": 48, "max_num_seqs": 8},
    "preempted": {
        "max_num_batched_tokens": 128,
        "enable_prefix_caching": False,
    },
    # Random prompts repeat no words, but pairs of them.
    "ngram": {
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": 5,
            "prompt_lookup_max": 2,
            "prompt_lookup_min": 1,
        }
    },
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {feature: str(make(folder, feature)) for feature in ("gqa", "window_and_full_layers")}


# --- schedules -------------------------------------------------------------------------


@pytest.fixture(
    scope="module",
    params=[("int4", "float32"), ("int4", "bfloat16"), ("k3v2", "float32"), ("k8v4", "bfloat16")],
    ids="-".join,
)
def by_schedule(request, models):
    """schedule -> result; batches: the prompts, again, and each followed by its answer."""
    name, dtype = request.param
    base = {"model": models["gqa"], "kv_cache_dtype": name, "dtype": dtype}
    base |= {"num_gpu_blocks_override": 120}
    batches = [Batch(PROMPTS, ASKED), Batch(PROMPTS, ASKED), Batch([], {"max_tokens": 8})]
    jobs = [Job({**base, **changes}, list(batches)) for changes in SCHEDULES.values()]
    jobs[2].llm["num_gpu_blocks_override"] = TOO_FEW_BLOCKS[name]
    jobs[2].batches[1:] = [Batch([prompt], ASKED) for prompt in PROMPTS]
    # The engine with n-gram drafts comes last: one after it ends in an error of vLLM's.
    results = only(run(jobs, script=exact_engine.__file__, env=CORES))
    return dict(zip(SCHEDULES, results, strict=True))


def _assert_same(expected: list[Output], got: list[Output]) -> None:
    for a, b in zip(expected, got, strict=True):
        assert a.tokens == b.tokens
        assert a.logprobs == b.logprobs


@pytest.mark.parametrize("schedule", list(SCHEDULES)[1:])
def test_schedule_does_not_change_answers(by_schedule, schedule):
    _assert_same(by_schedule["plain"].batches[0], by_schedule[schedule].batches[0])


def test_alone_equals_among_seven(by_schedule):
    alone = [outputs[0] for outputs in by_schedule["preempted"].batches[1:]]
    _assert_same(by_schedule["plain"].batches[0], alone)


def test_cache_hit_equals_miss(by_schedule):
    miss, hit, _ = by_schedule["plain"].batches
    assert not any(o.cached for o in miss)
    assert [o.cached for o in hit][:1] == [256]
    _assert_same(miss, hit)


def test_an_extended_prompt_hits_too(by_schedule):
    """Prefix caching ends at a block, and the recent rows of its end must be there too."""
    extended = by_schedule["plain"].batches[2]
    assert extended[0].cached == 256
    for schedule in ("chunks", "ngram"):
        _assert_same(extended, by_schedule[schedule].batches[2])


def test_the_schedules_happened(by_schedule):
    assert by_schedule["preempted"].counters["vllm:num_preemptions"] > 0
    assert by_schedule["plain"].counters["vllm:num_preemptions"] == 0
    counters = by_schedule["ngram"].counters
    drafts = counters["vllm:spec_decode_num_draft_tokens"]
    assert 0 < counters["vllm:spec_decode_num_accepted_tokens"] < drafts


def test_random_requests(models):
    """A short run of fuzz_engine.py; `--requests 1000` for a long one."""
    done = subprocess.run(
        [sys.executable, fuzz_engine.__file__, "--requests", "60", "--seed", "1",
         "--model", models["gqa"]],
        env=os.environ | CORES, capture_output=True, text=True, timeout=800,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["preemptions"] and said["cancelled"] and not said["different"]


# --- ways of running an engine ---------------------------------------------------------

SCORED = [Batch(PROMPTS, {"prompt_logprobs": 0, "max_tokens": 8})]


def _scores(result) -> list[float]:
    return [x for o in result.batches[0] for x in o.prompt_logprobs]


def _change(a, b) -> float:
    squares = [(x - y) ** 2 for x, y in zip(_scores(a), _scores(b), strict=True)]
    return (sum(squares) / len(squares)) ** 0.5


@pytest.mark.parametrize("name", WINDOWED)
def test_two_tensor_parallel_ranks(models, name):
    base = {"model": models["gqa"], "kv_cache_dtype": name, "dtype": "float32"}
    base |= {"num_gpu_blocks_override": 80}
    (one,) = only(run([Job(base, SCORED)]))
    env = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    two = [Job({**base, "tensor_parallel_size": 2}, SCORED)]
    (two,) = only(run(two, env=env))
    assert [o.tokens for o in one.batches[0]] == [o.tokens for o in two.batches[0]]
    assert _change(one, two) < 0.01


def test_compiled_model_in_worker_processes(models):
    base = {"model": models["gqa"], "kv_cache_dtype": "int4", "num_gpu_blocks_override": 80}
    eager, plain = only(run([Job(base, SCORED), Job({**base, "kv_cache_dtype": "auto"}, SCORED)]))
    (compiled,) = only(run([Job({**base, "enforce_eager": False}, SCORED)], multiprocess=True))
    assert _change(eager, compiled) < 0.5 * _change(plain, eager)


@pytest.mark.parametrize("name", WINDOWED)
def test_layers_of_other_kinds_beside_sealed_ones(models, name):
    """Layers with a window keep int8 rows, skipped ones unquantized rows, each in blocks of a size
    of their own: with everything but one layer skipped or windowed, less changes than with all."""
    base = {"num_gpu_blocks_override": 120}
    window, plain, skipped, half, whole = only(
        run(
            [
                Job({**base, "model": models[model], "kv_cache_dtype": dtype, **more}, SCORED)
                for model, dtype, more in (
                    ("window_and_full_layers", name, {}),
                    ("window_and_full_layers", "auto", {}),
                    ("gqa", "auto", {}),
                    ("gqa", name, {"kv_cache_dtype_skip_layers": ["0"]}),
                    ("gqa", name, {}),
                )
            ]
        )
    )
    assert 0 < _change(window, plain) < 0.5
    assert 0 < _change(skipped, half) < _change(skipped, whole)


# --- capacity --------------------------------------------------------------------------


@pytest.mark.parametrize("name", WINDOWED)
def test_a_full_pool_holds_what_was_stated(models, name):
    engine = {
        "model": models["gqa"],
        "kv_cache_dtype": name,
        "num_gpu_blocks_override": 64,
        "max_num_batched_tokens": 256,
        "enable_prefix_caching": False,
    }
    done = subprocess.run(
        [sys.executable, saturated_engine.__file__, json.dumps(engine), "256", "255"],
        env=os.environ
        | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
        | {"VLLM_LOGGING_LEVEL": "INFO"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    tokens, requests = found["held"]
    assert (requests, found["preemptions"]) == (found["requests"], 0)
    assert tokens > 0.9 * requests * 512
    said = re.search(
        r"takes (\d+) while it decodes: ([\d,]+) tokens fit", done.stdout + done.stderr
    )
    assert int(said[2].replace(",", "")) == found["stated"]
