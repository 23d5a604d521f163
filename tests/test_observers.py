"""Observers: streaming statistics against the same figures computed from everything at once."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kvq_plugin.calibrate.observers import (
    AVERAGING,
    BINS,
    Observers,
    as_tokens,
    observer_class,
    power_of_two,
    scale_and_zero,
)
from kvq_plugin.calibrate.scales import compute, stream_scales
from kvq_plugin.calibrate.settings import OBSERVERS, SCHEMES, Settings, Strategy
from kvq_plugin.formats import FORMATS
from kvq_plugin.reference import StaticScale, dequantize, quantize
from kvq_plugin.serving.scales.shapes import HeadShard, ScaleReader

HEADS, HEAD_SIZE = 3, 32
STRATEGIES = list(Strategy)


def settings_of(strategy=Strategy.CHANNEL, **changes) -> Settings:
    group = 8 if strategy is Strategy.GROUP else None
    return Settings(strategy=strategy, group_size=group, **{"observer": "minmax", **changes})


def activations(batches=4, tokens=64, seed=0) -> list[torch.Tensor]:
    """Batches ``[T, H, D]`` whose channels differ in size and offset, a head times ten."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(batches, tokens, HEADS, HEAD_SIZE, generator=random)
    x = x * torch.linspace(0.1, 4, HEAD_SIZE) + torch.linspace(-2, 3, HEAD_SIZE)
    return list(x * torch.tensor([1.0, 10.0, 0.01])[:, None])


def watched(settings: Settings, batches) -> object:
    observer = observer_class(settings)(settings, HEADS, HEAD_SIZE)
    for batch in batches:
        observer.observe(batch)
    return observer


def reduced(x: torch.Tensor, strategy: Strategy, how) -> torch.Tensor:
    """``[T, H, D]`` reduced by *how* to ``[H, units]``, from everything at once."""
    unit = settings_of(strategy).unit(HEAD_SIZE)
    if strategy is Strategy.TENSOR:
        return how(x.flatten()).expand(HEADS, 1)
    grouped = x.unflatten(-1, (-1, unit)).permute(1, 2, 0, 3).flatten(2)
    return torch.stack([torch.stack([how(unit) for unit in head]) for head in grouped])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_minmax_is_the_extremes_of_everything(strategy):
    batches = activations()
    low, high = watched(settings_of(strategy), batches).ranges()
    everything = torch.cat(batches)
    assert torch.equal(low, reduced(everything, strategy, torch.min))
    assert torch.equal(high, reduced(everything, strategy, torch.max))


def test_powers_of_two_are_rounded_up_to():
    x = torch.tensor([0.0, 1.0, 1.0000001, 0.75, 0.5, 3.0, 2.0**-126, 1.5 * 2.0**-100])
    expected = [0.0, 1.0, 2.0, 1.0, 0.5, 4.0, 2.0**-126, 2.0**-99]
    assert power_of_two(x).tolist() == expected


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_fp8_scales_are_powers_of_two_that_hold_everything(strategy):
    batches = activations()
    found = {}
    for scheme, exact in (("fp8", False), ("fp8", True), ("int8", False)):
        settings = settings_of(strategy, scheme=scheme, exact=exact)
        scale, _ = scale_and_zero(*watched(settings, batches).ranges(), settings)
        found[scheme, exact] = scale
    rounded, exact = found["fp8", False], found["fp8", True]
    amax = reduced(torch.cat(batches).abs(), strategy, torch.max)
    assert torch.equal(exact, amax / 448) and torch.equal(found["int8", False], amax / 127)
    assert rounded.log2().frac().eq(0).all()
    assert (exact <= rounded).all() and (rounded < 2 * exact).all()


