"""The one table of KV-cache formats; layouts, kernels, serving and tests derive from it.

A format says, for K and for V separately, which *code* a value becomes and at which
*granularity* its scale lives. ``csrc/formats.h`` holds the same rows for C++, and
``tests/test_contract.py`` compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum


class Kind(Enum):
    """How a code decodes."""

    FLOAT = "float"  # value = float8(code) * scale
    SIGNED = "signed"  # value = (code - zero point) * scale, code in [-qmax, qmax]
    AFFINE = "affine"  # value = code * scale + min, code in [0, qmax]


class Granularity(Enum):
    """Which elements share one scale. ``T`` tokens, ``H`` kv heads, ``D`` head size."""

    TENSOR = "tensor"
    HEAD = "head"
    CHANNEL = "channel"
    TOKEN_HEAD = "token_head"
    CHANNEL_GROUP = "channel_group"  # a channel of GROUP tokens
    TOKEN_GROUP = "token_group"  # GROUP channels of a token

    @property
    def is_dynamic(self) -> bool:
        """True when the kernel computes the scale while writing; no checkpoint is asked."""
        return self not in STATIC

    def scale_shape(self, tokens: int, heads: int, head_size: int) -> tuple[int, ...]:
        """Scale shape of a ``[T, H, D]`` tensor: ``()``, ``(H,)``, ``(H, D)``, ``(T, H)``,
        ``(T/GROUP, H, D)`` or ``(T, H, D/GROUP)``."""
        return {
            Granularity.TENSOR: (),
            Granularity.HEAD: (heads,),
            Granularity.CHANNEL: (heads, head_size),
            Granularity.TOKEN_HEAD: (tokens, heads),
            Granularity.CHANNEL_GROUP: (tokens // GROUP, heads, head_size),
            Granularity.TOKEN_GROUP: (tokens, heads, head_size // GROUP),
        }[self]


#: Tokens that are sealed together, and channels that share a scale in a TOKEN_GROUP.
GROUP = 32
STATIC = (Granularity.TENSOR, Granularity.HEAD, Granularity.CHANNEL)
DYNAMIC = (Granularity.TOKEN_HEAD,)


@dataclass(frozen=True, slots=True)
class Code:
    """One element's storage. ``qmax`` is the largest magnitude a code reaches."""

    name: str
    id: int  # enum value in csrc/formats.h
    bits: int
    kind: Kind
    qmax: float
    torch_dtype: str | None = None  # the float8 type it equals, for FLOAT


INT8 = Code("int8", 0, 8, Kind.SIGNED, 127.0)
INT4 = Code("int4", 1, 4, Kind.AFFINE, 15.0)
FP8_E4M3 = Code("fp8_e4m3", 2, 8, Kind.FLOAT, 448.0, "float8_e4m3fn")
FP8_E5M2 = Code("fp8_e5m2", 3, 8, Kind.FLOAT, 57344.0, "float8_e5m2")
# ROCm gfx94x only, see :func:`fnuz`.
FP8_E4M3FNUZ = Code("fp8_e4m3fnuz", 4, 8, Kind.FLOAT, 240.0, "float8_e4m3fnuz")
INT3 = Code("int3", 5, 3, Kind.AFFINE, 7.0)
INT2 = Code("int2", 6, 2, Kind.AFFINE, 3.0)
CODES = {c.name: c for c in (INT8, INT4, FP8_E4M3, FP8_E5M2, FP8_E4M3FNUZ, INT3, INT2)}


@dataclass(frozen=True, slots=True)
class Stream:
    """How one of K and V is stored: a code and the granularities its scales may have.

    ``rotated``: not the row itself is encoded but :func:`kvq_plugin.rotation.rotate` of it.
    ``lite``: affine codes whose scale is a byte and whose min is a multiple of half of it, a byte
    too (:mod:`kvq_plugin.codes`).
    """

    code: Code
    granularities: tuple[Granularity, ...]
    rotated: bool = False
    lite: bool = False

    @property
    def is_dynamic(self) -> bool:
        return all(g.is_dynamic for g in self.granularities)

    def metadata_bytes(self, head_size: int) -> int:
        """Bytes beside the codes, per token and kv head: an fp32 scale, or a scale and a min."""
        if not self.is_dynamic:
            return 0
        size = 2 if self.lite else 4
        if Granularity.TOKEN_HEAD in self.granularities:
            return size
        return size * head_size // GROUP


