"""The compiled codecs, through ops.store, on every 16-bit input and every instruction set.

The expected codes come from torch casts and numpy, not from the reference, so that a mistake
shared by the reference and the kernels still fails.
"""

import numpy as np
import oracle
import pytest
import torch
from cases import FLOAT_STATIC_ROWS, ISAS, SIGNED_STATIC_ROWS, name_of, use_isa

from kvq_plugin import ops, rotation
from kvq_plugin.formats import get_format
from kvq_plugin.layout import PageLayout
from kvq_plugin.reference import StaticScale

HEADS, HEAD_SIZE, BLOCK_SIZE = 2, 128, 64
TOKENS = 65536 // (HEADS * HEAD_SIZE)

every_isa = pytest.mark.parametrize("isa", ISAS)
every_16_bit_type = pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=name_of)


def stored_codes(x, format, static=None):
    """Store *x* ``[T, H, D]`` as K, and as V in reverse order; return both streams' codes."""
    tokens, heads, head_size = x.shape
    blocks = -(-tokens // BLOCK_SIZE)
    cache = oracle.empty_cache(format, blocks, heads, head_size, BLOCK_SIZE)
    ops.store(x, x.flip(0).contiguous(), cache, torch.arange(tokens), format, static, static)
    layout = PageLayout(format, head_size, BLOCK_SIZE)
    pages = cache.view(blocks, heads, -1)
    plain = [
        layout.unpack_codes(pages, which).transpose(1, 2).flatten(0, 1)[:tokens]
        for which in (layout.key, layout.value)
    ]
    return plain[0], plain[1].flip(0)


@every_isa
@every_16_bit_type
@pytest.mark.parametrize("format", FLOAT_STATIC_ROWS, ids=name_of)
def test_fp8_bytes_of_every_16_bit_input(format, dtype, isa):
    x = oracle.all_inputs(dtype).view(TOKENS, HEADS, HEAD_SIZE)
    code = format.key.code
    clamped = x.float().clamp(-code.qmax, code.qmax)
    expected = clamped.to(getattr(torch, code.torch_dtype)).view(torch.uint8)
    assert np.array_equal(expected.numpy(), oracle.float8_encode(x.float().numpy(), code.name))
    static = StaticScale.expand(1.0, HEADS, HEAD_SIZE)
    with use_isa(isa):
        for got in stored_codes(x, format, static):
            assert torch.equal(got, expected)


@every_isa
@pytest.mark.parametrize("format", FLOAT_STATIC_ROWS, ids=name_of)
def test_fp8_ties_and_their_neighbours_in_fp32(format, isa):
    """Midpoints between codes, and the fp32 numbers just above and below each."""
    values = oracle.float8_values(format.key.code.name)
    finite = np.sort(values[np.isfinite(values)])
    middle = torch.from_numpy((finite[1:] + finite[:-1]) / 2).float()
    inf = torch.tensor(float("inf"))
    x = torch.cat([middle, torch.nextafter(middle, inf), torch.nextafter(middle, -inf)])
    x = torch.nn.functional.pad(x, (0, -x.numel() % (2 * 32))).view(-1, 2, 32)
    expected = oracle.float8_encode(x.numpy(), format.key.code.name)
    with use_isa(isa):
        for got in stored_codes(x, format, StaticScale.expand(1.0, 2, 32)):
            assert np.array_equal(got.numpy(), expected)


@every_isa
@every_16_bit_type
@pytest.mark.parametrize("zero_point", (False, True))
@pytest.mark.parametrize("format", SIGNED_STATIC_ROWS, ids=name_of)
def test_int8_codes_of_every_16_bit_input(format, zero_point, dtype, isa):
    """Scale 1/16: thousands of exact ties, saturation at both ends, NaN."""
    x = oracle.all_inputs(dtype).view(TOKENS, HEADS, HEAD_SIZE)
    zero = torch.tensor([5.0, -11.0]) if zero_point else None
    shift = None if zero is None else zero.numpy()[:, None]
    expected = oracle.int8_codes(x.float().numpy(), np.float32(16.0), shift)
    static = StaticScale.expand(0.0625, HEADS, HEAD_SIZE, zero)
    with use_isa(isa):
        for got in stored_codes(x, format, static):
            assert np.array_equal(got.numpy(), expected)


@every_isa
def test_int4_ties_go_to_even(isa):
    """Rows with min 0 and max 15 have an fp16 scale of exactly 1: halves are true ties. Rows that
    rotation makes so, exactly: all their sums are of multiples of 1/16 and small."""
    format = get_format("int4_per_token_head")
    x = torch.zeros(8, 2, 32)
    x[..., 1] = 15.0
    x[..., 2:30] = torch.arange(1, 29) / 2
    rows = rotation.unrotate(x)
    assert torch.equal(rotation.rotate(rows), x)
    with use_isa(isa):
        for got in stored_codes(rows, format):
            assert torch.equal(got, x.round().to(torch.uint8))


@every_isa
def test_int8_rows_round_ties_to_even(isa):
    """amax 127 makes the scale fl(127 * fl(1/127)) and the inverse exactly 1."""
    format = get_format("int8_per_token_head")
    x = torch.zeros(4, 2, 64)
    x[..., 0] = -127.0
    x[..., 1:] = torch.arange(63) - 31.5
    with use_isa(isa):
        for got in stored_codes(x, format):
            assert torch.equal(got, x.round().to(torch.int8))
