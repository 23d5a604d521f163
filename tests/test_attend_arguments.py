"""Calls of ops.attend that cannot be right: refused with a ValueError, nothing written."""

import oracle
import pytest
import torch

from kvq_plugin import ops, reference
from kvq_plugin.formats import get_format


def arguments(**changes) -> dict:
    """A valid call, int8_per_token_head, S=2, 8 query and 2 kv heads, D=64, N=32."""
    p = oracle.build(get_format("int8_per_token_head"), ((40, 1), (20, 3)))
    call = {
        "out": torch.full_like(p.query, 7.0),
        "query": p.query,
        "cache": p.cache,
        "block_table": p.block_table,
        "seq_lens": p.seq_lens,
        "query_start_loc": p.query_start_loc,
        "format": p.format,
        "scale": p.scale,
    }
    return {**call, **changes}


def test_the_valid_call_is_valid():
    call = arguments()
    ops.attend(**call)
    assert (call["out"] != 7.0).all()


def test_tables_that_reach_past_the_cache_are_refused():
    """A sequence longer than its row of the block table would read memory that is not a page."""
    call = arguments()
    call["seq_lens"][0] = 32 * call["block_table"].shape[1] + 1
    with pytest.raises(ValueError, match="block_table"):
        ops.attend(**call)


#: Changed arguments, and what the message must name: the argument, what came, what was expected.
WRONG = {
    "out dtype": (
        {"out": torch.full((4, 8, 64), 7.0, dtype=torch.float16)},
        ("out", "float16", "float32"),
    ),
    "out shape": ({"out": torch.full((4, 8, 32), 7.0)}, ("out", "[4, 8, 32]", "[4, 8, 64]")),
    "out tokens": ({"out": torch.full((3, 8, 64), 7.0)}, ("out", "[3, 8, 64]", "[4, 8, 64]")),
    "query dtype": (
        {"query": torch.zeros(4, 8, 64, dtype=torch.float64)},
        ("query", "float64", "bfloat16"),
    ),
    "query rank": ({"query": torch.zeros(4, 64)}, ("query", "[4, 64]", "[tokens, heads, head")),
    "query head size": ({"query": torch.zeros(4, 8, 128)}, ("head size 128", "264", "136")),
    "heads that do not divide": (
        {"query": torch.zeros(4, 7, 64), "out": torch.full((4, 7, 64), 7.0)},
        ("7 query heads", "2 kv heads"),
    ),
    "cache dtype": (
        {"cache": torch.zeros(5, 2, 32, 136, dtype=torch.int8)},
        ("cache", "int8", "uint8"),
    ),
    "cache content": (
        {"cache": torch.zeros(5, 2, 32, 72, dtype=torch.uint8)},
        ("int8_per_token_head", "[5, 2, 32, 72]", "136"),
    ),
    "table dtype": (
        {"block_table": torch.zeros(2, 3, dtype=torch.int64)},
        ("block_table", "int64", "int32"),
    ),
    "table rank": (
        {"block_table": torch.zeros(2, dtype=torch.int32)},
        ("block_table", "[2]", "[S, blocks]"),
    ),
    "lengths dtype": (
        {"seq_lens": torch.tensor([40, 20])},
        ("seq_lens", "int64", "int32"),
    ),
    "starts dtype": (
        {"query_start_loc": torch.tensor([0, 1, 4])},
        ("query_start_loc", "int64", "int32"),
    ),
    "starts count": (
        {"query_start_loc": torch.tensor([0, 1], dtype=torch.int32)},
        ("query_start_loc", "2 entries", "2 sequences"),
    ),
    # A view of a longer table, so that a kernel which does read on reads pages of this cache.
    "table rows": (
        {"block_table": torch.zeros(2, 3, dtype=torch.int32)[:1]},
        ("block_table", "1", "2"),
    ),
    "alibi count": ({"alibi_slopes": torch.zeros(2)}, ("alibi_slopes", "2", "8")),
    "alibi dtype": (
        {"alibi_slopes": torch.zeros(8, dtype=torch.bfloat16)},
        ("alibi_slopes", "bfloat16", "float32"),
    ),
    "sink count": ({"sinks": torch.zeros(9)}, ("sinks", "9", "8")),
    "static scale for a dynamic format": (
        {"key_static": reference.StaticScale.expand(1.0, 2, 64)},
        ("int8_per_token_head", "key", "no static scale"),
    ),
}


@pytest.mark.parametrize(("changes", "named"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_named_and_nothing_is_written(changes, named):
    call = arguments(**changes)
    with pytest.raises(ValueError) as error:
        ops.attend(**call)
    missing = [fact for fact in named if fact not in str(error.value)]
    assert not missing, f"{error.value} does not say {missing}"
    assert (call["out"] == 7.0).all()
