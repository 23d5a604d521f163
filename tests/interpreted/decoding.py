"""A kernel that decodes every byte."""

import torch
import triton
import triton.language as tl

from kvq_plugin.formats import Code
from kvq_plugin.kernels.codec import PORTABLE, decode


@triton.jit
def _decode(source, target, CODE: tl.constexpr, ISA: tl.constexpr, FIELDS: tl.constexpr,
            IN_PLACE: tl.constexpr):  # fmt: skip
    at = tl.arange(0, 256)
    c = tl.load(source + at)
    low = decode(c, CODE, ISA, IN_PLACE=IN_PLACE)
    tl.store(target + at * FIELDS, low.to(tl.float32))
    if FIELDS == 2:
        high = decode(c, CODE, ISA, HIGH=True, IN_PLACE=IN_PLACE)
        tl.store(target + at * FIELDS + 1, high.to(tl.float32))


def decode_all(
    code: Code, in_place: bool, isa: int = PORTABLE.value, device: str = "cpu"
) -> torch.Tensor:
    """Values of the 256 bytes, ``[256, codes per byte]`` fp32."""
    source = torch.arange(256, device=device).to(torch.uint8)
    out = torch.empty(256, 8 // code.bits, device=device)
    _decode[(1,)](source, out, code.id, isa, 8 // code.bits, in_place)
    return out.cpu()
