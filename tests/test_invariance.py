"""How tokens are batched changes not one bit: neither of the cache nor of attention.

Prefix-cache hits, chunked prefill, preemption and speculative decoding all rest on this.
The engine tests can only see it through matrix products that are not invariant themselves.
"""

from __future__ import annotations

import pytest
import torch
from cases import ATTEND_ISAS, ISAS, use_isa

from kvq_plugin import ops
from kvq_plugin.formats import FORMATS
from kvq_plugin.reference import StaticScale

HEADS, GROUP, HEAD_SIZE, BLOCK, BLOCKS = 3, 3, 64, 128, 4
LENGTHS = (400, 120, 127, 33)  # across blocks, just short of one, short
CHUNK = 13  # no divisor of any block, tile or word
DECODED = (0, 1, 15, 16, 31, 32, 63, 100)
CASES = [(f, d) for f in dict.fromkeys(FORMATS.values()) for d in (torch.bfloat16, torch.float32)]


class Sequences:
    """Random K, V and queries of LENGTHS tokens in pages of their own."""

    def __init__(self, format, dtype) -> None:
        torch.manual_seed(0)
        self.format = format
        self.table = 1 + torch.arange(len(LENGTHS) * BLOCKS, dtype=torch.int32).view(-1, BLOCKS)
        self.key, self.value = (
            [torch.randn(n, HEADS, HEAD_SIZE).to(dtype) for n in LENGTHS] for _ in "kv"
        )
        self.query = [torch.randn(n, HEADS * GROUP, HEAD_SIZE).to(dtype) for n in LENGTHS]
        static = None
        if not format.is_dynamic:
            static = StaticScale.expand(torch.tensor(0.03), HEADS, HEAD_SIZE)
        self.static = {"key_static": static, "value_static": static}

    def cache(self, fill: int) -> torch.Tensor:
        content = self.format.bytes_per_token(HEAD_SIZE)
        shape = (1 + self.table.numel(), HEADS, BLOCK, content)
        return torch.full(shape, fill, dtype=torch.uint8)

    def slots(self, s: int, begin: int, end: int) -> torch.Tensor:
        at = torch.arange(begin, end)
        return self.table[s].long()[at // BLOCK] * BLOCK + at % BLOCK

    def store(self, cache: torch.Tensor, parts: list[tuple[int, int, int]]) -> None:
        ops.store(
            torch.cat([self.key[s][a:b] for s, a, b in parts]),
            torch.cat([self.value[s][a:b] for s, a, b in parts]),
            cache,
            torch.cat([self.slots(s, a, b) for s, a, b in parts]),
            self.format,
            **self.static,
        )

    def attend(self, cache: torch.Tensor, parts: list[tuple[int, int, int]]) -> torch.Tensor:
        query = torch.cat([self.query[s][a:b] for s, a, b in parts])
        starts = torch.tensor([0, *(b - a for _, a, b in parts)]).cumsum(0).int()
        out = torch.empty_like(query)
        ops.attend(
            out,
            query,
            cache,
            torch.stack([self.table[s] for s, _, _ in parts]),
            torch.tensor([b for _, _, b in parts], dtype=torch.int32),
            starts,
            self.format,
            0.125,
            **self.static,
        )
        return out


@pytest.fixture(params=[ISAS[0], *(isa for isa in ATTEND_ISAS if isa not in ISAS)])
def isa(request):
    """The best one here, and what there is beside the real ones."""
    with use_isa(request.param):
        yield


@pytest.fixture(params=CASES, ids=lambda c: f"{c[0].name}-{str(c[1]).removeprefix('torch.')}")
def case(request, isa):
    """Sequences, their cache written at once, and the attention of all of them at once."""
    sequences = Sequences(*request.param)
    cache = sequences.cache(0)
    whole = [(s, 0, n) for s, n in enumerate(LENGTHS)]
    sequences.store(cache, whole)
    return sequences, cache, sequences.attend(cache, whole).split(LENGTHS)


@pytest.fixture
def chunked(case) -> torch.Tensor:
    """The same cache written chunk by chunk, over pages that held something else: 0xFF is
    NaN as an fp8 code, as an fp32 scale and as an fp16 scale."""
    sequences = case[0]
    cache = sequences.cache(0xFF)
    for begin in range(0, max(LENGTHS), CHUNK):
        parts = [(s, begin, min(begin + CHUNK, n)) for s, n in enumerate(LENGTHS) if begin < n]
        sequences.store(cache, parts)
    return cache


def test_alone_equals_batched(case, chunked):
    sequences, _, expected = case
    for s, n in enumerate(LENGTHS):
        assert torch.equal(sequences.attend(chunked, [(s, 0, n)]), expected[s])


def test_decode_equals_prefill(case, chunked):
    sequences, _, expected = case
    for t in DECODED:
        rows = [(s, t, t + 1) for s, n in enumerate(LENGTHS) if t < n]
        want = torch.stack([expected[s][t] for s, _, _ in rows])
        assert torch.equal(sequences.attend(chunked, rows), want)


def test_mixed_batch_equals_prefill(case, chunked):
    sequences, _, expected = case
    rows = [(0, 387, 400), (1, 119, 120), (2, 0, 127), (3, 30, 33)]  # decode, verify, prefill
    want = torch.cat([expected[s][a:b] for s, a, b in rows])
    assert torch.equal(sequences.attend(chunked, rows), want)
