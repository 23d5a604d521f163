"""Pages: every code has its own bits, regions are aligned, unpacking inverts packing."""

import pytest
import torch
from cases import BLOCK_SIZES, HEAD_SIZES, ROWS, name_of
from oracle import pack, pack_metadata, unsigned

from kvq_plugin.formats import Kind, get_format
from kvq_plugin.layout import PageLayout, code_word

every_format = pytest.mark.parametrize("format", ROWS, ids=name_of)
every_head_size = pytest.mark.parametrize("head_size", HEAD_SIZES)


def regions(layout: PageLayout) -> list[tuple[int, int]]:
    """(first byte, end) of K codes, V codes, K metadata and V metadata, empty ones dropped."""
    found = []
    for which in (layout.key, layout.value):
        codes = layout.block_size * layout.head_size * which.stream.code.bits // 8
        found.append((which.codes, which.codes + codes))
    for which in (layout.key, layout.value):
        size = layout.block_size * which.stream.metadata_bytes
        if size:
            found.append((which.metadata, which.metadata + size))
    return found


@every_format
@every_head_size
@pytest.mark.parametrize("block_size", (*BLOCK_SIZES, 48))
def test_every_code_has_its_own_bits_inside_its_region(format, head_size, block_size):
    layout = PageLayout(format, head_size, block_size)
    for which, (begin, end) in zip((layout.key, layout.value), regions(layout), strict=False):
        bits = which.stream.code.bits
        assert which.code_bytes.shape == which.code_shifts.shape == (block_size, head_size)
        position = (which.code_bytes * 8 + which.code_shifts).flatten()
        assert torch.equal(position.sort().values, torch.arange(begin * 8, end * 8, bits))


@every_format
@every_head_size
@pytest.mark.parametrize("block_size", (*BLOCK_SIZES, 48))
def test_regions_tile_the_page_and_start_on_cache_lines(format, head_size, block_size):
    layout = PageLayout(format, head_size, block_size)
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
        w = code_word(format.key.code)
        line = (token // 16) * (head_size // w) + dim // w
        field = dim % w
        byte = layout.key.codes + line * 64 + (token % 16) * 4 + field % 4
        assert layout.key.code_bytes[token, dim] == byte
        assert layout.key.code_shifts[token, dim] == field // 4 * format.key.code.bits

        w = code_word(format.value.code)
        line = (token // w) * (head_size // 16) + dim // 16
        field = token % w
        byte = layout.value.codes + line * 64 + (dim % 16) * 4 + field % 4
        assert layout.value.code_bytes[token, dim] == byte
        assert layout.value.code_shifts[token, dim] == field // 4 * format.value.code.bits


def random_codes(layout: PageLayout, which, shape, generator) -> torch.Tensor:
    code = which.stream.code
    raw = torch.randint(0, 1 << code.bits, (*shape, layout.block_size, layout.head_size),
                        generator=generator, dtype=torch.uint8)  # fmt: skip
    return raw.view(torch.int8) if code.kind is Kind.SIGNED else raw


@every_format
@every_head_size
@pytest.mark.parametrize("block_size", (16, 128))
def test_unpack_inverts_pack_and_streams_do_not_touch_each_other(format, head_size, block_size):
    generator = torch.Generator().manual_seed(head_size)
    layout = PageLayout(format, head_size, block_size)
    pages = torch.full((2, 3, layout.size), 0xA5, dtype=torch.uint8)
    expected = {}
    for which in (layout.key, layout.value):
        codes = random_codes(layout, which, (2, 3), generator)
        pack(pages, which, codes)
        expected[which.codes] = codes
        if which.stream.metadata_bytes:
            words = torch.randint(-(2**31), 2**31, (2, 3, block_size), generator=generator)
            words = words.to(torch.int32)
            pack_metadata(pages, which, words)
            expected[which.metadata] = words
    for which in (layout.key, layout.value):
        codes = layout.unpack_codes(pages, which)
        assert codes.dtype == expected[which.codes].dtype
        assert torch.equal(codes, expected[which.codes])
        words = layout.unpack_metadata(pages, which)
        if which.stream.metadata_bytes:
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


@pytest.mark.parametrize("block_size", (0, -16, 8, 24, 100))
def test_block_size_that_cannot_be_laid_out(block_size):
    with pytest.raises(ValueError, match=rf"block size {block_size}.*expected.*multiple of 16"):
        PageLayout(get_format("int4_per_token_head"), 64, block_size)
