"""Golden hashes: what a device must have in its cache after storing given inputs.

The inputs come from integer arithmetic alone, so they are the same on every machine and device.
The CPU's kernels store them, the pages are repacked to layout ``gpu-v1``, and SHA-256 of the whole
cache goes into ``golden/gpu_v1.json``. A GPU stores the same inputs and hashes its cache.

    python tests/golden_cases.py      # rewrite the file, after a deliberate change of format
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kvq_plugin.formats import FORMATS, LOWBIT, STATIC, Granularity, Kind, KVFormat
from kvq_plugin.layout import CPU_V1, GPU_V1, PageLayout, repack
from kvq_plugin.reference import StaticScale

PATH = Path(__file__).parent / "golden" / "gpu_v1.json"
HEADS, BLOCKS, TOKENS = 2, 3, 37
#: Head size and block size: the smallest, the usual, rows that are no power of two, the largest.
SHAPES = ((16, 16), (64, 16), (80, 48), (128, 64), (256, 128))
#: The same of formats with recent rows.
SEALED_SHAPES = ((32, 32), (64, 64), (128, 128), (256, 32))
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
#: Both halves of a byte are equal, so that bytes nobody writes look the same in every layout.
UNTOUCHED = 0x55


@dataclass(frozen=True)
class Case:
    format: KVFormat
    head_size: int
    block_size: int
    dtype: str
    granularity: Granularity

    @property
    def name(self) -> str:
        shape = f"d{self.head_size} n{self.block_size}"
        return f"{self.format.name} {shape} {self.dtype} {self.granularity.value}"


def cases() -> Iterator[Case]:
    rows = {f.id: f for f in (*FORMATS.values(), *LOWBIT.values())}
    for format in (rows[i] for i in sorted(rows)):
        granularities = (Granularity.TOKEN_HEAD,) if format.is_dynamic else STATIC
        for head_size, block_size in SHAPES if format.recent is None else SEALED_SHAPES:
            for dtype in DTYPES:
                for granularity in granularities:
                    yield Case(format, head_size, block_size, dtype, granularity)


def numbers(count: int, seed: int) -> np.ndarray:
    """*count* scrambled uint32 (the finalizer of MurmurHash3 over a counter)."""
    x = np.arange(count, dtype=np.uint32) + np.uint32((seed * 0x9E3779B1) & 0xFFFFFFFF)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    return x ^ (x >> np.uint32(16))


def floats(count: int, seed: int, low: int, high: int, signed: bool = True) -> np.ndarray:
    """uint32 bits of fp32 numbers with exponents ``2**low .. 2**high`` and random mantissas."""
    x, spread = numbers(count, seed), np.uint32(high - low + 1)
    exponent = np.uint32(127 + low) + (numbers(count, seed + 1) % spread)
    bits = (exponent << np.uint32(23)) | (x & np.uint32(0x7FFFFF))
    return bits | (x & np.uint32(0x80000000)) if signed else bits


#: Bits of rows that rounding, saturation and reductions treat apart: zeros of either sign,
#: infinities, NaN of either sign, the largest finite values, the smallest subnormals.
SPECIAL = {
    "bfloat16": (0x0000, 0x8000, 0x7F80, 0xFF80, 0x7FC0, 0xFFC0, 0x7F7F, 0xFF7F, 0x0001, 0x8001),
    "float16": (0x0000, 0x8000, 0x7C00, 0xFC00, 0x7E00, 0xFE00, 0x7BFF, 0xFBFF, 0x0001, 0x8001),
    "float32": (0, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00000, 0x7F7FFFFF,
                0xFF7FFFFF, 1, 0x80000001),
}  # fmt: skip


def activations(case: Case, seed: int) -> torch.Tensor:
    """``[TOKENS, HEADS, D]``; the first tokens hold a special value each, throughout or once."""
    shape = (TOKENS, HEADS, case.head_size)
    count = int(np.prod(shape))
    wide = floats(count, seed, -7, 3)
    if case.dtype == "float32":
        bits = wide
    elif case.dtype == "bfloat16":
        bits = wide >> np.uint32(16)
    else:
        sign, rest = wide >> np.uint32(31), wide & np.uint32(0x7FFFFFFF)
        bits = (sign << np.uint32(15)) | ((rest - np.uint32(112 << 23)) >> np.uint32(13))
    bits = bits.reshape(shape)
    for i, value in enumerate(SPECIAL[case.dtype]):
        bits[i, 0, :] = value  # the whole row
        bits[i, 1, (5 * i) % case.head_size] = value  # among others
    kind = np.int32 if case.dtype == "float32" else np.int16
    unsigned = np.uint32 if case.dtype == "float32" else np.uint16
    return torch.from_numpy(bits.astype(unsigned).view(kind).copy()).view(DTYPES[case.dtype])


def static_scales(case: Case) -> tuple[StaticScale | None, StaticScale | None]:
    """Scales of K and V; signed codes have zero points for V."""
    if case.format.is_dynamic:
        return None, None
    shape = case.granularity.scale_shape(0, HEADS, case.head_size)
    count = int(np.prod(shape)) if shape else 1
    found = []
    for seed in (100, 200):
        scale = floats(count, seed, -6, -4, signed=False).view(np.float32).reshape(shape)
        zero = None
        if seed == 200 and case.format.value.code.kind is Kind.SIGNED:
            zero = torch.from_numpy((numbers(count, 300) % 41).astype(np.float32) - 20)
            zero = zero.reshape(shape)
        scale = torch.from_numpy(scale.copy())
        found.append(StaticScale.expand(scale, HEADS, case.head_size, zero))
    return tuple(found)


def slots(case: Case) -> torch.Tensor:
    """Distinct slots out of order; every seventh token is skipped. Of formats with recent rows the
    end of one group, most of whose rows nobody wrote and some are NaN, and a whole one without."""
    total = BLOCKS * case.block_size
    if case.format.recent is not None:
        found = np.arange(TOKENS, dtype=np.int64) + 58
        found[3] = 95
        return torch.from_numpy(found)
    found = (np.arange(TOKENS, dtype=np.int64) * 11 + 5) % total
    found[6::7] = -1
    return torch.from_numpy(found)


def recent_slots(case: Case) -> torch.Tensor:
    """Where the same rows are recent ones: in the next block, and one in none."""
    found = (slots(case) + case.block_size) % (BLOCKS * case.block_size)
    found[1] = -1
    return found


def empty(case: Case, format: KVFormat | None = None) -> torch.Tensor:
    """``[BLOCKS, HEADS, N, C]`` uint8, of *format* (default: the case's)."""
    content = (format or case.format).bytes_per_token(case.head_size, case.block_size)
    shape = (BLOCKS, HEADS, case.block_size, content)
    return torch.full(shape, UNTOUCHED, dtype=torch.uint8)


def stored(case: Case, store: Callable, kind: str, device: str = "cpu") -> torch.Tensor:
    """The cache in layout ``gpu-v1``, on the CPU, after ``store(key, value, cache, slots, format,
    key_static, value_static)`` wrote it on *device* in layout *kind*: its pages ``[BLOCKS, HEADS,
    size]``; of formats with recent rows those of both caches, one after the other."""

    def moved(x):
        return None if x is None else x.to(device)

    formats = [f for f in (case.format, case.format.recent) if f is not None]
    caches = [moved(empty(case, f)) for f in formats]
    inputs = (activations(case, 1), activations(case, 2))
    statics = map(moved, static_scales(case))
    recent = {}
    if case.format.recent is not None:
        recent = {"recent_cache": caches[1], "recent_slot_mapping": moved(recent_slots(case))}
    store(*map(moved, inputs), caches[0], moved(slots(case)), case.format, *statics, **recent)
    found = []
    for format, cache in zip(formats, caches, strict=True):
        layouts = (PageLayout(format, case.head_size, case.block_size, k) for k in (kind, GPU_V1))
        found.append(repack(cache.cpu().flatten(2), *layouts))
    return found[0] if len(found) == 1 else torch.cat([pages.flatten() for pages in found])


def digest(pages: torch.Tensor) -> str:
    return hashlib.sha256(pages.contiguous().numpy().tobytes()).hexdigest()


def golden() -> dict[str, str]:
    return json.loads(PATH.read_text())


def main() -> None:
    from kvq_plugin import ops

    hashes = {case.name: digest(stored(case, ops.store, CPU_V1)) for case in cases()}
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(json.dumps(hashes, indent=1) + "\n")
    print(f"{len(hashes)} hashes in {PATH}")


if __name__ == "__main__":
    main()
