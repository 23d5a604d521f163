"""Independent oracles and problem builders for the kernel tests; nothing here is a test.

The fp8 codecs below are written from the number formats (sign, exponent, mantissa, bias) in
numpy and the page packer from the layout's byte and bit positions, so that neither shares code with
what it checks. Attention and its error bound: ``attention_oracle.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache, wraps

import cases
import numpy as np
import torch

from kvq_plugin import reference, rotation
from kvq_plugin.formats import Code, Granularity, Kind, KVFormat, Stream
from kvq_plugin.layout import CPU_V1, PageLayout, StreamLayout


def single_threaded(function):
    """Run *function* on one thread: its many small tensor operations gain nothing from more,
    and on a busy machine each would wait for a second core (measured: 20 times slower)."""

    @wraps(function)
    def run(*args, **kwargs):
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return function(*args, **kwargs)
        finally:
            torch.set_num_threads(before)

    return run


#: exponent bits, mantissa bits, bias, has infinities, NaN only at 0x80
FLOAT_FORMATS = {
    "fp8_e4m3": (4, 3, 7, False, False),
    "fp8_e5m2": (5, 2, 15, True, False),
    "fp8_e4m3fnuz": (4, 3, 8, False, True),
}


@lru_cache
def float8_values(name: str) -> np.ndarray:
    """The value of each of the 256 bytes, from the definition of the format (float64)."""
    exponent_bits, mantissa_bits, bias, ieee, fnuz = FLOAT_FORMATS[name]
    values = np.empty(256)
    for byte in range(256):
        sign = -1.0 if byte & 0x80 else 1.0
        exponent = (byte & 0x7F) >> mantissa_bits
        mantissa = byte & ((1 << mantissa_bits) - 1)
        if exponent == 0:
            value = mantissa * 2.0 ** (1 - bias - mantissa_bits)
        else:
            value = (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)
        top = (1 << exponent_bits) - 1
        if ieee and exponent == top:
            value = np.nan if mantissa else np.inf
        if not ieee and not fnuz and byte & 0x7F == 0x7F:
            value = np.nan
        values[byte] = sign * value
    if fnuz:
        values[0x80] = np.nan
    return values


def float8_encode(x: np.ndarray, name: str) -> np.ndarray:
    """Nearest finite value, ties to the even code, saturating; NaN as torch writes it."""
    values = float8_values(name)
    finite = np.array([b for b in range(128) if np.isfinite(values[b])])
    grid = values[finite]  # ascending, because positive codes are ordered
    with np.errstate(invalid="ignore"):
        magnitude = np.minimum(np.abs(x.astype(np.float64)), grid[-1])
    upper = np.searchsorted(grid, magnitude).clip(1, len(grid) - 1)
    lower = upper - 1
    below, above = magnitude - grid[lower], grid[upper] - magnitude
    take_upper = (above < below) | ((above == below) & (finite[upper] % 2 == 0))
    code = np.where(take_upper, finite[upper], finite[lower])
    fnuz = FLOAT_FORMATS[name][4]
    negative = np.signbit(x) & ~(fnuz & (code == 0))
    code = code | (negative.astype(code.dtype) << 7)
    nan = 0x80 if fnuz else np.where(np.signbit(x), 0xFF, 0x7F)
    return np.where(np.isnan(x), nan, code).astype(np.uint8)


def all_inputs(dtype: torch.dtype) -> torch.Tensor:
    """All 65,536 bit patterns of a 16-bit *dtype*."""
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)


def int8_codes(x: np.ndarray, inverse: np.ndarray, zero_point: np.ndarray | None) -> np.ndarray:
    """Static int8: np.rint is round to nearest even; NaN encodes as real zero."""
    with np.errstate(invalid="ignore", over="ignore"):
        scaled = x.astype(np.float32) * inverse.astype(np.float32)
    rounded = np.rint(np.nan_to_num(scaled, nan=0.0, posinf=1e30, neginf=-1e30))
    if zero_point is not None:
        rounded = rounded + zero_point
    return rounded.clip(-127, 127).astype(np.int8)


def unsigned(codes: torch.Tensor, code: Code) -> torch.Tensor:
    """Plain codes -> the unsigned fields a page holds (signed codes are offset-binary)."""
    raw = codes.view(torch.uint8)
    return raw ^ 0x80 if code.kind is Kind.SIGNED else raw


def pack(pages: torch.Tensor, which: StreamLayout, codes: torch.Tensor) -> None:
    """Write all codes ``[..., N, D]`` (plain) of one stream into *pages* ``[..., size]``."""
    fields = unsigned(codes, which.stream.code)
    pages[..., which.code_bytes.unique()] = 0
    for shift in which.code_shifts.unique().tolist():
        here = which.code_shifts == shift
        at = which.code_bytes[here]
        pages[..., at] |= fields[..., here] << shift


def pack_metadata(pages: torch.Tensor, which: StreamLayout, words: torch.Tensor) -> None:
    """Write int32 metadata words ``[..., N]`` of one dynamic stream into *pages*."""
    raw = words.contiguous().view(torch.uint8)
    pages[..., which.metadata : which.metadata + raw.shape[-1]] = raw


def static_scale(
    format: KVFormat,
    granularity: Granularity,
    heads: int,
    head_size: int,
    generator: torch.Generator,
    zero_point: bool = False,
) -> reference.StaticScale:
    """A scale under which N(0, 1) data fills the code range, up to a factor 2 between channels."""
    shape = granularity.scale_shape(0, heads, head_size)
    top = 127.0 if format.key.code.kind is Kind.SIGNED else 8.0
    scale = (4.0 / top) * (1.0 + torch.rand(shape, generator=generator))
    zero = torch.randint(-20, 21, shape, generator=generator).float() if zero_point else None
    return reference.StaticScale.expand(scale, heads, head_size, zero)


@dataclass(frozen=True)
class Problem:
    """Arguments of one attention call plus the dense K and V (fp32, dequantized) behind it."""

    query: torch.Tensor
    cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    format: KVFormat
    scale: float
    key_static: reference.StaticScale | None
    value_static: reference.StaticScale | None
    keys: tuple[torch.Tensor, ...]  # per sequence [L, H, D]
    values: tuple[torch.Tensor, ...]
    blocks: tuple[torch.Tensor, ...]  # per sequence, physical block ids
    options: dict = field(default_factory=dict)
    layout: str = CPU_V1

    def arguments(self) -> tuple:
        """Positional arguments from ``query`` on, shared by ops.attend and reference.attend."""
        return (
            self.query, self.cache, self.block_table, self.seq_lens, self.query_start_loc,
            self.format, self.scale, self.key_static, self.value_static,
        )  # fmt: skip

    @single_threaded
    def expected(self) -> torch.Tensor:
        options = {**self.options, "layout": self.layout, "dtype": torch.float64}
        return reference.attend(*self.arguments(), **options)

    def only(self, s: int) -> Problem:
        """The same problem with sequence *s* alone in the batch."""
        begin, end = self.query_start_loc[s : s + 2].tolist()
        return replace(
            self,
            query=self.query[begin:end],
            block_table=self.block_table[s : s + 1],
            seq_lens=self.seq_lens[s : s + 1],
            query_start_loc=torch.tensor([0, end - begin], dtype=torch.int32),
            keys=self.keys[s : s + 1],
            values=self.values[s : s + 1],
            blocks=self.blocks[s : s + 1],
        )


@single_threaded
def build(
    format: KVFormat,
    batch=cases.SMALL_BATCH,
    *,
    dtype: torch.dtype = torch.float32,
    kv_heads: int = 2,
    group: int = 4,
    head_size: int = 64,
    block_size: int = 32,
    granularity: Granularity = Granularity.HEAD,
    zero_point: bool = False,
    query_gain: float = 1.0,
    key_spread: float = 1.0,
    value_spread: float = 1.0,
    style: str = "plain",
    seed: int = 0,
    kind: str = CPU_V1,
    **options,
) -> Problem:
    """A batch over a shuffled paged cache whose every unused byte is 0xFF.

    0xFF is a NaN in every float8, fp16 and fp32 field, so a kernel that lets a stale byte (past
    the end of a sequence, or in a block nobody owns) touch an output turns it into NaN.

    Args:
        batch: (sequence length, query length) pairs.
        key_spread, value_spread: tokens are scaled log-uniformly between ``1 / spread`` and 1.
        style: see :func:`empty_cache`.
        kind: layout of the pages.
        options: keyword options of attend.
    """
    g = torch.Generator().manual_seed(seed)
    layout = PageLayout(format, head_size, block_size, kind)
    counts = [-(-length // block_size) for length, _ in batch]
    total = sum(counts) + 3  # some blocks that nobody owns
    cache = empty_cache(format, total, kv_heads, head_size, block_size, style)
    order = torch.randperm(total, generator=g).int()
    owned = torch.split(order[: sum(counts)], counts)
    stale = int(order[-1])
    table = torch.full((len(batch), max(counts) + 1), stale, dtype=torch.int32)
    statics = [None, None]
    if not format.is_dynamic:
        statics = [
            static_scale(format, granularity, kv_heads, head_size, g, zero_point) for _ in "kv"
        ]
    pages = reference._pages(cache)
    dense: list[list[torch.Tensor]] = [[], []]
    for s, (length, _) in enumerate(batch):
        table[s, : counts[s]] = owned[s]
        for i, (which, spread) in enumerate(
            ((layout.key, key_spread), (layout.value, value_spread))
        ):
            x = torch.randn(length, kv_heads, head_size, generator=g)
            x *= spread ** -torch.rand(length, 1, 1, generator=g)
            codes, words = reference.quantize(x.to(dtype), which.stream, statics[i])
            dense[i].append(reference.dequantize(codes, words, which.stream, statics[i]))
            write_blocks(pages, which, owned[s].long(), codes, words)
    tokens = sum(count for _, count in batch)
    query = torch.randn(tokens, kv_heads * group, head_size, generator=g) * query_gain
    return Problem(
        query=query.to(dtype),
        cache=cache,
        block_table=table,
        seq_lens=torch.tensor([length for length, _ in batch], dtype=torch.int32),
        query_start_loc=torch.tensor([0] + [c for _, c in batch]).cumsum(0).int(),
        format=format,
        scale=head_size**-0.5,
        key_static=statics[0],
        value_static=statics[1],
        keys=tuple(dense[0]),
        values=tuple(dense[1]),
        blocks=tuple(owned),
        options=options,
        layout=kind,
    )


def empty_cache(
    format: KVFormat,
    blocks: int,
    kv_heads: int,
    head_size: int,
    block_size: int,
    style: str = "plain",
) -> torch.Tensor:
    """A ``[B, H, N, C]`` uint8 view, all 0xFF, of a larger storage in one of four styles.

    ``plain`` is contiguous; ``padded`` has 192 bytes between blocks; ``interleaved`` is layer 1
    of 3 in one allocation (stride over other layers' pages, storage offset); ``head_major`` has
    the heads outermost, so that the block stride is the smaller one.
    """
    c = format.bytes_per_token(head_size, block_size)
    page = block_size * c
    if style == "plain":
        strides, offset, size = (kv_heads * page, page), 0, blocks * kv_heads * page
    elif style == "padded":
        pitch = kv_heads * page + 192
        strides, offset, size = (pitch, page), 0, blocks * pitch
    elif style == "interleaved":
        pitch = 3 * kv_heads * page
        strides, offset, size = (pitch, page), kv_heads * page, blocks * pitch
    elif style == "head_major":
        strides, offset, size = (page, blocks * page), 0, blocks * kv_heads * page
    else:
        raise ValueError(f"unknown cache style {style!r}")
    storage = torch.full((size,), 0xFF, dtype=torch.uint8)
    return storage.as_strided((blocks, kv_heads, block_size, c), (*strides, c, 1), offset)


CACHE_STYLES = ("plain", "padded", "interleaved", "head_major")


def whole_storage(cache: torch.Tensor) -> torch.Tensor:
    """Every byte of the storage behind *cache*, bytes between its pages included."""
    size = cache.untyped_storage().nbytes()
    return cache.as_strided((size,), (1,), 0)


def clone_storage(cache: torch.Tensor) -> torch.Tensor:
    """A copy of *cache* with its whole storage, strides and offset."""
    copy = whole_storage(cache).clone()
    return copy.as_strided(cache.shape, cache.stride(), cache.storage_offset())


def write_blocks(
    pages: torch.Tensor,
    which: StreamLayout,
    blocks: torch.Tensor,
    codes: torch.Tensor,
    words: torch.Tensor | None,
) -> None:
    """Codes ``[L, H, D]`` of one sequence into its *blocks*; the rest of the last block 0xFF."""
    size = which.code_bytes.shape[0]
    length, heads, head_size = codes.shape
    if not length:
        return
    stale = torch.full((len(blocks) * size, heads, head_size), 0xFF, dtype=torch.uint8)
    plain = stale if which.stream.code.kind is not Kind.SIGNED else stale ^ 0x80
    plain[:length] = codes.view(torch.uint8)
    if which.stream.code.bits == 4:
        plain &= 0xF
    plain = plain.view(codes.dtype).view(len(blocks), size, heads, head_size).transpose(1, 2)
    mine = pages[blocks]
    pack(mine, which, plain.contiguous())
    if words is not None:
        full = torch.full((len(blocks) * size, heads), -1, dtype=torch.int32)
        full[:length] = words
        pack_metadata(mine, which, full.view(len(blocks), size, heads).transpose(1, 2))
    pages[blocks] = mine


@lru_cache
def rotation_matrix(head_size: int) -> torch.Tensor:
    """What rotates a row, ``[D, D]`` float64: Sylvester's Hadamard matrices along the diagonal,
    times a power of two near the root of their size, times signs."""
    size = 1
    while head_size % (2 * size) == 0:
        size *= 2
    channel = np.arange(head_size)
    common = channel[:, None] % size & channel % size
    odd = np.array([[int(x).bit_count() % 2 for x in row] for row in common])
    same = channel[:, None] // size == channel // size
    scale = 2.0 ** -np.ceil(np.log2(size) / 2)
    matrix = torch.from_numpy(np.where(same, 1.0 - 2.0 * odd, 0.0) * scale)
    return matrix * rotation.signs(head_size).double()


def unrotated(stream: Stream) -> Stream:
    """*stream* as it would be without its rotation: the codec alone."""
    return replace(stream, rotated=False)


def gain_of(basis: torch.Tensor) -> float:
    """The inverse of a rotation matrix is its transpose times this."""
    return 1.0 / float(basis[0].square().sum())
