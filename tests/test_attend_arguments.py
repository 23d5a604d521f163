"""Calls of ops.attend that cannot be right: refused with a ValueError, nothing written."""

from dataclasses import replace

import oracle
import pytest
import torch
from attending import every_isa
from cases import ALL_ROWS, ISAS, use_isa

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
    "softcap below 0": ({"softcap": -30.0}, ("softcap", "-30")),
    "softcap of NaN": ({"softcap": float("nan")}, ("softcap", "nan")),
    "softcap beyond fp32": ({"softcap": 1e300}, ("softcap", "1e+300", "10000")),
    "softcap of noise": ({"softcap": 1e8}, ("softcap", "100000000", "10000")),
    "softcap of nothing": ({"softcap": 1e-50}, ("softcap", "1e-50", "0.0001")),
    "out repeats memory": (
        {"out": torch.full((1, 8, 64), 7.0).expand(4, 8, 64)},
        ("out", "strides [0, 64, 1]", "clone"),
    ),
    "lengths rank": (
        {"seq_lens": torch.tensor(40, dtype=torch.int32)},
        ("seq_lens", "[]", "vector"),
    ),
    "query of rank 0": ({"query": torch.tensor(1.0)}, ("query", "[]", "[tokens, heads, head")),
    "sinks strided": ({"sinks": torch.zeros(16)[::2]}, ("sinks", "strides [2]")),
    "head size 0": (
        {
            "query": torch.zeros(4, 8, 0),
            "out": torch.full((4, 8, 0), 7.0),
            "cache": torch.zeros(5, 2, 32, 8, dtype=torch.uint8),
        },
        ("head size 0", "multiple of 16"),
    ),
    "no kv heads": (
        {"cache": torch.zeros(5, 0, 32, 136, dtype=torch.uint8)},
        ("cache", "[5, 0, 32, 136]"),
    ),
    "sequence of -1 tokens": (
        {"seq_lens": torch.tensor([40, -1], dtype=torch.int32)},
        ("sequence", "-1"),
    ),
    "starts that fall": (
        {"query_start_loc": torch.tensor([3, 0, 4], dtype=torch.int32)},
        ("query_start_loc", "[3, 0, 4]"),
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


@pytest.mark.parametrize("rows", (-1, 1))
def test_out_that_overlaps_other_queries_is_refused(rows):
    """Queries that another thread had yet to read would be outputs by then."""
    call = arguments()
    memory = torch.full((6, 8, 64), 7.0)
    query, out = memory[1:5], memory[1 + rows : 5 + rows]
    query.copy_(call["query"])
    before = memory.clone()
    with pytest.raises(ValueError, match="out overlaps query 2048 bytes away"):
        ops.attend(**{**call, "query": query, "out": out})
    assert torch.equal(memory, before)


@pytest.mark.parametrize("name", ("scale", "zero_point"))
@pytest.mark.parametrize(
    ("wrong", "named"),
    (
        (torch.ones(2, 64).double(), "float64"),
        (torch.ones(2, 64).bfloat16(), "bfloat16"),
        (torch.ones(()).expand(2, 64), "strides [0, 0]"),
        (torch.ones(64, 2).T, "strides [1, 2]"),
        (torch.ones(2), "[2]"),
        (torch.ones(2, 64, device="meta"), "meta"),
    ),
    ids=("double", "bfloat16", "expanded", "transposed", "per head", "elsewhere"),
)
def test_static_scales_that_would_be_misread(name, wrong, named):
    """An expanded scale has the right shape over 4 bytes: the kernel would read past them."""
    p = oracle.build(get_format("int8"), ((40, 1), (20, 3)), zero_point=True)
    out = torch.full_like(p.query, 7.0)
    bad = replace(p.value_static, **{name: wrong})
    arguments = replace(p, value_static=bad).arguments()
    with pytest.raises(ValueError) as error:
        ops.attend(out, *arguments)
    for fact in ("value", "contiguous float32", "[2, 64]", "StaticScale.expand", named):
        assert fact in str(error.value)
    assert (out == 7.0).all()


# --- block tables --------------------------------------------------------------------------------


@every_isa
@pytest.mark.parametrize("entry", (10**6, -1, 7, -(2**31), 2**31 - 1))
@pytest.mark.parametrize("at", (0, 1, 2))
def test_block_table_entries_outside_the_cache_are_refused(at, entry, isa):
    """10**6 was a segmentation fault."""
    p = oracle.build(get_format("int8_per_token_head"), ((20, 3), (90, 1)))
    assert p.cache.shape[0] == 7
    p.block_table[1, at] = entry
    out = torch.full_like(p.query, 7.0)
    with pytest.raises(ValueError) as error, use_isa(isa):
        ops.attend(out, *p.arguments())
    named = (f"block_table[1, {at}]", "sequence 1", f"block {entry}", "has 7")
    assert not [fact for fact in named if fact not in str(error.value)], error.value
    assert (out == 7.0).all()


@pytest.mark.parametrize("options", ({}, {"window": 30}, {"window": 30, "causal": False}))
def test_entries_that_no_query_sees_may_be_anything(options):
    """Past the end of a sequence, before its window, and of sequences without queries."""
    p = oracle.build(get_format("int8_per_token_head"), ((90, 1), (20, 3), (50, 0), (0, 0)))
    want, out = (torch.empty_like(p.query) for _ in range(2))
    ops.attend(want, *p.arguments(), **options)
    table = p.block_table.clone()
    table[0, 3:] = table[1, 1:] = 10**6
    table[2:] = -1
    if options:
        table[0, 0] = 10**6  # tokens 60 to 89 of blocks of 32
    ops.attend(out, *replace(p, block_table=table).arguments(), **options)
    assert torch.equal(out, want)
    if options:
        table[0, 1] = 10**6
        with pytest.raises(ValueError, match=r"block_table\[0, 1\]"):
            ops.attend(out, *replace(p, block_table=table).arguments(), **options)


@every_isa
@pytest.mark.parametrize("causal", (True, False))
def test_a_window_of_any_length(causal, isa):
    """Positions and windows were added up: near 2**63 that overflows."""
    p = oracle.build(get_format("int8_per_token_head"), ((90, 5), (20, 3)))
    want = torch.empty_like(p.query)
    with use_isa(isa):
        ops.attend(want, *p.arguments(), causal=causal)
        for window in (91, 2**31 - 1, 2**31, 2**63 - 1):
            out = torch.empty_like(p.query)
            ops.attend(out, *p.arguments(), causal=causal, window=window)
            assert torch.equal(out, want)


@pytest.mark.skipif(ISAS == ["reference"], reason="the reference has none of its own")
def test_valid_calls_pass_the_checks_in_python_by(monkeypatch):
    """They cost a decode step of a small model more than the kernels do; C++ has its own."""
    call = arguments()
    for name in [name for name in vars(ops) if name.startswith("_check")]:
        monkeypatch.setattr(ops, name, lambda *_, **__: pytest.fail("checked in Python"))
    ops.attend(**call)
    key = torch.zeros(4, 2, 64)
    ops.store(key, key, call["cache"], torch.arange(4), call["format"])


# --- the operators themselves --------------------------------------------------------------------

STORE = (
    "key", "value", "cache", "slots", "format",
    "key_inverse", "key_zero", "value_inverse", "value_zero",
)  # fmt: skip
ATTEND = (
    "out", "query", "cache", "block_table", "seq_lens", "query_start", "format", "scale",
    "key_scale", "key_zero", "value_scale", "value_zero", "causal", "window", "softcap",
    "alibi_slopes", "sinks",
)  # fmt: skip


def raw_store(**changes) -> None:
    ops._use_reference()
    x = torch.zeros(4, 2, 64)
    call = dict.fromkeys(STORE)
    call.update(key=x, value=x, slots=torch.arange(4), format=3)
    call["cache"] = torch.zeros(3, 2, 16, 136, dtype=torch.uint8)
    torch.ops.kvq.store(*{**call, **changes}.values())


def raw_attend(**changes) -> None:
    ops._use_reference()
    call = dict.fromkeys(ATTEND)
    call.update(out=torch.zeros(4, 8, 64), query=torch.zeros(4, 8, 64), format=3, scale=1.0)
    call["cache"] = torch.zeros(3, 2, 16, 136, dtype=torch.uint8)
    call["block_table"] = torch.zeros(2, 3, dtype=torch.int32)
    call["seq_lens"] = torch.tensor([40, 20], dtype=torch.int32)
    call["query_start"] = torch.tensor([0, 1, 4], dtype=torch.int32)
    call.update(causal=True, window=0, softcap=0.0)
    torch.ops.kvq.attend(*{**call, **changes}.values())


def cache_of(*shape) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


STATIC_CACHE = cache_of(3, 2, 16, 128)
ONES = torch.ones(2, 64)
RAW = {
    "store format -1": (raw_store, {"format": -1}),
    "unknown store format": (raw_store, {"format": len(ALL_ROWS)}),
    "store format huge": (raw_store, {"format": 2**40}),
    "store key rank": (raw_store, {"key": torch.zeros(4, 64)}),
    "store key dtype": (raw_store, {"key": torch.zeros(4, 2, 64).double()}),
    "store key strided": (raw_store, {"key": torch.zeros(4, 2, 128)[..., ::2]}),
    "store value tokens": (raw_store, {"value": torch.zeros(3, 2, 64)}),
    "store value dtype": (raw_store, {"value": torch.zeros(4, 2, 64).half()}),
    "store value head size": (raw_store, {"value": torch.zeros(4, 2, 32)}),
    "store head size 0": (
        raw_store,
        {
            "key": torch.zeros(4, 2, 0),
            "value": torch.zeros(4, 2, 0),
            "cache": cache_of(3, 2, 16, 8),
        },
    ),
    "store head size 8": (
        raw_store,
        {
            "key": torch.zeros(4, 2, 8),
            "value": torch.zeros(4, 2, 8),
            "cache": cache_of(3, 2, 16, 24),
        },
    ),
    "store head size 528": (
        raw_store,
        {
            "key": torch.zeros(4, 2, 528),
            "value": torch.zeros(4, 2, 528),
            "cache": cache_of(3, 2, 16, 2 * 528 + 8),
        },
    ),
    "store cache dtype": (raw_store, {"cache": torch.zeros(3, 2, 16, 136)}),
    "store cache rank": (raw_store, {"cache": cache_of(3, 2, 16 * 136)}),
    "store cache content": (raw_store, {"cache": STATIC_CACHE}),
    "store block size 24": (raw_store, {"cache": cache_of(3, 2, 24, 136)}),
    "store block size 0": (raw_store, {"cache": cache_of(3, 2, 0, 136)}),
    "store cache heads": (raw_store, {"cache": cache_of(3, 1, 16, 136)}),
    "store page strides": (raw_store, {"cache": cache_of(3, 2, 16, 200)[..., :136]}),
    "store cache expanded": (raw_store, {"cache": cache_of(1, 2, 16, 136).expand(3, -1, -1, -1)}),
    "store slots dtype": (raw_store, {"slots": torch.arange(4).int()}),
    "store slots rank": (raw_store, {"slots": torch.arange(4)[None]}),
    "store slots strided": (raw_store, {"slots": torch.arange(8)[::2]}),
    "store slots count": (raw_store, {"slots": torch.arange(5)}),
    "store slots range": (raw_store, {"slots": torch.tensor([48])}),
    "store scale for a dynamic format": (raw_store, {"key_inverse": ONES}),
    "store zero for a dynamic format": (raw_store, {"value_zero": ONES}),
    "store no scale": (raw_store, {"format": 0, "cache": STATIC_CACHE}),
    **{
        f"store scale {name}": (
            raw_store,
            {
                "format": 2,
                "cache": STATIC_CACHE,
                "key_inverse": ONES,
                "value_inverse": ONES,
                which: wrong,
            },
        )
        for which in ("key_inverse", "value_inverse", "key_zero")
        for name, wrong in {
            f"{which} dtype": ONES.double(),
            f"{which} shape": torch.ones(2),
            f"{which} expanded": torch.ones(1).expand(2, 64),
        }.items()
    },
    "attend format -1": (raw_attend, {"format": -1}),
    "attend format 99": (raw_attend, {"format": 99}),
    "attend query rank": (raw_attend, {"query": torch.zeros(4, 64)}),
    "attend out shape": (raw_attend, {"out": torch.zeros(4, 8, 32)}),
    "attend out tokens": (raw_attend, {"out": torch.zeros(3, 8, 64)}),
    "attend out dtype": (raw_attend, {"out": torch.zeros(4, 8, 64).half()}),
    "attend out strided": (raw_attend, {"out": torch.zeros(4, 8, 128)[..., ::2]}),
    "attend heads": (raw_attend, {"query": torch.zeros(4, 7, 64), "out": torch.zeros(4, 7, 64)}),
    "attend cache content": (raw_attend, {"cache": STATIC_CACHE}),
    "attend no kv heads": (raw_attend, {"cache": cache_of(3, 0, 16, 136)}),
    "attend table dtype": (raw_attend, {"block_table": torch.zeros(2, 3).long()}),
    "attend table rank": (raw_attend, {"block_table": torch.zeros(6).int()}),
    "attend table strided": (raw_attend, {"block_table": torch.zeros(2, 6).int()[:, ::2]}),
    "attend table rows": (raw_attend, {"block_table": torch.zeros(1, 3).int()}),
    "attend table range": (raw_attend, {"block_table": torch.full((2, 3), 3).int()}),
    "attend lengths dtype": (raw_attend, {"seq_lens": torch.tensor([40, 20])}),
    "attend lengths range": (raw_attend, {"seq_lens": torch.tensor([49, 20]).int()}),
    "attend lengths below 0": (raw_attend, {"seq_lens": torch.tensor([40, -20]).int()}),
    "attend starts count": (raw_attend, {"query_start": torch.tensor([0, 1]).int()}),
    "attend starts range": (raw_attend, {"query_start": torch.tensor([0, 1, 5]).int()}),
    "attend starts below 0": (raw_attend, {"query_start": torch.tensor([-1, 1, 4]).int()}),
    "attend sinks count": (raw_attend, {"sinks": torch.zeros(7)}),
    "attend slopes dtype": (raw_attend, {"alibi_slopes": torch.zeros(8).double()}),
    "attend softcap": (raw_attend, {"softcap": -1.0}),
    "attend softcap 1e300": (raw_attend, {"softcap": 1e300}),
    "attend softcap 1e-40": (raw_attend, {"softcap": 1e-40}),
    "attend out expanded": (raw_attend, {"out": torch.zeros(1, 8, 64).expand(4, 8, 64)}),
    "attend scale expanded": (
        raw_attend,
        {
            "format": 0,
            "cache": STATIC_CACHE,
            "key_scale": torch.ones(1).expand(2, 64),
            "value_scale": ONES,
        },
    ),
}


@pytest.mark.skipif(ISAS == ["reference"], reason="there are no operators")
@pytest.mark.parametrize(("operator", "changes"), RAW.values(), ids=RAW)
def test_operators_refuse_what_would_leave_their_tensors(operator, changes):
    """torch.ops.kvq is public: it must not rely on kvq_plugin.ops."""
    operator()
    with pytest.raises(RuntimeError, match="kvq: "):
        operator(**changes)
