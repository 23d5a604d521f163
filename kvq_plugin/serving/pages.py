"""How large the pages of sealed and of recent rows are, and how many tokens fit.

All pages of an engine have the size of the largest one, unless its layers are of several formats
(:func:`kvq_plugin.serving.mapped.settle_layout`): then a block is the pages of all full-attention
layers side by side, each as large as it is, and the recent rows' pages lie in another such block.
Where all are equal and the largest would be another layer's than
the sealed ones', its blocks are made shorter: at head size 64 a sealed page of 128 tokens of
``int4`` has 9,984 bytes a kv head, and one of 64 rows of int8 8,704.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kvq_plugin.formats import GROUP, KVFormat
from kvq_plugin.serving import compat

#: Of the name of the layer that a layer's recent rows are to vLLM (serving/recent.py).
SUFFIX = ".recent"
#: Tokens of a block of sealed rows, unless the user says otherwise.
BLOCK_SIZE = 128


def window(format: KVFormat, drafts: int) -> int:
    """Rows that must outlive a step: a query reads up to ``window + GROUP - 1`` of them, and
    *drafts* may be rejected."""
    return format.window + GROUP - 1 + drafts


def sealed_page(format: KVFormat, head_size: int, block_size: int) -> int:
    """Bytes of a page of *block_size* tokens, for one kv head."""
    return block_size * format.bytes_per_token(head_size, block_size)


def block_size_within(page: int, bytes_per_token: int, block_size: int) -> int:
    """*block_size*, halved until that many tokens fit into *page* bytes, but GROUP at least."""
    while block_size * bytes_per_token > page and block_size % (2 * GROUP) == 0:
        block_size //= 2
    return block_size


def recent_block_size(run: Iterable[KVFormat], head_size: int, block_size: int) -> int:
    """Tokens of a block of recent rows, beside sealed ones of *block_size*: no page of recent rows
    is larger than a sealed one, in any format of the *run*."""
    return min(
        block_size_within(
            sealed_page(format, head_size, block_size),
            format.recent.bytes_per_token(head_size),
            block_size,
        )
        for format in run
        if format.recent is not None
    )


def min_block_size(format: KVFormat, head_size: int) -> int:
    """The smallest block whose sealed page holds GROUP recent rows: below it, the recent rows'
    pages would be the larger ones, and all others padded to them."""
    needed = GROUP * format.recent.bytes_per_token(head_size)
    size = GROUP
    while sealed_page(format, head_size, size) < needed:
        size += GROUP
    return size


def capacity(vllm_config: Any, kv_cache_config: Any, stated: float) -> float:
    """How many requests of max_model_len tokens fit: what vLLM *stated*, or, with recent rows, what
    its scheduler then really admits.

    vLLM counts a whole batch of new tokens (max_num_batched_tokens) in every request's window,
    though there is but one batch at a time: 66 blocks of recent rows beside 64 sealed ones at
    8,192 tokens, of which a request keeps 2 once its prompt is in.
    """
    groups = kv_cache_config.kv_cache_groups
    recent = [g for g in groups if g.layer_names and g.layer_names[0].endswith(SUFFIX)]
    if not recent:
        return stated
    scheduler, longest = vllm_config.scheduler_config, vllm_config.model_config.max_model_len
    whole = vllm_config.max_in_flight_tokens
    decoding = whole // scheduler.max_num_batched_tokens * (1 + vllm_config.num_speculative_tokens)
    held, batch = (
        sum(_one_spec(g).max_admission_blocks_per_request(n, longest) for g in recent)
        for n in (decoding, whole)
    )
    per_request = round(kv_cache_config.num_blocks / stated) - batch + held
    usable = kv_cache_config.num_blocks - 1 - (batch - held)  # the first block is never given out
    fit = max(stated, usable / per_request)
    block = max(map(_block_bytes, groups))
    compat.init_logger(f"vllm.{__name__}").info_once(
        "Of %s blocks of KV cache a request of %s tokens takes %d while it decodes: %s tokens fit. "
        "Its recent rows are %d of these blocks, %.1f MiB, and those of a batch of new tokens up "
        "to %d more for the length of a step.",
        f"{kv_cache_config.num_blocks:,}",
        f"{longest:,}",
        per_request,
        f"{int(fit * longest):,}",
        held,
        held * block / 2**20,
        batch - held,
    )
    return fit


def _one_spec(group: Any) -> Any:
    """The spec of one layer of a *group*, whose layers may have pages of several sizes."""
    specs = getattr(group.kv_cache_spec, "kv_cache_specs", None)
    return next(iter(specs.values())) if specs else group.kv_cache_spec


def _block_bytes(group: Any) -> int:
    spec = group.kv_cache_spec
    if hasattr(spec, "kv_cache_specs"):
        return spec.page_size_bytes  # of all layers already
    return len(group.layer_names) * spec.page_size_bytes