def test_powers_of_two_keep_the_mantissas_of_scale_one():
    """Which is what they are for: of normal numbers, the same are rounded the same."""
    x = torch.randn(4096, 1, 32).clamp(0.125, 400)
    fp8 = FORMATS["fp8"]
    read = []
    for scale in (1.0, 0.25, 2.0, 0.3):
        static = StaticScale.expand(torch.tensor(scale), 1, 32)
        codes, meta = quantize(x, fp8.key, static)
        read.append(dequantize(codes, meta, fp8.key, static))
    assert torch.equal(read[0], read[1]) and torch.equal(read[0], read[2])
    assert not torch.equal(read[0], read[3])


def test_average_moves_by_its_constant():
    settings = settings_of(Strategy.HEAD, observer="average")
    batches = activations()
    expected = batches[0].amax((0, 2))
    for batch in batches[1:]:
        expected = expected + AVERAGING * (batch.amax((0, 2)) - expected)
    assert torch.allclose(watched(settings, batches).ranges()[1][:, 0], expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("share", (90.0, 99.0, 100.0))
def test_percentile_is_within_a_bin_of_the_exact_one(strategy, share):
    settings = settings_of(strategy, observer="percentile", percentile=share)
    batches = activations(tokens=256)
    low, high = watched(settings, batches).ranges()
    everything = torch.cat(batches)
    peak = reduced(everything.abs(), strategy, torch.max)
    below = reduced(everything.abs(), strategy, lambda x: x.quantile(share / 100, None, False))
    # The widest bin is twice the peak, rounded up to a power of two, over half the bins; the
    # exact quantile lies between two values, which in a tail may be far apart.
    above = reduced(
        everything.abs(),
        strategy,
        lambda x: x.sort().values[min(len(x) - 1, math.ceil(share / 100 * len(x)) + 1)],
    )
    tolerance = peak * 4 / (BINS / 2)
    assert torch.equal(-low, high)
    assert bool((high >= below - (above - below) - tolerance).all())
    assert bool((high <= above + tolerance).all())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("asymmetric", (False, True))
def test_mse_beats_minmax_on_what_it_saw(scheme, asymmetric):
    if scheme != "int8" and asymmetric:
        pytest.skip("floats have no zero point")
    batches = activations(tokens=512)
    batches[0][0] *= 20  # one token far out: worth clipping

    def error(observer: str) -> float:
        settings = settings_of(
            Strategy.HEAD, scheme=scheme, asymmetric=asymmetric, observer=observer
        )
        scale, zero = scale_and_zero(*watched(settings, batches).ranges(), settings)
        static = StaticScale.expand(scale[:, 0], HEADS, HEAD_SIZE, zero[:, 0])
        stream, x = settings.format.key, torch.cat(batches)
        codes, _ = quantize(x, stream, static)
        return float((dequantize(codes, None, stream, static) - x).square().mean())

    limit = 0.95 if scheme == "int8" else 1.001  # a float hardly gains from its scale
    assert error("mse") < limit * error("minmax")


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_cache_of_four_dimensions_gives_the_same(observer, strategy):
    settings = settings_of(strategy, observer=observer)
    batches = activations()
    # [B, H, T, D], two sequences a batch
    folded = [b.view(2, -1, HEADS, HEAD_SIZE).transpose(1, 2) for b in batches]
    for flat, four in zip(
        watched(settings, batches).ranges(), watched(settings, folded).ranges(), strict=True
    ):
        assert torch.equal(flat, four)


def test_other_dimensions_are_refused():
    with pytest.raises(ValueError, match=r"\[tokens, heads, head size\]"):
        as_tokens(torch.zeros(4, 96))


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ranks_join_to_what_one_rank_sees(observer, strategy):
    settings = settings_of(strategy, observer=observer)
    batches = activations()
    parts = []
    for first, last in ((0, 1), (1, 3)):
        part = observer_class(settings)(settings, last - first, HEAD_SIZE)
        for batch in batches:
            part.observe(batch[:, first:last])
        parts.append(part.state())
    joined = observer_class(settings).joined(settings, parts)
    for one, many in zip(watched(settings, batches).ranges(), joined.ranges(), strict=True):
        assert torch.equal(one, many)


@hypothesis_settings(max_examples=25, deadline=None)
@given(st.permutations(range(4)), st.sampled_from(["minmax", "percentile", "mse"]))
def test_the_order_of_batches_does_not_matter(order, observer):
    chosen = settings_of(Strategy.HEAD, observer=observer)
    batches = [b * 4.0**i for i, b in enumerate(activations())]
    one, other = watched(chosen, batches), watched(chosen, [batches[i] for i in order])
    for a, b in zip(one.ranges(), other.ranges(), strict=True):
        assert torch.equal(a, b)


@hypothesis_settings(max_examples=50, deadline=None)
@example(0.0, -(2.0**-52), True, "int8")
@given(
    st.floats(-1e4, 1e4, width=32), st.floats(-1e4, 1e4, width=32), st.booleans(),
    st.sampled_from(SCHEMES),
)  # fmt: skip
def test_a_range_survives_the_round_trip(one, other, asymmetric, scheme):
    """Ends of the range come back within half a step (floats: a relative 1/16), and 0 exactly."""
    low, high = torch.tensor([[min(one, other)]]), torch.tensor([[max(one, other)]])
    chosen = settings_of(Strategy.HEAD, scheme=scheme, asymmetric=asymmetric and scheme == "int8")
    scale, zero = scale_and_zero(low, high, chosen)
    if float(scale) < 1e-30:
        return
    static = StaticScale.expand(scale[:, 0], 1, 1, zero[:, 0])
    x = torch.tensor([low, high, 0.0]).view(3, 1, 1)
    codes, _ = quantize(x, chosen.format.key, static)
    back = dequantize(codes, None, chosen.format.key, static)
    step = scale * 0.51 if scheme == "int8" else x.abs() / 16 + scale
    # Asymmetric: rounding the zero point shifts the range by up to half a step more.
    assert bool(((back - x).abs() <= step * (2 if chosen.asymmetric else 1)).all())
    assert float(back[2]) == 0.0


def test_nan_is_counted_and_changes_nothing():
    observers = Observers(settings_of())
    good, bad = activations(batches=2)
    bad[3, 1, 5] = float("nan")
    bad[4, 2, 6] = float("inf")
    observers.observe("a", "k", good)
    observers.observe("a", "k", bad)
    assert observers.broken() == [("a", "k", 2)]
    [(_, observer)] = observers.items()
    assert torch.equal(observer.high, good.amax(0)) and observer.tokens == good.shape[0]


def test_state_belongs_to_the_object():
    first, second = Observers(settings_of()), Observers(settings_of())
    first.observe("a", "k", torch.full((1, HEADS, HEAD_SIZE), 100.0))
    second.observe("a", "k", torch.ones(1, HEADS, HEAD_SIZE))
    [(_, observer)] = second.items()
    assert float(observer.high.max()) == 1.0


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("asymmetric", (False, True))
def test_stored_tensors_are_ones_the_loader_reads(strategy, asymmetric):
    settings = settings_of(strategy, asymmetric=asymmetric)
    observer = watched(settings, activations())
    stream = stream_scales(settings, observer)
    shard = HeadShard.of(HEADS, HEADS, 0, 1)
    tensors = {"k_scale": stream.scale}
    if stream.zero_point is not None:
        tensors["k_zero_point"] = stream.zero_point
    read = ScaleReader("l", shard, HEAD_SIZE, HEAD_SIZE, HEADS).read(tensors)
    static = StaticScale.expand(read["k_scale"], HEADS, HEAD_SIZE, read.get("k_zero_point"))
    scale, zero = scale_and_zero(*observer.ranges(), settings)
    repeats = HEAD_SIZE // scale.shape[1]
    assert torch.equal(static.scale, scale.repeat_interleave(repeats, 1))
    if asymmetric:
        assert torch.equal(static.zero_point, zero.repeat_interleave(repeats, 1))


def test_query_scales_are_per_query_head():
    settings = settings_of(q_scale=True)
    assert stream_scales(settings, watched(settings, activations()), "q").scale.shape == (3, 1, 1)
    tensor = settings_of(Strategy.TENSOR)
    assert stream_scales(tensor, watched(tensor, activations()), "q").scale.shape == (1,)


@pytest.mark.parametrize("observer", ("minmax", "average", "percentile", "mse"))
@pytest.mark.parametrize("strategy", (Strategy.TENSOR, Strategy.CHANNEL))
def test_a_querys_scale_is_symmetric_whatever_ks_is(strategy, observer):
    """Half of it was lost: an asymmetric scale whose zero point nothing stores."""
    found = []
    for asymmetric in (False, True):
        settings = settings_of(strategy, observer=observer, asymmetric=asymmetric, q_scale=True)
        observers = Observers(settings)
        observers.observe("a", "q", torch.cat(activations()).abs())
        [(_, watching)] = observers.items()
        stream = stream_scales(settings, watching, "q")
        assert stream.zero_point is None
        found.append(stream.scale)
    assert torch.equal(*found)


def test_what_is_suspect_is_said():
    x = torch.cat(activations()) * torch.tensor([1.0, 0.1, 100.0])[:, None]
    x[:, 0, 3] = 0.0
    x[:, 2, 7] *= 1e4
    phrases = stream_scales(settings_of(), watched(settings_of(), [x])).suspects
    assert "1 of 96 channels are always zero" in phrases
    assert any(p.startswith("scales spread") for p in phrases)
    tensor = settings_of(Strategy.TENSOR)
    [outliers] = (p for p in stream_scales(tensor, watched(tensor, [x])).suspects if "outlier" in p)
    assert "head 2 channel 7" in outliers
    clean = settings_of(Strategy.HEAD)
    assert not stream_scales(clean, watched(clean, [torch.randn(99, 3, 32)])).suspects


def test_zero_channels_get_a_scale_that_can_be_served():
    x = torch.cat(activations())
    x[:, 0, 3] = 0.0
    stream = stream_scales(settings_of(), watched(settings_of(), [x]))
    assert float(stream.scale[0, 0, 3]) == float(stream.scale.max())
    dead = stream_scales(settings_of(), watched(settings_of(), [torch.zeros(5, 3, 32)]))
    assert bool((dead.scale == 1).all())


def test_a_layer_without_values_is_an_error():
    observers = Observers(settings_of())
    observers.observe("model.layers.4.self_attn", "k", activations()[0])
    with pytest.raises(ValueError, match="layers.4"):
        compute(observers.settings, observers)


@pytest.mark.parametrize(
    ("changes", "said"),
    (
        ({"scheme": "int4"}, "expected one of int8, fp8"),
        ({"scheme": "fp8", "asymmetric": True}, "drop --asymmetric"),
        ({"exact": True}, "--exact-scales was asked for int8"),
        ({"strategy": Strategy.GROUP}, "--group-size"),
        ({"group_size": 8}, "--group-size"),
        ({"observer": "best"}, "minmax"),
        ({"observer": "percentile", "percentile": 20.0}, "more than 50"),
        ({"percentile": 99.0}, "add --observer percentile"),
        ({"ignore": frozenset([-1])}, "from 0 on"),
    ),
)
def test_what_cannot_be_combined_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        Settings(**changes)


def test_the_observer_is_the_best_for_the_strategy():
    assert Settings(strategy=Strategy.TENSOR).observer == "mse"
    assert Settings().observer == "minmax"
    assert Settings(strategy=Strategy.TENSOR, observer="minmax").observer == "minmax"
    assert Settings("fp8", strategy=Strategy.TENSOR).observer == "minmax"


def test_group_must_divide_the_head():
    settings = Settings(strategy=Strategy.GROUP, group_size=24)
    with pytest.raises(ValueError, match="divide the head size 32"):
        settings.unit(32)
