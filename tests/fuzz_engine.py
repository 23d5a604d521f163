"""Random requests through an engine that has no room for them, against an engine that has.

    python tests/fuzz_engine.py --dtype int4 --requests 1000 [--seed 0] [--model DIR]

Requests come and are cancelled at random steps; prompts share prefixes, chunks of prompts are of a
random size per engine, and the pool is so small that requests are preempted. Products are in
float64 (`exact_engine`), so every answer must be that of an unhurried engine without a prefix cache
to the last bit. Prints JSON; exit status 1 if one bit differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import exact_engine
from engine_jobs import ENGINE

#: Requests given to one engine before the next, with other settings.
ROUND = 125
VOCABULARY = (3, 500)
CHUNKS = (48, 64, 100, 128, 200, 512)


def requests(rng: random.Random, count: int) -> list[tuple[list[int], int]]:
    """(prompt, tokens to generate) of each; half of the prompts begin as an earlier one does."""
    out: list[tuple[list[int], int]] = []
    for _ in range(count):
        prompt = []
        if out and rng.random() < 0.5:
            earlier = rng.choice(out)[0]
            prompt = earlier[: rng.choice((128, 256, rng.randint(1, len(earlier))))]
        length = rng.choice((1, 5, 33, 64, 127, 128, 129, 300, rng.randint(1, 440)))
        missing = max(1, length - len(prompt))
        prompt = prompt + [rng.randrange(*VOCABULARY) for _ in range(missing)]
        out.append((prompt[:440], rng.choice((1, 2, 8, 40, 70))))
    return out


def answers(llm, asked, tick: Callable[[], None], arrivals=None, cancels=None) -> dict:
    """index -> [(token, log-probability)] of the requests that were not cancelled. *arrivals* of
    requests per step, all at once without it; *cancels* says whether one is, per step."""
    from vllm import SamplingParams

    engine, found = llm.llm_engine, {}
    waiting = list(enumerate(asked))
    running: set[int] = set()
    while waiting or running:
        for _ in range(arrivals() if arrivals else len(waiting)):
            if waiting:
                index, (prompt, new) = waiting.pop(0)
                params = SamplingParams(temperature=0.0, max_tokens=new, logprobs=0,
                                        ignore_eos=True, detokenize=False)  # fmt: skip
                engine.add_request(str(index), {"prompt_token_ids": prompt}, params)
                running.add(index)
        for output in engine.step():
            if output.finished and int(output.request_id) in running:
                completion = output.outputs[0]
                steps = zip(completion.token_ids, completion.logprobs, strict=True)
                found[int(output.request_id)] = [(t, step[t].logprob) for t, step in steps]
                running.discard(int(output.request_id))
        if running and cancels and cancels():
            index = min(running)
            engine.abort_request([str(index)])
            running.discard(index)
        tick()
    return found


def through(settings: dict, asked, *how) -> tuple[dict, dict[str, float]]:
    """Answers of one engine, and its counters."""
    import gc

    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    def use():
        llm = LLM(**(ENGINE | settings))
        found = answers(llm, asked, *how)
        return found, {m.name: m.value for m in llm.get_metrics() if type(m).__name__ == "Counter"}

    result = use()
    gc.collect()
    cleanup_dist_env_and_memory()
    return result


def fuzz(model: str, dtype: str, count: int, seed: int, blocks: int, tick=lambda: None) -> dict:
    rng = random.Random(seed)
    asked = requests(rng, count)
    base = {"model": model, "kv_cache_dtype": dtype, "dtype": "bfloat16"}
    roomy = {"max_num_batched_tokens": 2048, "num_gpu_blocks_override": 12 * blocks}
    expected, _ = through(base | roomy | {"enable_prefix_caching": False}, asked, tick)
    said = {"dtype": dtype, "requests": count, "cancelled": 0, "different": [], "preemptions": 0.0,
            "cached tokens": 0.0, "rounds": []}  # fmt: skip
    for first in range(0, count, ROUND):
        part = asked[first : first + ROUND]
        tight = {"max_num_batched_tokens": rng.choice(CHUNKS)}
        tight["num_gpu_blocks_override"] = blocks * rng.choice((1, 1, 4))  # or a prefix stays
        tight["max_num_seqs"] = rng.choice((8, 16, 32))
        found, counters = through(base | tight, part, tick, lambda: rng.choice((0, 0, 1, 3, 8)),
                                  lambda: rng.random() < 0.02)  # fmt: skip
        said["cancelled"] += len(part) - len(found)
        said["different"] += [first + i for i, a in found.items() if a != expected[first + i]]
        said["preemptions"] += counters["vllm:num_preemptions"]
        said["cached tokens"] += counters["vllm:prefix_cache_hits"]
        said["rounds"].append(tight)
    return said


def main(argv=None) -> int:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--dtype", default="int4")
    p.add_argument("--requests", type=int, default=1000)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--blocks", type=int, default=16, help="of the pool")
    p.add_argument("--model", help="a tiny one is made if not given")
    a = p.parse_args(argv)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    exact_engine.exact_products()
    with tempfile.TemporaryDirectory() as folder:
        if a.model is None:
            from tiny_models import make

            a.model = str(make(Path(folder), "gqa"))
        said = fuzz(a.model, a.dtype, a.requests, a.seed, a.blocks)
    print(json.dumps(said))
    return 1 if said["different"] else 0


if __name__ == "__main__":
    sys.exit(main())
