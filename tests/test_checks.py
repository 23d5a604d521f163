"""Refusals at start-up, on stand-ins for vLLM's config."""

from __future__ import annotations

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from kvq_plugin import kernels
from kvq_plugin.formats import FORMATS, SERVED
from kvq_plugin.kernels import cuda
from kvq_plugin.mapping import MIXED
from kvq_plugin.serving import compat, mapped, selection
from kvq_plugin.serving.checks import check, settle_blocks, settle_drafts
from kvq_plugin.serving.compat import additions
from kvq_plugin.serving.selection import serves

pytest.importorskip("vllm")

#: Names vLLM 0.32 accepts on the command line and its CPU backend would corrupt memory with.
FOREIGN = ("nvfp4", "nvfp4_4over6", "turboquant_k8v4", "ultraquant_4bit", "fp8_inc", "fp8_ds_mla")
DYNAMIC = "int8_per_token_head"


def _config(dtype=DYNAMIC, model=None, cache=None, parallel=None, **top):
    return SimpleNamespace(
        additional_config=top.pop("additional_config", {}),
        kv_transfer_config=top.pop("kv_transfer_config", None),
        speculative_config=top.pop("speculative_config", None),
        diffusion_config=top.pop("diffusion_config", None),
        quant_config=None,
        attention_config=SimpleNamespace(backend=None, backend_per_kind={}),
        cache_config=SimpleNamespace(
            **{
                "cache_dtype": dtype,
                "block_size": 128,
                "user_specified_block_size": True,
                "kv_cache_dtype_skip_layers": [],
                "kv_offloading_size": None,
                "kv_cache_layout": None,
            }
            | (cache or {})
        ),
        scheduler_config=SimpleNamespace(
            disable_hybrid_kv_cache_manager=top.pop("without_hybrid", None)
        ),
        num_speculative_tokens=top.pop("drafts", 0),
        use_v2_model_runner=False,
        parallel_config=SimpleNamespace(
            **{"decode_context_parallel_size": 1, "prefill_context_parallel_size": 1}
            | (parallel or {})
        ),
        model_config=SimpleNamespace(
            **{
                "dtype": torch.bfloat16,
                "model": "no-such-folder",
                "hf_config": SimpleNamespace(),
                "use_mla": False,
                "is_encoder_decoder": False,
                "is_hybrid": False,
                "is_attention_free": False,
                "is_mm_prefix_lm": False,
                "rswa_window": None,
                "get_head_size": lambda: 64,
                "get_total_num_hidden_layers": lambda: 4,
            }
            | (model or {})
        ),
    )


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", *SERVED])
def test_what_works_is_let_through(dtype):
    check(_config(dtype))


def test_a_config_without_a_model_is_let_through():
    config = _config()
    config.model_config = None
    check(config)


@pytest.mark.parametrize("dtype", FOREIGN)
def test_foreign_dtypes(dtype):
    with pytest.raises(ValueError, match=f"{dtype} is not implemented.*supported are auto"):
        check(_config(dtype))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": {"use_mla": True}}, "MLA"),
        ({"model": {"is_encoder_decoder": True}}, "cross attention"),
        ({"model": {"is_hybrid": True}}, "state-space"),
        ({"model": {"is_attention_free": True}}, "without attention"),
        ({"model": {"get_head_size": lambda: 72}}, "head size 72: supported are 32, 64"),
        ({"model": {"is_mm_prefix_lm": True}}, "images in both directions.*--limit-mm-per-prompt"),
        ({"model": {"rswa_window": 64}}, "R-SWA"),
        ({"diffusion_config": object()}, "mix causal and bidirectional"),
        ({"kv_transfer_config": object()}, "KV connector"),
        ({"parallel": {"decode_context_parallel_size": 2}}, "decode-context-parallel-size 2"),
        ({"parallel": {"prefill_context_parallel_size": 2}}, "prefill-context-parallel-size 2"),
        ({"cache": {"kv_offloading_size": 1.0}}, "KV offloading.*drop.*--kv-offloading-size"),
        ({"cache": {"block_size": 16}}, "blocks of 16 tokens.*multiples of 32"),
        ({"cache": {"kv_cache_dtype_skip_layers": ["4"]}}, "'4'.*layer numbers 0 to 3"),
        ({"cache": {"kv_cache_dtype_skip_layers": ["attention"]}}, "'attention'"),
        ({"speculative_config": SimpleNamespace(kv_cache_dtype="int8")}, "draft.*calibrated"),
        ({"speculative_config": SimpleNamespace(kv_cache_dtype="nvfp4")}, "draft.*nvfp4"),
    ],
)
def test_refusals_say_why(change, says):
    with pytest.raises(ValueError, match=says) as refusal:
        check(_config(**change))
    assert "use" in str(refusal.value) or "supported" in str(refusal.value)


