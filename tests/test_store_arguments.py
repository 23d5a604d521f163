"""Calls of ops.store that cannot be right: refused with a ValueError, nothing written."""

from dataclasses import replace

import pytest
import torch

from kvq_plugin import ops, reference
from kvq_plugin.formats import get_format

FORMAT = get_format("int8_per_token_head")
STATIC = get_format("fp8")


def arguments(**changes):
    """A valid call for FORMAT with T=4, H=2, D=64, N=16, and *changes*."""
    call = {
        "key": torch.zeros(4, 2, 64),
        "value": torch.zeros(4, 2, 64),
        "cache": torch.zeros(3, 2, 16, FORMAT.bytes_per_token(64), dtype=torch.uint8),
        "slot_mapping": torch.arange(4),
        "format": FORMAT,
    }
    return {**call, **changes}


#: Changed arguments, and what the message must name: the argument, what came, what was expected.
WRONG = {
    "value dtype": (
        {"value": torch.zeros(4, 2, 64, dtype=torch.float16)},
        ("value", "float16", "float32"),
    ),
    "activation dtype": (
        {
            "key": torch.zeros(4, 2, 64, dtype=torch.float64),
            "value": torch.zeros(4, 2, 64, dtype=torch.float64),
        },
        ("key", "float64", "bfloat16"),
    ),
    "cache dtype": (
        {"cache": torch.zeros(3, 2, 16, 136, dtype=torch.float16)},
        ("cache", "float16", "uint8"),
    ),
    "slot dtype": (
        {"slot_mapping": torch.arange(4, dtype=torch.int32)},
        ("slot_mapping", "int32", "int64"),
    ),
    "key rank": ({"key": torch.zeros(4, 64)}, ("key", "[4, 64]", "[tokens, heads, head size]")),
    "key of rank 0": ({"key": torch.tensor(1.0)}, ("key", "[]", "[tokens, heads, head size]")),
    "cache that repeats memory": (
        {"cache": torch.zeros(1, 2, 16, 136, dtype=torch.uint8).expand(3, -1, -1, -1)},
        ("cache", "strides [0, 2176, 136, 1]", "clone"),
    ),
    "value shape": (
        {"value": torch.zeros(4, 2, 32)},
        ("value", "[4, 2, 32]", "[4, 2, 64]"),
    ),
    "value tokens": ({"value": torch.zeros(3, 2, 64)}, ("value", "[3, 2, 64]", "[4, 2, 64]")),
    "slot count": ({"slot_mapping": torch.arange(5)}, ("slots", "5", "4")),
    "slot rank": ({"slot_mapping": torch.arange(4)[None]}, ("slot_mapping", "[1, 4]", "vector")),
    "cache rank": (
        {"cache": torch.zeros(3, 2, 16 * 136, dtype=torch.uint8)},
        ("cache", "[3, 2, 2176]", "136"),
    ),
    "cache bytes per token": (
        {"cache": torch.zeros(3, 2, 16, 128, dtype=torch.uint8)},
        ("int8_per_token_head", "head size 64", "[3, 2, 16, 128]", "136"),
    ),
    "cache heads": (
        {"cache": torch.zeros(3, 4, 16, 136, dtype=torch.uint8)},
        ("key", "2 kv heads", "4"),
    ),
    "block size": (
        {"cache": torch.zeros(3, 2, 24, 136, dtype=torch.uint8)},
        ("[3, 2, 24, 136]", "multiple of 16"),
    ),
    "page strides": (
        {"cache": torch.zeros(3, 2, 16, 200, dtype=torch.uint8)[..., :136]},
        ("strides", "200", "contiguous"),
    ),
    "static scale missing": (
        {"format": STATIC, "cache": torch.zeros(3, 2, 16, 128, dtype=torch.uint8)},
        ("fp8_e4m3", "key", "static scale"),
    ),
    "static scale for a dynamic format": (
        {"value_static": reference.StaticScale.expand(1.0, 2, 64)},
        ("int8_per_token_head", "value", "no static scale"),
    ),
    "static scale heads": (
        {
            "format": STATIC,
            "cache": torch.zeros(3, 2, 16, 128, dtype=torch.uint8),
            "key_static": reference.StaticScale.expand(1.0, 3, 64),
            "value_static": reference.StaticScale.expand(1.0, 2, 64),
        },
        ("key", "[3, 64]", "[2, 64]"),
    ),
    **{
        f"static {name}": (
            {
                "format": STATIC,
                "cache": torch.zeros(3, 2, 16, 128, dtype=torch.uint8),
                "key_static": reference.StaticScale.expand(1.0, 2, 64),
                "value_static": replace(reference.StaticScale.expand(1.0, 2, 64), **changed),
            },
            ("value", "contiguous float32", "[2, 64]", *named),
        )
        for name, (changed, named) in {
            "inverse dtype": ({"inverse": torch.ones(2, 64).double()}, ("inverse", "float64")),
            "inverse expanded": ({"inverse": torch.ones(1).expand(2, 64)}, ("strides [0, 0]",)),
            "inverse transposed": ({"inverse": torch.ones(64, 2).T}, ("strides [1, 2]",)),
            "zero point dtype": (
                {"zero_point": torch.zeros(2, 64, dtype=torch.int8)},
                ("zero point", "int8"),
            ),
            "zero point shape": ({"zero_point": torch.zeros(2)}, ("zero point", "[2]")),
            "inverse device": ({"inverse": torch.ones(2, 64, device="meta")}, ("meta", "cpu")),
        }.items()
    },
    "head size 0": (
        {
            "key": torch.zeros(4, 2, 0),
            "value": torch.zeros(4, 2, 0),
            "cache": torch.zeros(3, 2, 16, 8, dtype=torch.uint8),
        },
        ("head size 0", "multiple of 16"),
    ),
    "no heads": (
        {
            "key": torch.zeros(4, 0, 64),
            "value": torch.zeros(4, 0, 64),
            "cache": torch.zeros(3, 0, 16, 136, dtype=torch.uint8),
        },
        ("cache", "[3, 0, 16, 136]"),
    ),
}


