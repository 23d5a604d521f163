"""The compiled store of formats with recent rows: both caches' bytes are the reference's, on every
instruction set, whatever the rows hold and however slots are dealt out."""

from __future__ import annotations

import oracle
import pytest
import torch
from cases import ACTIVATIONS, ISAS, WINDOW_ROWS, name_of, use_isa

from kvq_plugin import _native, codes, ops, reference
from kvq_plugin.layout import PageLayout

NAN, INF = float("nan"), float("inf")
every_format = pytest.mark.parametrize("format", WINDOW_ROWS, ids=name_of)
every_isa = pytest.mark.parametrize("isa", ISAS)
pytestmark = pytest.mark.skipif(ISAS == ["reference"], reason="there are no kernels to compare")

#: What is done to rows of N(0, 1), by the place in the store's encoders that it leads to.
EDGES = {
    "plain": lambda x: x,
    "offset": lambda x: x * 0.01 + 50 * torch.randn(1, *x.shape[1:]),
    "constant": lambda x: x[:1].expand_as(x).clone(),
    "zero": lambda x: -torch.zeros_like(x),
    "tiny": lambda x: x * 2.0**-24,
    "large": lambda x: x * 2.0**9,
    "beyond fp16": lambda x: x * 2.0**15,
    "infinite": lambda x: x.index_put((torch.tensor([3, 40]),), torch.tensor(-INF)),
    "huge": lambda x: x.index_put((torch.tensor([40]), torch.tensor([0])), torch.tensor(3e38)),
    "opposed": lambda x: x.index_put(
        (torch.tensor([40, 40, 40]), torch.tensor([0, 0, 0]), torch.tensor([1, 2, 35])),
        torch.tensor([INF, -INF, INF]),
    ),
    "nan": lambda x: x.index_put((torch.tensor([0, 37, 70]),), torch.tensor(NAN)),
    "sink": lambda x: x * torch.where(torch.arange(len(x)) == 0, 1000.0, 1.0)[:, None, None],
}