@pytest.mark.parametrize(
    ("dtype", "change", "says"),
    [
        ("int4", {"cache": {"block_size": 32}}, "blocks of 32.*64 and more.*--block-size 128"),
        ("k3v2", {"cache": {"block_size": 64}}, "blocks of 64.*96 and more.*--block-size 128"),
        ("k3v2", {"model": {"get_head_size": lambda: 80}}, "head size 80.*multiples of 32"),
        ("int4", {"model": {"attention_chunk_size": 8192}}, "chunked local.*int8_per_token_head"),
        ("int4", {"without_hybrid": True}, "drop --disable-hybrid-kv-cache-manager"),
        ("int4", {"drafts": 33}, "33 speculative tokens.*up to 32.*num_speculative_tokens"),
        ("int4", {"method": "draft_model"}, "V1 model runner.*use another method"),
        ("int4", {"kv_cache_dtype": "k3v2"}, "draft.*k3v2.*int8_per_token_head.*leave it out"),
    ],
)
def test_recent_rows_that_cannot_be_kept(dtype, change, says):
    fields = {name: change.pop(name) for name in ("method", "kv_cache_dtype") if name in change}
    if fields or "drafts" in change:
        drafter = SimpleNamespace(model="elsewhere", hf_config=SimpleNamespace())
        fields = {"kv_cache_dtype": None, "method": "eagle", "draft_model_config": drafter} | fields
        change["speculative_config"] = SimpleNamespace(**fields)
    with pytest.raises(ValueError, match=says):
        check(_config(dtype, **change))


@pytest.mark.parametrize("dtype", ["auto", DYNAMIC, "k8v4", "int4"])
def test_a_draft_model_keeps_no_recent_rows(dtype):
    speculation = SimpleNamespace(kv_cache_dtype=None)
    settle_drafts(_config(dtype, speculative_config=speculation))
    assert speculation.kv_cache_dtype == (DYNAMIC if dtype == "int4" else None)


@pytest.mark.parametrize(
    ("model", "method", "refused"),
    [
        ("elsewhere", "eagle", True),
        ("elsewhere", "medusa", False),  # no attention of its own
        ("no-such-folder", "ngram", False),  # the target itself
    ],
)
def test_a_draft_model_that_would_inherit_static_int8(model, method, refused):
    drafter = SimpleNamespace(model=model, hf_config=SimpleNamespace())
    speculation = SimpleNamespace(kv_cache_dtype=None, draft_model_config=drafter, method=method)
    config = _config("int8", speculative_config=speculation)
    if not refused:
        return check(config)
    with pytest.raises(ValueError, match='draft.*int8.*calibrated.*"kv_cache_dtype"'):
        check(config)
    drafter.hf_config.quantization_config = {"kv_cache_scheme": {"num_bits": 8}}
    check(config)


@pytest.mark.parametrize("change", [{"model": {"use_mla": True}}, {"kv_transfer_config": object()}])
def test_an_unquantized_cache_is_vllms_business(change):
    check(_config("auto", **change))


def test_an_unquantized_cache_must_have_the_models_dtype():
    with pytest.raises(ValueError, match="running in bfloat16.*--dtype float16"):
        check(_config("float16"))


def test_a_block_size_that_vllm_has_not_chosen_yet():
    check(_config(cache={"block_size": 16, "user_specified_block_size": False}))


def test_skip_layers_that_exist():
    check(_config(cache={"kv_cache_dtype_skip_layers": ["0", "3", "sliding_window"]}))


# --- whose cache it is -----------------------------------------------------------------

#: Models and engines that the plugin cannot serve, which vLLM's own kernels may.
NOT_OURS = [
    {"model": {"is_encoder_decoder": True}},
    {"model": {"is_hybrid": True}},
    {"model": {"get_head_size": lambda: 1024}},
    {"kv_transfer_config": object()},
    {"diffusion_config": object()},
    {"parallel": {"decode_context_parallel_size": 2}},
    {"parallel": {"prefill_context_parallel_size": 2}},
]
MLA = {"model": {"use_mla": True}}
DECLARED = {"quantization_config": {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}}


