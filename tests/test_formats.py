"""The format table: names, derived sizes and the claims users read."""

import pytest
import torch
from cases import ALL_ROWS, GRANULARITIES, HEAD_SIZES, ROWS, name_of

from kvq_plugin.formats import CODES, FORMATS, LOWBIT, Granularity, Kind, get_format

#: Bytes per token and kv head as a function of the head size: the table users are shown.
BYTES_PER_TOKEN = {
    "fp8_e4m3": lambda d: 2 * d,
    "fp8_e5m2": lambda d: 2 * d,
    "int8": lambda d: 2 * d,
    "int8_per_token_head": lambda d: 2 * d + 8,
    "fp8_per_token_head": lambda d: 2 * d + 8,
    "int4_per_token_head": lambda d: d + 8,
}


def test_names_are_the_ones_users_type():
    assert {"fp8", "fp8_e4m3", "fp8_e5m2", "int8"} <= set(FORMATS)
    assert {"int8_per_token_head", "fp8_per_token_head", "int4_per_token_head"} <= set(FORMATS)
    assert get_format("fp8") is get_format("fp8_e4m3")


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="nvfp4") as error:
        get_format("nvfp4")
    for name in FORMATS:
        assert name in str(error.value)


def test_rows_and_codes_have_distinct_consecutive_ids():
    assert sorted(f.id for f in ALL_ROWS) == list(range(len(ALL_ROWS)))
    assert sorted(c.id for c in CODES.values()) == list(range(len(CODES)))


def test_names_and_aliases_are_unique():
    names = [n for f in ALL_ROWS for n in (f.name, *f.aliases)]
    assert len(names) == len(set(names)) == len(FORMATS) + len(LOWBIT)


@pytest.mark.parametrize("format", ROWS, ids=name_of)
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_bytes_per_token(format, head_size):
    size = format.bytes_per_token(head_size)
    assert size == BYTES_PER_TOKEN[format.name](head_size)
    assert size % 4 == 0, "C must stay a multiple of 4 for 32-bit metadata words"
    assert size < 4 * head_size, "a format must beat bf16"


@pytest.mark.parametrize("format", ROWS, ids=name_of)
def test_float_code_claims_match_torch(format):
    for stream in (format.key, format.value):
        if stream.code.kind is Kind.FLOAT:
            info = torch.finfo(getattr(torch, stream.code.torch_dtype))
            assert stream.code.qmax == info.max
            assert stream.code.bits == info.bits


@pytest.mark.parametrize("format", ROWS, ids=name_of)
def test_static_formats_only_default_when_a_float_code_can(format):
    """Scale 1.0 is a usable guess for a float code alone; integers must refuse."""
    has_default = format.default_scale is not None
    assert has_default == (not format.is_dynamic and format.key.code.kind is Kind.FLOAT)


def test_scale_shapes():
    shapes = [g.scale_shape(64, 3, 96) for g in Granularity]
    assert shapes == [(), (3,), (3, 96), (64, 3), (2, 3, 96), (64, 3, 3)]
    assert [g.is_dynamic for g in Granularity] == [g not in GRANULARITIES for g in Granularity]
