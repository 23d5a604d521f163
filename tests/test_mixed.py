"""Layers of different KV caches in one engine: no schedule changes a bit of an answer, memory holds
what the bits promise, and a checkpoint serves by what it says itself."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import exact_engine
import pytest
from engine_jobs import Batch, Job, only, run
from scaled import eagle_draft
from tiny_models import make

from kvq_plugin.mapping import MIXED, bytes_per_token, parse
from kvq_plugin.servers import serve

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CORES = {"VLLM_CPU_OMP_THREADS_BIND": f"0-{os.cpu_count() - 1}"}
random.seed(3)
PROMPTS = [[random.randrange(3, 500) for _ in range(n)] for n in (300, 127, 121, 64, 5)]
ASKED = {"max_tokens": 80}
LAYERS = 6
#: No window, sealed beside blocks of 64 and of 32 recent rows, static scales. `k8v4` twice: with a
#: layer of each, vLLM would split the recent rows in two groups.
KINDS = {"0": "int8_per_token_head", "1": "int4", "2": "k3v2", "3": "fp8", "default": "k8v4"}
PLAIN_KINDS = {"0": "int8_per_token_head", "1-2": "k8v4", "3": "fp8_per_token_head", "4-5": "fp8"}
BLOCKS = 40


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("models"), "gqa", num_hidden_layers=LAYERS)


def _mixed(layers: dict[str, str]) -> dict:
    return {"kv_cache_dtype": MIXED, "additional_config": {"kvq": {"layers": layers}}}


@pytest.fixture(scope="module", params=[KINDS, PLAIN_KINDS], ids=["recent", "plain"])
def schedules(request, model):
    """Of one process: plain, in chunks, with too few blocks, by its config.json alone, skipped."""
    base = {"model": str(model), "dtype": "float32", "num_gpu_blocks_override": BLOCKS}
    own = model.parent / f"own-{len(request.param)}"
    shutil.copytree(model, own)
    config = json.loads((own / "config.json").read_text())
    config["kvq"] = {"layers": request.param}
    (own / "config.json").write_text(json.dumps(config))
    both = [Batch(PROMPTS, ASKED), Batch(PROMPTS, ASKED)]
    base |= _mixed(request.param)
    few = {"num_gpu_blocks_override": 12 if request.param is KINDS else 6}
    jobs = {
        "plain": Job(base, [*both, Batch([], {"max_tokens": 8})]),
        "chunks": Job({**base, "max_num_batched_tokens": 48, "max_num_seqs": 8}, both[:1]),
        "few blocks": Job(
            {**base, **few, "max_num_batched_tokens": 128, "enable_prefix_caching": False,
             "max_model_len": 400},
            both[:1],
        ),
        "declared": Job(
            {**base, "model": str(own), "kv_cache_dtype": "auto", "additional_config": {}}, both[:1]
        ),
        "skipped": Job({**base, "kv_cache_dtype_skip_layers": ["0"]}, both[:1]),
    }  # fmt: skip
    found = only(run(list(jobs.values()), script=exact_engine.__file__, env=CORES))
    return dict(zip(jobs, found, strict=True))


def _answers(batch) -> list:
    return [(o.tokens, o.logprobs) for o in batch]


@pytest.mark.parametrize("schedule", ["chunks", "few blocks", "declared"])
def test_schedule_does_not_change_answers(schedules, schedule):
    assert _answers(schedules["plain"].batches[0]) == _answers(schedules[schedule].batches[0])


def test_a_cache_hit_equals_a_miss(schedules):
    miss, hit, extended = schedules["plain"].batches
    assert not any(o.cached for o in miss) and hit[0].cached == 256 and extended[0].cached == 256
    assert _answers(miss) == _answers(hit)


def test_what_was_asked_happened(schedules):
    plain, skipped = (schedules[n].batches[0] for n in ("plain", "skipped"))
    assert _answers(plain) != _answers(skipped)  # layer 0 is unquantized there
    assert all(abs(x) < 100 for o in skipped for x in o.logprobs)  # and nothing is NaN
    preempted = {name: r.counters["vllm:num_preemptions"] for name, r in schedules.items()}
    assert preempted.pop("few blocks") > 0 and not any(preempted.values())


def test_a_mapping_to_one_format_is_that_format(model):
    base = {"model": str(model), "dtype": "float32", "num_gpu_blocks_override": BLOCKS}
    jobs = [
        Job({**base, **more}, [Batch(PROMPTS, ASKED)])
        for more in ({"kv_cache_dtype": "int4"}, _mixed({"default": "int4"}))
    ]
    uniform, mixed = only(run(jobs, script=exact_engine.__file__, env=CORES))
    assert _answers(uniform.batches[0]) == _answers(mixed.batches[0])


@pytest.mark.parametrize("layers", [KINDS, PLAIN_KINDS], ids=["recent", "plain"])
def test_an_eagle_draft_has_a_cache_of_its_own(model, layers, tmp_path):
    """Whose configuration vLLM makes of the target's, with the mapping in it."""
    draft = {"method": "eagle", "model": str(eagle_draft(model, tmp_path / "eagle"))}
    base = {"model": str(model), "dtype": "float32", **_mixed(layers)}
    jobs = [
        Job({**base, **more}, [Batch(PROMPTS, ASKED)])
        for more in ({}, {"speculative_config": {**draft, "num_speculative_tokens": 2}})
    ]
    plain, drafted = only(run(jobs, script=exact_engine.__file__, env=CORES))
    assert drafted.counters["vllm:spec_decode_num_drafts"] > 0
    assert _answers(plain.batches[0]) == _answers(drafted.batches[0])


