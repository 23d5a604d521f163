"""Tiny random models, one per attention feature the built-in model lacks.

Weights have a standard deviation of 0.1, so that softmax is far from uniform and a wrong
mask, window or bias moves every log-probability by much more than quantization does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

VOCAB = 512
STD = 0.1
_BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": STD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GEMMA = {"query_pre_attn_scalar": 32, "sliding_window": 48}


def _llama(**changes) -> dict[str, Any]:
    return {"model_type": "llama", **_BASE, **changes}


#: feature -> configuration. Windows of 48 are shorter than the prompts and than a block.
CONFIGS: dict[str, dict[str, Any]] = {
    "gqa": _llama(),
    "mqa": _llama(num_key_value_heads=1),
    "group_16": _llama(num_attention_heads=16, num_key_value_heads=1),
    "head_size_80": _llama(head_dim=80),
    "head_size_256": _llama(head_dim=256),
    "sliding_window": {**_BASE, "model_type": "mistral", "sliding_window": 48},
    "softcap": {
        **_BASE,
        **_GEMMA,
        "model_type": "gemma2",
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": None,
    },
    "window_and_full_layers": {
        **_BASE,
        **_GEMMA,
        "model_type": "gemma3_text",
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "alibi": {
        "model_type": "bloom",
        "vocab_size": VOCAB,
        "hidden_size": 128,
        "n_layer": 2,
        "n_head": 4,
        "initializer_range": STD,
    },
    "sinks": {
        **_BASE,
        "model_type": "gpt_oss",
        "num_local_experts": 2,
        "num_experts_per_tok": 2,
        "sliding_window": 48,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 1.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 512,
            "truncate": False,
        },
    },
    "kv_sharing": {
        **_BASE,
        "model_type": "gemma3n_text",
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "intermediate_size": [128] * 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4,
        "sliding_window": 48,
        "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": VOCAB,
        "laurel_rank": 8,
    },
}

#: Models whose checkpoints name their scales in a way of their own, one whose layers vLLM makes
#: without a cache configuration, and one that sees its prompt in both directions; loaded, not
#: generated with.
LOADED_ONLY: dict[str, dict[str, Any]] = {
    "falcon": {
        **{k: _BASE[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers")},
        "model_type": "falcon",
        "num_attention_heads": 4,
        "initializer_range": STD,
    },
    "prefix_lm": {
        **{key: value for key, value in _BASE.items() if key != "num_key_value_heads"},
        "model_type": "hrm_text",
        "num_layers_per_stack": 1,
        "H_cycles": 1,
        "L_cycles": 1,
    },
    "hy_v3": {
        **_BASE,
        "model_type": "hy_v3",
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "num_shared_experts": 1,
        "moe_intermediate_size": 64,
        "expert_hidden_dim": 64,
        "enable_moe_fp32_combine": False,
        "route_norm": True,
        "qk_norm": True,
        "first_k_dense_replace": 1,
        "mlp_layer_types": ["dense", "sparse"],
    },
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": VOCAB,
        "n_embd": 128,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 512,
        "initializer_range": STD,
    },
    "nemotron_h": {
        **{key: value for key, value in _BASE.items() if key != "num_hidden_layers"},
        "model_type": "nemotron_h",
        "layers_block_type": ["attention", "attention"],
    },
}

#: feature -> the change that takes it away, to show that the test would notice.
WITHOUT: dict[str, dict[str, Any]] = {
    "sliding_window": {"sliding_window": None},
    "softcap": {"attn_logit_softcapping": None},
    "window_and_full_layers": {"sliding_window": 400},
    "sinks": {"sliding_window": 400},
}


def make(folder: Path, feature: str, **changes) -> Path:
    """Write the model of *feature*, its configuration updated by *changes*, and return where."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict((CONFIGS | LOADED_ONLY)[feature]) | changes
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter, mean=2.0)
    path = folder / "-".join([feature, *changes])
    model.save_pretrained(path)
    return path


IMAGE_SIDE = 64  # pixels


def make_multimodal(folder: Path) -> Path:
    """Write a model that sees images (Idefics3, with the built-in model's tokenizer).

    Of the image models one that needs no torchvision; it attends causally over everything.
    """
    from transformers import (
        AutoTokenizer,
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3ImageProcessorPil,
        Idefics3Processor,
    )

    from kvq_plugin.model import builtin_model

    size = {"longest_edge": IMAGE_SIDE}
    images = Idefics3ImageProcessorPil(size=size, max_image_size=size, do_image_splitting=False)
    tokenizer = AutoTokenizer.from_pretrained(builtin_model())
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4)
    config = Idefics3Config(
        text_config={**_BASE, "model_type": "llama", "vocab_size": len(processor.tokenizer)},
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": IMAGE_SIDE,
            "patch_size": 16,
            "initializer_range": STD,
        },
        image_token_id=processor.tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    torch.manual_seed(0)
    path = folder / "idefics3"
    Idefics3ForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(path)
    processor.save_pretrained(path)
    return path


def image_token(model: Path) -> int:
    """The token that stands for an image in a prompt for *model*."""
    return json.loads((model / "config.json").read_text())["image_token_id"]
