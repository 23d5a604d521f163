"""Random batches through store and attend of the instruction sets in turn, against the reference.

``make sanitize`` runs it on a library with the address and undefined-behaviour sanitizers in it,
which stop the process at their first finding; alone it runs on the library that is installed:

    python tests/fuzz.py --batches 200 --seed 7

Batches are ragged and strided; rows hold NaN of any bits, infinities and subnormals; slots are
skipped; blocks are partly filled; bytes that no token owns are NaN or noise. Tensors end where
their last element does, so that reading or writing on is seen.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from kvq_plugin import _native, ops, reference
from kvq_plugin.formats import FORMATS, Granularity, Kind
from kvq_plugin.layout import PageLayout

ROWS = tuple({f.id: f for f in FORMATS.values()}.values())
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BITS = {
    torch.float32: (torch.int32, (0x7FC00000, 0x7F800001, -0x7FFFFF, 0x7FFFFFFF, -1)),
    torch.bfloat16: (torch.int16, (0x7FC0, 0x7F81, -0x7F, 0x7FFF, -1)),
    torch.float16: (torch.int16, (0x7E00, 0x7C01, -0x3FF, 0x7FFF, -1)),
}
#: Share of the largest |V| that an output may be off by: two bf16 roundings (weights, output) and
#: what limbs do to scores, at most 2e-3 here. The kernels' own tests have the tight bounds.
TOLERANCE = 0.02


class Batch:
    """Everything of one random batch, and what should come of it."""

    def __init__(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.format = self.pick(ROWS)
        self.dtype = self.pick(DTYPES)
        self.kv_heads = self.below(3) + 1
        self.group = self.pick((1, 2, 3, 4, 7, 8, 16, 33))
        self.head_size = 16 * (1 + self.below(8) if self.below(10) else self.pick((16, 32)))
        self.block_size = self.pick((16, 32, 48, 64, 128))
        lengths = [self.below(150) for _ in range(1 + self.below(4))]
        if not self.below(6):
            lengths[0] = 500 + self.below(1100)
        counts = [self.pick((0, 1, 1, 1 + self.below(40), n, n + 2)) for n in lengths]
        self.lengths, self.counts = lengths, [min(c, 70) for c in counts]
        self.statics = (None, None)
        if not self.format.is_dynamic:
            self.statics = self.static(), self.static()
        self.make_pages()
        self.make_rows()
        self.make_query()

    def below(self, n: int) -> int:
        return int(torch.randint(n, (), generator=self.random))

    def pick(self, items):
        return items[self.below(len(items))]

    def normal(self, *shape) -> torch.Tensor:
        return torch.randn(shape, generator=self.random)

    def static(self) -> reference.StaticScale:
        shape = self.pick((Granularity.TENSOR, Granularity.HEAD, Granularity.CHANNEL)).scale_shape(
            0, self.kv_heads, self.head_size
        )
        signed = self.format.key.code.kind is Kind.SIGNED
        scale = (4.0 / (127.0 if signed else 8.0)) * (1 + torch.rand(shape, generator=self.random))
        zero = None
        if signed and self.below(2):
            zero = torch.randint(-20, 21, shape, generator=self.random).float()
        return reference.StaticScale.expand(scale, self.kv_heads, self.head_size, zero)

    def make_pages(self) -> None:
        """Blocks for every sequence and some more, in a random order and with random strides."""
        size = self.block_size
        held = [-(-n // size) for n in self.lengths]
        self.num_blocks = sum(held) + 1 + self.below(3)
        order = torch.randperm(self.num_blocks, generator=self.random).int()
        self.blocks = order[: sum(held)].split(held)
        self.table = torch.full((len(held), max(held) + self.below(2)), 10**6, dtype=torch.int32)
        for s, mine in enumerate(self.blocks):
            self.table[s, : len(mine)] = mine
        content = self.format.bytes_per_token(self.head_size)
        page = size * content
        gap = self.pick((0, 64, 52))
        if self.below(3):
            strides = (self.kv_heads * page + gap, page)
        else:
            strides = (page + gap, self.num_blocks * (page + gap))
        last = (self.num_blocks - 1) * strides[0] + (self.kv_heads - 1) * strides[1] + page
        offset = self.pick((0, 64, 4))
        if self.below(2):
            storage = torch.full((offset + last,), 0xFF, dtype=torch.uint8)
        else:
            storage = torch.randint(256, (offset + last,), generator=self.random, dtype=torch.uint8)
        self.storage, self.offset = storage, offset
        self.shape = (self.num_blocks, self.kv_heads, size, content)
        self.strides = (*strides, content, 1)

    def cache(self, storage: torch.Tensor) -> torch.Tensor:
        return storage.as_strided(self.shape, self.strides, self.offset)

    def strided(self, x: torch.Tensor) -> torch.Tensor:
        """*x* with other strides between tokens and heads; D stays contiguous."""
        tokens, heads, d = x.shape
        kind = self.below(3)
        if kind == 0:
            return x.contiguous()
        if kind == 1:  # a slice of a fused tensor
            wide = torch.full((tokens, heads + 2, d), float("nan"), dtype=x.dtype)
            wide[:, 1 : 1 + heads] = x
            return wide[:, 1 : 1 + heads]
        return x.transpose(0, 1).contiguous().transpose(0, 1)

    def spoil(self, x: torch.Tensor, share: float) -> None:
        """NaNs of any bits into some elements."""
        integers, patterns = BITS[x.dtype]
        for _ in range(max(1, int(share * x.shape[0]))):
            t, h, d = (self.below(n) for n in x.shape)
            x[t, h, d : d + 1] = torch.tensor([self.pick(patterns)], dtype=integers).view(x.dtype)

    def make_rows(self) -> None:
        """New K and V: all tokens of all sequences, shuffled a little, some of them skipped."""
        slots = []
        for blocks, n in zip(self.blocks, self.lengths, strict=True):
            token = torch.arange(n)
            at = blocks.long()[token // self.block_size] if n else token
            slots.append(at * self.block_size + token % self.block_size)
        self.token_slots = slots
        slots = torch.cat(slots)
        if self.below(2):
            slots = slots[torch.randperm(len(slots), generator=self.random)]
        self.key, self.value = (
            self.normal(len(slots), self.kv_heads, self.head_size).to(self.dtype) for _ in "kv"
        )
        self.wild = bool(len(slots)) and not self.below(5)
        if len(slots) and not self.below(3):
            self.spoil(self.pick((self.key, self.value)), 0.02)
        if self.wild:
            info = torch.finfo(self.dtype)
            for x in (self.key, self.value):
                t = self.below(len(slots))
                x[t] *= self.pick((0.0, -0.0, info.tiny, info.max, float("inf"), 1e-30))
        skipped = torch.rand(len(slots), generator=self.random) < self.pick((0.0, 0.0, 0.1))
        self.skipped = bool(skipped.any())
        self.slots = torch.where(skipped, -1, slots)

    def make_query(self) -> None:
        heads = self.kv_heads * self.group
        self.query = self.normal(sum(self.counts), heads, self.head_size).to(self.dtype)
        self.nan_query = len(self.query) > 0 and not self.below(4)
        if self.nan_query:
            self.spoil(self.query, 0.05)
        self.starts = torch.tensor([0, *self.counts]).cumsum(0).int()
        self.options = {
            "causal": bool(self.below(4)),
            "window": self.pick((0, 0, 1, 5, 40, 600, 2**63 - 1)),
            "softcap": self.pick((0.0, 0.0, 3.0)),
            "alibi_slopes": self.pick((None, None, torch.rand(heads, generator=self.random) / 4)),
            "sinks": self.pick((None, None, self.normal(heads))),
        }

    # --- what should come -------------------------------------------------------------------------

    def expected_bytes(self, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """The storage after the store: reference.quantize's codes in the places of the layout."""
        storage = self.storage.clone()
        pages = reference._pages(self.cache(storage))
        layout = PageLayout(self.format, self.head_size, self.block_size)
        kept = self.slots >= 0
        slots = self.slots[kept]
        block, position = slots // self.block_size, slots % self.block_size
        for x, which, static in (
            (key, layout.key, self.statics[0]),
            (value, layout.value, self.statics[1]),
        ):
            codes, words = reference.quantize(x[kept], which.stream, static)
            raw = codes.view(torch.uint8)
            if which.stream.code.kind is Kind.SIGNED:
                raw = raw ^ 0x80
            where, shifts = which.code_bytes[position], which.code_shifts[position]
            width = (1 << which.stream.code.bits) - 1
            # Two codes may share a byte, but none of the same field.
            for shift in range(0, 8, which.stream.code.bits) if len(slots) else ():
                t, d = (shifts == shift).nonzero(as_tuple=True)
                at = (block[t][:, None], torch.arange(self.kv_heads)[None], where[t, d][:, None])
                kept_bits = pages[at] & (0xFF ^ (width << shift))
                pages[at] = kept_bits | (raw[t, :, d] << shift)
            if words is not None and len(slots):
                four = words.contiguous().view(torch.uint8).view(len(slots), self.kv_heads, 4)
                at = which.metadata + 4 * position[:, None, None] + torch.arange(4)
                h = torch.arange(self.kv_heads)[None, :, None]
                pages[block[:, None, None], h, at] = four
        return storage

    def expected_output(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """float64 outputs without the NaNs, where NaNs must be, and the largest |V|."""
        clean = [x.masked_fill(x.isnan(), 0.0) for x in (self.key, self.value)]
        cache = self.cache(self.expected_bytes(*clean))
        options = {**self.options, "window": min(self.options["window"], 2**31)}
        table = torch.where(self.table < self.num_blocks, self.table, 0)
        out = reference.attend(
            self.query.masked_fill(self.query.isnan(), 0.0), cache, table,
            torch.tensor(self.lengths, dtype=torch.int32), self.starts, self.format,
            self.head_size**-0.5, *self.statics, **options, dtype=torch.float64,
        )  # fmt: skip
        _, values = reference.load(cache, self.format, self.head_size, *self.statics)
        owned = torch.cat([b.long() for b in self.blocks])
        largest = values[owned].nan_to_num(0.0, 0.0, 0.0).abs().max() if len(owned) else 0.0
        return out, self.expected_nans(), float(largest)

    def expected_nans(self) -> torch.Tensor:
        nan = torch.zeros(self.query.shape, dtype=torch.bool)
        hides = self.format.key.code.kind is Kind.SIGNED and not self.format.is_dynamic
        per_channel = not self.format.is_dynamic
        at = {int(slot): t for t, slot in enumerate(self.slots.tolist()) if slot >= 0}
        for s, (length, count) in enumerate(zip(self.lengths, self.counts, strict=True)):
            begin = int(self.starts[s])
            position = torch.arange(length - count, length)[:, None]
            token = torch.arange(length)[None]
            seen = torch.ones(count, length, dtype=torch.bool)
            if self.options["causal"]:
                seen &= token <= position
            if window := self.options["window"]:
                seen &= (position - token < window) & (token - position < window)
            rows = slice(begin, begin + count)
            nan[rows] |= (
                self.query[rows].isnan().any(-1, keepdim=True) & seen.any(-1)[:, None, None]
            )
            if hides or not length:
                continue
            order = [at[int(slot)] for slot in self.token_slots[s]]
            k, v = (x[order].isnan() for x in (self.key, self.value))
            whole = k.any(-1, keepdim=True).expand_as(k)
            whole = whole | (v if per_channel else v.any(-1, keepdim=True).expand_as(v))
            hit = torch.einsum("qt,thd->qhd", seen.float(), whole.float()) > 0
            nan[rows] |= hit.repeat_interleave(self.group, 1)
        return nan

    # --- and what comes ---------------------------------------------------------------------------

    def run(self, isas: list[str]) -> None:
        want = self.expected_bytes(self.key, self.value)
        # Skipped slots leave tokens with stale bytes, and wild ones with any scores: then only
        # the bytes are compared, and attention runs for the sanitizers.
        comparable = not self.skipped and not self.wild
        output = self.expected_output() if comparable else None
        key, value, query = (
            self.strided(self.key),
            self.strided(self.value),
            self.strided(self.query),
        )
        lengths = torch.tensor(self.lengths, dtype=torch.int32)
        for isa in isas:
            with _native.use_isa(isa):
                storage = self.storage.clone()
                ops.store(key, value, self.cache(storage), self.slots, self.format, *self.statics)
                assert torch.equal(storage, want), f"{isa}: bytes differ"
                storage = want.clone()
                out = self.strided(torch.full_like(self.query, 7.0))
                ops.attend(
                    out, query, self.cache(storage), self.table, lengths, self.starts, self.format,
                    self.head_size**-0.5, *self.statics, **self.options,
                )  # fmt: skip
                assert torch.equal(storage, want), f"{isa}: attention wrote into the cache"
                if comparable:
                    self.compare(isa, out, *output)

    def compare(self, isa, out, expected, nan, largest) -> None:
        assert torch.equal(out.isnan(), nan), (
            f"{isa}: NaN in {int(out.isnan().sum())} elements, expected in {int(nan.sum())}"
        )
        error = (out.double() - expected).masked_fill(nan, 0.0).abs()
        worst = float(error.max()) if error.numel() else 0.0
        assert worst <= TOLERANCE * largest + 1e-6, f"{isa}: off by {worst:.3g} of {largest:.3g}"

    def __str__(self) -> str:
        return (
            f"{self.format.name} {self.dtype} {self.kv_heads} x {self.group} heads of "
            f"{self.head_size}, blocks of {self.block_size}, sequences "
            f"{list(zip(self.lengths, self.counts, strict=True))}, {self.options}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="the first batch's")
    parser.add_argument("--library", type=Path, help="another build of the compiled kernels")
    parser.add_argument("--isa", action="append", help="an instruction set (default: all)")
    args = parser.parse_args()
    if args.library:
        _native.LIBRARY = args.library
    isas = _native.supported_isas()
    try:
        with _native.use_isa("amx_emulated"):
            isas.append("amx_emulated")
    except ValueError:
        pass
    isas = args.isa or isas
    begin = time.monotonic()
    for i in range(args.batches):
        seed = args.seed + i
        torch.set_num_threads(1)  # what the reference needs
        batch = Batch(seed)
        torch.set_num_threads(3 if seed % 4 == 0 else 1)
        try:
            batch.run([isas[seed // 4 % len(isas)]])
        except Exception as error:
            print(f"batch {seed}: {batch}\n{type(error).__name__}: {error}", file=sys.stderr)
            return 1
        if (i + 1) % 1000 == 0:
            print(f"{i + 1} batches, {time.monotonic() - begin:.0f} s", flush=True)
    print(f"{args.batches} batches on {', '.join(isas)}: no finding")
    return 0


if __name__ == "__main__":
    sys.exit(main())
