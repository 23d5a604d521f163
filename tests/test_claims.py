"""What docs/support.md says works beside a quantized cache: each through a real engine.

Pipeline and data parallelism, AsyncLLM, LoRA, images, ``vllm run-batch``. Tensor parallelism and
compilation are in test_engine_modes, servers in test_server. In float32 where engines must agree,
so that only a value at a rounding boundary may become another code.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess

import async_engine
import pytest
import torch
from engine_jobs import Batch, Job, only, run
from safetensors.torch import load_file, save_file
from scaled import add_scales
from tiny_models import IMAGE_SIDE, image_token, make, make_multimodal

from kvq_plugin.servers import engine_env, vllm_command

# Engines start in fixtures, one after another, and a loaded machine takes minutes for it.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

random.seed(2)
PROMPTS = [[random.randrange(3, 500) for _ in range(n)] for n in (5, 33, 150)]
DTYPE = "int8_per_token_head"
NEW = 8
#: One core for each of two engines or workers.
TWO = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
RANK, ALPHA = 4, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def gqa(folder):
    return make(folder, "gqa")


def with_adapter(model, folder):
    """A LoRA adapter of all attention projections, and *model* with it merged into its weights."""
    torch.manual_seed(3)
    weights = load_file(model / "model.safetensors")
    projections = ("q_proj", "k_proj", "v_proj", "o_proj")
    adapter, merged = {}, dict(weights)
    for name, weight in weights.items():
        if name.split(".")[-2] not in projections:
            continue
        a = torch.randn(RANK, weight.shape[1]) * 0.1
        b = torch.randn(weight.shape[0], RANK) * 0.1
        base = f"base_model.model.{name.removesuffix('.weight')}"
        adapter |= {f"{base}.lora_A.weight": a, f"{base}.lora_B.weight": b}
        merged[name] = weight.float() + ALPHA / RANK * (b @ a)
    (folder / "adapter").mkdir()
    save_file(adapter, folder / "adapter" / "adapter_model.safetensors")
    (folder / "adapter" / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "r": RANK,
                "lora_alpha": ALPHA,
                "target_modules": projections,
                "bias": "none",
            }
        )
    )
    shutil.copytree(model, folder / "merged")
    save_file(merged, folder / "merged" / "model.safetensors", metadata={"format": "pt"})
    return str(folder / "adapter"), str(folder / "merged")


@pytest.fixture(scope="module")
def results(folder, gqa):
    """Engines that live in one process: plain, with an adapter, merged, with images."""
    adapter, merged = with_adapter(gqa, folder)
    pictured = make_multimodal(folder)
    token = image_token(pictured)
    beside = [[5, 6, token, 7, 8, *prompt] for prompt in PROMPTS]
    exact = {"kv_cache_dtype": DTYPE, "dtype": "float32"}
    scored = {"prompt_logprobs": 0, "max_tokens": NEW}
    seen = [Batch(beside, scored, image=(IMAGE_SIDE, seed)) for seed in (0, 1)]
    pictures = {"model": str(pictured), "skip_tokenizer_init": False}
    jobs = {
        # vLLM's LoRA operators for CPUs do not score prompts.
        "lora": Job(
            {**exact, "model": str(gqa), "enable_lora": True, "max_lora_rank": 8},
            [Batch(PROMPTS, {"max_tokens": NEW}, adapter=a) for a in (None, adapter)],
        ),
        "merged": Job({**exact, "model": merged}, [Batch(PROMPTS, {"max_tokens": NEW})]),
        "plain": Job({**exact, "model": str(gqa)}, [Batch(PROMPTS, {"max_tokens": NEW})]),
        "images, auto": Job({**pictures, "kv_cache_dtype": "auto"}, seen),
        "images": Job({**pictures, "kv_cache_dtype": DTYPE}, seen),
    }
    return dict(zip(jobs, only(run(list(jobs.values()))), strict=True))


def _drift(a, b) -> float:
    """Greatest difference of log-probabilities of what two batches generated."""
    pairs = [
        xy for p, q in zip(a, b, strict=True) for xy in zip(p.logprobs, q.logprobs, strict=True)
    ]
    return max(abs(x - y) for x, y in pairs)


def _change(a, b) -> float:
    """Root mean square difference of the prompts' log-probabilities."""
    scores = ([x for o in batch for x in o.prompt_logprobs] for batch in (a, b))
    squares = [(x - y) ** 2 for x, y in zip(*scores, strict=True)]
    return (sum(squares) / len(squares)) ** 0.5