def _declaring(change):
    """*change* for a checkpoint that declares fp8 scales."""
    model = change.get("model", {}) | {"hf_config": SimpleNamespace(**DECLARED)}
    return change | {"model": model}


@pytest.mark.parametrize("change", NOT_OURS)
def test_on_cpus_what_we_do_not_serve_keeps_vllms_fp8(change):
    for config in (_config("fp8", **change), _config("auto", **_declaring(change))):
        check(config)
        assert not serves(config)
    with pytest.raises(ValueError, match="supported are"):  # vLLM would corrupt memory
        check(_config(DYNAMIC, **change))
    check(_config("auto", **change))


def test_on_cpus_vllm_has_no_fp8_for_mla():
    with pytest.raises(ValueError, match="MLA"):
        check(_config("fp8", **MLA))
    declared = _config("auto", **_declaring(MLA))  # vLLM serves these unquantized
    check(declared)
    assert not serves(declared)


def test_on_cpus_fp8_of_vllms_own_can_be_named():
    config = _config("fp8", cache={"block_size": 16, "user_specified_block_size": True})
    config.attention_config.backend = compat.AttentionBackendEnum.CPU_ATTN
    check(config)
    assert not serves(config)
    config.cache_config.cache_dtype = DYNAMIC
    assert serves(config)  # vLLM has no such kernel


@pytest.mark.parametrize("dtype", FORMATS)
def test_on_cpus_our_names_are_ours(dtype):
    assert serves(_config(dtype))


OWN = "int8_per_token_head"  # here, as if vLLM did not know it: needs no calibration


@pytest.fixture
def on_gpu(monkeypatch):
    """A process of vLLM's CUDA platform, as far as the checks can tell, where CUSTOM is ours."""
    monkeypatch.setattr(compat, "is_cpu", lambda: False)
    monkeypatch.setattr(compat.current_platform, "get_device_capability", lambda: None)
    ours = compat.AttentionBackendEnum.CUSTOM
    monkeypatch.setattr(additions, "_added_backends", {selection.BACKEND_NAME: ours})
    monkeypatch.setattr(additions, "_own_dtypes", {OWN})

    def config(*args, backend=None, per_kind=None, **kwargs):
        made = _config(*args, **kwargs)
        backend = backend and compat.AttentionBackendEnum[backend]
        made.attention_config = SimpleNamespace(backend=backend, backend_per_kind=per_kind or {})
        return made

    return config


@pytest.mark.parametrize("dtype", ["auto", "float16", "nvfp4", *FORMATS])
@pytest.mark.parametrize("head_size", [16, 80, 256])
def test_what_works_on_gpus(on_gpu, dtype, head_size):
    shape = {"model": {"get_head_size": lambda: head_size}, "cache": {"block_size": 16}}
    for backend in (None, "CUSTOM"):
        if FORMATS.get(dtype) is not FORMATS["int8"] or backend is None:  # which needs scales
            check(on_gpu(dtype, backend=backend, **shape))


@pytest.fixture
def sealing_gpu(on_gpu, monkeypatch):
    """A GPU of NVIDIA's, with the CUDA C++ kernels, to formats that vLLM does not know."""
    monkeypatch.setattr(additions, "_own_dtypes", SERVED.keys() - FORMATS.keys())
    monkeypatch.setattr(compat.current_platform, "is_cuda", lambda: True)
    monkeypatch.setattr(cuda, "library_refusal", lambda: None)
    return on_gpu


