"""The kernels alone: write K and V into a paged, quantized cache and attend to it.

    python kernels_on_tensors.py

torch and kvq_plugin are all it needs. One sequence of 1,000 tokens, 8 query heads that share 2 kv
heads of 64 channels; the newest token decodes.
"""

import torch

from kvq_plugin import ops
from kvq_plugin.formats import get_format

HEADS, KV_HEADS, HEAD_SIZE, BLOCK, TOKENS = 8, 2, 64, 128, 1000


def main() -> None:
    torch.manual_seed(0)
    key, value = (torch.randn(TOKENS, KV_HEADS, HEAD_SIZE) for _ in "kv")
    query = torch.randn(1, HEADS, HEAD_SIZE)
    exact = torch.nn.functional.scaled_dot_product_attention(
        query[0, :, None],
        key.transpose(0, 1).repeat_interleave(HEADS // KV_HEADS, 0),
        value.transpose(0, 1).repeat_interleave(HEADS // KV_HEADS, 0),
    )[:, 0]

    blocks = -(-TOKENS // BLOCK)
    for name in ("int8_per_token_head", "k8v4", "int4_per_token_head"):
        format = get_format(name)
        row = format.bytes_per_token(HEAD_SIZE)
        cache = torch.zeros(blocks, KV_HEADS, BLOCK, row, dtype=torch.uint8)
        ops.store(key, value, cache, torch.arange(TOKENS), format)
        out = torch.empty_like(query)
        ops.attend(
            out,
            query,
            cache,
            block_table=torch.arange(blocks, dtype=torch.int32)[None],
            seq_lens=torch.tensor([TOKENS], dtype=torch.int32),
            query_start_loc=torch.tensor([0, 1], dtype=torch.int32),
            format=format,
            scale=HEAD_SIZE**-0.5,
        )
        error = (out[0] - exact).norm() / exact.norm()
        print(f"{name:20} {row:4} bytes a token and head, error {error:.2%}")


if __name__ == "__main__":
    main()
