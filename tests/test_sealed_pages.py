"""Formats with recent rows in plain torch: a sealed group's codes, and where a page has them."""

from __future__ import annotations

import pytest
import sealed_oracle
import torch
from cases import WINDOW_ROWS, name_of

from kvq_plugin import codes, sealed
from kvq_plugin.formats import GROUP, Granularity, get_format
from kvq_plugin.layout import CPU_V1, GPU_V1, PageLayout

every_format = pytest.mark.parametrize("format", WINDOW_ROWS, ids=name_of)
NAN, INF = float("nan"), float("inf")


# --- scales and codes ----------------------------------------------------------------------------


def test_scale_bytes_are_the_tops_of_fp16():
    every = torch.arange(256, dtype=torch.int32)
    expected = torch.tensor(sealed_oracle.scale_values())
    assert torch.equal(codes.decode_scale(every).nan_to_num(-1), expected.nan_to_num(-1))
    assert codes.decode_scale(every[255:]).isnan().all()


def test_scales_round_to_the_nearest_byte_and_ties_to_the_even_one():
    values = torch.tensor(sealed_oracle.scale_values()[:248])
    ties = (values[1:] + values[:-1]) / 2
    near = [torch.nextafter(ties, torch.tensor(to)) for to in (0.0, INF)]
    random = torch.rand(500) * 2.0 ** torch.randint(-22, 16, (500,))
    tiny = torch.tensor([0.0, 2.0**-149, 2.0**-18, 2.0**-19, 2.0**-17])
    x = torch.cat([values, ties, *near, random.clamp(max=61440.0), tiny])
    expected = [sealed_oracle.nearest_scale(v) for v in x.tolist()]
    assert codes.encode_scale(x).tolist() == expected


def group_of(kind: str) -> torch.Tensor:
    """Rotated rows ``[GROUP, 2 heads, 32]`` that take the encoders to their edges."""
    g = torch.Generator().manual_seed(5)
    x = torch.randn(GROUP, 2, 32, generator=g)
    if kind == "offset":
        x = x * 0.01 + torch.randn(1, 2, 32, generator=g) * 100  # zero points past a byte
    elif kind == "constant":
        x = x[:1].expand(GROUP, 2, 32).clone()
    elif kind == "sink":
        x[0] *= 1000
    elif kind == "huge":
        x[3] *= 1e30
        x[7, 0, 5] = INF
    elif kind == "tiny":
        x *= 1e-7
    elif kind == "zero":
        x = -torch.zeros_like(x)
    elif kind == "nan":
        x[9, 1] = NAN
    elif kind == "nan first":
        x[0, 1] = NAN
    return x


KINDS = ("normal", "offset", "constant", "sink", "huge", "tiny", "zero", "nan", "nan first")


@every_format
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("starts_page", (False, True))
def test_groups_are_encoded_as_defined(format, kind, starts_page):
    x = group_of(kind)
    for stream in (format.key, format.value):
        got, words = sealed.encode_group(x[None], stream, torch.tensor([starts_page]))
        values = sealed.decode_group(got, words, stream)[0]
        for h in range(2):
            want, by_index, numbers = sealed_oracle.seal_head(x[:, h], stream, starts_page)
            assert got[0, :, h].tolist() == want.tolist()
            mask = 0xFFFF if stream.lite else 0xFFFFFFFF
            flat = _in_page_order(words[0], stream)[h]
            assert [w & mask for w in flat.tolist()] == [
                sealed_oracle.canonical(by_index[i], stream) for i in range(len(by_index))
            ]
            assert torch.equal(values[:, h].nan_to_num(-7.0), numbers.nan_to_num(-7.0))


def _in_page_order(words: torch.Tensor, stream) -> torch.Tensor:
    if Granularity.TOKEN_HEAD in stream.granularities:
        return words.T
    if Granularity.TOKEN_GROUP in stream.granularities:
        return words.permute(1, 2, 0).flatten(1)
    return words


