"""The CUDA C++ kernels, thread by thread on a CPU, against the reference.

What a GPU would run is compiled by g++ with the address sanitizer: indexing, fragment layouts,
masks, splits and rounding are all the kernel's own; the instructions are emulator.py's.
"""

import ctypes
import itertools
import re

import emulator
import numpy as np
import oracle
import pytest
import torch
from cases import BATCHES, DYNAMIC_ROWS, OUTPUT_ROUNDING, PLAIN_ROWS, STATIC_ROWS, name_of

from kvq_plugin import kernels, reference
from kvq_plugin.calls import Attend, Store
from kvq_plugin.formats import CODES, FORMATS, Granularity, get_format
from kvq_plugin.kernels import Workspace, cuda, structs
from kvq_plugin.layout import GPU_V1, PageLayout

every_format = pytest.mark.parametrize("format", PLAIN_ROWS, ids=name_of)

#: RMS error over RMS output on N(0, 1) data: q and P are fp16 (2**-12 / sqrt(3) of an element at
#: most, once each), sums of many such errors are less than one of them, and int4's codes have 2.8
#: times the range of the values they stand for (2.5e-4 measured; one bf16 operand would give 2e-3).
OPERANDS = 2.0**-11


def bound(dtype) -> float:
    return OPERANDS + OUTPUT_ROUNDING[dtype] / 3**0.5


def check(tmp_path, format, batch, *, multiprocessors=4, orders=("",), **kwargs):
    """One emulated call against float64, the same to the bit for every order of blocks in *orders*.
    Returns the struct it was launched with."""
    problem = oracle.build(format, batch, kind=GPU_V1, **kwargs)
    expected = problem.expected()
    lengths, counts = zip(*batch, strict=True)
    outs = []
    for order in orders:
        outs.append(torch.full_like(problem.query, float("nan")))
        params = emulator.attend(
            tmp_path / "call", outs[-1], problem.arguments(), multiprocessors=multiprocessors,
            max_query_len=max(counts), max_seq_len=max(lengths), order=order, **problem.options,
        )  # fmt: skip
        assert torch.equal(outs[0], outs[-1])
    error = (outs[0].double() - expected).square().mean().sqrt()
    assert error <= bound(outs[0].dtype) * expected.square().mean().sqrt()
    return params


DECODE = ((65, 1), (1, 1), (33, 1))


@every_format
def test_decode(tmp_path, format):
    check(tmp_path, format, DECODE, head_size=64, block_size=16, group=4)


@pytest.mark.parametrize(
    ("name", "head_size", "group"),
    (
        ("int8_per_token_head", 128, 7),
        ("fp8_per_token_head", 112, 1),
        ("int4_per_token_head", 128, 4),
        ("int4_per_token_head", 96, 16),
        ("fp8_per_token_head", 256, 8),
        ("fp8_per_token_head", 208, 16),
        ("int8", 16, 16),
        ("int4_per_token_head", 48, 3),
        ("fp8", 80 - 32, 5),
        ("k8v4", 128, 8),
        ("k8v4", 96, 1),
    ),
)
def test_head_sizes_and_groups(tmp_path, name, head_size, group):
    """A class of head sizes takes all smaller ones; rows fill their tiles or not."""
    format = get_format(name)
    check(tmp_path, format, ((40, 1), (17, 1)), head_size=head_size, group=group, block_size=48,
          kv_heads=1, granularity=Granularity.CHANNEL)  # fmt: skip


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=name_of)
def test_activations(tmp_path, dtype):
    check(tmp_path, FORMATS["int8_per_token_head"], DECODE, dtype=dtype, style="interleaved")


@pytest.mark.parametrize("format", STATIC_ROWS, ids=name_of)
def test_channel_scales_and_zero_points(tmp_path, format):
    zero = format.key.code is CODES["int8"]
    check(tmp_path, format, DECODE, granularity=Granularity.CHANNEL, zero_point=zero)


@pytest.mark.parametrize("format", DYNAMIC_ROWS, ids=name_of)
def test_tokens_of_very_different_size(tmp_path, format):
    """V's scales go into fp16 weights, whose range is that of the loudest token."""
    check(tmp_path, format, ((90, 1),), key_spread=100.0, value_spread=1e5)


