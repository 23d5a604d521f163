"""Sealing: rows leave the recent cache for few bits, ``GROUP`` tokens at a time.

A format with recent rows (``KVFormat.recent``) has two caches. New rows go to the recent one, as
int8. When the last slot of a group of ``GROUP`` is written, the group's rows, *as the recent cache
holds them*, become codes of the sealed cache. A query at position p reads sealed rows before
``format.sealed_before(p)`` and recent ones from there on, so what it sees depends on positions
alone: not on how tokens were batched, and not on drafts that were rejected, because writing the
last slot again seals again.

Each page's first row is kept as int8 too, and its K has no say in its group's ranges. Attention
reads it for position 0, the attention sink: KL .0030 without it, .0017 with its K, .0013 with K and
V (`int4`; `k3v2`: .0406, .0213, .0109). The store, which knows slots but no positions, treats all
pages alike; where a page is not a sequence's first, that row is read by its codes.
"""

from __future__ import annotations

import torch

from kvq_plugin.codes import decode_affine, encode_affine
from kvq_plugin.formats import GROUP, Granularity, Stream
from kvq_plugin.layout import PageLayout


def encode_group(
    x: torch.Tensor, stream: Stream, starts_page: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated rows ``x [G, GROUP, H, D]`` fp32 -> (codes uint8 of that shape, metadata words).

    Words are ``[G, H, D]`` per channel, ``[G, GROUP, H]`` per token and ``[G, GROUP, H, D/GROUP]``
    per token and group of channels. *starts_page* ``[G]``: groups whose row 0 is left out.
    """
    if Granularity.CHANNEL_GROUP in stream.granularities:
        left_out = torch.zeros_like(x, dtype=torch.bool)
        if starts_page is not None:
            left_out[starts_page, 0] = True
        return encode_affine(x, 1, stream, left_out)
    if Granularity.TOKEN_GROUP in stream.granularities:
        codes, words = encode_affine(x.unflatten(-1, (-1, GROUP)), -1, stream)
        return codes.flatten(-2), words
    return encode_affine(x, -1, stream)


def decode_group(codes: torch.Tensor, words: torch.Tensor, stream: Stream) -> torch.Tensor:
    """Inverse of :func:`encode_group`, of codes ``[..., GROUP, H, D]``."""
    if Granularity.CHANNEL_GROUP in stream.granularities:
        return decode_affine(codes, words, -3, stream)
    if Granularity.TOKEN_GROUP in stream.granularities:
        return decode_affine(codes.unflatten(-1, (-1, GROUP)), words, -1, stream).flatten(-2)
    return decode_affine(codes, words, -1, stream)


def seal(
    pages: torch.Tensor,
    slots: torch.Tensor,
    recent_pages: torch.Tensor,
    recent_slots: torch.Tensor,
    layout: PageLayout,
    recent_layout: PageLayout,
) -> None:
    """Seal the groups whose last slot is among *slots* ``[T]``, from the same token's
    *recent_slots* ``[T]``, in *pages* and *recent_pages* ``[B, H, size]``.

    Raises ValueError where the two slots of a token are at different places of their groups.
    """
    both = (slots >= 0) & (recent_slots >= 0)
    if bool(((slots - recent_slots)[both] % GROUP != 0).any()):
        raise ValueError(
            f"slot_mapping and recent_slot_mapping must agree modulo {GROUP}: both caches' blocks "
            f"are multiples of {GROUP} tokens, got {slots.tolist()} and {recent_slots.tolist()}"
        )
    last = both & (slots % GROUP == GROUP - 1)
    # Of two tokens that seal one group the later one stays.
    pairs = ((x[last] // GROUP).tolist() for x in (slots, recent_slots))
    groups = dict(zip(*pairs, strict=True))
    for group, recent_group in groups.items():
        block, first = divmod(group * GROUP, layout.block_size)
        recent_block, recent_first = divmod(recent_group * GROUP, recent_layout.block_size)
        rows = slice(recent_first, recent_first + GROUP)
        page, source = pages[block], recent_pages[recent_block]
        for i, (which, recent) in enumerate(
            ((layout.key, recent_layout.key), (layout.value, recent_layout.value))
        ):
            codes = recent_layout.unpack_codes(source, recent)[:, rows].transpose(0, 1)
            words = recent_layout.unpack_metadata(source, recent)[:, rows].transpose(0, 1)
            scale = words.contiguous().view(torch.float32)
            if first == 0:
                codes_at, scale_at = first_row(layout, i)
                page[:, codes_at] = codes[0].view(torch.uint8) ^ 0x80
                page[:, scale_at] = scale[0, :, None].contiguous().view(torch.uint8)
            x = codes.float() * scale[..., None]
            starts = torch.tensor([first == 0])
            write_group(page, layout, which, first, *encode_group(x[None], which.stream, starts))


def first_row(layout: PageLayout, which: int) -> tuple[slice, slice]:
    """Where the first row's codes (D bytes, offset binary) and scale lie, of K (0) or V (1)."""
    codes = layout.first + which * layout.head_size
    scale = layout.first + 2 * layout.head_size + 4 * which
    return slice(codes, codes + layout.head_size), slice(scale, scale + 4)


def load_first(pages: torch.Tensor, layout: PageLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """First rows of K and of V, rotated fp32, of *pages* ``[..., size]``: each ``[..., D]``."""
    found = []
    for which in (0, 1):
        codes, scale = (pages[..., at].contiguous() for at in first_row(layout, which))
        found.append((codes ^ 0x80).view(torch.int8).float() * scale.view(torch.float32))
    return tuple(found)


def write_group(page, layout: PageLayout, which, first: int, codes, words) -> None:
    """Codes ``[1, GROUP, H, D]`` and words of one group into *page* ``[H, size]`` at token
    *first*; the bytes of other tokens stay."""
    all_codes = layout.unpack_codes(page, which)
    all_codes[:, first : first + GROUP] = codes[0].transpose(0, 1)
    layout.pack_codes(page, which, all_codes)
    size = GROUP * which.stream.metadata_bytes(layout.head_size)
    if Granularity.TOKEN_HEAD in which.stream.granularities:
        raw = words[0].T
    elif Granularity.TOKEN_GROUP in which.stream.granularities:
        raw = words[0].permute(1, 2, 0)  # [H, D/GROUP, GROUP]
    else:
        raw = words[0]
    at = which.metadata + first // GROUP * size
    page[:, at : at + size] = raw.contiguous().view(torch.uint8).view(page.shape[0], -1)


def load(pages: torch.Tensor, layout: PageLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """All of *pages* ``[B, H, size]``, rotated fp32 K and V, each ``[B, N, H, D]``."""
    found = []
    for which in (layout.key, layout.value):
        codes = layout.unpack_codes(pages, which).transpose(1, 2)
        words = layout.unpack_metadata(pages, which).transpose(1, 2)
        if Granularity.CHANNEL_GROUP in which.stream.granularities:
            x = decode_group(codes.unflatten(1, (-1, GROUP)), words, which.stream).flatten(1, 2)
        else:
            x = decode_group(codes, words, which.stream)
        found.append(x)
    return tuple(found)