@dataclass(frozen=True, slots=True)
class KVFormat:
    """One row: what ``--kv-cache-dtype NAME`` stores.

    Attributes:
        name: the canonical name; ``aliases`` are the other names users may type.
        id: row number in ``csrc/formats.h``.
        key, value: storage of K and of V.
        default_scale: static scale used when a checkpoint has none; None means refuse.
        max_error: bound on the relative RMSE of N(0, 1) data, read by the tests.
        recent: how the newest rows are stored, in a cache of their own, until GROUP of them are
            *sealed*: encoded from there to ``key`` and ``value``. None: rows are encoded at once.
        window: a query reads at least this many of the newest rows from ``recent``.
    """

    name: str
    id: int
    key: Stream
    value: Stream
    default_scale: float | None
    max_error: float
    aliases: tuple[str, ...] = ()
    recent: KVFormat | None = None
    window: int = 0

    def __hash__(self) -> int:
        return hash(self.name)  # of all fields it takes longer than what is looked up with it

    @property
    def is_dynamic(self) -> bool:
        """True when neither K nor V takes scales from a checkpoint."""
        return self.key.is_dynamic and self.value.is_dynamic

    def first_row_bytes(self, head_size: int) -> int:
        """Bytes of the int8 copy of a page's first row: codes and scales of K and V."""
        return 0 if self.recent is None else 2 * head_size + 8

    @property
    def head_size_step(self) -> int:
        """Head sizes are multiples of this: of a word of the finest plane, and of groups."""
        streams = (self.key, self.value)
        grouped = any(Granularity.TOKEN_GROUP in s.granularities for s in streams)
        return 32 if grouped or self.key.code.bits == 3 else 16

    @property
    def block_size_step(self) -> int:
        """Block sizes are multiples of this."""
        return 16 if self.recent is None else GROUP

    def bytes_per_token(self, head_size: int, block_size: int = 128) -> int:
        """Bytes per token and kv head, K and V together, metadata included: the page of
        *block_size* tokens over their number. The size of the page matters to formats with a
        first row only, whose pages are rounded up to whole cache lines."""
        streams = (self.key, self.value)
        size = sum(s.code.bits * head_size // 8 + s.metadata_bytes(head_size) for s in streams)
        if self.recent is None:
            return size
        size += -(-self.first_row_bytes(head_size) // block_size)
        while block_size * size % 64:
            size += 1
        return size

    def sealed_before(self, position: int) -> int:
        """A query at *position* reads sealed rows before this position, recent ones from it on."""
        return max(0, (position + 1 - self.window) // GROUP * GROUP)


def _row(name, id, code, granularities, default_scale, max_error, aliases=(), rotated=False):
    stream = Stream(code, granularities, rotated)
    return KVFormat(name, id, stream, stream, default_scale, max_error, aliases)


_ROWS = (
    # name, id, code, granularities, default scale, RMSE bound on N(0,1), aliases.
    # Measured at scale 1.0 / calibrated: e4m3 2.6 %, e5m2 5.4 %, int8 token-head 0.8 %
    # (D=128), int4 token-head 10 % (12 % at D=512), rotated or not: a rotated bell curve is one.
    _row("fp8_e4m3", 0, FP8_E4M3, STATIC, 1.0, 0.028, aliases=("fp8",)),
    _row("fp8_e5m2", 1, FP8_E5M2, STATIC, 1.0, 0.057),
    _row("int8", 2, INT8, STATIC, None, 0.012),
    _row("int8_per_token_head", 3, INT8, DYNAMIC, None, 0.010),
    _row("fp8_per_token_head", 4, FP8_E4M3, DYNAMIC, None, 0.028),
    _row("int4_per_token_head", 5, INT4, DYNAMIC, None, 0.13, rotated=True),
)

_ROTATED_INT8 = _row("int8_rotated", 6, INT8, DYNAMIC, None, 0.010, rotated=True)
_ROTATED_INT4 = Stream(INT4, DYNAMIC, rotated=True)
_PER_CHANNEL, _PER_GROUP = (Granularity.CHANNEL_GROUP,), (Granularity.TOKEN_GROUP,)
_WINDOW = {"recent": _ROTATED_INT8, "window": GROUP}
_LOWBIT_ROWS = (
    # name, id, K, V, default scale, RMSE bound of the coarser of the two
    _ROTATED_INT8,
    KVFormat("k8v4", 7, _ROTATED_INT8.key, _ROTATED_INT4, None, 0.13),
    KVFormat(
        "int4", 8, Stream(INT4, _PER_CHANNEL, rotated=True), _ROTATED_INT4, None, 0.13, **_WINDOW
    ),
    KVFormat(
        "k3v2",
        9,
        Stream(INT3, _PER_CHANNEL, rotated=True, lite=True),
        Stream(INT2, _PER_GROUP, rotated=True, lite=True),
        None,
        0.45,
        **_WINDOW,
    ),
)

#: Formats of one code for K and V, by every name, aliases included.
FORMATS: dict[str, KVFormat] = {n: f for f in _ROWS for n in (f.name, *f.aliases)}
#: Formats below 8 bits that vLLM does not know, and what their recent rows are stored as.
LOWBIT: dict[str, KVFormat] = {f.name: f for f in _LOWBIT_ROWS}
#: Every name a user may type for ``--kv-cache-dtype``; rotated int8 is the recent rows' alone.
SERVED: dict[str, KVFormat] = FORMATS | {n: f for n, f in LOWBIT.items() if f is not _ROTATED_INT8}


def get_format(name: str) -> KVFormat:
    """The format called *name*; ValueError listing the names users may type otherwise.

    This is the only place where a dtype string is compared with anything.
    """
    try:
        return FORMATS[name] if name in FORMATS else LOWBIT[name]
    except KeyError:
        raise ValueError(
            f"unknown KV-cache format {name!r}; kvq_plugin knows {', '.join(sorted(SERVED))}"
        ) from None


def fnuz(format: KVFormat) -> KVFormat:
    """*format* as ROCm's gfx94x GPUs store it: their e4m3 is e4m3fnuz, all else is the same.

    The same byte means half as much there, so static scales made for e4m3fn count double. The
    page has the same size and the format the same name.
    """
    key, value = (
        replace(s, code=FP8_E4M3FNUZ) if s.code is FP8_E4M3 else s
        for s in (format.key, format.value)
    )
    if key is format.key and value is format.value:
        return format
    return replace(format, key=key, value=value)
