"""Whose a run's KV cache is, the plugin's or vLLM's own, and what is refused on GPUs; on stand-ins
for vLLM's config."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from run_configs import DYNAMIC, run_config

from kvq_plugin import kernels
from kvq_plugin.formats import FORMATS, SERVED
from kvq_plugin.kernels import cuda
from kvq_plugin.serving import compat, selection
from kvq_plugin.serving.checks import check
from kvq_plugin.serving.compat import additions
from kvq_plugin.serving.defaults import settle_blocks
from kvq_plugin.serving.selection import serves

pytest.importorskip("vllm")

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
    for config in (run_config("fp8", **change), run_config("auto", **_declaring(change))):
        check(config)
        assert not serves(config)
    with pytest.raises(ValueError, match="supported are"):  # vLLM would corrupt memory
        check(run_config(DYNAMIC, **change))
    check(run_config("auto", **change))


def test_on_cpus_vllm_has_no_fp8_for_mla():
    with pytest.raises(ValueError, match="MLA"):
        check(run_config("fp8", **MLA))
    declared = run_config("auto", **_declaring(MLA))  # vLLM serves these unquantized
    check(declared)
    assert not serves(declared)


def test_on_cpus_fp8_of_vllms_own_can_be_named():
    config = run_config("fp8", cache={"block_size": 16, "user_specified_block_size": True})
    config.attention_config.backend = compat.AttentionBackendEnum.CPU_ATTN
    check(config)
    assert not serves(config)
    config.cache_config.cache_dtype = DYNAMIC
    assert serves(config)  # vLLM has no such kernel


def test_on_cpus_fp8_is_not_vllms_for_one_kind_of_layers():
    config, stock = run_config("fp8"), compat.AttentionBackendEnum.CPU_ATTN
    config.attention_config.backend_per_kind = {"sliding_window": stock}
    with pytest.raises(ValueError, match="CPU_ATTN for some kinds.*--attention-backend CPU_ATTN"):
        check(config)
    config.cache_config.cache_dtype = DYNAMIC  # nobody else's
    check(config)


@pytest.mark.parametrize("field", ["backend", "per kind"])
def test_on_cpus_a_backend_of_other_platforms_is_named(monkeypatch, field):
    said = []
    logger = SimpleNamespace(warning_once=lambda text, *values: said.append(text % values))
    monkeypatch.setattr(compat, "init_logger", lambda name: logger, raising=False)
    config, other = run_config(DYNAMIC), compat.AttentionBackendEnum.TRITON_ATTN
    if field == "backend":
        config.attention_config.backend = other
    else:
        config.attention_config.backend_per_kind = {"full_attention": other}
    check(config)
    assert len(said) == 1 and "no attention backend TRITON_ATTN on CPUs" in said[0]


@pytest.mark.parametrize("dtype", FORMATS)
def test_on_cpus_our_names_are_ours(dtype):
    assert serves(run_config(dtype))


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
        made = run_config(*args, **kwargs)
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