@pytest.mark.parametrize(("changes", "named"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_named_and_nothing_is_written(changes, named):
    call = arguments(**changes)
    before = call["cache"].clone()
    with pytest.raises(ValueError) as error:
        ops.store(**call)
    missing = [fact for fact in named if fact not in str(error.value)]
    assert not missing, f"{error.value} does not say {missing}"
    assert torch.equal(call["cache"], before)


def test_head_size_that_cannot_be_stored():
    x = torch.zeros(4, 2, 72)
    cache = torch.zeros(3, 2, 16, 2 * 72 + 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="72"):
        ops.store(**arguments(key=x, value=x, cache=cache))


def test_activations_strided_in_the_last_dim_are_refused_or_right():
    """A kernel reads rows of consecutive elements: anything else must not be misread."""
    x = torch.randn(4, 2, 128)[..., ::2]
    want, got = arguments()["cache"], arguments()["cache"]
    reference.store(x, x, want, torch.arange(4), FORMAT)
    try:
        ops.store(x, x, got, torch.arange(4), FORMAT)
    except ValueError as error:
        assert "contiguous" in str(error)
    else:
        assert torch.equal(got, want)


def test_slots_beyond_the_cache_are_refused():
    """A wild write would corrupt memory that belongs to somebody else."""
    storage = torch.zeros(6, 2, 16, FORMAT.bytes_per_token(64), dtype=torch.uint8)
    call = arguments(cache=storage[:3], slot_mapping=torch.tensor([0, 1, 2, 48]))
    with pytest.raises(ValueError, match="slot"):
        ops.store(**call)
    assert not storage.any()