@pytest.mark.parametrize(
    "options",
    (
        {"softcap": 5.0},
        {"window": 20},
        {"window": 9, "causal": False, "batch": BATCHES["chunked"][3:]},
        {"causal": False, "batch": ((70, 2), (33, 5))},
        {"alibi_slopes": torch.linspace(0.01, 0.5, 8)},
        {"sinks": torch.linspace(-2.0, 3.0, 8)},
        {"batch": BATCHES["speculative"][:3]},
        {"batch": BATCHES["empty"]},
        {"batch": ((40, 9), (16, 16))},
    ),
    ids=lambda o: "-".join(o),
)
def test_options(tmp_path, options):
    options = dict(options)
    batch = options.pop("batch", DECODE)
    check(tmp_path, FORMATS["int8_per_token_head"], batch, **options)


#: Blocks come in the order of the GPU's choosing.
ORDERS = ("", "backwards", "1")


@pytest.mark.parametrize("name", ("int8", "int4_per_token_head"))
def test_a_long_sequence_among_short_ones(tmp_path, name):
    """Shares that hold several sequences, and one that holds a part of one."""
    sinks = torch.linspace(-2.0, 3.0, 4)
    batch = ((30, 1), (1400, 1), (0, 0), (1, 1), (300, 1), (0, 1))
    params = check(tmp_path, FORMATS[name], batch, multiprocessors=3, kv_heads=1, sinks=sinks,
                   orders=ORDERS)  # fmt: skip
    assert params.abreast == 1 and params.blocks == 12


@pytest.mark.parametrize(
    "options", ({}, {"window": 100}, {"causal": False}), ids=lambda o: "-".join(o)
)
def test_tiles_of_rows_abreast(tmp_path, options):
    """36 rows a kv head are 3 tiles, in blocks beside each other."""
    batch = ((400, 9), (500, 1), (9, 9))
    params = check(tmp_path, FORMATS["int8_per_token_head"], batch, group=4, kv_heads=2,
                   multiprocessors=12, orders=ORDERS, **options)  # fmt: skip
    assert params.abreast == 3 and params.blocks == 24


def test_a_decode_beside_a_prompt(tmp_path):
    """A prompt's tiles of rows are too many to lie abreast; the decode is still cut."""
    batch = ((1200, 1), (40, 36))
    params = check(tmp_path, FORMATS["int8_per_token_head"], batch, group=4, kv_heads=1,
                   multiprocessors=6, orders=ORDERS[:2])  # fmt: skip
    assert params.abreast == 1 and params.blocks == 12


def test_a_nan_reaches_its_own_output_only(tmp_path):
    batch = ((33, 1), (40, 1))
    problem = oracle.build(FORMATS["int8_per_token_head"], batch, kv_heads=1, kind=GPU_V1)
    layout = PageLayout(problem.format, 64, 32, GPU_V1)
    page = reference._pages(problem.cache)[int(problem.block_table[0, 1]), 0]
    page[layout.value.metadata : layout.value.metadata + 4] = torch.tensor(
        [float("nan")]
    ).view(torch.uint8)  # fmt: skip
    out = torch.zeros_like(problem.query)
    emulator.attend(tmp_path / "call", out, problem.arguments(), max_query_len=1, max_seq_len=40)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


# Store ------------------------------------------------------------------------------------------


@every_format
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=name_of)
def test_store_writes_the_reference_s_bytes(tmp_path, format, dtype):
    g = torch.Generator().manual_seed(format.id)
    heads, head_size, tokens = 2, 80, 19
    statics = [None, None]
    if not format.is_dynamic:
        zero = format.key.code is CODES["int8"]
        statics = [
            oracle.static_scale(format, Granularity.CHANNEL, heads, head_size, g, zero)
            for _ in "kv"
        ]
    rows = 4.0 * torch.randn(2, tokens, heads, head_size, generator=g)
    rows[0, 0, 0, 3], rows[0, 0, 0, 4], rows[1, 1, 1, 5] = float("nan"), -float("nan"), float("inf")
    rows[0, 2], rows[1, 3], rows[0, 4, 0] = 0.0, -0.0, -float("inf")
    rows[1, 5] = 1e-30
    key, value = rows.to(dtype)
    slots = torch.randperm(64, generator=g)[:tokens]
    slots[7] = -1
    expected = oracle.empty_cache(format, 4, heads, head_size, 16, "padded")
    cache = oracle.clone_storage(expected)
    reference.store(key, value, expected, slots, format, *statics, layout=GPU_V1)
    emulator.store(tmp_path / "call", key, value, cache, slots, format, *statics)
    assert torch.equal(oracle.whole_storage(cache), oracle.whole_storage(expected))


