"""Stand-ins for vLLM's config of a run, with what the plugin reads of it."""

from __future__ import annotations

from types import SimpleNamespace

import torch

DYNAMIC = "int8_per_token_head"


def run_config(dtype=DYNAMIC, model=None, cache=None, parallel=None, **top):
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
            **{
                "decode_context_parallel_size": 1,
                "prefill_context_parallel_size": 1,
                "pipeline_parallel_size": 1,
            }
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
