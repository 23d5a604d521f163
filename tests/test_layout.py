"""Pages: every code has its own bits, regions are aligned, unpacking inverts packing."""

import pytest
import torch
from cases import BLOCK_SIZES, HEAD_SIZES, PLAIN_ROWS, name_of
from oracle import pack, pack_metadata, static_scale, unsigned

from kvq_plugin import reference
from kvq_plugin.formats import Granularity, Kind, get_format
from kvq_plugin.layout import CPU_V1, GPU_V1, MAX_HEAD_SIZES, PageLayout, repack

every_format = pytest.mark.parametrize("format", PLAIN_ROWS, ids=name_of)
every_layout = pytest.mark.parametrize(
    ("kind", "head_size"),
    [(k, d) for k, largest in MAX_HEAD_SIZES.items() for d in HEAD_SIZES if d <= largest],
)


def regions(layout: PageLayout) -> list[tuple[int, int]]:
    """(first byte, end) of K codes, V codes, K metadata and V metadata, empty ones dropped."""
    found = []
    for which in (layout.key, layout.value):
        codes = layout.block_size * layout.head_size * which.stream.code.bits // 8
        found.append((which.codes, which.codes + codes))
    for which in (layout.key, layout.value):
        size = layout.block_size * which.stream.metadata_bytes(layout.head_size)
        if size:
            found.append((which.metadata, which.metadata + size))
    return found


@every_layout
@every_format
@pytest.mark.parametrize("block_size", (*BLOCK_SIZES, 48))
def test_every_code_has_its_own_bits_inside_its_region(format, head_size, block_size, kind):
    layout = PageLayout(format, head_size, block_size, kind)
    for which, (begin, end) in zip((layout.key, layout.value), regions(layout), strict=False):
        bits = which.stream.code.bits
        assert which.code_bytes.shape == which.code_shifts.shape == (block_size, head_size)
        position = (which.code_bytes * 8 + which.code_shifts).flatten()
        assert torch.equal(position.sort().values, torch.arange(begin * 8, end * 8, bits))


@every_layout
@every_format
@pytest.mark.parametrize("block_size", (*BLOCK_SIZES, 48))
def test_regions_tile_the_page_and_start_on_cache_lines(format, head_size, block_size, kind):
    layout = PageLayout(format, head_size, block_size, kind)
    at = 0
    for begin, end in regions(layout):
        assert begin == at, "regions must follow each other with no gap and no overlap"
        assert begin % 64 == 0
        at = end
    assert layout.size == at == block_size * format.bytes_per_token(head_size)
    assert layout.size % 64 == 0, "the next page starts on a cache line too"


