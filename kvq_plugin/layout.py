"""Where each code and scale of a page lies: format x head size x block size -> bytes.

A page is one (block, kv head): a contiguous blob of ``block_size * bytes_per_token``
bytes that holds, in this order, the K codes, the V codes, the K metadata, the V
metadata and, in formats with recent rows, the first row: the page's first token as int8 codes of
K and of V, channel by channel, and their fp32 scales. What every layout shares:

* 32-bit words hold ``W = 32 / bits`` codes. Code ``i`` of a word sits in byte ``i % 4``,
  sub-byte field ``i // 4``, so that masking and shifting a whole word yields byte operands
  for four consecutive codes.
* Signed codes are stored offset-binary (code + 128), so K and V share one unsigned encoding.
* Metadata is one 32-bit word per token: the fp32 scale, or for affine codes the fp16 scale
  in the low and the fp16 min in the high half. Per channel and ``GROUP`` tokens it is the same
  word, ``[N/GROUP][D]``. Lite metadata are 16-bit words, scale byte low and min byte high:
  ``[N/GROUP][D]`` per channel, ``[N/GROUP][D/GROUP][GROUP tokens]`` per group of channels.
* Three-bit codes lie in two planes, the low two bits and the third: words of 16 and of 32 codes.
  Both planes of sixteen tokens (``CPU_V1``), or of a token (``GPU_V1``), follow each other.

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

from kvq_plugin.formats import GROUP, Granularity, Kind, KVFormat, Stream

CPU_V1 = "cpu-v1"
GPU_V1 = "gpu-v1"
LANES = 16  # 32-bit lanes of a 512-bit register; rows of the smallest matrix product on GPUs
#: Largest head size of each layout. A GPU program holds whole rows of the output in registers.
MAX_HEAD_SIZES = {CPU_V1: 512, GPU_V1: 256}
MAX_HEAD_SIZE = MAX_HEAD_SIZES[CPU_V1]
LOW_BITS = 2  # of a three-bit code, in its first plane


def page_layout(device: torch.device) -> str:
    """Id of the layout of pages on *device*."""
    return CPU_V1 if device.type == "cpu" else GPU_V1


@dataclass(frozen=True)
class Plane:
    """Bits ``[low, low + bits)`` of every code: its byte and its bit there, both ``[N, D]``."""

    bits: int
    low: int
    bytes: torch.Tensor
    shifts: torch.Tensor


@dataclass(frozen=True)
class StreamLayout:
    """Byte positions of one stream (K or V) inside a page.

    Attributes:
        codes, metadata: byte offset of the code and metadata regions.
        code_bytes: ``[N, D]`` int64, byte of each code; ``code_shifts``: its bit in that byte.
            Of three-bit codes, these are where the two low bits lie.
        high_bytes, high_shifts: the same of the third bit; None where there is none.
    """

    stream: Stream
    codes: int
    metadata: int
    code_bytes: torch.Tensor
    code_shifts: torch.Tensor
    high_bytes: torch.Tensor | None = None
    high_shifts: torch.Tensor | None = None

    @property
    def planes(self) -> tuple[Plane, ...]:
        bits = self.stream.code.bits
        if self.high_bytes is None:
            return (Plane(bits, 0, self.code_bytes, self.code_shifts),)
        low = Plane(LOW_BITS, 0, self.code_bytes, self.code_shifts)
        return low, Plane(bits - LOW_BITS, LOW_BITS, self.high_bytes, self.high_shifts)


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
        step = self.format.head_size_step
        if self.head_size % step or not 0 < self.head_size <= largest:
            raise ValueError(
                f"head size {self.head_size} cannot be stored as {self.format.name} "
                f"({self.layout}): expected a multiple of {step} up to {largest}; "
                f"use --kv-cache-dtype auto"
            )
        step = self.format.block_size_step
        if self.block_size % step or self.block_size <= 0:
            raise ValueError(
                f"block size {self.block_size} cannot hold {self.format.name} pages: expected a "
                f"multiple of {step}; pass --block-size 128"
            )

    @property
    def size(self) -> int:
        return self.block_size * self.format.bytes_per_token(self.head_size, self.block_size)

    @property
    def first(self) -> int:
        """Byte offset of the first row, in formats that have one."""
        metadata = self.format.value.metadata_bytes(self.head_size)
        return self.value.metadata + self.block_size * metadata

    def _code_region(self, stream: Stream) -> int:
        return self.block_size * self.head_size * stream.code.bits // 8

    @cached_property
    def key(self) -> StreamLayout:
        metadata = self._code_region(self.format.key) + self._code_region(self.format.value)
        place = self._dims_by_lines if self.layout == CPU_V1 else self._rows
        return self._stream(self.format.key, 0, metadata, place)

    @cached_property
    def value(self) -> StreamLayout:
        metadata = self.format.key.metadata_bytes(self.head_size)
        metadata = self.key.metadata + self.block_size * metadata
        codes = self._code_region(self.format.key)
        place = self._tokens_by_lines if self.layout == CPU_V1 else self._rows
        return self._stream(self.format.value, codes, metadata, place)

    # Each returns (index of the word, field in the word) of every code of a plane, both [N, D]:
    # words of `word` codes; `stride` words hold all planes of sixteen tokens, or of a token.

    def _dims_by_lines(self, word: int, stride: int, start: int):
        token, dim = self._grid()
        line = start + dim // word * LANES + token % LANES
        return token // LANES * stride + line, dim % word

    def _tokens_by_lines(self, word: int, stride: int, start: int):
        token, dim = self._grid()
        line = (token // word) * (self.head_size // LANES) + dim // LANES
        return line * LANES + dim % LANES, token % word

    def _rows(self, word: int, stride: int, start: int):
        token, dim = self._grid()
        return token * (stride // LANES) + start // LANES + dim // word, dim % word

    def _grid(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.arange(self.block_size)[:, None], torch.arange(self.head_size)[None, :]

    def _stream(self, stream: Stream, codes: int, metadata: int, place) -> StreamLayout:
        bits, found = stream.code.bits, []
        low = LOW_BITS if bits == 3 else bits
        for width, before in ((low, 0), (bits - low, low)):
            if not width:
                continue
            words = LANES * self.head_size // 32  # of sixteen tokens and one bit
            word, field = place(32 // width, words * bits, words * before)
            code_bytes = codes + word * 4 + field % 4
            found += [code_bytes, (field // 4 * width).expand_as(code_bytes).contiguous()]
        return StreamLayout(stream, codes, metadata, *found)

    def unpack_codes(self, pages: torch.Tensor, which: StreamLayout) -> torch.Tensor:
        """Plain codes of *pages* ``[..., size]`` uint8 as ``[..., N, D]``.

        int8 for signed codes, uint8 otherwise (float codes are their bytes).
        """
        code, raw = which.stream.code, None
        for plane in which.planes:
            bits = pages[..., plane.bytes] >> plane.shifts.to(torch.uint8)
            bits &= (1 << plane.bits) - 1
            raw = bits if raw is None else raw | bits << plane.low
        return (raw ^ 0x80).view(torch.int8) if code.kind is Kind.SIGNED else raw

    def unpack_metadata(self, pages: torch.Tensor, which: StreamLayout) -> torch.Tensor | None:
        """Metadata words of *pages* ``[..., size]``, int32, lite ones int16; None for static.

        ``[..., N]`` per token, ``[..., N/GROUP, D]`` per channel, ``[..., N, D/GROUP]`` per token
        and group of channels.
        """
        size = self.block_size * which.stream.metadata_bytes(self.head_size)
        if not size:
            return None
        words = pages[..., which.metadata : which.metadata + size].contiguous()
        words = words.view(torch.int16 if which.stream.lite else torch.int32)
        if Granularity.CHANNEL_GROUP in which.stream.granularities:
            return words.unflatten(-1, (-1, self.head_size))
        if Granularity.TOKEN_GROUP in which.stream.granularities:
            lines = words.unflatten(-1, (-1, self.head_size // GROUP, GROUP))
            return lines.transpose(-1, -2).flatten(-3, -2)
        return words

    def pack_codes(self, pages: torch.Tensor, which: StreamLayout, codes: torch.Tensor) -> None:
        """Write all codes ``[..., N, D]`` of one stream into *pages* ``[..., size]``; the
        inverse of :meth:`unpack_codes`."""
        code = which.stream.code
        fields = codes.view(torch.uint8) ^ 0x80 if code.kind is Kind.SIGNED else codes
        region = torch.zeros_like(pages[..., : self._code_region(which.stream)])
        for plane in which.planes:
            part = fields >> plane.low & (1 << plane.bits) - 1
            for shift in range(0, 8, plane.bits):
                here = plane.shifts == shift
                region[..., plane.bytes[here] - which.codes] |= part[..., here] << shift
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
