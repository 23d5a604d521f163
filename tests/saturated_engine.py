"""How many tokens a pool of KV-cache blocks holds at once: the script of a process.

    python saturated_engine.py '{"model": ..., "kv_cache_dtype": ...}' PROMPT NEW

fills an engine with as many requests as it says fit, steps it until they are done, and prints JSON:
what it ``stated`` in tokens and in ``requests``, the most tokens and requests that were ``held`` at
once, and how many preemptions there were.
"""

from __future__ import annotations

import json
import random
import sys

from engine_jobs import ENGINE


def main(arguments: str, prompt: str, new: str) -> dict:
    from vllm import LLM, SamplingParams

    llm = LLM(**(ENGINE | json.loads(arguments)))
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    cache = engine.vllm_config.cache_config
    requests = int(cache.kv_cache_max_concurrency)
    params = SamplingParams(temperature=0.0, max_tokens=int(new), ignore_eos=True, detokenize=False)
    random.seed(0)
    for i in range(requests):
        ids = [random.randrange(3, 500) for _ in range(int(prompt))]
        engine.add_request(str(i), {"prompt_token_ids": ids}, params)
    held = (0, 0)
    while engine.has_unfinished_requests():
        engine.step()
        running = [r.num_computed_tokens for r in scheduler.running]
        held = max(held, (sum(running), len(running)))
    counters = {m.name: m.value for m in llm.get_metrics() if type(m).__name__ == "Counter"}
    return {
        "stated": cache.kv_cache_size_tokens,
        "requests": requests,
        "held": held,
        "preemptions": counters["vllm:num_preemptions"],
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
