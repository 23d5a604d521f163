"""Triton's store in its interpreter: every byte as the reference writes it."""

import functools

import golden_cases
import oracle
import pytest
import torch
from cases import ACTIVATIONS, PLAIN_ROWS, STATIC_ROWS, name_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvq_plugin import reference
from kvq_plugin.calls import Store
from kvq_plugin.formats import Granularity, Kind, get_format
from kvq_plugin.kernels import launch
from kvq_plugin.kernels import triton_store as kernel
from kvq_plugin.layout import GPU_V1

every_format = pytest.mark.parametrize("format", PLAIN_ROWS, ids=name_of)
NAN, INF = float("nan"), float("inf")
GOLDEN = [
    case
    for case in golden_cases.cases()
    if (case.head_size, case.dtype) == (80, "bfloat16")
    and case.granularity not in (Granularity.TENSOR, Granularity.HEAD)
]


def write(*args, **recent) -> None:
    kernel.store(Store(*args, **recent))


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case.name)
def test_golden_hashes(case):
    """Special values, zero points, skipped slots, head sizes that are no power of two."""
    digest = golden_cases.digest(golden_cases.stored(case, write, GPU_V1))
    assert digest == golden_cases.golden()[case.name]


@pytest.fixture(autouse=True)
def fewer_programs(monkeypatch):
    """The interpreter's time goes by programs: tiles of 8 tokens from 5 tokens on."""
    choices = ((4, launch.StoreChoice(block_t=1, warps=1)),
               (None, launch.StoreChoice(block_t=8, warps=4)))  # fmt: skip
    monkeypatch.setattr(launch, "STORE", choices)


def compare(format, key, value, slots, block_size=16, style="plain"):
    """All bytes of the storage, those between pages included, against the reference's."""
    heads, head_size = key.shape[1:]
    statics = (None, None)
    if not format.is_dynamic:
        g = torch.Generator().manual_seed(1)
        zero = format.key.code.kind is Kind.SIGNED
        statics = [
            oracle.static_scale(format, Granularity.CHANNEL, heads, head_size, g, zero_point=zero)
            for _ in "kv"
        ]
    cache = oracle.empty_cache(format, 3, heads, head_size, block_size, style)
    want = oracle.clone_storage(cache)
    write(key, value, cache, slots, format, *statics)
    n = slots.numel()
    reference.store(key[:n], value[:n], want, slots, format, *statics, layout=GPU_V1)
    assert torch.equal(oracle.whole_storage(cache), oracle.whole_storage(want))


@every_format
@pytest.mark.parametrize("style", ("padded", "interleaved"))
def test_cache_strides_and_strided_rows(format, style):
    """Rows as slices of a fused QKV projection; fewer slots than rows."""
    qkv = torch.randn(9, 7, 48).to(torch.bfloat16)
    key, value = qkv[:, 1:3], qkv[:, 4:6]
    compare(format, key, value, torch.tensor([40, -1, 3, 17, 0, 47, 16]), style=style)


@every_format
def test_slots_past_the_cache_write_nothing(format):
    """The CPU raises; a GPU's kernel cannot, and must not write elsewhere."""
    key = torch.randn(2, 1, 16)
    statics = (None, None)
    if not format.is_dynamic:
        statics = (reference.StaticScale.expand(1.0, 1, 16),) * 2
    cache = oracle.empty_cache(format, 2, 1, 16, 16, "padded")
    write(key, key, cache, torch.tensor([32, 10**12]), format, *statics)
    assert (oracle.whole_storage(cache) == 0xFF).all()


@pytest.mark.parametrize("name", [f.name for f in PLAIN_ROWS])
@given(data=st.lists(st.floats(width=32), min_size=16, max_size=16))
@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_row_of_fp32(name, data):
    key = torch.tensor(data)[None, None]
    compare(get_format(name), key, -key, torch.tensor([7]))


def all_16_bit_rows(dtype):
    return oracle.all_inputs(dtype).view(512, 1, 128)


@pytest.mark.parametrize("dtype", ACTIVATIONS[:2], ids=name_of)
@pytest.mark.parametrize("name", [f.name for f in STATIC_ROWS])
def test_every_16_bit_input(name, dtype):
    x = all_16_bit_rows(dtype)
    format = get_format(name)
    static = reference.StaticScale.expand(0.7, 1, 128)
    caches = [oracle.empty_cache(format, 4, 1, 128, 128) for _ in range(2)]
    for cache, store in zip(
        caches, (write, functools.partial(reference.store, layout=GPU_V1)), strict=True
    ):
        store(x, x, cache, torch.arange(512), format, static, static)
    assert torch.equal(*caches)


def test_cpu_tensors_need_the_interpreter(monkeypatch):
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    format = get_format("int8_per_token_head")
    cache = oracle.empty_cache(format, 1, 1, 16, 16)
    with pytest.raises(ValueError, match="need a CUDA or ROCm device.*TRITON_INTERPRET"):
        write(torch.zeros(1, 1, 16), torch.zeros(1, 1, 16), cache, torch.zeros(1).long(), format)
