"""Formats with recent rows in plain torch: what is sealed, what is read, and that both depend on
positions alone, whatever the batches, drafts and stale bytes."""

from __future__ import annotations

import oracle
import pytest
import sealed_oracle
import torch
from cases import ACTIVATIONS, WINDOW_ROWS, name_of
from hypothesis import given, settings
from hypothesis import strategies as st

from kvq_plugin import ops, reference, sealed
from kvq_plugin.formats import GROUP, Granularity
from kvq_plugin.layout import CPU_V1, GPU_V1, PageLayout

every_format = pytest.mark.parametrize("format", WINDOW_ROWS, ids=name_of)
NAN, INF = float("nan"), float("inf")
BLOCK, RECENT_BLOCK = 64, 32


class Sequences:
    """Rows of some sequences, their pages in shuffled blocks, and what was attended so far."""

    def __init__(self, format, lengths, seed=0, *, fill=0xFF, kv_heads=1, head_size=32,
                 kind=CPU_V1, dtype=torch.float32, room=8):  # fmt: skip
        g = torch.Generator().manual_seed(seed)
        self.format, self.lengths, self.kind = format, lengths, kind
        self.key, self.value = (
            [torch.randn(n, kv_heads, head_size, generator=g).to(dtype) for n in lengths]
            for _ in "kv"
        )
        self.query = [
            torch.randn(n, 2 * kv_heads, head_size, generator=g).to(dtype) for n in lengths
        ]
        self.caches, self.tables = [], []
        for f, size in ((format, BLOCK), (format.recent, RECENT_BLOCK)):
            width = -(-(max(lengths) + room) // size)
            blocks = 1 + len(lengths) * width
            shape = (blocks, kv_heads, size, f.bytes_per_token(head_size, size))
            cache = torch.full(shape, fill or 0, dtype=torch.uint8)
            if fill is None:
                cache = torch.randint(256, shape, dtype=torch.uint8, generator=g)
            order = 1 + torch.randperm(blocks - 1, generator=g)
            self.caches.append(cache)
            self.tables.append(order.int().view(len(lengths), width))

    def slots(self, which: int, s: int, begin: int, end: int) -> torch.Tensor:
        size, at = self.caches[which].shape[2], torch.arange(begin, end)
        return self.tables[which][s].long()[at // size] * size + at % size

    def store(self, parts, keys, values, module=reference) -> None:
        """Rows ``keys[i]``, ``values[i]`` of parts ``(sequence, first position)``."""
        slots, recent = (
            torch.cat(
                [self.slots(w, s, b, b + len(k)) for (s, b), k in zip(parts, keys, strict=True)]
            )
            for w in (0, 1)
        )
        options = {} if module is ops else {"layout": self.kind}
        module.store(
            torch.cat(keys), torch.cat(values), self.caches[0], slots, self.format,
            recent_cache=self.caches[1], recent_slot_mapping=recent, **options,
        )  # fmt: skip

    def attend(self, parts, queries, **options) -> list[torch.Tensor]:
        """Queries ``queries[i]`` of parts ``(sequence, first position)``, float64."""
        counts = [len(q) for q in queries]
        rows = torch.tensor([s for s, _ in parts])
        lengths = torch.tensor([b + n for (_, b), n in zip(parts, counts, strict=True)]).int()
        out = reference.attend(
            torch.cat(queries), self.caches[0], self.tables[0][rows], lengths,
            torch.tensor([0, *counts]).cumsum(0).int(), self.format, 0.2,
            recent_cache=self.caches[1], recent_block_table=self.tables[1][rows],
            layout=self.kind, dtype=torch.float64, **options,
        )  # fmt: skip
        return list(out.split(counts))

    def run(self, steps, generator, store=reference, **options) -> list[torch.Tensor]:
        """*steps* of ``(sequence, begin, end, drafts)`` parts: tokens are stored, drafts after
        them too, all attended, drafts forgotten. Then everything leaves the recent cache that no
        later query reads. Returns every position's output, per sequence."""
        out = [torch.full(q.shape, NAN, dtype=torch.float64) for q in self.query]
        for step in steps:
            parts = [(s, begin) for s, begin, _, _ in step]
            rows = []
            for x in (self.key, self.value, self.query):
                rows.append([
                    torch.cat([x[s][b:e], torch.randn(n, *x[s].shape[1:], generator=generator)
                               .to(x[s].dtype)]) for s, b, e, n in step])  # fmt: skip
            self.store(parts, rows[0], rows[1], store)
            for (s, b, e, _), o in zip(step, self.attend(parts, rows[2], **options), strict=True):
                out[s][b:e] = o[: e - b]
                gone = max(0, e + 1 - (self.format.window + GROUP - 1))
                spoilt = self.slots(1, s, 0, gone)
                nan = torch.full((gone, *self.key[s].shape[1:]), NAN)
                reference.store(nan, nan, self.caches[1], spoilt, self.format.recent,
                                layout=self.kind)  # fmt: skip
        return out

    def at_once(self):
        return [[(s, 0, n, 0) for s, n in enumerate(self.lengths)]]

    def sealed_bytes(self, s: int) -> list[torch.Tensor]:
        """Codes, metadata and first rows of the whole groups of sequence *s*."""
        head_size = self.key[0].shape[2]
        layout = PageLayout(self.format, head_size, BLOCK, self.kind)
        groups = self.lengths[s] // GROUP
        pages = reference._pages(self.caches[0])[self.tables[0][s].long()]
        found = []
        for which in (layout.key, layout.value):
            unpacked = layout.unpack_codes(pages, which).transpose(1, 2).flatten(0, 1)
            found.append(unpacked[: groups * GROUP])
            words = layout.unpack_metadata(pages, which).transpose(1, 2).flatten(0, 1)
            per_group = Granularity.CHANNEL_GROUP in which.stream.granularities
            found.append(words[: groups if per_group else groups * GROUP])
        begun = -(-groups * GROUP // BLOCK)
        found.append(pages[:begun, :, layout.first : layout.first + 2 * head_size + 8])
        return found


def assert_same(one: Sequences, other: Sequences) -> None:
    for s in range(len(one.lengths)):
        for a, b in zip(one.sealed_bytes(s), other.sealed_bytes(s), strict=True):
            assert torch.equal(a, b)


@every_format
@pytest.mark.parametrize("kind", (CPU_V1, GPU_V1))
def test_sealed_pages_hold_what_is_defined(format, kind):
    """Codes in their places, scales in theirs, the first row of every page, and no other byte."""
    d = 32
    case = Sequences(format, [150], kv_heads=2, kind=kind, fill=0x55)
    case.store([(0, 0)], [case.key[0]], [case.value[0]])
    layout = PageLayout(format, d, BLOCK, kind)
    expected = torch.full(case.caches[0].shape, 0x55, dtype=torch.uint8).flatten(2)
    for t in range(0, 128, GROUP):
        page = expected[int(case.tables[0][0, t // BLOCK])]
        for i, x in enumerate((case.key[0], case.value[0])):
            which = (layout.key, layout.value)[i]
            stream, rows = which.stream, sealed_oracle.recent_rows(x, format)[t : t + GROUP]
            size = GROUP * stream.metadata_bytes(d)
            for h in range(2):
                found, words, _ = sealed_oracle.seal_head(rows[:, h], stream, t % BLOCK == 0)
                for plane in which.planes:
                    for row in range(GROUP):
                        for c in range(d):
                            at = plane.bytes[t % BLOCK + row, c]
                            mask = (1 << plane.bits) - 1 << int(plane.shifts[t % BLOCK + row, c])
                            bits = int(found[row, c]) >> plane.low << int(
                                plane.shifts[t % BLOCK + row, c])  # fmt: skip
                            page[h, at] = int(page[h, at]) & ~mask | bits & mask
                width = 2 if stream.lite else 4
                for index, word in words.items():
                    at = which.metadata + t % BLOCK // GROUP * size + index * width
                    raw = sealed_oracle.canonical(word, stream).to_bytes(width, "little")
                    page[h, at : at + width] = torch.tensor(list(raw), dtype=torch.uint8)
                if t % BLOCK == 0:
                    plain, scale = reference.quantize(x[t : t + 1], format.recent.key)
                    codes_at, scale_at = sealed.first_row(layout, i)
                    page[h, codes_at] = (plain[0, h].int() + 128).to(torch.uint8)
                    page[h, scale_at] = scale[0, h : h + 1].view(torch.uint8)
    assert torch.equal(case.caches[0].flatten(2), expected)


OPTIONS = {
    "plain": {},
    "window": {"window": 9},
    "window over both": {"window": 70},
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.06])},
    "sinks": {"sinks": torch.tensor([-3.0, 0.0, 2.0, 20.0])},
}


@every_format
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_attention_is_as_defined(format, options):
    case = Sequences(format, [140, 64, 31, 1], kv_heads=2)
    got = case.run(case.at_once(), None, **options)
    for s, out in enumerate(got):
        expected = sealed_oracle.attend(
            case.query[s], case.key[s], case.value[s], format, 0.2, BLOCK, **options
        )
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


@every_format
def test_what_a_query_reads_where(format):
    assert [format.sealed_before(p) for p in (0, 30, 31, 62, 63, 94, 95, 127)] == [
        0, 0, 0, 0, 32, 32, 64, 96]  # fmt: skip
    for p in range(300):
        recent = p + 1 - format.sealed_before(p)
        assert min(p + 1, 32) <= recent <= 63


def schedule(random, lengths, drafts: bool):
    """Every sequence from its first token to its last in chunks of any size, in any order, beside
    others or alone; drafts that were rejected behind some."""
    at, steps = [0] * len(lengths), []
    while any(a < n for a, n in zip(at, lengths, strict=True)):
        step = []
        for s in random.sample(range(len(lengths)), random.randint(1, len(lengths))):
            left = lengths[s] - at[s]
            if not left:
                continue
            n = min(left, random.choice((1, 1, 2, 5, 31, 32, 33, 64, left)))
            step.append((s, at[s], at[s] + n, random.randint(0, 6) if drafts else 0))
            at[s] += n
        if step:
            steps.append(step)
    return steps


@every_format
@given(
    random=st.randoms(use_true_random=False),
    lengths=st.lists(st.integers(1, 170), min_size=1, max_size=3),
    drafts=st.booleans(),
    fill=st.sampled_from((0, 0xFF, 0x7F, None)),
)
@settings(max_examples=25, deadline=None)
@oracle.single_threaded
def test_positions_alone_decide(format, random, lengths, drafts, fill):
    """Other chunks, other company, rejected drafts, stale bytes: the same bytes and outputs."""
    whole, parts = (Sequences(format, lengths, fill=f) for f in (0xAA, fill))
    g = torch.Generator().manual_seed(1)
    expected = whole.run(whole.at_once(), g)
    got = parts.run(schedule(random, lengths, drafts), g)
    assert_same(whole, parts)
    for a, b in zip(expected, got, strict=True):
        assert torch.isfinite(a).all()
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@every_format
def test_tokens_that_are_skipped_write_and_seal_nothing(format):
    case = Sequences(format, [64])
    before = [c.clone() for c in case.caches]
    slots, recent = (case.slots(w, 0, 0, 64) for w in (0, 1))
    none = torch.full_like(slots, -1)
    arguments = (case.key[0], case.value[0], case.caches[0])
    more = {"recent_cache": case.caches[1]}
    reference.store(*arguments, none, format, recent_slot_mapping=none, **more)
    reference.store(*arguments, slots, format, recent_slot_mapping=none, **more)
    for cache, old in zip(case.caches, before, strict=True):
        assert torch.equal(cache, old)
    reference.store(*arguments, none, format, recent_slot_mapping=recent, **more)
    assert torch.equal(case.caches[0], before[0]) and not torch.equal(case.caches[1], before[1])
    # The last token alone seals the group from what the recent cache holds.
    last = (case.key[0][-1:], case.value[0][-1:], case.caches[0], slots[-1:], format)
    reference.store(*last, recent_slot_mapping=recent[-1:], **more)
    other = Sequences(format, [64])
    other.store([(0, 0)], [other.key[0]], [other.value[0]])
    layout = PageLayout(format, 32, BLOCK)
    for which in (layout.key, layout.value):
        got, want = (
            layout.unpack_codes(c.flatten(2)[case.tables[0][0, 0]], which)[:, GROUP:]
            for c in (case.caches[0], other.caches[0])
        )
        assert torch.equal(got, want)


@every_format
def test_a_later_token_of_the_same_slot_stays(format):
    case, other = (Sequences(format, [32]) for _ in "ab")
    key, value = case.key[0], case.value[0]
    other.store([(0, 0)], [key], [value])
    slots, recent = (case.slots(w, 0, 0, 32).repeat(2) for w in (0, 1))
    reference.store(
        torch.cat([value, key]), torch.cat([key, value]), case.caches[0], slots, format,
        recent_cache=case.caches[1], recent_slot_mapping=recent,
    )  # fmt: skip
    assert_same(case, other)


@every_format
def test_slots_that_disagree_modulo_a_group_are_refused(format):
    case = Sequences(format, [4])
    for module in (reference, ops):
        with pytest.raises(ValueError, match="agree modulo 32"):
            module.store(
                case.key[0], case.value[0], case.caches[0], torch.arange(4), format,
                recent_cache=case.caches[1], recent_slot_mapping=torch.arange(1, 5),
            )  # fmt: skip


@every_format
@pytest.mark.parametrize("where", ("key", "value"))
@pytest.mark.parametrize("at", (0, 5, 40))
def test_a_nan_reaches_who_sees_it(format, where, at):
    """Once its group is sealed, a NaN in K concerns all that see any of the group."""
    case = Sequences(format, [130, 60])
    getattr(case, where)[0][at, 0, 3] = NAN
    out, other = case.run(case.at_once(), None)
    assert torch.isfinite(out[:at]).all() and out[at:].isnan().any((1, 2)).all()
    assert torch.isfinite(other).all()


@every_format
@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=name_of)
def test_infinities_stay_numbers(format, dtype):
    case = Sequences(format, [100], dtype=dtype)
    case.key[0][7, 0, 3], case.value[0][40, 0, 1] = INF, -INF
    (out,) = case.run(case.at_once(), None)
    assert torch.isfinite(out).all()


@every_format
def test_round_trip_error_stays_under_the_table(format):
    g = torch.Generator().manual_seed(1)
    errors = []
    for stream in (format.key, format.value):
        x = torch.randn(64, GROUP, 2, 128, generator=g)
        back = sealed.decode_group(*sealed.encode_group(x, stream), stream)
        errors.append(float((back - x).square().mean().sqrt()))
    assert format.max_error / 2 < max(errors) < format.max_error, errors
