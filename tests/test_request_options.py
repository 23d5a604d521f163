"""The scheduler's options: none may change what a quantized cache answers, to the last bit."""

from __future__ import annotations

import random

import exact_engine
import pytest
from engine_jobs import Batch, Job, only, run
from tiny_models import make

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

OPTIONS = {
    "plain": {"enable_prefix_caching": False},
    "long prefills": {"long_prefill_token_threshold": 37, "max_num_batched_tokens": 256},
    "a fair share": {
        "long_prefill_token_threshold": 16,
        "long_prefill_token_threshold_adaptive": True,
        "max_num_batched_tokens": 100,
    },
    "few at once": {"watermark": 0.2, "max_num_active_seqs": 2, "num_gpu_blocks_override": 40},
    # Preempts whatever has no room for its whole prompt.
    "no reserve": {
        "scheduler_reserve_full_isl": False,
        "num_gpu_blocks_override": 9,
        "max_num_batched_tokens": 64,
    },
    "dense checkpoints": {"prefix_cache_retention_interval": None},
    "match of 32": {"prefix_match_unit": 32},
    "scheduled tokens": {"max_num_scheduled_tokens": 50},
}


@pytest.fixture(scope="module")
def by_option(tmp_path_factory):
    """``int4``, whose groups are sealed and whose recent rows have pages of their own."""
    numbers = random.Random(2)
    prompts = [[numbers.randrange(3, 500) for _ in range(n)] for n in (300, 127, 121, 64, 33, 5)]
    batch = Batch(prompts, {"max_tokens": 40})
    model = str(make(tmp_path_factory.mktemp("models"), "gqa"))
    base = {"model": model, "kv_cache_dtype": "int4", "num_gpu_blocks_override": 120}
    jobs = [Job({**base, **option}, [batch, batch]) for option in OPTIONS.values()]
    return dict(zip(OPTIONS, only(run(jobs, script=exact_engine.__file__)), strict=True))


@pytest.mark.parametrize("option", list(OPTIONS)[1:])
def test_an_option_does_not_change_answers(by_option, option):
    expected = by_option["plain"].batches[0]
    for batch in by_option[option].batches:  # the second one finds the first one's prefixes
        assert [o.tokens for o in batch] == [o.tokens for o in expected]
        assert [o.logprobs for o in batch] == [o.logprobs for o in expected]


def test_no_reserve_preempts(by_option):
    assert by_option["no reserve"].counters["vllm:num_preemptions"] > 0