@pytest.mark.parametrize("layers", [{"default": "int8_per_token_head"}, {"0": "int4"}])
def test_attention_in_both_directions_is_refused(model, layers):
    """Such layers have a backend around ours, which a format of their own would replace."""
    embedding = {"runner": "pooling", "convert": "embed", "hf_overrides": {"is_causal": False}}
    layers = {"default": "int8_per_token_head"} | layers
    (result,) = run([Job({"model": str(model), **embedding, **_mixed(layers)})])
    assert "attention is not only causal" in result.error and "EncoderOnly" in result.error


def test_two_tensor_parallel_ranks(model):
    base = {"model": str(model), "dtype": "float32", "num_gpu_blocks_override": BLOCKS}
    scored = [Batch(PROMPTS, {"prompt_logprobs": 0, "max_tokens": 8})]
    base |= _mixed(KINDS)
    (one,) = only(run([Job(base, scored)]))
    env = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    (two,) = only(run([Job({**base, "tensor_parallel_size": 2}, scored)], env=env))
    assert [o.tokens for o in one.batches[0]] == [o.tokens for o in two.batches[0]]
    pairs = [
        (x, y)
        for a, b in zip(one.batches[0], two.batches[0], strict=True)
        for x, y in zip(a.prompt_logprobs, b.prompt_logprobs, strict=True)
    ]
    assert (sum((x - y) ** 2 for x, y in pairs) / len(pairs)) ** 0.5 < 0.01


# --- over HTTP -------------------------------------------------------------------------

KV_MEMORY, LONGEST, STEP = 256 << 20, 2048, 512
SERVED = {"0": "int8_per_token_head", "1-28": "int4", "29": "k8v4"}


def test_a_mapped_checkpoint_serves_what_its_bits_promise(smollm2, tmp_path):
    """Without a flag. Within 2 % of the pages' bytes, beside the blocks of recent rows."""
    folder = tmp_path / "mapped"
    folder.mkdir()
    for file in Path(smollm2).iterdir():
        (folder / file.name).symlink_to(file.resolve())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config | {"kvq": {"layers": SERVED}}))
    args = ["--enforce-eager", "--max-model-len", str(LONGEST)]
    args += ["--kv-cache-memory-bytes", str(KV_MEMORY), "--max-num-batched-tokens", str(STEP)]
    with serve(str(folder), "auto", args=args) as server:
        reply = server.client().completions.create(
            model=str(folder), prompt="21, 22, 23, 24, 25, 26, 27, 28,", temperature=0.0,
            max_tokens=8,
        )  # fmt: skip
        stated = server.kv_tokens()
    assert "29" in reply.choices[0].text
    names = [parse(SERVED, 30).name(n) for n in range(30)]
    promised = KV_MEMORY / sum(3 * bytes_per_token(name, 64) for name in names)
    sealed, recent = LONGEST // 128, 2  # blocks a request keeps while it decodes
    # Beside them: recent rows of a step's new tokens, 64 to a block, and vLLM's null block.
    blocks = stated / LONGEST * (sealed + recent) + STEP // 64 + 1
    assert 0.98 < blocks * 128 / promised < 1.02
