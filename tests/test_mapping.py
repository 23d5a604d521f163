"""Mappings of layers to KV caches, as users write them; no vLLM."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from kvq_plugin.formats import SERVED, get_format
from kvq_plugin.mapping import MIXED, NAMES, bits, bytes_per_token, compact, declared_mapping, parse

EXAMPLE = {"0": "int8_per_token_head", "1-28": "int4", "29": "k8v4"}


def test_every_layer_gets_its_format():
    mapping = parse(EXAMPLE, 30)
    names = [mapping.name(n) for n in range(30)]
    assert names == ["int8_per_token_head", *["int4"] * 28, "k8v4"]
    assert compact(names) == EXAMPLE
    assert [f.name for f in mapping.formats] == ["int8_per_token_head", "int4", "k8v4"]


def test_default_and_sliding_fill_in_what_no_range_names():
    mapping = parse({"1": "k3v2", "sliding": "int8_per_token_head", "default": "auto"}, 4)
    assert mapping.name(1, sliding=True) == "k3v2"
    assert mapping.name(2, sliding=True) == "int8_per_token_head"
    assert mapping.name(2) == "auto"
    assert [f.name for f in mapping.formats] == ["k3v2", "int8_per_token_head"]
    without = parse({"0": "int4", "sliding": "int8_per_token_head"}, 4)
    with pytest.raises(ValueError, match="says nothing about layer 2"):
        without.name(2)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"0-30": "int4"}, "range '0-30' names layer 30, which the model lacks: it has 0 to 29"),
        ({"0-9": "int4", "9-29": "k8v4"}, "'0-9' and '9-29' overlap in layer 9"),
        ({"0-9": "int4", "12-29": "k8v4"}, "says nothing about layers 10-11 of 0-29"),
        ({"5": "int4"}, "says nothing about layers 0-4, 6-29"),
        ({"0-29": "int5"}, "layers '0-29' are to have 'int5', which is no KV cache"),
        ({"0-29": MIXED}, "no KV cache of kvq_plugin"),
        ({"9-3": "int4", "default": "int4"}, "'9-3' ends before it begins: expected 3-9"),
        ({"all": "int4"}, "'all' is no range of layers"),
        ({"1,2": "int4", "default": "int4"}, "'1,2' is no range"),
        ({}, "expected a mapping such as"),
        (["int4"], "expected a mapping such as"),
    ],
)
def test_errors_name_the_range_on_one_line(given, says):
    with pytest.raises(ValueError) as error:
        parse(given, 30)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_checkpoint_declares_its_mapping():
    config = {"kvq": {"layers": EXAMPLE}}
    assert declared_mapping(config) == EXAMPLE
    assert declared_mapping(SimpleNamespace(**config)) == EXAMPLE
    assert declared_mapping({}) is None and declared_mapping({"kvq": 3}) is None


def test_costs():
    assert bytes_per_token("auto", 64) == 256 and bits(256, 64) == 16
    assert bytes_per_token("int4", 64) == get_format("int4").bytes_per_token(64)
    assert bits(bytes_per_token("int8_per_token_head", 64), 64) == 8.5
    assert set(NAMES) - set(SERVED) == {MIXED}
