"""Where each code and scale of a page lies: format x head size x block size -> bytes.

A page is one (block, kv head): a contiguous blob of ``block_size * bytes_per_token``
bytes that holds, in this order, the K codes, the V codes, the K metadata and the V
metadata. Codes are interleaved for the loads the CPU kernels do (layout id ``CPU_V1``):

* 32-bit words hold ``W = 32 / bits`` codes of consecutive dims (K) or tokens (V). Code
  ``i`` of a word sits in byte ``i % 4``, sub-byte field ``i // 4``, so that masking and
  shifting a whole word yields byte operands for four consecutive codes.
* K words are ordered ``[N/16][D/W][16 tokens]`` and V words ``[N/W][D/16][16 dims]``: one
  64-byte line feeds one 512-bit dot product with no horizontal sum.
* Signed codes are stored offset-binary (code + 128), so K and V share one unsigned encoding.
* Metadata is one 32-bit word per token: the fp32 scale, or for affine codes the fp16 scale
  in the low and the fp16 min in the high half.

``unpack_codes`` turns any page back into plain codes, which is what tests compare.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from kvq_plugin.formats import Code, Kind, KVFormat, Stream

CPU_V1 = "cpu-v1"
LANES = 16  # 32-bit lanes of a 512-bit register
MAX_HEAD_SIZE = 512


@dataclass(frozen=True)
class StreamLayout:
    """Byte positions of one stream (K or V) inside a page.

    Attributes:
        codes, metadata: byte offset of the code and metadata regions.
        code_bytes: ``[N, D]`` int64, byte of each code; ``code_shifts``: its bit in that byte.
    """

    stream: Stream
    codes: int
    metadata: int
    code_bytes: torch.Tensor
    code_shifts: torch.Tensor


@dataclass(frozen=True)
class PageLayout:
    """Layout of one page. ``size`` is its bytes; ``key`` and ``value`` locate the streams.

    Raises ValueError when *head_size* or *block_size* cannot be laid out.
    """

    format: KVFormat
    head_size: int
    block_size: int

    def __post_init__(self) -> None:
        if self.head_size % LANES or not 0 < self.head_size <= MAX_HEAD_SIZE:
            raise ValueError(
                f"head size {self.head_size} cannot be stored as {self.format.name}: expected a "
                f"multiple of {LANES} up to {MAX_HEAD_SIZE}; use --kv-cache-dtype auto"
            )
        if self.block_size % LANES or self.block_size <= 0:
            raise ValueError(
                f"block size {self.block_size} cannot hold {self.format.name} pages: expected a "
                f"multiple of {LANES}; pass --block-size 128"
            )

    @property
    def size(self) -> int:
        return self.block_size * self.format.bytes_per_token(self.head_size)

    def _code_region(self, stream: Stream) -> int:
        return self.block_size * self.head_size * stream.code.bits // 8

    @cached_property
    def key(self) -> StreamLayout:
        code = self.format.key.code
        token, dim = self._grid()
        word, field = dim // code_word(code), dim % code_word(code)
        line = (token // LANES) * (self.head_size // code_word(code)) + word
        metadata = self._code_region(self.format.key) + self._code_region(self.format.value)
        return self._stream(self.format.key, 0, metadata, line, token % LANES, field)

    @cached_property
    def value(self) -> StreamLayout:
        code = self.format.value.code
        token, dim = self._grid()
        word, field = token // code_word(code), token % code_word(code)
        line = word * (self.head_size // LANES) + dim // LANES
        metadata = self.key.metadata + self.block_size * self.format.key.metadata_bytes
        codes = self._code_region(self.format.key)
        return self._stream(self.format.value, codes, metadata, line, dim % LANES, field)

    def _grid(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.arange(self.block_size)[:, None], torch.arange(self.head_size)[None, :]

    @staticmethod
    def _stream(stream, codes, metadata, line, lane, field) -> StreamLayout:
        code_bytes = codes + line * (4 * LANES) + lane * 4 + field % 4
        shifts = (field // 4 * stream.code.bits).expand_as(code_bytes).contiguous()
        return StreamLayout(stream, codes, metadata, code_bytes, shifts)

    def unpack_codes(self, pages: torch.Tensor, which: StreamLayout) -> torch.Tensor:
        """Plain codes of *pages* ``[..., size]`` uint8 as ``[..., N, D]``.

        int8 for signed codes, uint8 otherwise (float codes are their bytes).
        """
        code = which.stream.code
        raw = pages[..., which.code_bytes] >> which.code_shifts.to(torch.uint8)
        raw &= (1 << code.bits) - 1
        return (raw ^ 0x80).view(torch.int8) if code.kind is Kind.SIGNED else raw

    def unpack_metadata(self, pages: torch.Tensor, which: StreamLayout) -> torch.Tensor | None:
        """Metadata words of *pages* ``[..., size]`` as int32 ``[..., N]``; None for static."""
        if not which.stream.metadata_bytes:
            return None
        words = pages[..., which.metadata : which.metadata + 4 * self.block_size]
        return words.contiguous().view(torch.int32)


def code_word(code: Code) -> int:
    """Codes in one 32-bit word."""
    return 32 // code.bits
