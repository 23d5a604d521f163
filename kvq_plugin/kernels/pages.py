"""What Triton's kernels know of a page when they are compiled, as one ``constexpr``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache as memoize

import torch
import triton

from kvq_plugin import rotation
from kvq_plugin.formats import KVFormat
from kvq_plugin.layout import GPU_V1, PageLayout, StreamLayout


@dataclass(frozen=True)
class Part:
    """K or V. ``codes`` and ``metadata`` are bytes into the page, ``row`` those of a token's codes;
    ``width`` is a row padded to a power of two, to 16 at least, the least inner size of a matrix
    product on a GPU."""

    code: int
    bits: int
    qmax: float
    qmax_inverse: float
    dynamic: bool
    lite: bool
    rotated: bool
    codes: int
    metadata: int
    row: int
    width: int

    @classmethod
    def of(cls, which: StreamLayout, head_size: int) -> Part:
        stream, code = which.stream, which.stream.code
        row = head_size * code.bits // 8
        # The reference multiplies with 1 / qmax rounded to fp32.
        inverse = float(torch.tensor(1.0 / code.qmax, dtype=torch.float32))
        return cls(code.id, code.bits, float(code.qmax), inverse, stream.is_dynamic, stream.lite,
                   stream.rotated, which.codes, which.metadata, row,
                   max(16, triton.next_power_of_2(row)))  # fmt: skip


@dataclass(frozen=True)
class Page:
    """``size`` tokens of ``d`` channels, ``width`` with a row's padding. Rotations mix
    2**``stages`` channels and multiply by ``turn``, back by ``turn_back``. Of formats with recent
    rows: where the first row lies, and how many rows stay recent."""

    size: int
    d: int
    width: int
    k: Part
    v: Part  # not "value", which Triton takes for the constexpr's own
    stages: int
    turn: float
    turn_back: float
    first: int
    recent: int


@memoize
def page_of(format: KVFormat, head_size: int, block_size: int) -> Page:
    """Of layout ``gpu-v1``. Raises ValueError where it has no such pages."""
    layout = PageLayout(format, head_size, block_size, GPU_V1)
    # Of sealed rows a field is 16 channels at least, and there are up to four.
    width = triton.next_power_of_2(head_size)
    turn = 2.0 ** -rotation.exponent(head_size)
    return Page(
        size=block_size,
        d=head_size,
        width=width if format.recent is None else max(64, width),
        k=Part.of(layout.key, head_size),
        v=Part.of(layout.value, head_size),
        stages=rotation.width(head_size).bit_length() - 1,
        turn=turn,
        turn_back=turn * rotation.gain(head_size),
        first=layout.first,
        recent=format.window,
    )
