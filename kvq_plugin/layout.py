"""Where each code and scale of a page lies: format x head size x block size -> bytes.

A page is one (block, kv head): a contiguous blob of ``block_size * bytes_per_token``
bytes that holds, in this order, the K codes, the V codes, the K metadata and the V
metadata. What every layout shares:

* 32-bit words hold ``W = 32 / bits`` codes. Code ``i`` of a word sits in byte ``i % 4``,
  sub-byte field ``i // 4``, so that masking and shifting a whole word yields byte operands
  for four consecutive codes.
* Signed codes are stored offset-binary (code + 128), so K and V share one unsigned encoding.
* Metadata is one 32-bit word per token: the fp32 scale, or for affine codes the fp16 scale
  in the low and the fp16 min in the high half.

What differs is the order of the words, chosen for the loads that the kernels do:

* ``CPU_V1``: words hold consecutive dims of K, consecutive tokens of V; K words are ordered
  ``[N/16][D/W][16 tokens]`` and V words ``[N/W][D/16][16 dims]``: one 64-byte line feeds one
  512-bit dot product with no horizontal sum.
* ``GPU_V1``: words hold consecutive dims of K and of V, ordered ``[N][D/W]``: a token's codes
  are one row, which is what a tile of a matrix product loads.

``unpack_codes`` turns any page back into plain codes, which is what tests compare, and
``repack`` one layout into the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from kvq_plugin.formats import Code, Kind, KVFormat, Stream

CPU_V1 = "cpu-v1"
GPU_V1 = "gpu-v1"
LANES = 16  # 32-bit lanes of a 512-bit register; rows of the smallest matrix product on GPUs
#: Largest head size of each layout. A GPU program holds whole rows of the output in registers.
MAX_HEAD_SIZES = {CPU_V1: 512, GPU_V1: 256}
MAX_HEAD_SIZE = MAX_HEAD_SIZES[CPU_V1]


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

    ``layout`` is CPU_V1 or GPU_V1; both have the same regions and the same size.

    Raises ValueError when *head_size* or *block_size* cannot be laid out.
    """

    format: KVFormat
    head_size: int
    block_size: int
    layout: str = CPU_V1

    def __post_init__(self) -> None:
        if self.layout not in MAX_HEAD_SIZES:
            raise ValueError(
                f"unknown page layout {self.layout!r}: expected one of {', '.join(MAX_HEAD_SIZES)}"
            )
        largest = MAX_HEAD_SIZES[self.layout]
        if self.head_size % LANES or not 0 < self.head_size <= largest:
            raise ValueError(
                f"head size {self.head_size} cannot be stored as {self.format.name} "
                f"({self.layout}): expected a multiple of {LANES} up to {largest}; "
                f"use --kv-cache-dtype auto"
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
        metadata = self._code_region(self.format.key) + self._code_region(self.format.value)
        place = self._dims_by_lines if self.layout == CPU_V1 else self._rows
        return self._stream(self.format.key, 0, metadata, *place(self.format.key.code))

    @cached_property
    def value(self) -> StreamLayout:
        metadata = self.key.metadata + self.block_size * self.format.key.metadata_bytes
        codes = self._code_region(self.format.key)
        place = self._tokens_by_lines if self.layout == CPU_V1 else self._rows
        return self._stream(self.format.value, codes, metadata, *place(self.format.value.code))

    # Each returns (index of the word, field in the word) of every code, both [N, D].

    def _dims_by_lines(self, code: Code) -> tuple[torch.Tensor, torch.Tensor]:
        token, dim = self._grid()
        line = (token // LANES) * (self.head_size // code_word(code)) + dim // code_word(code)
        return line * LANES + token % LANES, dim % code_word(code)

    def _tokens_by_lines(self, code: Code) -> tuple[torch.Tensor, torch.Tensor]:
        token, dim = self._grid()
        line = (token // code_word(code)) * (self.head_size // LANES) + dim // LANES
        return line * LANES + dim % LANES, token % code_word(code)

    def _rows(self, code: Code) -> tuple[torch.Tensor, torch.Tensor]:
        token, dim = self._grid()
        word = token * (self.head_size // code_word(code)) + dim // code_word(code)
        return word, dim % code_word(code)

    def _grid(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.arange(self.block_size)[:, None], torch.arange(self.head_size)[None, :]

    @staticmethod
    def _stream(stream, codes, metadata, word, field) -> StreamLayout:
        code_bytes = codes + word * 4 + field % 4
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

    def pack_codes(self, pages: torch.Tensor, which: StreamLayout, codes: torch.Tensor) -> None:
        """Write all codes ``[..., N, D]`` of one stream into *pages* ``[..., size]``; the
        inverse of :meth:`unpack_codes`."""
        code = which.stream.code
        fields = codes.view(torch.uint8) ^ 0x80 if code.kind is Kind.SIGNED else codes
        per_byte = 8 // code.bits
        region = torch.zeros_like(pages[..., : which.code_bytes.numel() // per_byte])
        for shift in range(0, 8, code.bits):
            here = which.code_shifts == shift
            region[..., which.code_bytes[here] - which.codes] |= fields[..., here] << shift
        pages[..., which.codes : which.codes + region.shape[-1]] = region


def repack(pages: torch.Tensor, source: PageLayout, target: PageLayout) -> torch.Tensor:
    """*pages* ``[..., size]`` uint8 of layout *source*, in layout *target*: the same codes and
    metadata in other places. Raises ValueError unless both describe the same kind of page."""
    same = [(x.format, x.head_size, x.block_size) for x in (source, target)]
    if same[0] != same[1]:
        raise ValueError(f"cannot repack {source} as {target}: only the layout may differ")
    out = pages.clone()  # metadata stays where it is
    for before, after in ((source.key, target.key), (source.value, target.value)):
        target.pack_codes(out, after, source.unpack_codes(pages, before))
    return out


def code_word(code: Code) -> int:
    """Codes in one 32-bit word."""
    return 32 // code.bits