def test_store_of_unaligned_rows(tmp_path):
    """Rows that 16-byte loads cannot read are read element by element."""
    format = FORMATS["int8_per_token_head"]
    storage = torch.randn(2, 5, 1, 67, generator=torch.Generator().manual_seed(0)).bfloat16()
    key, value = storage[..., 3:]
    slots = torch.arange(5)
    expected = oracle.empty_cache(format, 1, 1, 64, 16)
    cache = expected.clone()
    reference.store(key, value, expected, slots, format, layout=GPU_V1)
    emulator.store(tmp_path / "call", key, value, cache, slots, format)
    assert torch.equal(cache, expected)


# Decoders ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code", dict.fromkeys(f.key.code for f in FORMATS.values()), ids=lambda c: c.name
)
def test_every_byte_decodes(tmp_path, code):
    """Two tokens' words of every byte, along one token (K) and across both (V)."""
    per, byte = 32 // code.bits, np.arange(256, dtype=np.uint8)
    a = np.stack([byte, byte[::-1], np.roll(byte, 77), np.roll(byte, 130)], 1).copy()
    words = [torch.from_numpy(x.copy().view(np.int32)[:, 0]) for x in (a, a[::-1])]
    fields = [
        (w.numpy().view(np.uint32)[:, None] >> (np.arange(per) % 4 * 8 + np.arange(per) // 4 * 4))
        & (2**code.bits - 1)
        for w in words
    ]
    along, across = torch.zeros(256, per // 2).int(), torch.zeros(256, per).int()
    params = emulator.DecodeParams(
        *(t.data_ptr() for t in (*words, along, across)), 256, code.id
    )  # fmt: skip
    emulator.run(tmp_path / "call", params, words, [along, across])
    halves = [t.numpy().view(np.float16).astype(np.float64) for t in (along, across)]
    if code.bits == 8 and code.name != "int8":
        values = [oracle.float8_values(code.name)[f] for f in fields]
        assert np.array_equal(halves[0], values[0], equal_nan=True)
    elif code.name == "int8":
        values = [f - 128.0 for f in fields]
        assert np.array_equal(halves[0] * 2**24, fields[0])
    else:
        values = [f - 8.0 for f in fields]
        order = [0, 2, 1, 3, 4, 6, 5, 7]
        assert np.array_equal(halves[0] * 2**24 / ([1] * 4 + [16] * 4), fields[0][:, order])
    pairs = np.stack(values, 2).reshape(256, 2 * per)
    assert np.array_equal(halves[1], pairs, equal_nan=True)


# What Python and C++ must agree on --------------------------------------------------------------


#: What params.h calls the types of fields that are no pointers and no structs.
TYPES = {"int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64, "float": ctypes.c_float,
         "Activation": ctypes.c_int32}  # fmt: skip


@pytest.mark.parametrize("name", ("Rows", "Cache", "StaticScale", "StoreParams", "AttendParams"))
def test_structs_match(name):
    """Names, order and types of all fields."""
    header = re.sub(r"//.*", "", (emulator.ROOT / "csrc" / "cuda" / "params.h").read_text())
    body = re.search(rf"^struct {name} {{\n(.*?)^}};", header, re.M | re.S)[1]
    lines = re.findall(r"(?:const )?(\w+)(\*?) (\w+(?:, \w+)*);", body)
    assert len(lines) == body.count(";")
    declared = []
    for type, star, names in lines:
        type = ctypes.c_void_p if star else TYPES.get(type) or getattr(structs, type)
        declared += [(field, type) for field in names.split(", ")]
    assert getattr(structs, name)._fields_ == declared


def test_plans_fit_the_workspace(monkeypatch):
    """No batch needs more than workspace_size, nor more counters than there is room for."""
    monkeypatch.setattr(cuda, "_multiprocessors", lambda device: 132)
    library, device = emulator.host_library(), torch.device("cuda")
    shapes = ((8, 8, 128), (32, 8, 128), (32, 2, 64), (16, 1, 256))
    for sequences, queries in itertools.product((1, 2, 3, 7, 17, 64, 300), (1, 2, 8, 300)):
        for heads, kv_heads, head_size in shapes:
            params = structs.AttendParams(
                cache=structs.Cache(None, 0, 0, 16, kv_heads, head_size, 3), num_tokens=sequences,
                num_seqs=sequences, num_heads=heads, max_query_len=queries,
            )  # fmt: skip
            need = cuda.plan(library, params, 131072, 132)
            assert 0 < need <= cuda.workspace_size(head_size, device)
            assert params.blocks <= cuda.COUNTERS
            # One sequence keeps the device busy; nothing is cut where nothing is long.
            slots = 132 * {1: 3, 2: 2}[-(-params.tile_rows // 8)] if head_size == 128 else 132
            assert params.blocks >= 0.95 * slots
            assert cuda.plan(library, params, 60, 132) == 0


def test_attend_brings_its_workspace_or_takes_one(monkeypatch):
    launched = []
    monkeypatch.setattr(cuda, "_load", emulator.host_library)
    monkeypatch.setattr(cuda, "_device_refusal", lambda device: None)
    monkeypatch.setattr(cuda, "_multiprocessors", lambda device: 132)
    monkeypatch.setattr(cuda, "_launch", lambda name, params, device: launched.append(params))
    problem = oracle.build(FORMATS["int8_per_token_head"], ((40, 1),), kind=GPU_V1)
    out = torch.empty_like(problem.query)
    counters = torch.zeros(cuda.COUNTERS, dtype=torch.int32)
    whole, small = (Workspace(torch.zeros(n, dtype=torch.uint8), counters) for n in (1 << 24, 64))

    def call(workspace):
        cuda.attend(Attend(out, *problem.arguments(), max_query_len=1, max_seq_len=131072,
                           workspace=workspace))  # fmt: skip

    call(None), call(whole)
    assert launched[0].blocks == launched[1].blocks > 1 and launched[0].workspace
    assert launched[1].counters == counters.data_ptr()
    assert launched[1].workspace == whole.scratch.data_ptr()
    with pytest.raises(ValueError, match=r"workspace must hold \d+ bytes.*64 and.*new_workspace"):
        call(small)


def test_refusals_say_what_to_do(monkeypatch):
    format = FORMATS["int4_per_token_head"]
    assert cuda.shape_refusal(format, 128, 16) is None
    assert "Triton" in cuda.shape_refusal(format, 80, 16)
    assert "up to 256" in cuda.shape_refusal(format, 512, 16)
    assert "--block-size" in cuda.shape_refusal(format, 128, 8)
    cache = torch.empty(1, 1, 16, format.bytes_per_token(128), dtype=torch.uint8)
    rows = torch.zeros(1, 1, 128)
    monkeypatch.setattr(kernels, "_choice", lambda: "cuda")
    with pytest.raises(ValueError, match="KVQ_GPU_KERNELS=triton"):
        kernels.store(Store(rows, rows, cache, torch.zeros(1, dtype=torch.int64), format))


def test_caches_of_more_slots_than_stores_can_count(monkeypatch):
    monkeypatch.setattr(cuda, "_load", lambda: None)
    monkeypatch.setattr(cuda, "_device_refusal", lambda device: None)
    format = FORMATS["int8_per_token_head"]
    most = torch.empty(1 << 27, 1, 16, 136, dtype=torch.uint8, device="meta")
    assert cuda.refusal(format, 64, most) is None
    beyond = torch.empty((1 << 27) + 1, 1, 16, 136, dtype=torch.uint8, device="meta")
    assert "count to 2,147,483,648" in cuda.refusal(format, 64, beyond)