@pytest.mark.parametrize("dtype", sorted(SERVED.keys() - FORMATS.keys()))
def test_low_bits_on_gpus(sealing_gpu, monkeypatch, dtype):
    recent = SERVED[dtype].recent is not None
    check(sealing_gpu(dtype))
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)  # Triton
    for name, value, says in (
        ("library_refusal", lambda: "it is not built", "kernels: it is not built, nor is Triton"),
        ("shape_refusal", lambda *shape: f"no {shape[1:]}", r"kernels: no \(64, 128\), nor is"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(cuda, name, value)
            with pytest.raises(ValueError, match=says) if recent else nullcontext():
                check(sealing_gpu(dtype))


@pytest.mark.parametrize("dtype", ("int4", "k3v2"))
def test_low_bits_on_gpus_without_the_library(on_gpu, monkeypatch, dtype):
    """Triton's kernels, unless CUDA C++ alone is asked for; on AMD there are no others."""
    monkeypatch.setattr(additions, "_own_dtypes", SERVED.keys() - FORMATS.keys())
    monkeypatch.setattr(cuda, "library_refusal", lambda: "it is not built")
    monkeypatch.setattr(kernels, "find_spec", lambda name: name)
    for is_cuda in (True, False):
        monkeypatch.setattr(compat.current_platform, "is_cuda", lambda is_cuda=is_cuda: is_cuda)
        check(on_gpu(dtype))
    monkeypatch.setattr(kernels, "_choice", lambda: "cuda")
    with pytest.raises(ValueError, match="KVQ_GPU_KERNELS=cuda: it is not built; use"):
        check(on_gpu(dtype))


def test_blocks_of_sealed_rows_on_gpus(sealing_gpu):
    """Larger ones than vLLM would take, unless the user says; other formats keep theirs."""
    for dtype, given, chosen in (("int4", False, 128), ("int4", True, 96), ("k8v4", False, 96)):
        cache = {"block_size": 96, "user_specified_block_size": given}
        config = sealing_gpu(dtype, cache=cache)
        settle_blocks(config)
        assert config.cache_config.block_size == chosen
    for size, says in ((48, "multiples of 32"), (32, "64 and more")):
        with pytest.raises(ValueError, match=f"blocks of {size} .* {says}; use --block-size 128"):
            check(sealing_gpu("int4", cache={"block_size": size}))


@pytest.mark.parametrize("change", [MLA, *NOT_OURS])
def test_on_gpus_names_that_vllm_has_are_its_business(on_gpu, change):
    for backend in (None, "TRITON_ATTN", "FLASH_ATTN"):
        for config in (
            on_gpu("fp8", backend=backend, **change),
            on_gpu("auto", backend=backend, **_declaring(change)),
        ):
            check(config)
            assert not serves(config)


@pytest.mark.parametrize("change", [MLA, *NOT_OURS])
def test_gpu_refusals_name_the_ways_out(on_gpu, change):
    with pytest.raises(ValueError, match="supported are .*use --") as refusal:
        check(on_gpu("fp8", backend="CUSTOM", **change))
    assert "or drop --attention-backend" in str(refusal.value)
    with pytest.raises(ValueError, match="supported are .*use --") as refusal:
        check(on_gpu(OWN, **change))
    assert "--attention-backend" not in str(refusal.value)  # vLLM knows no such name


def test_one_kind_of_layers_left_to_the_plugin_is_checked(on_gpu):
    kinds = {"sliding_window": compat.AttentionBackendEnum.CUSTOM}
    with pytest.raises(ValueError, match="MLA"):
        check(on_gpu("fp8", backend="FLASH_ATTN", per_kind=kinds, **MLA))


def test_a_scheme_we_cannot_serve_is_vllms_business_on_gpus(on_gpu):
    scheme = {"quantization_config": {"kv_cache_scheme": {"num_bits": 4, "type": "float"}}}
    model = {"hf_config": SimpleNamespace(**scheme)}
    assert not serves(on_gpu("auto", model=model))
    with pytest.raises(ValueError):
        serves(on_gpu("auto", backend="CUSTOM", model=model))


# --- static scales ---------------------------------------------------------------------


def _folder(tmp_path, tensors):
    save_file({name: torch.ones(1) for name in tensors}, tmp_path / "model.safetensors")
    return {"model": str(tmp_path)}


WEIGHT = "model.layers.0.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    "scale",
    [
        "model.layers.0.self_attn.k_scale",
        "model.layers.0.self_attn.attn.v_scale",
        "model.layers.0.self_attn.k_proj.k_scale",
        "model.layers.0.self_attn.kv_scale",
    ],
)
def test_int8_with_scales_in_the_checkpoint(tmp_path, scale):
    check(_config("int8", model=_folder(tmp_path, [WEIGHT, scale])))


@pytest.mark.parametrize("other", [WEIGHT, "model.layers.0.self_attn.k_proj.weight_scale"])
def test_int8_without_scales(tmp_path, other):
    model = _folder(tmp_path, [WEIGHT, other])
    with pytest.raises(ValueError, match="kvq calibrate.*int8_per_token_head"):
        check(_config("int8", model=model))
    for name in FORMATS.keys() - {"int8"}:
        check(_config(name, model=model))


def test_int8_names_are_read_from_the_index(tmp_path):
    index = {"weight_map": {"model.layers.0.self_attn.k_scale": "a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    check(_config("int8", model={"model": str(tmp_path)}))


def test_int8_with_a_declared_scheme_is_left_to_the_loader(tmp_path):
    model = _folder(tmp_path, [WEIGHT])
    declared = SimpleNamespace(quantization_config={"kv_cache_scheme": {"num_bits": 8}})
    check(_config("int8", model=model | {"hf_config": declared}))


# --- options ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["auto", DYNAMIC])
@pytest.mark.parametrize("given", [{"window": 1}, 3, "int8"])
def test_options_are_refused_whatever_the_dtype(dtype, given):
    with pytest.raises(ValueError, match="the only option, or nothing: remove it"):
        check(_config(dtype, additional_config={"kvq": given}))


@pytest.mark.parametrize("given", [None, {}, {"kvq": {}}, {"another_plugin": {"window": 1}}])
def test_additional_config_without_options_is_let_through(given):
    check(_config(additional_config=given))


def test_a_bad_switch_for_huge_pages_is_refused_at_start(monkeypatch):
    monkeypatch.setenv("KVQ_HUGE_PAGES", "yes")
    with pytest.raises(ValueError, match="KVQ_HUGE_PAGES='yes': expected 1 .* or 0"):
        check(_config())
    check(_config("auto"))  # not the plugin's to serve


# --- mappings of layers ----------------------------------------------------------------


def _mixed(layers, **more):
    return _config(MIXED, additional_config={"kvq": {"layers": layers}}, **more)


def test_a_mapping_is_served_and_checked_format_by_format(tmp_path):
    save_file({"a.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    check(_mixed({"0": "int8_per_token_head", "default": "int4"}))
    assert serves(_mixed({"default": "auto"}))
    for layers, says in (
        ({"0": "int8", "default": "k8v4"}, "kvq_mixed needs calibrated scales"),
        ({"0-99": "int4"}, "'0-99' names layer 99, which the model lacks"),
    ):
        with pytest.raises(ValueError, match=says):
            check(_mixed(layers, model={"model": str(tmp_path)}))
    with pytest.raises(ValueError, match="head size 80: supported are multiples of 32"):
        check(_mixed({"0": "k3v2", "default": "int4"}, model={"get_head_size": lambda: 80}))
    with pytest.raises(ValueError, match="blocks of 32 tokens"):
        small = {"block_size": 32}
        check(_mixed({"0": "k8v4", "default": "k3v2"}, cache=small))


def test_a_mapping_needs_its_dtype_and_the_dtype_a_mapping():
    given = {"kvq": {"layers": {"default": "int4"}}}
    for dtype in ("auto", "int4"):
        with pytest.raises(ValueError, match="expected kvq_mixed; pass --kv-cache-dtype kvq_mixed"):
            check(_config(dtype, additional_config=given))
    with pytest.raises(ValueError, match="needs to know each layer's KV cache"):
        check(_config(MIXED))


def test_a_checkpoint_may_carry_its_mapping():
    held = SimpleNamespace(kvq={"layers": {"default": "int4"}})
    assert serves(_config("auto", model={"hf_config": held}))
    check(_config(MIXED, model={"hf_config": held}))
    own = _config(MIXED, {"hf_config": held}, additional_config={"kvq": {"layers": {"0": "int4"}}})
    with pytest.raises(ValueError, match="says nothing about layers"):  # the user's own wins
        check(own)


def test_only_recent_rows_beside_other_pages_need_packed_blocks():
    for layers, expected in (
        ({"0": "int4", "default": "k8v4"}, mapped.PACKED_LAYOUT),
        ({"0": "int8_per_token_head", "default": "k8v4"}, None),
    ):
        run = _mixed(layers)
        mapped.settle_layout(run)
        assert run.cache_config.kv_cache_layout == expected
    uniform = _config("int4")
    mapped.settle_layout(uniform)
    assert uniform.cache_config.kv_cache_layout is None


def test_a_draft_model_beside_a_mapping_has_one_kv_cache():
    drafting = _mixed({"default": "k8v4"}, speculative_config=SimpleNamespace(kv_cache_dtype=None))
    settle_drafts(drafting)
    assert drafting.speculative_config.kv_cache_dtype == "int8_per_token_head"
