"""What the vLLM that comes first on PYTHONPATH says beside its engines: one JSON object.

python tests/version_facts.py MODEL
"""

from __future__ import annotations

import json
import sys

from engine_jobs import ENGINE


def command_line(model: str) -> list[str]:
    """Which of our dtypes, and of a word that is none, ``vllm serve`` takes.

    Nothing has loaded the plugin before: building the command's parser has to.
    """
    from vllm.config import CacheConfig
    from vllm.entrypoints.cli import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from kvq_plugin.formats import SERVED

    parser = FlexibleArgumentParser()
    [command] = serve.cmd_init()
    command.subparser_init(parser.add_subparsers())
    accepted = []
    for name in (*SERVED, "int9"):
        try:
            arguments = parser.parse_args(["serve", model, "--kv-cache-dtype", name])
            accepted.append(CacheConfig(cache_dtype=arguments.kv_cache_dtype).cache_dtype)
        except (SystemExit, ValueError):  # by argparse, and from 0.33 on by CacheConfig
            continue
    return accepted


def dtype_handlers() -> dict:
    """Our dtypes in vLLM's own registry of them (0.33): name -> what vLLM makes of the entry."""
    import torch
    from vllm.config import cache

    if not hasattr(cache, "register_kv_cache_dtype"):
        return {}
    from vllm.v1 import kv_cache_interface

    found = {}
    for name, handler in cache._KV_CACHE_DTYPE_HANDLERS.items():
        found[name] = {
            "conforms": isinstance(handler, cache.KVCacheDTypeHandler) and handler.name == name,
            "tensors": cache.STR_DTYPE_TO_TORCH_DTYPE[name] is handler.torch_dtype() is torch.uint8,
            "custom": kv_cache_interface.get_kv_quant_mode(name).is_custom_mode,
            "quantized": kv_cache_interface.is_quantized_kv_cache(name),
            "known": cache.is_known_kv_cache_dtype(name),
        }
    return found


def late_block_size(model: str) -> str:
    """The error of an engine whose blocks get a size of 48 once the model has its backends."""
    from vllm import LLM
    from vllm.platforms import current_platform

    def choose(cls, vllm_config):
        vllm_config.cache_config.block_size = 48

    type(current_platform).update_block_size_for_backend = classmethod(choose)
    try:
        LLM(model, kv_cache_dtype="int8_per_token_head", **ENGINE)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main(model: str) -> dict:
    accepted = command_line(model)
    import vllm

    from kvq_plugin import doctor

    return {
        "accepted": accepted,
        "vllm": vllm.__version__,
        "doctor": [finding.what for finding in doctor.versions()],
        "handlers": dtype_handlers(),
        "late_block_size": late_block_size(model),
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
