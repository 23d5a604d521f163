"""Run vLLM engines in a process of their own and bring back what they generated.

vLLM changes the process it runs in (plugins, environment, process groups), so tests hand
over a list of jobs instead of importing it. By default an engine lives inside that one
process, which starts a tiny model in two seconds; ``multiprocess=True`` gives it the worker
processes users get.

Importing vLLM takes 9 seconds of processor time, so one process imports it (engine_preload.py) and
every list of jobs gets a fork of that; where what is imported depends on more, a Python of its own.

    results = run([Job({"model": path, "kv_cache_dtype": "fp8"}, [Batch([[1, 2, 3]])])])
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from multiprocessing import forkserver
from pathlib import Path
from unittest.mock import patch

GREEDY = {"temperature": 0.0, "max_tokens": 16, "logprobs": 2, "ignore_eos": True}
ENGINE = {
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "kv_cache_memory_bytes": 64 << 20,
    "max_model_len": 512,
    "seed": 0,
    "disable_log_stats": False,
}
#: What every engine's process has in its environment.
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}
#: vLLM compiles how it ranks log-probabilities even in eager engines, 4 s of processor time.
EAGER = {"TORCHDYNAMO_DISABLE": "1"}
#: Scripts that change nothing before vLLM is imported, and variables vLLM reads after that.
FORKED_SCRIPTS = ("engine_jobs.py", "exact_engine.py")
FORKED_VARIABLES = {"VLLM_CPU_OMP_THREADS_BIND"}


@dataclass
class Batch:
    """One ``generate`` call: token-id prompts and sampling parameters over GREEDY.

    Without prompts, the previous batch's prompts each followed by what it generated.

    Attributes:
        reload_from: checkpoint whose weights the engine first loads in place of its own.
        adapter: folder of a LoRA adapter.
        image: side in pixels and seed of a random image beside every prompt.
    """

    prompts: list[list[int]] = field(default_factory=list)
    sampling: dict = field(default_factory=dict)
    reload_from: str = ""
    adapter: str | None = None
    image: tuple[int, int] | None = None


@dataclass
class Job:
    """One engine: arguments of ``LLM`` over ENGINE, and the batches it is given in turn."""

    llm: dict
    batches: list[Batch] = field(default_factory=list)


@dataclass
class Output:
    """One request's result.

    Attributes:
        prompt: the prompt's tokens.
        tokens, logprobs: what was generated, and the log-probability of each.
        margins: nats between the best and the second best token at each step; where it is
            small, rounding noise (another batch shape, another chunk) may pick the other.
        prompt_logprobs: of each prompt token but the first, if asked for.
        cached: prompt tokens found in the prefix cache.
    """

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    margins: list[float]
    prompt_logprobs: list[float]
    cached: int


@dataclass
class Result:
    """One job's outputs per batch, vLLM's counters, or the error that ended it."""

    batches: list[list[Output]]
    counters: dict[str, float]
    error: str | None = None


def run(
    jobs: list[Job],
    *,
    timeout: float = 600,
    multiprocess: bool = False,
    env: dict | None = None,
    script: str = __file__,
) -> list[Result]:
    """Run *jobs* one after another in one new process, by *script*."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "jobs.json"), Path(folder, "results.json")
        source.write_text(json.dumps([asdict(job) for job in jobs]))
        eager = all((ENGINE | job.llm)["enforce_eager"] for job in jobs)
        settings = SETTINGS | (EAGER if eager else {}) | (env or {})
        if multiprocess:
            settings["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
        alike = eager and Path(script).name in FORKED_SCRIPTS
        alike = alike and not multiprocess and FORKED_VARIABLES.issuperset(env or {})
        start = _fork if alike else _start
        said = start([script, str(source), str(target)], os.environ | settings, timeout)
        if not target.is_file():
            raise RuntimeError(f"the engine process died:\n{said[-4000:]}")
        results = json.loads(target.read_text())
    return [
        Result([[Output(**o) for o in batch] for batch in r["batches"]], r["counters"], r["error"])
        for r in results
    ]


def _start(argv: list[str], environment: dict[str, str], timeout: float) -> str:
    """Run a script in a new Python; what it said."""
    done = subprocess.run(
        [sys.executable, *argv], env=environment, capture_output=True, text=True, timeout=timeout
    )
    return done.stdout + done.stderr


def _fork(argv: list[str], environment: dict[str, str], timeout: float) -> str:
    """The same in a fork of the process that has imported vLLM."""
    context = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(["engine_preload"])
    path = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    with patch.dict(os.environ, SETTINGS | EAGER | {"PYTHONPATH": os.pathsep.join(path)}):
        forkserver.ensure_running()
    log = Path(argv[-1]).with_name("log")
    log.touch()
    child = context.Process(target=_forked, args=(argv, environment, log))
    child.start()
    try:
        child.join(timeout)
        if child.is_alive():
            raise subprocess.TimeoutExpired(argv, timeout, log.read_text())
    finally:  # pytest's time limit ends the wait too
        child.kill()
        child.join()
    return log.read_text()


def _forked(argv: list[str], environment: dict[str, str], log: Path) -> None:
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), stream.fileno())
    if "engine_preload" not in sys.modules:  # a preload that fails is not told
        raise RuntimeError("vLLM was not imported beforehand: run tests/engine_preload.py to see")
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


