"""Attention features, through the engine, on tiny random models: quantized against not.

A prompt's log-probabilities must stay within what quantization moves them by, which taking
the feature away exceeds many times over; and what decoding gave must equal scoring the same
tokens as a prompt, which goes through prefill.
"""

from __future__ import annotations

import random

import pytest
from engine_jobs import Batch, Job, Output, only, run
from tiny_models import CONFIGS, WITHOUT, make

# Engines start in fixtures, one after another, and a loaded machine takes minutes for it.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

DTYPE = "int8_per_token_head"
#: Root mean square of log-probability differences to ``auto``, in nats. Measured: 0.010 to
#: 0.031 for int8, 0.089 for e4m3; taking a window or a softcap away moves them by 0.4 to 0.7.
MAX_CHANGE = 0.05
MIN_EFFECT = 0.2
#: Decode against prefill, in nats. vLLM's own bf16 path differs by up to 0.0015.
MAX_DECODE_DRIFT = 0.02
NEW = 12
random.seed(0)
PROMPTS = [[random.randrange(3, 500) for _ in range(n)] for n in (5, 33, 150)]
BATCHES = [
    Batch(PROMPTS, {"prompt_logprobs": 0, "max_tokens": NEW}),
    Batch([], {"prompt_logprobs": 0, "max_tokens": 1}),
]
#: The same of ``int4``, whose layers with a window keep int8.
INT4_CHANGE = 0.25
#: One code of 4 bits that flips, as vLLM's products depend on the batch, moves a log-probability
#: by up to 0.3; test_engine_recent.py has products that do not, and allows nothing.
INT4_DECODE_DRIFT = 0.3
#: (feature, cache dtype, activations) beside every feature in DTYPE.
MORE = [
    *((feature, "int4", "auto") for feature in CONFIGS),
    ("gqa", DTYPE, "float16"),
    ("gqa", DTYPE, "float32"),
    ("kv_sharing", "fp8", "auto"),  # static: scales come from the layer that is shared
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(feature, cache dtype, activations) -> its batches; "without" for a feature removed."""
    folder = tmp_path_factory.mktemp("models")
    models = {feature: make(folder, feature) for feature in CONFIGS}
    keys = [(f, d, "auto") for f in CONFIGS for d in ("auto", DTYPE)]
    keys += MORE + [("gqa", "auto", activations) for activations in ("float16", "float32")]
    jobs = [
        Job({"model": str(models[f]), "kv_cache_dtype": d, "dtype": a}, BATCHES) for f, d, a in keys
    ]
    for feature, change in WITHOUT.items():
        path = make(folder, feature, **change)
        keys.append((feature, "auto", "without"))
        jobs.append(Job({"model": str(path), "kv_cache_dtype": "auto"}, BATCHES))
    batches = (result.batches for result in only(run(jobs)))
    return dict(zip(keys, batches, strict=True))


def _change(a: list[Output], b: list[Output]) -> float:
    squares = [
        (x - y) ** 2
        for p, q in zip(a, b, strict=True)
        for x, y in zip(p.prompt_logprobs, q.prompt_logprobs, strict=True)
    ]
    return (sum(squares) / len(squares)) ** 0.5


def _bound(dtype: str) -> float:
    return {DTYPE: MAX_CHANGE, "int4": INT4_CHANGE}.get(dtype, 0.15)


@pytest.mark.parametrize(
    ("feature", "dtype", "activations"),
    [*((f, DTYPE, "auto") for f in CONFIGS), *MORE],
)
def test_feature_matches_the_unquantized_engine(results, feature, dtype, activations):
    plain = results[feature, "auto", activations]
    quantized = results[feature, dtype, activations]
    change = _change(plain[0], quantized[0])
    print(f"{feature} {dtype} {activations}: {change:.4f} nats")
    assert 0 < change < _bound(dtype)


@pytest.mark.parametrize(
    ("feature", "dtype", "activations"),
    [*((f, DTYPE, "auto") for f in CONFIGS), *MORE],
)
def test_decode_equals_prefill(results, feature, dtype, activations):
    decoded, scored = results[feature, dtype, activations]
    for before, after in zip(decoded, scored, strict=True):
        drift = INT4_DECODE_DRIFT if dtype == "int4" else MAX_DECODE_DRIFT
        assert before.logprobs == pytest.approx(after.prompt_logprobs[-NEW:], abs=drift)


@pytest.mark.parametrize("feature", WITHOUT)
def test_the_feature_would_be_missed(results, feature):
    with_it, without = results[feature, "auto", "auto"], results[feature, "auto", "without"]
    assert _change(with_it[0], without[0]) > MIN_EFFECT
