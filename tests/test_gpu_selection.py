"""Which backend vLLM's CUDA and ROCm platforms give a layer once the plugin is loaded, and what is
refused at start. Without a GPU: ``gpu_platform.py`` says what is vLLM's own code there and what a
stand-in."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from gpu_platform import FLASH, run

from kvq_plugin.formats import SERVED as NAMES

pytest.importorskip("vllm")

OURS = {name: f"kvq_plugin.serving.gpu.KVQ_{format.name}" for name, format in NAMES.items()}
STOCK = "kvq_plugin.serving.stock_triton.StockTritonBackend"
#: What vLLM 0.32 does not know; all else stays its own unless KVQ is named.
OWN = ["int8", "k8v4", "int4", "k3v2"]
TRITON = "vllm.v1.attention.backends.triton_attn.TritonAttentionBackend"

#: Layers that cannot be served, by what the message must say.
REFUSED = {
    "head_size not supported": {"head_size": 272},
    "block_size not supported": {"block_size": 24},
    "partial multimodal token": {"use_mm_prefix": True},
    "KV connector not supported": {"use_kv_connector": True},
    "PCP not supported": {"use_pcp": True},
    "DCP not supported": {"use_dcp": True},
    "R-SWA not supported": {"use_rswa": True},
    "batch invariance not supported": {"use_batch_invariant": True},
    "decoder self-attention only": {"attn_type": "encoder_decoder"},
}
SERVED = (
    {"has_sink": True, "has_sliding_window": True, "use_non_causal": True},
    {"head_size": 80, "block_size": 48},
    {"use_adaptive_verification": True},
)

#: Engine arguments that must be refused before anything is loaded where the plugin serves, by what
#: the message must say; vLLM's own fp8 is none of the plugin's business.
ENGINES = {
    "blocks of 24 tokens: supported are multiples of 16": {"block_size": 24},
    "context parallelism": {"decode_context_parallel_size": 3, "tensor_parallel_size": 3},
    "KV connector": {
        "kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    },
    "int8 needs calibrated scales": {"kv_cache_dtype": "int8"},
    "the only option, or nothing: remove it": {"additional_config": {"kvq": {"wndow": 3}}},
}

SELECT = f"""
import json
from kvq_plugin.serving.compat.additions import added_backend
own = added_backend("KVQ").name
names, refused, served = {list(NAMES)!r}, {list(REFUSED.values())!r}, {SERVED!r}
found = {{
    "own": own,
    "auto": {{n: select(n) for n in names}},
    "stock": {{n: stock(n) for n in names if n not in {OWN!r}}},
    "named": [select(n, own) for n in names],
    "triton": [select("auto", "TRITON_ATTN"), select("fp8", "TRITON_ATTN")],
    "unquantized": [select("auto", b) for b in (None, own, "FLASH_ATTN")],
    "encoder": [select("fp8", own, attn_type="encoder_only"),
                select("int8", attn_type="encoder_only")],
    "vllms": select("fp8", "FLASH_ATTN"),
    "unknown to vllm": [refusal(select, "int8", b) for b in ("FLASH_ATTN", "TRITON_ATTN")],
    "refused": [refusal(select, "fp8", own, **layer) for layer in refused],
    "own refused": [refusal(select, "int8", **layer) for layer in refused],
    "served": [select("fp8", own, **layer) for layer in served],
    "mla": [select("fp8", use_mla=True, head_size=576),
            stock("fp8", use_mla=True, head_size=576)],
    "connector": [select("fp8", use_kv_connector=True), stock("fp8", use_kv_connector=True)],
}}
"""
CONFIGURE = f"""
import os, pickle
model, engines = os.environ["MODEL"], {list(ENGINES.values())!r}
def summary(dtype, backend=None, **more):
    config = engine(model, kv_cache_dtype=dtype, attention_backend=backend, **more)
    return [type(config.quant_config).__name__, config.cache_config.cache_dtype]
