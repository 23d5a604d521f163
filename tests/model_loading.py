"""Fixtures: tiny models with KV scales through vLLM's own loader, without an engine."""

from __future__ import annotations

import json
import os
import pickle
from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("vllm")

from tiny_models import make  # noqa: E402

from kvq_plugin.serving import compat  # noqa: E402

ATTENTION = "model.layers.{}.self_attn."


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """``checkpoint(model)`` -> weights and config.json of a tiny random model."""
    folder = tmp_path_factory.mktemp("models")

    @cache
    def read(model):
        path = make(folder, model)
        return load_file(path / "model.safetensors"), json.loads((path / "config.json").read_text())

    return read


@pytest.fixture(scope="module")
def engine_free(tmp_path_factory):
    """vLLM's process groups for one rank, without an engine; the environment is put back."""
    from vllm import distributed
    from vllm.config import VllmConfig, set_current_vllm_config

    from kvq_plugin.serving import register

    environment = dict(os.environ)
    register()
    with pytest.MonkeyPatch.context() as patch, set_current_vllm_config(VllmConfig()):
        # vLLM's CPU worker does the same: torch has no allocator to empty without a device.
        patch.setattr(torch.accelerator, "empty_cache", lambda: None)
        store = tmp_path_factory.mktemp("groups") / "store"
        distributed.init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
        distributed.initialize_model_parallel(1, 1)
        yield
        distributed.destroy_model_parallel()
        distributed.destroy_distributed_environment()
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def load(checkpoint, engine_free, tmp_path):
    """``load(dtype, tensors, **engine_args)`` -> (model, its attention layers, vllm_config).

    ``prepare(names)`` is called once the checkpoint is written, with its tensors' names.
    """
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    def run(dtype, tensors, quantization=None, model="gqa", prepare=None, **engine_args):
        weights, config = checkpoint(model)
        if quantization is not None:
            config = config | {"quantization_config": quantization}
        (tmp_path / "config.json").write_text(json.dumps(config))
        tensors = {k: torch.as_tensor(v).contiguous().clone() for k, v in tensors.items()}
        save_file({**weights, **tensors}, tmp_path / "model.safetensors", {"format": "pt"})
        if prepare is not None:
            prepare([*weights, *tensors])
        vllm_config = EngineArgs(
            model=str(tmp_path),
            **{
                "skip_tokenizer_init": True,
                "kv_cache_dtype": dtype,
                "max_model_len": 128,
                "enforce_eager": True,
                "dtype": "bfloat16",
                **engine_args,
            },
        ).create_engine_config()
        vllm_config = pickle.loads(pickle.dumps(vllm_config))  # as workers receive it
        with set_current_vllm_config(vllm_config):
            model = get_model(vllm_config=vllm_config)
        found = vllm_config.compilation_config.static_forward_context.values()
        return model, [x for x in found if isinstance(x, compat.Attention)], vllm_config

    return run


def both(suffixes, module=ATTENTION):
    """*suffixes* -> value, in both layers; layer 1's scales are doubled."""
    return {
        module.format(i) + name: torch.as_tensor(value) * (1 + i * name.endswith("scale"))
        for i in range(2)
        for name, value in suffixes.items()
    }
