"""What a configuration lacks for our KV caches and its user did not choose."""

from __future__ import annotations

from typing import Any

from kvq_plugin.formats import KVFormat
from kvq_plugin.mapping import MIXED
from kvq_plugin.serving import compat, platforms
from kvq_plugin.serving.mapped import run_formats

#: The KV cache of a draft model beside a target with recent rows.
DRAFT_DTYPE = "int8_per_token_head"


def settle_drafts(vllm_config: Any) -> None:
    """Give a draft model, where the target has recent rows or a mapping, a KV cache of its own."""
    speculation = None
    if vllm_config.cache_config.cache_dtype == MIXED or _sealed(vllm_config):
        speculation = vllm_config.speculative_config
    if speculation is not None and speculation.kv_cache_dtype is None:
        speculation.kv_cache_dtype = DRAFT_DTYPE


def settle_draft_blocks(vllm_config: Any) -> None:
    """What blocks of a draft's configuration have of the run's, of which vLLM makes it.

    Whose choice their size is: vLLM 0.33 takes the run's for a draft with a KV cache of its own,
    and it counts as the user's then, whoever chose. And how they lie, which vLLM leaves out: the
    draft's layers share the blocks of the target's (settle_layout).
    """
    if not is_drafts(vllm_config):
        return
    cache, run = vllm_config.cache_config, compat.get_current_vllm_config_or_none().cache_config
    cache.user_specified_block_size = run.user_specified_block_size
    cache.kv_cache_layout = run.kv_cache_layout


def is_drafts(vllm_config: Any) -> bool:
    """Whether this is a draft model's configuration, which vLLM makes of the run's, in force."""
    run = compat.get_current_vllm_config_or_none()
    if run is None or run is vllm_config:
        return False
    return None not in (run.speculative_config, vllm_config.speculative_config)


def settle_blocks(vllm_config: Any) -> None:
    """Blocks of sealed rows that hold enough of them, unless the user chose: GPUs' default of 16
    tokens is less than a group, and vLLM would take the smallest that all layers' backends have."""
    sealed, cache = _sealed(vllm_config), vllm_config.cache_config
    if compat.is_cpu() or not sealed or cache.user_specified_block_size:
        return
    cache.block_size = platforms.backends()[sealed[0]].default_block_size
    cache.user_specified_block_size = True  # to vLLM, which keeps it then


def _sealed(vllm_config: Any) -> list[KVFormat]:
    """The run's formats that have recent rows."""
    return [format for format in run_formats(vllm_config) if format.recent is not None]
