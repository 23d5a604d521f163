"""Choosing formats under a budget, without an engine; test_allocate_engine.py measures."""

from __future__ import annotations

import itertools
import json
import random

import pytest

from kvq_plugin.allocate.measure import Sensitivities
from kvq_plugin.allocate.solve import (
    Allocation,
    Shape,
    average_bits,
    budget_bytes,
    parse_bits,
    parse_memory,
    require_range,
)

FORMATS = ("k3v2", "int4", "k8v4", "auto")


def _problem(layers: int, seed: int):
    draw = random.Random(seed)
    shapes = [Shape(n, draw.choice((1, 3)), draw.choice((64, 128))) for n in range(layers)]
    costs = []
    for _ in shapes:
        scale = 10 ** draw.uniform(-4, -1)
        costs.append({name: scale * draw.random() for name in FORMATS[:-1]} | {"auto": 0.0})
    return shapes, costs


@pytest.mark.parametrize("seed", range(4))
def test_no_choice_is_better(seed):
    """Against all 4^5 choices, at budgets over the whole range."""
    shapes, costs = _problem(5, seed)
    allocation = Allocation(shapes, costs)
    every = [
        (sum(s.bytes(n) for s, n in zip(shapes, names, strict=True)),
         sum(c[n] for c, n in zip(costs, names, strict=True)))
        for names in itertools.product(FORMATS, repeat=5)
    ]  # fmt: skip
    least, most = min(every)[0], max(size for size, _ in every)
    for budget in range(least, most + 300, (most - least) // 12):
        choice = allocation.within(budget)
        assert choice.size <= budget
        assert choice.kl == pytest.approx(min(kl for size, kl in every if size <= budget))
        assert choice.size == sum(s.bytes(n) for s, n in zip(shapes, choice.names, strict=True))
    points = allocation.frontier()
    assert points[0][0] == average_bits(least, shapes) and points[-1][1] == 0
    assert all(a < b and x > y for (a, x), (b, y) in itertools.pairwise(points))


def test_budgets():
    shapes = [Shape(0, 3, 64), Shape(1, 3, 64)]
    assert budget_bytes(4.875, shapes) == 2 * 3 * 78 == sum(s.bytes("int4") for s in shapes)
    assert average_bits(2 * 3 * 78, shapes) == 4.875
    assert parse_bits("4.0bits") == parse_bits("4") == 4.0
    assert parse_memory("1GiB") == 1 << 30 and parse_memory("1.5 MB") == 1_500_000
    for bad in ("4.0 GiB", "four", ""):
        with pytest.raises(ValueError, match="expected bits per value"):
            parse_bits(bad)
    with pytest.raises(ValueError, match="expected a number and a unit"):
        parse_memory("100")


def test_bad_budgets_name_the_range():
    shapes = [Shape(0, 3, 64), Shape(1, 3, 64)]
    for asked, where in ((3.0, "below the smallest"), (17.0, "above the largest")):
        with pytest.raises(ValueError, match=f"{where}.*expected 3.125 to 16.000 bits"):
            require_range(budget_bytes(asked, shapes), shapes, FORMATS)
    require_range(budget_bytes(3.125, shapes), shapes, FORMATS)


class Meter:
    """One whose layers cost their number, and that counts."""

    def __init__(self, layers: int, fail_after: int = 1000) -> None:
        self.shapes = [Shape(n, 3, 64) for n in range(layers)]
        self.asked, self.left = [], fail_after

    def kl(self, names) -> float:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        self.asked.append(names)
        return float(sum(names))


def test_an_interrupted_measurement_goes_on(tmp_path):
    file, windows = tmp_path / "cells.json", [[1, 2, 3]]
    first = Sensitivities.resume(file, "m", windows, 4, "float32")
    with pytest.raises(KeyboardInterrupt):
        first.measure(Meter(3, fail_after=5), FORMATS)
    again, meter = Sensitivities.resume(file, "m", windows, 4, "float32"), Meter(3)
    again.measure(meter, FORMATS)
    assert len(meter.asked) == 3 * 4 - 5  # three formats, each uniform and in three layers
    assert again.costs(FORMATS)[2] == {"k3v2": 2.0, "int4": 2.0, "k8v4": 2.0, "auto": 0.0}
    assert json.loads(file.read_text())["uniform"]["int4"] == 3.0
    with pytest.raises(ValueError, match="remove it, or name another with --cells"):
        Sensitivities.resume(file, "m", [[1, 2, 4]], 4, "float32")