def test_lora_adapter_equals_merged_weights(results):
    """K and V of an adapter are what the cache quantizes; without one the base model answers."""
    without, adapted = results["lora"].batches
    merged, plain = results["merged"].batches[0], results["plain"].batches[0]
    assert [o.tokens for o in adapted] == [o.tokens for o in merged]
    assert _drift(adapted, merged) < 0.02
    assert [o.tokens for o in without] == [o.tokens for o in plain]
    assert [o.tokens for o in adapted] != [o.tokens for o in plain]


def test_images_beside_text(results):
    """A model that sees images (Idefics3): quantized against not, and the image matters."""
    plain, quantized = results["images, auto"].batches, results["images"].batches
    print(f"{_change(plain[0], quantized[0]):.4f} nats, other image {_change(*plain):.4f}")
    assert 0 < _change(plain[0], quantized[0]) < 0.05
    assert _change(*plain) > 3 * _change(plain[0], quantized[0])
    assert _change(plain[1], quantized[1]) < 0.05


def test_async_engine_with_two_data_parallel_ranks(results, gqa):
    """AsyncLLM, every prompt on each rank, all at once."""
    tokens = async_engine.run(
        {
            "model": str(gqa),
            "kv_cache_dtype": DTYPE,
            "dtype": "float32",
            "data_parallel_size": 2,
        },
        PROMPTS * 2,
        [0] * len(PROMPTS) + [1] * len(PROMPTS),
        tokens=NEW,
        env=TWO,
        timeout=600,
    )
    expected = [o.tokens for o in results["plain"].batches[0]]
    assert tokens == expected * 2


def in_two_stages(model, dtype):
    """Two pipeline stages answer as one engine does.

    Compiled: vLLM's CPU worker skips the warm-up of an eager model, in which a later stage makes
    its buffers, and then fails with any KV cache.
    """
    base = {"model": str(model), "kv_cache_dtype": dtype, "dtype": "float32"}
    batch = Batch(PROMPTS, {"prompt_logprobs": 0, "max_tokens": NEW})
    (alone,) = only(run([Job(base, [batch])]))
    staged = Job({**base, "pipeline_parallel_size": 2, "enforce_eager": False}, [batch])
    (stages,) = only(run([staged], multiprocess=True, env=TWO))
    assert [o.tokens for o in alone.batches[0]] == [o.tokens for o in stages.batches[0]]
    assert _change(alone.batches[0], stages.batches[0]) < 0.01


def test_two_pipeline_stages_with_static_scales(folder, gqa):
    """Each stage loads the scales of its own layers."""
    granularities = [("channel", "tensor")] * 2
    in_two_stages(add_scales(gqa, folder / "scaled", PROMPTS, "int", granularities), "int8")


def test_two_pipeline_stages_with_recent_rows(gqa):
    in_two_stages(gqa, "int4")


def test_run_batch(smollm2, tmp_path):
    # Both answers lead by more than 2 nats, at every word up to the one asked for.
    questions = {
        "water": ("What is the boiling point of water?", "100"),
        "capital": ("What is the capital of Japan?", "Tokyo"),
    }
    requests = [
        {
            "custom_id": name,
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": str(smollm2),
                "messages": [{"role": "user", "content": question}],
                "temperature": 0.0,
                "max_tokens": 24,
            },
        }
        for name, (question, _) in questions.items()
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(request) + "\n" for request in requests))
    command = [vllm_command(), "run-batch", "-i", str(source), "-o", str(target)]
    command += ["--model", str(smollm2), "--kv-cache-dtype", DTYPE, "--enforce-eager"]
    command += ["--max-model-len", "1024", "--kv-cache-memory-bytes", str(128 << 20)]
    done = subprocess.run(
        command,
        env={**os.environ, **engine_env()},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    replies = [json.loads(line) for line in target.read_text().splitlines()]
    assert {reply["custom_id"] for reply in replies} == questions.keys()
    for reply in replies:
        answer = reply["response"]["body"]["choices"][0]["message"]["content"]
        assert questions[reply["custom_id"]][1] in answer


def test_sleep_mode_is_not_vllms_on_cpus(gqa):
    """Which is why the support matrix has no such cell for CPUs."""
    (result,) = run([Job({"model": str(gqa), "enable_sleep_mode": True})])
    assert "Sleep mode is not supported on current platform" in result.error
