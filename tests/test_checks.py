"""Refusals at start-up, on stand-ins for vLLM's config."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from run_configs import DYNAMIC, run_config
from safetensors.torch import save_file

from kvq_plugin.formats import FORMATS, SERVED
from kvq_plugin.mapping import MIXED
from kvq_plugin.serving import checks, defaults, mapped
from kvq_plugin.serving.checks import check
from kvq_plugin.serving.selection import serves

pytest.importorskip("vllm")

#: Names vLLM 0.32 accepts on the command line and its CPU backend would corrupt memory with.
FOREIGN = ("nvfp4", "nvfp4_4over6", "turboquant_k8v4", "ultraquant_4bit", "fp8_inc", "fp8_ds_mla")


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", *SERVED])
def test_what_works_is_let_through(dtype):
    check(run_config(dtype))


def test_a_config_without_a_model_is_let_through():
    config = run_config()
    config.model_config = None
    check(config)


@pytest.mark.parametrize("dtype", FOREIGN)
def test_foreign_dtypes(dtype):
    with pytest.raises(ValueError, match=f"{dtype} is not implemented.*supported are auto"):
        check(run_config(dtype))


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
        check(run_config(**change))
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
        check(run_config(dtype, **change))


@pytest.mark.parametrize("dtype", ["auto", DYNAMIC, "k8v4", "int4"])
def test_a_draft_model_keeps_no_recent_rows(dtype):
    speculation = SimpleNamespace(kv_cache_dtype=None)
    defaults.settle_drafts(run_config(dtype, speculative_config=speculation))
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
    config = run_config("int8", speculative_config=speculation)
    if not refused:
        return check(config)
    with pytest.raises(ValueError, match='draft.*int8.*calibrated.*"kv_cache_dtype"'):
        check(config)
    drafter.hf_config.quantization_config = {"kv_cache_scheme": {"num_bits": 8}}
    check(config)


@pytest.mark.parametrize("change", [{"model": {"use_mla": True}}, {"kv_transfer_config": object()}])
def test_an_unquantized_cache_is_vllms_business(change):
    check(run_config("auto", **change))


def test_an_unquantized_cache_must_have_the_models_dtype():
    with pytest.raises(ValueError, match="running in bfloat16.*--dtype float16"):
        check(run_config("float16"))


def test_a_block_size_that_vllm_has_not_chosen_yet():
    check(run_config(cache={"block_size": 16, "user_specified_block_size": False}))


@pytest.mark.parametrize("entry", ["01", " 1", "\u00b2", "-1", ""])
def test_skip_layers_are_the_numbers_that_vllm_compares(entry):
    with pytest.raises(ValueError, match="layer numbers 0 to 3"):
        check(run_config(cache={"kv_cache_dtype_skip_layers": [entry]}))


@pytest.mark.parametrize(("method", "refused"), [("ngram", True), ("eagle", False)])
def test_only_a_draft_model_has_more_layers(method, refused):
    drafter = SimpleNamespace(model="elsewhere", hf_config=SimpleNamespace())
    speculation = SimpleNamespace(kv_cache_dtype=None, draft_model_config=drafter, method=method)
    config = run_config(cache={"kv_cache_dtype_skip_layers": ["4"]}, speculative_config=speculation)
    if not refused:
        return check(config)
    with pytest.raises(ValueError, match="'4'.*layer numbers 0 to 3"):
        check(config)


@pytest.mark.parametrize("chosen", [True, False])
def test_blocks_of_a_draft_are_the_users_where_those_of_the_run_are(monkeypatch, chosen):
    both = {"speculative_config": SimpleNamespace(kv_cache_dtype=None)}
    blocks = {"user_specified_block_size": chosen, "kv_cache_layout": "BLHNC"}
    run = run_config("int4", cache=blocks, **both)
    monkeypatch.setattr(checks.compat, "get_current_vllm_config_or_none", lambda: run)
    draft = run_config(cache={"block_size": 16}, **both)
    defaults.settle_draft_blocks(draft)
    assert draft.cache_config.user_specified_block_size is chosen
    assert draft.cache_config.kv_cache_layout == "BLHNC"  # which vLLM leaves out of a copy


def test_skip_layers_that_exist():
    check(run_config(cache={"kv_cache_dtype_skip_layers": ["0", "3", "sliding_window"]}))


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
    check(run_config("int8", model=_folder(tmp_path, [WEIGHT, scale])))


@pytest.mark.parametrize("other", [WEIGHT, "model.layers.0.self_attn.k_proj.weight_scale"])
def test_int8_without_scales(tmp_path, other):
    model = _folder(tmp_path, [WEIGHT, other])
    with pytest.raises(ValueError, match="kvq calibrate.*int8_per_token_head"):
        check(run_config("int8", model=model))
    for name in FORMATS.keys() - {"int8"}:
        check(run_config(name, model=model))


def test_int8_names_are_read_from_the_index(tmp_path):
    index = {"weight_map": {"model.layers.0.self_attn.k_scale": "a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    check(run_config("int8", model={"model": str(tmp_path)}))


def test_int8_with_a_declared_scheme_is_left_to_the_loader(tmp_path):
    model = _folder(tmp_path, [WEIGHT])
    declared = SimpleNamespace(quantization_config={"kv_cache_scheme": {"num_bits": 8}})
    check(run_config("int8", model=model | {"hf_config": declared}))


# --- options ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["auto", DYNAMIC])
@pytest.mark.parametrize("given", [{"window": 1}, 3, "int8"])
def test_options_are_refused_whatever_the_dtype(dtype, given):
    with pytest.raises(ValueError, match="the only option, or nothing: remove it"):
        check(run_config(dtype, additional_config={"kvq": given}))


@pytest.mark.parametrize("given", [None, {}, {"kvq": {}}, {"another_plugin": {"window": 1}}])
def test_additional_config_without_options_is_let_through(given):
    check(run_config(additional_config=given))


def test_a_bad_switch_for_huge_pages_is_refused_at_start(monkeypatch):
    monkeypatch.setenv("KVQ_HUGE_PAGES", "yes")
    with pytest.raises(ValueError, match="KVQ_HUGE_PAGES='yes': expected 1 .* or 0"):
        check(run_config())
    check(run_config("auto"))  # not the plugin's to serve


# --- mappings of layers ----------------------------------------------------------------


def _mixed(layers, **more):
    return run_config(MIXED, additional_config={"kvq": {"layers": layers}}, **more)


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
            check(run_config(dtype, additional_config=given))
    with pytest.raises(ValueError, match="needs to know each layer's KV cache"):
        check(run_config(MIXED))


def test_a_checkpoint_may_carry_its_mapping():
    held = SimpleNamespace(kvq={"layers": {"default": "int4"}})
    assert serves(run_config("auto", model={"hf_config": held}))
    check(run_config(MIXED, model={"hf_config": held}))
    own = run_config(
        MIXED, {"hf_config": held}, additional_config={"kvq": {"layers": {"0": "int4"}}}
    )
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
    uniform = run_config("int4")
    mapped.settle_layout(uniform)
    assert uniform.cache_config.kv_cache_layout is None


def test_a_layout_of_the_users_own_is_not_overruled(monkeypatch):
    recent, plain = _mixed({"default": "int4"}), _mixed({"default": "k8v4"})
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", "NHD")
    mapped.settle_layout(plain)  # vLLM looks at it itself
    with pytest.raises(ValueError, match="LAYOUT=NHD.*supported is BLHNC; unset it"):
        mapped.settle_layout(recent)
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", mapped.PACKED_LAYOUT)
    mapped.settle_layout(recent)
    assert recent.cache_config.kv_cache_layout == mapped.PACKED_LAYOUT


def test_pipeline_stages_of_a_mapping_have_no_recent_rows():
    """A stage without any would end in vLLM's StopIteration."""
    stages = {"pipeline_parallel_size": 2}
    check(run_config("int4", parallel=stages))
    check(_mixed({"0": "int8_per_token_head", "default": "k8v4"}, parallel=stages))
    with pytest.raises(ValueError, match="stages with int4 .*; drop --pipeline-parallel-size"):
        check(_mixed({"0": "int4", "default": "k8v4"}, parallel=stages))


