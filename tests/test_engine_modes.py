"""Ways of running an engine: skipped layers, tensor parallelism, compilation, refusals."""

from __future__ import annotations

import random

import gpu_engine
import pytest
from engine_jobs import Batch, Job, only, run
from scaled import add_scales
from tiny_models import make

# Engines start in fixtures, one after another, and a loaded machine takes minutes for it.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

random.seed(1)
PROMPTS = [[random.randrange(3, 500) for _ in range(n)] for n in (5, 33, 150)]
SCORED = [Batch(PROMPTS, {"prompt_logprobs": 0, "max_tokens": 8})]
DTYPE = "int8_per_token_head"
#: Nats, root mean square; measured 0.018 with every layer quantized.
MAX_CHANGE = 0.05


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    features = ("gqa", "mqa", "window_and_full_layers")
    return {feature: str(make(folder, feature)) for feature in features}


def _scores(result) -> list[float]:
    return [x for o in result.batches[0] for x in o.prompt_logprobs]


def _change(a, b) -> float:
    squares = [(x - y) ** 2 for x, y in zip(_scores(a), _scores(b), strict=True)]
    return (sum(squares) / len(squares)) ** 0.5


def test_skipped_layers_stay_unquantized(models):
    """Both layers skipped is the unquantized run; one skipped lies between."""

    def job(dtype, skip, feature="gqa"):
        return Job(
            {
                "model": models[feature],
                "kv_cache_dtype": dtype,
                "kv_cache_dtype_skip_layers": skip,
            },
            SCORED,
        )

    plain, none, first, both, window_plain, window = only(
        run(
            [
                job("auto", []),
                job(DTYPE, []),
                job(DTYPE, ["0"]),
                job(DTYPE, ["0", "1"]),
                job("auto", [], "window_and_full_layers"),
                job("int4_per_token_head", ["sliding_window"], "window_and_full_layers"),
            ]
        )
    )
    assert _scores(both) == _scores(plain)
    assert 0 < _change(plain, first) < MAX_CHANGE
    assert _scores(first) != _scores(none)
    # int4 in the one full layer only; both layers in int4 would move scores by 0.25.
    assert 0 < _change(window_plain, window) < 0.2


#: K's and V's scales, layer by layer: each granularity on each side.
STATIC = [("channel", "attn_head"), ("attn_head", "tensor"), ("tensor", "channel")]


def test_two_tensor_parallel_ranks(models, tmp_path):
    """Two kv heads are divided among the ranks, one is replicated.

    In float32, because summing bf16 halves changes the tokens of vLLM's own cache too. A head
    too far moves log-probabilities by 0.3 nats; rounding, by 1e-5 or one code.
    """
    bases = [{"model": models["mqa"], "kv_cache_dtype": DTYPE, "dtype": "float32"}]
    for feature in ("gqa", "mqa"):
        deep = make(tmp_path, feature, num_hidden_layers=len(STATIC))
        model = add_scales(deep, tmp_path / feature, PROMPTS, "int", STATIC)
        bases.append({"model": str(model), "kv_cache_dtype": "int8", "dtype": "float32"})
    alone = only(run([Job(base, SCORED) for base in bases]))
    pairs = only(
        run(
            [Job({**base, "tensor_parallel_size": 2}, SCORED) for base in bases],
            multiprocess=True,
            env={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
        )
    )
    for one, two in zip(alone, pairs, strict=True):
        assert [o.tokens for o in one.batches[0]] == [o.tokens for o in two.batches[0]]
        assert _change(one, two) < 0.01


def test_compiled_model_in_worker_processes(models):
    """vLLM's defaults: torch.compile, and an engine in processes of its own."""
    base = {"model": models["gqa"], "kv_cache_dtype": "fp8"}
    (eager,) = only(run([Job(base, SCORED)]))
    (compiled,) = only(run([Job({**base, "enforce_eager": False}, SCORED)], multiprocess=True))
    assert _change(eager, compiled) < 0.15  # fused kernels round elsewhere; e4m3 is coarse


def test_gpu_backend_under_vllms_scheduler(models):
    """Chunks, batches of decodes and prefills, windows, a layer with pages of another size, in
    pages of 16 tokens by default. Without a GPU: see gpu_engine."""
    base = {
        "model": models["window_and_full_layers"],
        "kv_cache_dtype": DTYPE,
        "max_num_batched_tokens": 64,
        "max_num_seqs": 8,
        "max_model_len": 256,
        "num_gpu_blocks_override": 48,  # the reference reads all of them each time
    }
    more = [{"block_size": 32}, {}, {"kv_cache_dtype_skip_layers": ["0"]}]
    cpu, gpu, skipped = only(
        run([Job({**base, **settings}, SCORED) for settings in more], script=gpu_engine.__file__)
    )
    # bf16 rounds elsewhere; taking a window away moves scores by 0.4.
    assert _change(cpu, gpu) < MAX_CHANGE
    assert 0 < _change(cpu, skipped) < MAX_CHANGE


def test_recent_rows_on_the_gpu_backend(models):
    """Full layers that seal, beside one with a window; decodes and prefills in launches of their
    own, each with its rows of both block tables."""
    base = {
        "model": models["window_and_full_layers"],
        "kv_cache_dtype": "int4",
        "block_size": 128,
        "max_num_batched_tokens": 64,
        "max_num_seqs": 8,
        "max_model_len": 256,
        "num_gpu_blocks_override": 48,
    }
    more = ({}, {}, {"kv_cache_dtype": "k8v4", "block_size": None})
    cpu, sealed, plain = only(
        run([Job({**base, **settings}, SCORED) for settings in more], script=gpu_engine.__file__)
    )
    assert _change(cpu, sealed) < MAX_CHANGE
    assert 0 < _change(cpu, plain) < 0.3  # other codes


@pytest.fixture(scope="module")
def refusals(models) -> dict[str, str]:
    """Errors of engines that must not start, without their tracebacks."""
    asked = {
        "int8 without scales": {"kv_cache_dtype": "int8"},
        "foreign dtype": {"kv_cache_dtype": "nvfp4"},
        "unknown option": {"kv_cache_dtype": DTYPE, "additional_config": {"kvq": {"wndow": 3}}},
    }
    results = run([Job({"model": models["gqa"], **llm}) for llm in asked.values()])
    assert all(result.error for result in results)
    messages = (result.error.split("Traceback")[0] for result in results)
    return dict(zip(asked, messages, strict=True))


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("int8 without scales", ("ValidationError", "kvq calibrate", "int8_per_token_head")),
        ("foreign dtype", ("nvfp4", "supported are", "int8_per_token_head")),
        ("unknown option", ("wndow", "remove it")),
    ],
)
def test_refused_before_anything_starts(refusals, case, says):
    for word in says:
        assert word in refusals[case]