@every_format
def test_words_and_lines_are_as_the_docstring_says(format):
    head_size, block_size = 96, 32
    layout = PageLayout(format, head_size, block_size)
    for token, dim in ((0, 0), (1, 0), (0, 1), (17, 33), (31, 95), (16, 8), (5, 64)):
        w = 32 // format.key.code.bits
        line = (token // 16) * (head_size // w) + dim // w
        field = dim % w
        byte = layout.key.codes + line * 64 + (token % 16) * 4 + field % 4
        assert layout.key.code_bytes[token, dim] == byte
        assert layout.key.code_shifts[token, dim] == field // 4 * format.key.code.bits

        w = 32 // format.value.code.bits
        line = (token // w) * (head_size // 16) + dim // 16
        field = token % w
        byte = layout.value.codes + line * 64 + (dim % 16) * 4 + field % 4
        assert layout.value.code_bytes[token, dim] == byte
        assert layout.value.code_shifts[token, dim] == field // 4 * format.value.code.bits


@every_format
def test_rows_of_gpu_pages_are_as_the_docstring_says(format):
    head_size, block_size = 96, 32
    layout = PageLayout(format, head_size, block_size, GPU_V1)
    for token, dim in ((0, 0), (1, 0), (0, 1), (17, 33), (31, 95), (16, 8), (5, 68)):
        for which in (layout.key, layout.value):
            bits = which.stream.code.bits
            w = 32 // which.stream.code.bits
            byte = which.codes + token * head_size * bits // 8 + dim // w * 4 + dim % w % 4
            assert which.code_bytes[token, dim] == byte
            assert which.code_shifts[token, dim] == dim % w // 4 * bits


@every_format
@pytest.mark.parametrize("head_size", (16, 96, 256))
def test_both_layouts_hold_the_same_codes_and_attention(format, head_size):
    """Stored by the reference in either layout, repacked either way, read in either."""
    g = torch.Generator().manual_seed(head_size)
    key, value = (torch.randn(40, 2, head_size, generator=g) for _ in "kv")
    statics = [None, None]
    if not format.is_dynamic:
        statics = [static_scale(format, Granularity.CHANNEL, 2, head_size, g) for _ in "kv"]
    slots = torch.randperm(4 * 16, generator=g)[:40]
    kinds = {kind: PageLayout(format, head_size, 16, kind) for kind in (CPU_V1, GPU_V1)}
    caches = {}
    for kind, layout in kinds.items():
        caches[kind] = torch.zeros(4, 2, 16, layout.size // 16, dtype=torch.uint8)
        reference.store(key, value, caches[kind], slots, format, *statics, layout=kind)
    assert not torch.equal(*caches.values())
    pages = {kind: cache.flatten(2) for kind, cache in caches.items()}
    there = repack(pages[CPU_V1], kinds[CPU_V1], kinds[GPU_V1])
    assert torch.equal(there, pages[GPU_V1])
    assert torch.equal(repack(there, kinds[GPU_V1], kinds[CPU_V1]), pages[CPU_V1])
    query = torch.randn(3, 4, head_size, generator=g)
    table, lens = torch.tensor([[2, 0], [1, 3]]).int(), torch.tensor([30, 17]).int()
    starts = torch.tensor([0, 1, 3]).int()
    outputs = [
        reference.attend(query, cache, table, lens, starts, format, 0.1, *statics, layout=kind)
        for kind, cache in caches.items()
    ]
    assert torch.equal(*outputs)


def test_repacking_something_else_is_refused():
    source = PageLayout(get_format("fp8"), 64, 32)
    with pytest.raises(ValueError, match="only the layout may differ"):
        repack(torch.zeros(source.size).byte(), source, PageLayout(get_format("fp8"), 64, 16))


def test_unknown_layout_is_refused():
    with pytest.raises(ValueError, match=r"unknown page layout 'gpu-v0'.*gpu-v1"):
        PageLayout(get_format("fp8"), 64, 32, "gpu-v0")


def random_codes(layout: PageLayout, which, shape, generator) -> torch.Tensor:
    code = which.stream.code
    raw = torch.randint(0, 1 << code.bits, (*shape, layout.block_size, layout.head_size),
                        generator=generator, dtype=torch.uint8)  # fmt: skip
    return raw.view(torch.int8) if code.kind is Kind.SIGNED else raw


@every_layout
@every_format
@pytest.mark.parametrize("block_size", (16, 128))
def test_unpack_inverts_pack_and_keeps_to_its_stream(format, head_size, block_size, kind):
    generator = torch.Generator().manual_seed(head_size)
    layout = PageLayout(format, head_size, block_size, kind)
    pages = torch.full((2, 3, layout.size), 0xA5, dtype=torch.uint8)
    expected = {}
    for which in (layout.key, layout.value):
        codes = random_codes(layout, which, (2, 3), generator)
        pack(pages, which, codes)
        expected[which.codes] = codes
        if which.stream.is_dynamic:
            words = torch.randint(-(2**31), 2**31, (2, 3, block_size), generator=generator)
            words = words.to(torch.int32)
            pack_metadata(pages, which, words)
            expected[which.metadata] = words
    for which in (layout.key, layout.value):
        codes = layout.unpack_codes(pages, which)
        assert codes.dtype == expected[which.codes].dtype
        assert torch.equal(codes, expected[which.codes])
        words = layout.unpack_metadata(pages, which)
        if which.stream.is_dynamic:
            assert torch.equal(words, expected[which.metadata])
        else:
            assert words is None


@every_format
def test_one_code_changes_only_its_own_bits(format):
    layout = PageLayout(format, 32, 16)
    for which in (layout.key, layout.value):
        zero = torch.zeros(16, 32, dtype=torch.uint8)
        zero = zero.view(torch.int8) ^ -128 if which.stream.code.kind is Kind.SIGNED else zero
        assert not unsigned(zero, which.stream.code).any()
        page = torch.zeros(layout.size, dtype=torch.uint8)
        page[which.code_bytes[9, 21]] = 1 << int(which.code_shifts[9, 21])
        changed = layout.unpack_codes(page, which) != zero
        assert changed.nonzero().tolist() == [[9, 21]]


@pytest.mark.parametrize("head_size", (0, -16, 8, 24, 100, 528, 576))
def test_head_size_that_cannot_be_laid_out(head_size):
    with pytest.raises(ValueError, match=rf"head size {head_size}.*expected.*multiple of 16"):
        PageLayout(get_format("fp8"), head_size, 32)


@pytest.mark.parametrize("head_size", (272, 512))
def test_head_size_too_large_for_gpu_pages(head_size):
    with pytest.raises(ValueError, match=rf"head size {head_size}.*gpu-v1.*up to 256"):
        PageLayout(get_format("fp8"), head_size, 32, GPU_V1)


@pytest.mark.parametrize("block_size", (0, -16, 8, 24, 100))
def test_block_size_that_cannot_be_laid_out(block_size):
    with pytest.raises(ValueError, match=rf"block size {block_size}.*expected.*multiple of 16"):
        PageLayout(get_format("int4_per_token_head"), 64, block_size)