def test_a_draft_model_beside_a_mapping_has_one_kv_cache():
    drafting = _mixed({"default": "k8v4"}, speculative_config=SimpleNamespace(kv_cache_dtype=None))
    defaults.settle_drafts(drafting)
    assert drafting.speculative_config.kv_cache_dtype == "int8_per_token_head"


def test_the_configuration_of_a_draft_model_carries_the_targets_mapping(monkeypatch):
    """vLLM makes it of the run's, and a KV cache of the draft's own goes with no mapping."""
    both = {"speculative_config": SimpleNamespace(kv_cache_dtype=None, method="eagle")}
    run = _mixed({"default": "k8v4"}, **both)
    draft = run_config(DYNAMIC, additional_config=run.additional_config, **both)
    with pytest.raises(ValueError, match="expected kvq_mixed"):
        check(draft)
    monkeypatch.setattr(checks.compat, "get_current_vllm_config_or_none", lambda: run)
    check(draft)
    monkeypatch.setattr(checks.compat, "get_current_vllm_config_or_none", lambda: draft)
    with pytest.raises(ValueError, match="expected kvq_mixed"):
        check(draft)  # a run's own


@pytest.mark.parametrize("dtype", [DYNAMIC, "int4", "fp8"])
def test_hidden_states_are_not_quantized(dtype):
    """vLLM would end in an AssertionError once the weights are loaded."""
    speculation = SimpleNamespace(kv_cache_dtype=None, method="extract_hidden_states")
    with pytest.raises(ValueError, match="extract_hidden_states.*--kv-cache-dtype auto"):
        check(run_config(dtype, speculative_config=speculation))
