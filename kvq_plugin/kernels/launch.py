"""How the Triton kernels are launched: one table of tile shapes, and what follows from shapes.

Nothing here looks at data on a device, so that a CUDA graph may capture every launch.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache as memoize
from itertools import product

import torch
import triton

from kvq_plugin.calls import Attend, Store
from kvq_plugin.formats import GROUP, KVFormat
from kvq_plugin.kernels import misaligned
from kvq_plugin.kernels.codec import PORTABLE, SM80, SM89

#: Query rows of one program at most; more query heads per kv head are dealt out in chunks.
MAX_ROWS = 64


@dataclass(frozen=True)
class AttendChoice:
    """``block_n`` tokens per tile, warps, stages of the software pipeline, and query rows per tile
    of long queries (more if one token has more)."""

    block_n: int
    warps: int
    stages: int
    rows: int = MAX_ROWS


@dataclass(frozen=True)
class StoreChoice:
    """``block_t`` tokens per program, and warps."""

    block_t: int
    warps: int


# On an H100 these reach 56 to 74 % of a copy at 8 bits (docs/performance.md). To stream 4.3 TB/s
# at about 0.8 us of latency, each of an H200's 132
# SMs needs some 26 KiB under way; two tiles of 8 KiB of K and as much of V give 32 KiB per program,
# and shared memory holds four programs per SM. Stages: the address of a tile comes out of the block
# table, so Triton spends half the stages on that load; with fewer than five, tiles are loaded one
# at a time (read in the PTX: cp.async.wait_group 0). Eight warps, or tiles of half the tokens,
# where registers are spilled otherwise (ptxas; Triton 3.6 spills for sm_80 what 3.9 does not).
# tests/test_triton_compile.py holds these limits.
#: (long queries, bits of the wider code, head size rounded up) -> choice
ATTEND = {
    (False, 8, 64): AttendChoice(block_n=128, warps=4, stages=5),
    (False, 8, 128): AttendChoice(block_n=64, warps=4, stages=5),
    (False, 8, 256): AttendChoice(block_n=32, warps=4, stages=5),
    (False, 4, 64): AttendChoice(block_n=128, warps=4, stages=5),
    (False, 4, 128): AttendChoice(block_n=128, warps=4, stages=5),
    (False, 4, 256): AttendChoice(block_n=64, warps=4, stages=5),
    (True, 8, 64): AttendChoice(block_n=32, warps=4, stages=5),
    (True, 8, 128): AttendChoice(block_n=64, warps=8, stages=5),
    (True, 8, 256): AttendChoice(block_n=16, warps=8, stages=5),
    (True, 4, 64): AttendChoice(block_n=32, warps=4, stages=5),
    (True, 4, 128): AttendChoice(block_n=16, warps=8, stages=5),
    (True, 4, 256): AttendChoice(block_n=16, warps=8, stages=5),
}
#: The same of formats with recent rows, whose tiles are groups.
SEALED = {
    **dict.fromkeys(
        product((False, True), (4, 3), (64, 128, 256)), AttendChoice(GROUP, warps=4, stages=5)
    ),
    (True, 4, 128): AttendChoice(GROUP, warps=8, stages=5, rows=32),
    (True, 4, 256): AttendChoice(GROUP, warps=8, stages=5, rows=16),
    (True, 3, 128): AttendChoice(GROUP, warps=8, stages=5, rows=16),
    (True, 3, 256): AttendChoice(GROUP, warps=8, stages=5, rows=16),
}
#: Programs per multiprocessor that splitting the context aims for, by (long queries).
PROGRAMS_PER_SM = {False: 4, True: 2}
#: Tokens that make a split worth its partial result.
MIN_SPLIT_TOKENS = 256
#: Splits combined at a time, and warps that do it.
MERGE_BLOCK, MERGE_WARPS = 16, 4
#: Batches of up to ``tokens`` -> choice; decoding wants programs, prefill wants wide ones.
STORE = ((256, StoreChoice(block_t=1, warps=1)), (None, StoreChoice(block_t=16, warps=4)))
#: The same of sealing. All sequences may complete a group in the same step; of a prompt's tokens
#: every 32nd does.
SEAL = ((256, StoreChoice(block_t=1, warps=4)), (None, StoreChoice(block_t=GROUP, warps=4)))


def cdiv(a: int, b: int) -> int:
    """As triton.cdiv, which takes the host 100 times as long because kernels may call it too."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The next one, as of triton.next_power_of_2."""
    return 1 << (n - 1).bit_length()


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (``TRITON_INTERPRET=1``), on CPU tensors."""
    return triton.knobs.runtime.interpret


@memoize
def decoder(device: torch.device) -> int:
    """Which of the decoders of ``codec.py`` runs on *device*."""
    if device.type != "cuda" or torch.version.hip is not None:
        return PORTABLE.value
    return SM89.value if torch.cuda.get_device_capability(device) >= (8, 9) else SM80.value


def attend_choice(format: KVFormat, head_size: int, long: bool) -> AttendChoice:
    bits = max(format.key.code.bits, format.value.code.bits)
    width = next(w for w in (64, 128, 256) if head_size <= w)
    choice = (ATTEND if format.recent is None else SEALED)[long, bits, width]
    if torch.version.hip is not None:  # no asynchronous copies to shared memory to keep busy
        return replace(choice, stages=min(choice.stages, 2))
    return choice


def store_choice(tokens: int, table=None) -> StoreChoice:
    return next(c for most, c in table or STORE if most is None or tokens <= most)


@memoize
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2  # the interpreter: few programs, yet more than one split
    return torch.cuda.get_device_properties(device).multi_processor_count


def split_count(programs: int, max_seq_len: int, device: torch.device, long: bool) -> int:
    """Splits of the context for a grid of *programs* over contexts of up to *max_seq_len*."""
    target = PROGRAMS_PER_SM[long] * multiprocessors(device)
    return max(1, min(target // programs, cdiv(max_seq_len, MIN_SPLIT_TOKENS)))


@dataclass(frozen=True)
class Rows:
    """How a launch deals query rows to programs; a ``constexpr`` of its kernels.

    ``heads`` of the ``group`` query heads of one kv head and ``block_q`` tokens make a tile of
    ``block_m`` rows. Queries of up to ``short`` tokens belong to the launch with one block per
    sequence, longer ones to the one that is ``long``.
    """

    group: int
    heads: int
    block_m: int
    short: int
    long: bool

    @property
    def block_q(self) -> int:
        return self.block_m // self.heads

    @property
    def chunks(self) -> int:
        return cdiv(self.group, self.heads)


def rows(group: int, max_query_len: int, most: int = MAX_ROWS) -> tuple[Rows, ...]:
    """Launches for *group* query heads per kv head and queries of up to *max_query_len* tokens, a
    tile of long ones having *most* rows, or those of one token."""
    heads = cdiv(group, cdiv(group, MAX_ROWS))
    fits = heads * max_query_len <= MAX_ROWS
    block_m = max(16, power_of_2(heads * max_query_len if fits else heads))
    short = Rows(group, heads, block_m, block_m // heads, long=False)
    if fits:
        return (short,)
    return short, replace(short, block_m=max(most, power_of_2(heads)), long=True)


def workspace_size(head_size: int, device: torch.device) -> int:
    """Bytes that :func:`kvq_plugin.kernels.attend` needs at most for split contexts, whatever
    the batch: reserve them once and pass them as ``workspace``."""
    programs = max(PROGRAMS_PER_SM.values()) * multiprocessors(device)
    return programs * MAX_ROWS * (head_size + 1) * 4


def check(call: Store | Attend) -> None:
    """Refuse what the kernels cannot do, before anything is launched.

    Raises ValueError for pages that are not 16-byte aligned, and for CPU tensors outside of the
    interpreter.
    """
    for name, x in (("cache", call.cache), ("recent cache", call.recent_cache)):
        if x is not None and (reason := misaligned(x, name)) is not None:
            raise ValueError(reason)
    if call.cache.device.type != "cuda" and not interpreted():
        raise ValueError(
            f"Triton kernels need a CUDA or ROCm device, the cache is on {call.cache.device}; "
            f"call kvq_plugin.ops, or set TRITON_INTERPRET=1 to debug"
        )


def on_device_of(x: torch.Tensor):
    """Triton launches on the current device; this makes it that of *x*."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()