fp8 = {{"kv_cache_dtype": "fp8", "attention_backend": "KVQ"}}
of_vllm = [{{"block_size": 24}}, engines[2]]  # its kernels may take them
found |= {{
    "engines": [refusal(engine, model, **(fp8 | more)) for more in engines],
    "configs": [summary("fp8", b) for b in ("KVQ", None, "TRITON_ATTN", "FLASH_ATTN")],
    "foreign": [summary("nvfp4"), *(summary("fp8", **more) for more in of_vllm)],
    "pickle": pickle.dumps(engine(model, attention_backend="KVQ").attention_config).hex(),
}}
platform.capability = (7, 5)
found["old GPU"] = [refusal(engine, model, **fp8), refusal(select, "fp8", "KVQ")]
"""
PRINT = """
print(json.dumps(found))
"""
#: vLLM loads a model's class in a process of its own to note facts about it, which fails on the
#: stand-in; what a CPU noted is read from vLLM's cache.
INSPECT = """
import sys
from vllm.engine.arg_utils import EngineArgs
EngineArgs(model=sys.argv[1], skip_tokenizer_init=True, max_model_len=512).create_engine_config()
"""


@pytest.fixture(scope="module")
def cuda(smollm2) -> dict:
    subprocess.run([sys.executable, "-c", INSPECT, str(smollm2)], check=True, timeout=300)
    return json.loads(run("cuda", SELECT + CONFIGURE + PRINT, MODEL=str(smollm2))[-1])


@pytest.fixture(scope="module", params=["cuda", "rocm"])
def platform(request) -> dict:
    """What was selected on each; ROCm's with vLLM's registry as it was before 0.32."""
    if request.param == "cuda":
        found = request.getfixturevalue("cuda")
    else:
        found = json.loads(run(request.param, SELECT + PRINT, OLD_REGISTRY="1")[-1])
    assert found["own"] == {"cuda": "KVQ", "rocm": "CUSTOM"}[request.param]
    return found


def test_names_that_vllm_has_stay_vllms(platform):
    ours = {name: path for name, path in platform["auto"].items() if "kvq_plugin" in path}
    assert ours == {name: OURS[name] for name in OWN}
    assert platform["auto"] == platform["stock"] | ours


def test_the_backend_that_is_named_has_all_names(platform):
    assert platform["named"] == list(OURS.values())


def test_triton_is_vllms(platform):
    assert platform["triton"] == [TRITON, TRITON]


def test_unquantized_layers_keep_vllms_choice(platform):
    """Under KVQ, the one vLLM would make without it."""
    auto, kvq, flash = platform["unquantized"]
    assert flash == FLASH and kvq == auto
    assert not auto.startswith("kvq_plugin")


def test_encoder_layers_have_no_cache(platform):
    assert platform["encoder"] == [STOCK, STOCK]


def test_another_backend_is_left_alone(platform):
    assert platform["vllms"] == FLASH
    for name, says in zip(("FLASH_ATTN", "TRITON_ATTN"), platform["unknown to vllm"], strict=True):
        assert name in says and "drop --attention-backend" in says and "KVQ" in says


@pytest.mark.parametrize("layer", ["mla", "connector"])
def test_fp8_runs_of_vllms_are_as_without_the_plugin(platform, layer):
    with_plugin, without = platform[layer]
    assert with_plugin == without and "kvq_plugin" not in with_plugin


def test_layers_that_cannot_be_served_are_refused(platform):
    for says, message in zip(REFUSED, platform["refused"], strict=True):
        assert says in message and "--kv-cache-dtype auto" in message
    for says, message in zip(REFUSED, platform["own refused"], strict=True):
        assert says in message and message.endswith("--kv-cache-dtype auto")
    assert set(platform["served"]) == {OURS["fp8"]}


# --- engines ---------------------------------------------------------------------------


def test_engines_that_cannot_work_are_refused_at_start(cuda):
    for says, message in zip(ENGINES, cuda["engines"], strict=True):
        assert says in message


def test_gpus_without_kernels_are_refused(cuda):
    engine, layer = cuda["old GPU"]
    assert "stand-in for an H200, a GPU of compute capability 7.5" in engine
    assert "supported are GPUs from 8.0 on" in engine
    assert "compute capability not supported" in layer


def test_scales_are_loaded_our_way_under_our_backend_alone(cuda):
    assert cuda["configs"] == [["KVQConfig", "fp8"]] + [["NoneType", "fp8"]] * 3


def test_what_is_vllms_is_not_checked(cuda):
    """Its own dtypes, and of fp8 all that is refused where it is ours."""
    assert cuda["foreign"] == [["NoneType", "nvfp4"]] + [["NoneType", "fp8"]] * 2


def test_a_config_that_names_the_backend_reaches_other_processes(cuda):
    """Unpickled, in a new process, before any plugin is loaded: so do vLLM's workers."""
    code = (
        "import pickle, sys; config = pickle.loads(bytes.fromhex(sys.stdin.read()));"
        "backend = config.backend;"
        "assert pickle.loads(pickle.dumps(backend)) is backend;"
        "print(backend.name, backend.get_path())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=cuda["pickle"], capture_output=True, text=True,
        timeout=300, env=os.environ | {"VLLM_PLUGINS": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-2:] == ["KVQ", STOCK]
