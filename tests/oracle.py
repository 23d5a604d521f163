"""Independent oracles and problem builders for the kernel tests; nothing here is a test.

The fp8 codecs below are written from the number formats (sign, exponent, mantissa, bias) in
numpy, the page packer from the layout's byte and bit positions, and the attention from its
definition, so that none shares code with what it checks.
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


def visible(length: int, count: int, causal: bool = True, window: int = 0) -> torch.Tensor:
    """Which keys each of the last *count* queries of a sequence sees, ``[count, length]``."""
    mask = torch.zeros(count, length, dtype=torch.bool)
    for i in range(count):
        position = length - count + i
        first = max(0, position - window + 1) if window else 0
        last = position if causal else length - 1
        if window and not causal:
            last = min(last, position + window - 1)
        mask[i, first : last + 1] = True
    return mask


def weights(
    problem: Problem,
    s: int,
    *,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention probabilities ``[heads, q, L]`` and mask ``[q, L]`` of sequence *s*, float64.

    Invisible keys have probability zero; with a sink the rows sum to less than one.
    """
    begin, end = problem.query_start_loc[s : s + 2].tolist()
    length, count = int(problem.seq_lens[s]), end - begin
    heads = problem.query.shape[1]
    k = problem.keys[s].double()
    group = heads // k.shape[1]
    mask = visible(length, count, causal, window)
    probabilities = torch.zeros(heads, count, length, dtype=torch.float64)
    for head in range(heads):
        q = problem.query[begin:end, head].double()
        logits = (q @ k[:, head // group].T) * problem.scale
        if softcap:
            logits = (logits / softcap).tanh() * softcap
        if alibi_slopes is not None:
            position = torch.arange(length - count, length)[:, None]
            logits = logits + float(alibi_slopes[head]) * (torch.arange(length) - position)
        logits[~mask] = -torch.inf
        extra = torch.full((count, 1), -torch.inf, dtype=torch.float64)
        if sinks is not None:
            extra[:] = float(sinks[head])
        top = torch.maximum(logits.amax(-1, keepdim=True), extra)
        mass = (logits - top).exp()
        probabilities[head] = mass / (mass.sum(-1, keepdim=True) + (extra - top).exp())
    return probabilities, mask


@single_threaded
def attend(problem: Problem) -> torch.Tensor:
    """Dense attention from the definition, float64 ``[T, heads, D]``."""
    out = torch.zeros(problem.query.shape, dtype=torch.float64)
    for s in range(problem.seq_lens.numel()):
        begin, end = problem.query_start_loc[s : s + 2].tolist()
        if begin == end:
            continue
        p, _ = weights(problem, s, **problem.options)
        group = p.shape[0] // problem.values[s].shape[1]
        for head in range(p.shape[0]):
            out[begin:end, head] = p[head] @ problem.values[s][:, head // group].double()
    return out


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


@dataclass(frozen=True)
class _Operand:
    """One stream as kernels hold it: ``|value| <= codes * token * channel + minimum``."""

    codes: torch.Tensor  # [L, D] magnitude of the decoded code (plus zero point)
    token: torch.Tensor  # [L] per-token scale folded into the score or the probability
    channel: torch.Tensor  # [D] per-channel scale folded into q or the output
    minimum: torch.Tensor  # [L] magnitude of the affine minimum
    basis: torch.Tensor | None = None  # [D, D]: what is above describes rows times its transpose

    def query(self, q: torch.Tensor) -> torch.Tensor:
        """``|q|`` ``[T, D]`` as kernels multiply it with codes, channel scales folded in."""
        q = q if self.basis is None else q @ (gain_of(self.basis) * self.basis).T
        return (q * self.channel).abs()

    def held(self, values: torch.Tensor) -> torch.Tensor:
        """Rows ``[L, D]`` as kernels add them up."""
        return values if self.basis is None else values @ self.basis.T

    def spread(self, error: torch.Tensor) -> torch.Tensor:
        """What errors ``[T, D]`` of held sums are at worst in the output."""
        if self.basis is None:
            return error
        return error.expand(-1, self.channel.shape[0]) @ (gain_of(self.basis) * self.basis.abs())


def _operand(problem: Problem, s: int, head: int, value: bool) -> _Operand:
    size = problem.cache.shape[2]
    layout = PageLayout(problem.format, problem.query.shape[2], size, problem.layout)
    which = layout.value if value else layout.key
    static = problem.value_static if value else problem.key_static
    length = int(problem.seq_lens[s])
    pages = reference._pages(problem.cache)[problem.blocks[s].long(), head]
    plain = layout.unpack_codes(pages, which).reshape(-1, layout.head_size)[:length]
    codes = reference.decode(plain.contiguous(), which.stream.code).double().abs()
    ones = torch.ones(length, dtype=torch.float64)
    channel = torch.ones(layout.head_size, dtype=torch.float64)
    if static is not None:
        if static.zero_point is not None:
            codes = codes + static.zero_point[head].double().abs()
        return _Operand(codes, ones, static.scale[head].double(), 0 * ones)
    basis = rotation_matrix(layout.head_size) if which.stream.rotated else None
    words = layout.unpack_metadata(pages, which).reshape(-1)[:length].contiguous()
    if which.stream.code.kind is not Kind.AFFINE:
        return _Operand(codes, words.view(torch.float32).double(), channel, 0 * ones, basis)
    scale, minimum = words.view(torch.float16).view(-1, 2).double().unbind(-1)
    return _Operand(codes, scale, channel, minimum.abs(), basis)


@single_threaded
def attention_bound(problem: Problem) -> torch.Tensor:
    """Worst case of ``|kernel - exact|`` per output element, ``[T, heads, D]`` float64.

    * A query element is off by ``LIMB`` of its row's largest (channel scales folded in), so the
      score of key t by ``ds_t = LIMB * scale * max|q| * (token_t * sum|codes_t| + D * min_t)``,
      and to first order the output by ``sum_t p_t ds_t |v_t - o| <= sum_t p_t ds_t (|v_t| + |o|)``
      (``expm1`` makes it hold for large ``ds`` too). Softcap only contracts scores.
    * A probability (value token scale folded in) is off by ``LIMB`` of the largest one, for
      every visible token; tiles only make this smaller.
    * Where :func:`cases.weight_rounding` allows, a probability is also off by that much of itself.
    * ``FP32_SLACK`` of the absolute sum, and rounding of the output to the activation dtype.

    Sums over V are of rotated rows where the stream is; rotating them back adds their errors up.
    """
    dtype = problem.query.dtype
    bound = torch.zeros(problem.query.shape, dtype=torch.float64)
    for s in range(problem.seq_lens.numel()):
        begin, end = problem.query_start_loc[s : s + 2].tolist()
        if begin == end:
            continue
        p, mask = weights(problem, s, **problem.options)
        heads, kv_heads = p.shape[0], problem.values[s].shape[1]
        for head in range(heads):
            kv = head * kv_heads // heads
            k, v = (_operand(problem, s, kv, value) for value in (False, True))
            q = k.query(problem.query[begin:end, head].double())
            mass = k.token * k.codes.sum(-1) + k.codes.shape[1] * k.minimum
            ds = cases.LIMB * problem.scale * q.amax(-1)[:, None] * mass
            moved = p[head] * torch.expm1((2 * ds).clamp(max=40)) / 2
            values = problem.values[s][:, kv].double()
            out, held = (p[head] @ values).abs(), v.held(values)
            error = moved @ values.abs() + moved.sum(-1, keepdim=True) * out
            loudest = (p[head] * v.token).amax(-1, keepdim=True)
            sums = cases.LIMB * loudest * (mask.double() @ v.codes) * v.channel
            loudest = p[head].amax(-1, keepdim=True)
            sums += cases.LIMB * loudest * (mask.double() @ v.minimum)[:, None]
            rounding = cases.FP32_SLACK + cases.weight_rounding(problem.format, dtype)
            sums += rounding * (p[head] @ held.abs()) + cases.FP32_SLACK * (p[head] @ held).abs()
            error += v.spread(sums)
            error += cases.OUTPUT_ROUNDING[dtype] * (out + error) + cases.OUTPUT_FLOOR[dtype]
            bound[begin:end, head] = error
    return bound
