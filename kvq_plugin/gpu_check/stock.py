"""vLLM's own Triton attention, where vLLM is installed, to be timed beside ours."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache as memoize

import torch

from kvq_plugin.serving import compat

#: Its caches: name -> bytes of one element, and of metadata per token and kv head (K or V).
MODES = {"bf16": (2, 0), "fp8": (1, 0), "int8_per_token_head": (1, 4)}
#: As vLLM's backend sets them for decoding.
SEGMENTS, GRID_2D = 16, 128


@memoize
def missing() -> str:
    """Why there is nothing to time; empty if there is."""
    try:
        compat.unified_attention()
    except Exception as e:  # vLLM for another device can fail in many ways
        return f"{type(e).__name__}: {e}".splitlines()[0]
    return ""


def decode(
    mode: str,
    batch: int,
    context: int,
    kv_heads: int,
    group: int,
    head_size: int,
    page: int,
    device: torch.device,
) -> tuple[Callable[[], None], int]:
    """A call that decodes one step over a full cache of *mode*, and the cache's bytes."""
    attention, modes = compat.unified_attention()
    width, metadata = MODES[mode]
    pages = batch * context // page
    shape = (pages, page, kv_heads, head_size)
    dtype = {
        "bf16": torch.bfloat16,
        "fp8": torch.float8_e4m3fn,
        "int8_per_token_head": torch.int8,
    }[mode]
    # 0x18 to 0x3F are ordinary numbers in each of the three.
    key, value = (
        torch.randint(0x18, 0x40, (*shape, width), dtype=torch.uint8, device=device)
        .view(dtype)
        .view(shape)
        for _ in "kv"
    )
    heads, f32 = kv_heads * group, {"dtype": torch.float32, "device": device}
    rows = (batch, heads, SEGMENTS)
    query = torch.randn(batch, heads, head_size, device=device, dtype=torch.bfloat16)
    one = torch.ones((batch, kv_heads), **f32)
    scales = [torch.ones(shape[:3], **f32) for _ in "kv"] if metadata else [None, None]
    arguments = {
        "q": query,
        "k": key,
        "v": value,
        "out": torch.empty_like(query),
        "cu_seqlens_q": torch.arange(batch + 1, dtype=torch.int32, device=device),
        "max_seqlen_q": 1,
        "seqused_k": torch.full((batch,), context, dtype=torch.int32, device=device),
        "max_seqlen_k": context,
        "softmax_scale": head_size**-0.5,
        "causal": True,
        "window_size": (-1, -1),
        "block_table": torch.randperm(pages, device=device).int().view(batch, -1),
        "softcap": 0,
        "q_descale": None,
        "k_descale": one if mode == "fp8" else None,
        "v_descale": one if mode == "fp8" else None,
        "seq_threshold_3D": GRID_2D // kv_heads,
        "num_par_softmax_segments": SEGMENTS,
        "softmax_segm_output": torch.empty((*rows, head_size), **f32),
        "softmax_segm_max": torch.empty(rows, **f32),
        "softmax_segm_expsum": torch.empty(rows, **f32),
        "k_scale_cache": scales[0],
        "v_scale_cache": scales[1],
    }
    if metadata:
        arguments["kv_quant_mode"] = modes.INT8_PER_TOKEN_HEAD
    accepted = inspect.signature(attention).parameters
    if metadata and "kv_quant_mode" not in accepted:
        raise ValueError(f"this vLLM's Triton attention has no {mode}; update vLLM")
    arguments = {k: v for k, v in arguments.items() if k in accepted}
    size = 2 * pages * page * kv_heads * (head_size * width + metadata)
    return lambda: attention(**arguments), size
