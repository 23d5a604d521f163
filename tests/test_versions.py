"""Every vLLM version that docs/support.md lists, run: each in processes of its own.

A tiny model, so that a version takes about a minute. The bytes and the arithmetic of a KV cache
are ours on every version, and what vLLM computes around them is the same too: when written, all
scores were equal to those of 0.32 bit for bit.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from functools import cache
from types import SimpleNamespace

import pytest
import version_facts
from engine_jobs import Batch, Job, Result, only, run
from safetensors.torch import load_file
from scaled import add_scales, eagle_draft
from tiny_models import make
from version_matrix import environment

from kvq_plugin.evaluate import BASELINE, evaluate, floor_chunk, load_tokenizer
from kvq_plugin.formats import FORMATS, SERVED
from kvq_plugin.mapping import MIXED
from kvq_plugin.serving.compat import RUN_VERSIONS

# All engines of a version start in one fixture, and a loaded machine takes minutes for it.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

REFERENCE = "0.32.0"
DYNAMIC = "int8_per_token_head"
#: Formats that need no scales from a checkpoint, one name each.
READY = [f.name for f in dict.fromkeys(SERVED.values()) if f.is_dynamic or f.default_scale]
#: Names that no vLLM has of its own.
OWN = ["int8", *(name for name in SERVED if name not in FORMATS), MIXED]
#: Layers with windows, layers with sinks, and layers with KV caches of their own.
SPECIAL = [("window_and_full_layers", "int4"), ("sinks", DYNAMIC), ("gqa", MIXED)]
MAPPING = {"kvq": {"layers": {"0": "int4", "1": DYNAMIC}}}
#: Change of scores between versions, as a part of what the format itself changes.
MAX_CHANGE = 0.1
#: Nats; a hit computes its last tokens in matrix products of another shape (test_engine.py).
MAX_HIT_DRIFT = 0.05

random.seed(1)
PROMPTS = [[random.randrange(3, 500) for _ in range(n)] for n in (5, 33, 300)]
#: Scoring a prompt reads no cached prefix, and leaves one for who asks again.
SCORED, AGAIN = (
    Batch(PROMPTS, {"prompt_logprobs": 0, "max_tokens": 8}),
    Batch(PROMPTS, {"max_tokens": 8}),
)

#: What is refused -> the engine that asks for it, and words of the message.
REFUSALS = {
    "block size": ({"kv_cache_dtype": DYNAMIC, "block_size": 48}, "--block-size 128"),
    "offloading": ({"kv_cache_dtype": DYNAMIC, "kv_offloading_size": 1.0}, "--kv-offloading-size"),
    "no scales": ({"kv_cache_dtype": "int8"}, "kvq calibrate"),
    "foreign dtype": ({"kv_cache_dtype": "nvfp4"}, "use int8_per_token_head"),
    "option": ({"kv_cache_dtype": DYNAMIC, "additional_config": {"kvq": {"x": 3}}}, "remove it"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> SimpleNamespace:
    """Paths of a model without scales and of one with int8 scales that it declares."""
    folder = tmp_path_factory.mktemp("models")
    plain = make(folder, "gqa")
    strategies = [("channel", "attn_head"), ("attn_head", "tensor")]
    scaled = add_scales(plain, folder / "scaled", PROMPTS, "int", strategies)
    special = {name: str(make(folder, name)) for name, _ in SPECIAL if name != "gqa"}
    draft = eagle_draft(plain, folder / "eagle")
    return SimpleNamespace(plain=str(plain), scaled=str(scaled), special=special, draft=str(draft))


@pytest.fixture(scope="module")
def outcome(models):
    """version -> its engines' results by name, run when first asked for."""
    jobs = {
        name: Job({"model": models.plain, "kv_cache_dtype": name}, [SCORED, AGAIN])
        for name in ("auto", *READY)
    }
    for name in ("int8", "auto"):
        job = Job({"model": models.scaled, "kv_cache_dtype": name}, [SCORED, AGAIN])
        jobs[f"scaled {name}"] = job
    for skip in (["0"], ["0", "1"]):
        llm = {"model": models.plain, "kv_cache_dtype": DYNAMIC}
        jobs[f"skip {skip}"] = Job({**llm, "kv_cache_dtype_skip_layers": skip}, [SCORED])
    for name, dtype in SPECIAL:
        for each in ("auto", dtype):
            llm = {"model": models.special.get(name, models.plain), "kv_cache_dtype": each}
            mapping = {"additional_config": MAPPING} if each == MIXED else {}
            jobs[f"{name} {each}"] = Job(llm | mapping, [SCORED])
    alone = {"model": models.scaled, "kv_cache_dtype": "int8", "dtype": "float32"}
    jobs["alone"] = Job(alone, [SCORED])
    others = {what: Job({"model": models.plain, **llm}) for what, (llm, _) in REFUSALS.items()}
    eagle = {"method": "eagle", "model": models.draft, "num_speculative_tokens": 2}
    for dtype, own in (("int4", {}), (MIXED, {}), ("auto", {"kv_cache_dtype": "fp8"})):
        llm = {"model": models.plain, "kv_cache_dtype": dtype, "speculative_config": eagle | own}
        if dtype == MIXED:
            llm["additional_config"] = MAPPING
        others[f"drafts for {dtype}"] = Job(llm, [AGAIN])

    @cache
    def of(version: str) -> dict[str, Result]:
        results = run([*jobs.values(), *others.values()], env=environment(version))
        only(results[: len(jobs)])
        return dict(zip([*jobs, *others], results, strict=True))

    return of


@pytest.fixture(scope="module", params=RUN_VERSIONS)
def version(request) -> str:
    environment(request.param)  # skips a version that could not be had
    return request.param


