"""The same format in ``generate`` and in vLLM's engine: the same perplexity, in float32.

Both with the same arithmetic between their caches (exact_llama), so that what the caches hold, and
how it is read, is all that could differ.
"""

from __future__ import annotations

import math
from pathlib import Path

import exact_llama
import pytest
import torch
from dequantized import CACHE
from engine_jobs import Batch, Job, only, run
from transformers import AutoModelForCausalLM

from kvq_plugin.evaluate import load_tokenizer, make_windows
from kvq_plugin.hf_cache import NAME, KVQCache
from kvq_plugin.texts import builtin_text

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LENGTH = 512
DTYPES = ("int8_per_token_head", "fp8", "int4_per_token_head", "int4")


@pytest.fixture(scope="module")
def window(smollm2):
    return make_windows(load_tokenizer(str(smollm2)), builtin_text(), 1, LENGTH)[0]


@pytest.fixture(scope="module")
def through_vllm(smollm2, window):
    """dtype -> log-probabilities of the window's tokens."""
    engine = {"model": str(smollm2), "dtype": "float32", "max_model_len": LENGTH + 1}
    batches = [Batch([window], {"prompt_logprobs": 0, "max_tokens": 1})]
    jobs = [Job({**engine, "kv_cache_dtype": dtype}, batches) for dtype in DTYPES]
    script = str(Path(__file__).with_name("exact_llama.py"))
    results = only(run(jobs, timeout=800, script=script))
    scored = [result.batches[0][0].prompt_logprobs for result in results]
    return dict(zip(DTYPES, scored, strict=True))


@pytest.fixture(scope="module")
def model(smollm2):
    load = AutoModelForCausalLM.from_pretrained
    return load(smollm2, dtype=torch.float32, attn_implementation=NAME).eval()


@pytest.mark.parametrize("dtype", DTYPES)
def test_perplexity_is_that_of_vllm(model, window, through_vllm, monkeypatch, dtype):
    exact_llama.patch_transformers(monkeypatch)
    ids = torch.tensor([window])
    with torch.inference_mode():
        out = model(ids, **{CACHE: KVQCache(model.config, dtype)}).logits[0, :-1]
    ours = out.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    theirs = torch.tensor(through_vllm[dtype])
    change = 100 * math.expm1(float((theirs - ours).mean()))
    perplexity = math.exp(-float(ours.mean()))
    print(f"{dtype}: perplexity {perplexity:.4f}, {change:+.5f} % through vLLM")
    assert abs(change) < 0.1
    assert torch.equal(theirs, ours)  # every log-probability, to the last bit