def test_lite_codes_stay_within_half_a_step_of_what_shares_their_scale():
    """Scale rounded by a sixteenth at most, then half of it, wherever the values lie."""
    g = torch.Generator().manual_seed(0)
    stream = get_format("k3v2").key
    x = torch.randn(200, GROUP, 1, 32, generator=g) + 3 * torch.randn(200, 1, 1, 32, generator=g)
    got, words = sealed.encode_group(x, stream)
    error = (sealed.decode_group(got, words, stream) - x).abs()
    step = torch.maximum((x.amax(1) - x.amin(1)) / 7, x.amin(1).abs() / 56)[:, None]
    assert (error <= step * 0.75).all(), "ends may be cut by what the scale was rounded down"
    assert (error <= step * 0.54).float().mean() > 0.97


# --- pages ---------------------------------------------------------------------------------------


@every_format
@pytest.mark.parametrize("kind", (CPU_V1, GPU_V1))
@pytest.mark.parametrize("head_size", (32, 64, 96, 256))
@pytest.mark.parametrize("block_size", (32, 96, 128))
def test_pages_hold_every_code_once_and_regions_tile_them(format, kind, head_size, block_size):
    layout = PageLayout(format, head_size, block_size, kind)
    taken = torch.zeros(layout.size, 8, dtype=torch.int64)
    for which in (layout.key, layout.value):
        assert which.codes % 64 == 0 and which.metadata % 64 == 0
        for plane in which.planes:
            assert plane.bytes.shape == plane.shifts.shape == (block_size, head_size)
            for bit in range(plane.bits):
                at = (plane.bytes.flatten(), plane.shifts.flatten() + bit)
                taken.index_put_(at, torch.ones(at[0].numel(), dtype=torch.int64), True)
        begin = which.metadata
        taken[begin : begin + block_size * which.stream.metadata_bytes(head_size)] += 1
    for which in (0, 1):
        for at in sealed.first_row(layout, which):
            taken[at] += 1
    end = layout.first + format.first_row_bytes(head_size)
    assert (taken[:end] == 1).all() and (taken[end:] == 0).all()
    assert layout.size == block_size * format.bytes_per_token(head_size, block_size)
    assert layout.size % 64 == 0 and layout.size - end < 2 * block_size
    pages = torch.randint(256, (3, 2, layout.size), dtype=torch.uint8)
    for which in (layout.key, layout.value):
        copy = pages.clone()
        layout.pack_codes(copy, which, layout.unpack_codes(pages, which))
        assert torch.equal(copy, pages)


@every_format
def test_planes_are_as_the_docstring_says(format):
    head_size, block_size = 96, 64
    layout = PageLayout(format, head_size, block_size)
    for token, dim in ((0, 0), (1, 0), (0, 1), (17, 33), (31, 95), (16, 8), (63, 64)):
        start = token // 16 * 16 * head_size * format.key.code.bits // 8
        for plane, before in zip(layout.key.planes, (0, 4 * head_size), strict=False):
            word = 32 // plane.bits
            byte = start + before + dim // word * 64 + token % 16 * 4 + dim % word % 4
            assert plane.bytes[token, dim] == byte
            assert plane.shifts[token, dim] == dim % word // 4 * plane.bits
        (plane,) = layout.value.planes
        word = 32 // plane.bits
        line = token // word * (head_size // 16) + dim // 16
        byte = layout.value.codes + line * 64 + dim % 16 * 4 + token % word % 4
        assert plane.bytes[token, dim] == byte
        assert plane.shifts[token, dim] == token % word // 4 * plane.bits


@pytest.mark.parametrize(
    ("name", "head_size", "size"),
    (("int4", 64, 78), ("int4", 128, 151), ("k3v2", 64, 50), ("k3v2", 128, 99),
     ("k8v4", 64, 104), ("k8v4", 128, 200), ("int8_rotated", 128, 264)),
)  # fmt: skip
def test_bytes_of_a_token_in_a_page_of_128(name, head_size, size):
    assert get_format(name).bytes_per_token(head_size) == size


def test_sizes_that_cannot_be_laid_out_are_refused():
    with pytest.raises(ValueError, match=r"head size 48.*multiple of 32"):
        PageLayout(get_format("k3v2"), 48, 128)
    with pytest.raises(ValueError, match=r"block size 48.*multiple of 32"):
        PageLayout(get_format("int4"), 64, 48)
    PageLayout(get_format("int4"), 48, 32)