@pytest.fixture(scope="module")
def results(outcome, version) -> dict[str, Result]:
    return outcome(version)


@pytest.fixture(scope="module")
def reference(outcome) -> dict[str, Result]:
    return outcome(REFERENCE)


@pytest.fixture(scope="module")
def facts(version, models) -> dict:
    """See version_facts.py."""
    done = subprocess.run(
        [sys.executable, version_facts.__file__, models.plain],
        env=os.environ
        | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
        | environment(version),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def _scores(result: Result) -> list[float]:
    return [x for output in result.batches[0] for x in output.prompt_logprobs]


def _change(a: Result, b: Result) -> float:
    """Root mean square of the scores' differences, in nats."""
    squares = [(x - y) ** 2 for x, y in zip(_scores(a), _scores(b), strict=True)]
    return (sum(squares) / len(squares)) ** 0.5


# --- without an engine -----------------------------------------------------------------


def test_it_is_the_version_it_should_be(facts, version):
    assert facts["vllm"].split("+")[0] == version


def test_the_command_line_takes_every_format(facts):
    assert facts["accepted"] == list(SERVED)


def test_doctor_says_what_was_run(facts, version):
    assert f"vLLM {facts['vllm']} (engine tests run on {RUN_VERSIONS[version]})" in facts["doctor"]


def test_dtypes_are_registered_the_way_vllm_has(facts, version):
    """Through vLLM's API where there is one, and then only the names that are ours alone."""
    assert list(facts["handlers"]) == (OWN if version >= "0.33" else [])
    assert all(all(properties.values()) for properties in facts["handlers"].values())


# --- engines ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*READY, "scaled int8"])
def test_scores_are_those_of_the_reference(reference, results, version, name):
    change = _change(reference[name], results[name])
    effect = _change(reference["auto"], reference[name])
    print(f"vLLM {version}, {name}: {change:.2g} nats; the format itself {effect:.2g}")
    assert change <= MAX_CHANGE * effect


@pytest.mark.parametrize(("name", "dtype"), SPECIAL)
def test_special_layers_score_as_with_the_reference(reference, results, name, dtype):
    change = _change(reference[f"{name} {dtype}"], results[f"{name} {dtype}"])
    effect = _change(reference[f"{name} auto"], reference[f"{name} {dtype}"])
    assert effect > 0 and change <= MAX_CHANGE * effect


def test_a_declared_scheme_needs_no_flag(results):
    assert _scores(results["scaled auto"]) == _scores(results["scaled int8"])
    assert _scores(results["scaled auto"]) != _scores(results["auto"])


def test_skipped_layers_stay_unquantized(results):
    assert _scores(results["skip ['0', '1']"]) == _scores(results["auto"])
    one = _scores(results["skip ['0']"])
    assert one != _scores(results["auto"]) and one != _scores(results[DYNAMIC])


@pytest.mark.parametrize("name", [*READY, "scaled int8"])
def test_a_prefix_hit_equals_a_miss(results, name):
    miss, hit = results[name].batches
    assert not any(output.cached for output in miss) and hit[-1].cached
    for a, b in zip(miss, hit, strict=True):
        assert a.tokens == b.tokens
        assert a.logprobs == pytest.approx(b.logprobs, abs=MAX_HIT_DRIFT)


@pytest.mark.parametrize("dtype", ["int4", MIXED, "auto"])
def test_a_draft_with_a_cache_of_its_own(results, dtype):
    """Of int8 beside recent rows, of fp8 beside vLLM's own. vLLM 0.33 makes its configuration from
    the run's, with blocks that look like the user's choice."""
    result = results[f"drafts for {dtype}"]
    if result.error and "Cannot inspect kernel parameters" in result.error:
        pytest.skip("drafts of this vLLM need Triton, on CPUs too")
    only([result])
    assert result.counters["vllm:spec_decode_num_drafts"] > 0


def test_two_tensor_parallel_ranks(results, version, models):
    """In float32, as in test_engine_modes.py, where a head too far moves scores by 0.3 nats."""
    llm = {"model": models.scaled, "kv_cache_dtype": "int8", "dtype": "float32"}
    bound = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    (pair,) = only(
        run(
            [Job({**llm, "tensor_parallel_size": 2}, [SCORED])],
            env=environment(version) | bound,
        )
    )
    assert _change(results["alone"], pair) < 0.01


@pytest.mark.parametrize("what", REFUSALS)
def test_refusals_are_value_errors(results, what):
    error = results[what].error.split("Traceback")[0]
    assert error.startswith(("ValueError:", "ValidationError:"))  # pydantic's is a ValueError
    assert REFUSALS[what][1] in error


def test_a_block_size_chosen_late_is_refused_too(facts):
    """By vLLM's own last check, against what our backend says it takes."""
    assert facts["late_block_size"].startswith("ValueError: No common block size for 48")


def test_eval_sees_the_logits(version, tmp_path, smollm2, monkeypatch):
    """``kvq eval`` refuses divergences from other logits than those vLLM scores a prompt by; here
    they come in four chunks."""
    for name, value in environment(version).items():
        monkeypatch.setenv(name, value)
    model = make(tmp_path, "gqa")
    load_tokenizer(str(smollm2)).save_pretrained(model)  # any: prompts are tokens
    texts, chunk = {"random": PROMPTS[-1:]}, floor_chunk(PROMPTS[-1:])
    options = {"keep": tmp_path, "chunk": chunk, "kv_memory_bytes": 64 << 20}
    found = evaluate(str(model), BASELINE, texts, **options)
    assert found.kv_tokens > 0
    assert load_file(tmp_path / "0-0.safetensors")["sizes"].tolist() == [76, 76, 76, 71]