def only(results: list[Result]) -> list[Result]:
    """*results*, after failing on the first engine that ended in an error."""
    for result in results:
        if result.error is not None:
            raise AssertionError(f"engine failed: {result.error}")
    return results


# --- inside the process ----------------------------------------------------------------


def _main(source: str, target: str) -> None:
    import engine_preload  # noqa: F401

    choose_cos()
    jobs = json.loads(Path(source).read_text())
    Path(target).write_text(json.dumps([_run_job(job) for job in jobs]))


def choose_cos() -> None:
    """Let one thread be the first that asks MKL for a cosine.

    MKL chooses a function's code at its first call. Of two threads that meet there one may get
    another code, in 3 processes of 100: last bits of half a rotary table, in the first engine only.
    """
    import torch

    torch.zeros(1).cos()


def _run_job(job: dict) -> dict:
    import traceback

    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = None
    result = {"batches": [], "counters": {}, "error": None}
    try:
        llm = LLM(**(ENGINE | job["llm"]))
        for batch in job["batches"]:
            if path := batch["reload_from"]:
                llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
                llm.reset_prefix_cache()
            prompts = batch["prompts"] or _continued(result["batches"][-1])
            result["batches"].append(_generate(llm, prompts, batch))
        result["counters"] = {
            m.name: m.value for m in llm.get_metrics() if type(m).__name__ == "Counter"
        }
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}\n{traceback.format_exc()[-3000:]}"
    del llm
    gc.collect()
    if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0":
        cleanup_dist_env_and_memory()
    return result


def _continued(batch: list[dict]) -> list[list[int]]:
    return [output["prompt"] + output["tokens"] for output in batch]


def _generate(llm, prompts: list[list[int]], batch: dict) -> list[dict]:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    requests = [{"prompt_token_ids": ids, **_image(batch["image"])} for ids in prompts]
    params = SamplingParams(detokenize=False, **(GREEDY | batch["sampling"]))
    adapter = batch["adapter"] and LoRARequest("adapter", 1, batch["adapter"])
    outputs = []
    for request in llm.generate(requests, params, use_tqdm=False, lora_request=adapter):
        completion = request.outputs[0]
        tokens = list(completion.token_ids)
        steps = completion.logprobs or []
        known = zip(request.prompt_token_ids, request.prompt_logprobs or [], strict=False)
        outputs.append(
            {
                "prompt": list(request.prompt_token_ids),
                "tokens": tokens,
                "logprobs": [
                    step[token].logprob for step, token in zip(steps, tokens, strict=True)
                ],
                "margins": [_margin(step) for step in steps],
                "prompt_logprobs": [step[token].logprob for token, step in known if step],
                "cached": request.num_cached_tokens or 0,
            }
        )
    return outputs


def _image(of: list[int] | None) -> dict:
    if of is None:
        return {}
    import numpy
    from PIL import Image

    side, seed = of
    pixels = numpy.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype="uint8")
    return {"multi_modal_data": {"image": Image.fromarray(pixels)}}


def _margin(step: dict) -> float:
    best, second = sorted((entry.logprob for entry in step.values()), reverse=True)[:2]
    return best - second


if __name__ == "__main__":
    _main(*sys.argv[1:])