class Case:
    """Rows, slots and two caches: those of two sequences, interleaved, some tokens skipped."""

    def __init__(self, format, *, head_size=64, kv_heads=2, block_size=64, recent_block=32,
                 dtype=torch.float32, edge="plain", style="plain", fill=0xFF, seed=0):  # fmt: skip
        torch.manual_seed(seed)
        self.format, tokens = format, 150
        x = torch.randn(2, tokens, kv_heads, head_size)
        self.key, self.value = (EDGES[edge](rows).to(dtype) for rows in x)
        self.caches, slots = [], []
        for f, size in ((format, block_size), (format.recent, recent_block)):
            blocks = 2 * -(-100 // size) + 1
            cache = oracle.empty_cache(f, blocks, kv_heads, head_size, size, style)
            oracle.whole_storage(cache).fill_(fill)
            self.caches.append(cache)
            table = torch.randperm(blocks)[:-1].view(2, -1)
            at = torch.arange(100)
            slots.append(torch.cat([t[at // size] * size + at % size for t in table]))
        order = torch.randperm(200)[:tokens] if seed % 2 else torch.arange(tokens)
        self.slots = [s[order] for s in slots]
        self.slots[0][11] = -1
        self.slots[1][90] = -1

    def stored(self, module) -> list[torch.Tensor]:
        caches = [oracle.clone_storage(c) for c in self.caches]
        module.store(
            self.key, self.value, caches[0], self.slots[0], self.format,
            recent_cache=caches[1], recent_slot_mapping=self.slots[1],
        )  # fmt: skip
        return [oracle.whole_storage(c) for c in caches]

    def check(self, isa: str) -> None:
        with use_isa(isa):
            got = self.stored(ops)
        for a, b in zip(got, self.stored(reference), strict=True):
            assert torch.equal(a, b), f"{int((a != b).sum())} of {a.numel()} bytes differ"


@every_isa
@every_format
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=name_of)
@pytest.mark.parametrize("edge", EDGES)
def test_bytes_are_the_references_at_every_edge(format, edge, dtype, isa):
    Case(format, edge=edge, dtype=dtype).check(isa)


@every_isa
@every_format
@pytest.mark.parametrize("dtype", ACTIVATIONS, ids=name_of)
@pytest.mark.parametrize("head_size", (32, 64, 96, 128, 160, 256, 512))
def test_bytes_are_the_references_for_every_shape(format, head_size, dtype, isa):
    Case(format, head_size=head_size, dtype=dtype, kv_heads=1, block_size=96).check(isa)


@every_isa
@pytest.mark.parametrize("head_size", (16, 48, 80, 112))
def test_int4_takes_head_sizes_that_are_multiples_of_16(head_size, isa):
    Case(WINDOW_ROWS[0], head_size=head_size, block_size=32).check(isa)


@every_isa
@every_format
@pytest.mark.parametrize("style", oracle.CACHE_STYLES)
@pytest.mark.parametrize("seed", (1, 2))
def test_bytes_are_the_references_in_any_order_and_strides(format, style, seed, isa):
    Case(format, style=style, seed=seed, kv_heads=3, recent_block=64, fill=0x7F).check(isa)


@every_isa
@every_format
def test_rows_are_read_back_whatever_the_recent_cache_holds(format, isa):
    """A group's last token seals 31 rows of noise: scales of any bits, NaN and infinities too."""
    case = Case(format, kv_heads=4)
    g = torch.Generator().manual_seed(3)
    for cache in case.caches:
        storage = oracle.whole_storage(cache)
        storage.copy_(torch.randint(256, storage.shape, generator=g, dtype=torch.uint8))
    last = [s[31:32] for s in case.slots]
    case.key, case.value, case.slots = case.key[31:32], case.value[31:32], last
    assert int(last[0]) % 32 == 31
    case.check(isa)


@every_isa
@every_format
@pytest.mark.parametrize("head_size", (32, 128))
def test_extremes_of_values_are_those_of_codes(format, head_size, isa):
    """Rows of any codes, whose scales leave all values within fp16: whichever sign a scale has, and
    however small it is, rounding its products keeps the order of the codes."""
    case = Case(format, head_size=head_size, kv_heads=32, dtype=torch.bfloat16)
    g = torch.Generator().manual_seed(4)
    recent = case.caches[1].flatten(2)
    recent.copy_(torch.randint(256, recent.shape, generator=g, dtype=torch.uint8))
    layout = PageLayout(format.recent, head_size, 32)
    for which in (layout.key, layout.value):
        size = (*recent.shape[:2], 32)
        scales = torch.randn(size, generator=g) * 2.0 ** torch.randint(-149, 8, size, generator=g)
        scales[torch.rand(size, generator=g) < 0.05] = 0.0
        scales[:, ::2] = scales[:, ::2, :1]  # rows in each other's range
        recent[..., which.metadata : which.metadata + 128] = scales.clamp(-500, 500).view(
            torch.uint8
        )
    last = [s[31:32] for s in case.slots]
    case.key, case.value, case.slots = case.key[31:32], case.value[31:32], last
    case.check(isa)


@every_isa
@every_format
def test_of_two_groups_for_one_the_later_one_stays(format, isa):
    """The first is sealed after all rows are written, for it lacks one; the second is whole."""
    case = Case(format, dtype=torch.bfloat16)
    case.key, case.value = (torch.cat([x[:32], -x[32:64]]) for x in (case.key, case.value))
    case.slots = [torch.cat([case.slots[0][:32]] * 2), case.slots[1][:64].clone()]
    case.slots[0][11] = case.slots[0][43]
    case.slots[1][11] = -1
    case.check(isa)


@every_isa
@every_format
def test_a_row_that_is_written_after_its_group_is_sealed_with_it(format, isa):
    case = Case(format, dtype=torch.bfloat16)
    rows = torch.cat([torch.arange(32), torch.tensor([70])])
    case.key, case.value = case.key[rows], case.value[rows]
    sealed, recent = (s[:32] for s in case.slots)
    case.slots = [torch.cat([sealed, torch.tensor([-1])]), torch.cat([recent, recent[5:6]])]
    case.check(isa)


@every_isa
@every_format
def test_of_two_tokens_for_a_slot_the_later_one_stays(format, isa):
    case = Case(format)
    case.key, case.value = (torch.cat([x, x.flip(0)]) for x in (case.key, case.value))
    case.slots = [torch.cat([s, s]) for s in case.slots]
    case.check(isa)


@every_format
def test_threads_change_nothing(format):
    case = Case(format, kv_heads=5)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(case.stored(ops))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_scales_of_the_header_are_the_references():
    """Every float's neighbourhood that matters: all exponents, mantissas around every tie."""
    exponents = torch.arange(127 - 40, 127 + 16, dtype=torch.int32)[:, None] << 23
    around = torch.tensor([-2, -1, 0, 1, 2], dtype=torch.int32)
    mantissas = (torch.arange(16, dtype=torch.int32)[:, None] << 19) + around
    x = (exponents + mantissas.flatten()).flatten().view(torch.float32)
    x = torch.cat([x[x < 63000], torch.zeros(1)]).contiguous()
    got = torch.empty(x.shape, dtype=torch.uint8)
    _native.convert_scales(x.clone(), got, encode=True)
    assert torch.equal(got.int(), codes.encode_scale(x))
    values, every = torch.empty(256), torch.arange(256).to(torch.uint8)
    _native.convert_scales(values, every, encode=False)
    expected = codes.decode_scale(every.int())
    assert torch.equal(values.nan_to_num(-1), expected.nan_to_num(-1))


ARGUMENTS = {
    "recent cache": ({"recent_cache": None}, "needs recent_cache and recent_slot_mapping"),
    "recent slots": ({"recent_slot_mapping": None}, "needs recent_cache"),
    "recent format": (
        {"recent_cache": torch.zeros(4, 2, 32, 128, dtype=torch.uint8)},
        "int8_rotated.*136",
    ),
    "recent block": (
        {"recent_cache": torch.zeros(4, 2, 48, 136, dtype=torch.uint8)},
        "multiple of 32",
    ),
    "recent heads": (
        {"recent_cache": torch.zeros(4, 3, 32, 136, dtype=torch.uint8)},
        "recent_cache has 3 kv heads",
    ),
    "recent slot": ({"recent_slot_mapping": lambda slots: slots % 32 + 10**6}, "names slot 10000"),
    "recent count": ({"recent_slot_mapping": torch.arange(3)}, "3 recent slots for 150"),
}


@every_format
@pytest.mark.parametrize(("changed", "message"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_wrong_arguments_are_refused_and_worded(format, changed, message):
    case = Case(format)
    changed = {k: v(case.slots[0]) if callable(v) else v for k, v in changed.items()}
    options = {"recent_cache": case.caches[1], "recent_slot_mapping": case.slots[1], **changed}
    before = [c.clone() for c in case.caches]
    with pytest.raises(ValueError, match=message):
        ops.store(case.key, case.value, case.caches[0], case.slots[0], format, **options)
    assert all(torch.equal(a, b) for a, b in zip(case.caches, before, strict=True))


def test_a_format_without_recent_rows_takes_no_recent_cache():
    case, format = Case(WINDOW_ROWS[0]), WINDOW_ROWS[0].recent
    with pytest.raises(ValueError, match="int8_rotated has no recent rows"):
        ops.store(
            case.key, case.value, case.caches[1], case.slots[1], format,
            recent_cache=case.caches[1], recent_slot_mapping=case.slots[1],
        )  # fmt: skip
