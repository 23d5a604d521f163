"""The rotation itself: against its definition as a matrix, and what it does to rows."""

import oracle
import pytest
import torch
from cases import HEAD_SIZES

from kvq_plugin import reference, rotation
from kvq_plugin.formats import get_format

every_head_size = pytest.mark.parametrize("head_size", (16, *HEAD_SIZES))
INT4 = get_format("int4_per_token_head").key
INF, NAN = float("inf"), float("nan")

#: Signs are part of the format: pages written with others decode to noise.
FIRST_SIGNS = "1101110110101010010101101000000010011111010111011111101000101001"


def test_signs_are_those_of_pages_already_written():
    assert "".join(str(int(s < 0)) for s in rotation.signs(64)) == FIRST_SIGNS
    assert torch.equal(rotation.signs(512)[:64], rotation.signs(64))
    assert 230 < (rotation.signs(512) < 0).sum() < 282


@every_head_size
def test_rotate_is_multiplying_with_the_matrix(head_size):
    x = torch.randn(7, 3, head_size, dtype=torch.float64)
    matrix = oracle.rotation_matrix(head_size)
    torch.testing.assert_close(rotation.rotate(x), x @ matrix.T)
    torch.testing.assert_close(rotation.unrotate(x), x @ matrix * rotation.gain(head_size))
    torch.testing.assert_close(rotation.unrotate(rotation.rotate(x)), x)


@every_head_size
def test_products_survive(head_size):
    q, k = torch.randn(2, 50, head_size, dtype=torch.float64)
    rotated = (rotation.rotate(q) * rotation.rotate(k)).sum(-1) * rotation.gain(head_size)
    torch.testing.assert_close(rotated, (q * k).sum(-1))


@every_head_size
def test_blocks_do_not_mix(head_size):
    """Head sizes that are no power of two: channels mix within runs of the one that divides."""
    width = rotation.width(head_size)
    assert head_size % width == 0 and (head_size // width) % 2
    x = torch.zeros(head_size)
    x[0] = 1.0
    assert (rotation.rotate(x) != 0).tolist() == [i < width for i in range(head_size)]


def test_integers_rotate_exactly():
    """Powers of two and sums: nothing of small integers is rounded, so nothing may differ."""
    x = torch.randint(-1000, 1000, (20, 512)).float()
    assert torch.equal(rotation.rotate(x).double(), rotation.rotate(x.double()))


@pytest.mark.parametrize("head_size", (64, 128))
def test_outliers_cost_less(head_size):
    """A channel twenty times the others, as K has them: codes lose a fraction of what they lost."""
    x = torch.randn(200, 1, head_size, generator=torch.Generator().manual_seed(0))
    x[..., 5] *= 20
    codes, words = reference.quantize(x, INT4)
    error = (reference.dequantize(codes, words, INT4) - x).square().mean(-1).sqrt()
    plain = oracle.unrotated(INT4)
    codes, words = reference.quantize(x, plain)
    before = (reference.dequantize(codes, words, plain) - x).square().mean(-1).sqrt()
    assert error.mean() < 0.6 * before.mean()


def test_an_infinity_spreads_over_its_row_as_the_largest_value():
    x = torch.zeros(3, 1, 64)
    x[0, 0, 9], x[1, 0, 9], x[2, 0, 9] = INF, -INF, 1e38
    back = reference.dequantize(*reference.quantize(x, INT4), INT4)
    expected = torch.zeros(3, 1, 64)
    expected[:, 0, 9] = torch.tensor([1.0, -1.0, 1.0]) * 65504 * 8
    torch.testing.assert_close(back, expected, rtol=0, atol=1e-3 * 65504 * 8)


def test_opposed_infinities_and_the_largest_floats_stay_finite():
    largest = torch.finfo(torch.float32).max
    x = torch.tensor([INF, -INF, largest, -largest] * 128)[None, None]
    back = reference.dequantize(*reference.quantize(x, INT4), INT4)
    assert back.isfinite().all()


def test_a_nan_poisons_its_row_also_where_runs_do_not_mix():
    x = torch.zeros(2, 1, 80)
    x[0, 0, 3] = NAN
    back = reference.dequantize(*reference.quantize(x, INT4), INT4)
    assert back[0].isnan().all() and (back[1] == 0).all()
