"""What stands in Python and in C++ says the same; what torch is told of the operators is true."""

import os
import re
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import torch
from cases import ALL_ROWS, BLOCK_SIZES, HEAD_SIZES, ISAS, name_of
from torch._subclasses.fake_tensor import FakeTensorMode

from kvq_plugin import _native, ops, rotation
from kvq_plugin.formats import CODES, Granularity, get_format
from kvq_plugin.layout import CPU_V1, MAX_HEAD_SIZES, PageLayout

ROOT = Path(__file__).parent.parent
#: Every instruction set there is a build of, best first.
KNOWN_ISAS = ["amx", "avx512_bf16", "avx512", "avx2_vnni", "avx2", "neon_dotprod", "generic"]

pytestmark = pytest.mark.skipif(
    ISAS == ["reference"], reason="KVQ_KERNELS=reference: there is no library to compare with"
)


def test_format_tables_are_equal():
    def row(s):
        per_token = s.granularities == (Granularity.TOKEN_HEAD,)
        grouping = {
            (Granularity.CHANNEL_GROUP, False): 1,
            (Granularity.CHANNEL_GROUP, True): 2,
            (Granularity.TOKEN_GROUP, True): 3,
        }.get((s.granularities[0], s.lite), 0)
        return (s.code.id, per_token, s.rotated, grouping)

    python = [
        (f.name, row(f.key), row(f.value), f.recent is not None)
        for f in sorted(ALL_ROWS, key=lambda f: f.id)
    ]
    assert _native.format_table() == python


@pytest.mark.parametrize("head_size", (16, *HEAD_SIZES))
def test_rotations_are_equal(head_size):
    """Signs, powers of two and the gain; test_store.py and test_rotation.py see them at work."""
    factors, gain = _native.rotation(head_size)
    expected = rotation.signs(head_size) * 2.0 ** -rotation.exponent(head_size)
    assert torch.equal(factors, expected)
    assert gain == rotation.gain(head_size)


@pytest.mark.parametrize("format", ALL_ROWS, ids=name_of)
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("block_size", (*BLOCK_SIZES, 96))
def test_page_layouts_are_equal(format, head_size, block_size):
    if head_size % format.head_size_step or block_size % format.block_size_step:
        pytest.skip("cannot be laid out")
    layout = PageLayout(format, head_size, block_size)
    python = (
        layout.key.codes,
        layout.value.codes,
        layout.key.metadata,
        layout.value.metadata,
        layout.first,
        layout.size,
    )
    assert tuple(_native.page_layout(format.id, head_size, block_size)) == python


def test_unknown_formats_have_no_layout():
    for format_id in (-1, len(ALL_ROWS), 2**20):
        with pytest.raises(ValueError, match=f"no format {format_id}"):
            _native.page_layout(format_id, 64, 16)


def test_largest_head_sizes_are_equal():
    assert _native.max_head_size() == MAX_HEAD_SIZES[CPU_V1]


def test_code_ids_and_bits_are_equal():
    """The codec enum, read from the header: a code no format uses is not in the table above."""
    header = (ROOT / "csrc" / "formats.h").read_text()
    body = re.search(r"enum class Code[^{]*\{([^}]*)\}", header).group(1)
    ids = {name.lower(): int(value) for name, value in re.findall(r"k(\w+) = (\d+)", body)}
    assert ids == {name.replace("_", ""): code.id for name, code in CODES.items()}


# --- instruction sets ----------------------------------------------------------------------------


def test_supported_instruction_sets_are_ordered_and_end_with_generic():
    supported = _native.supported_isas()
    assert supported == [name for name in KNOWN_ISAS if name in supported]
    assert supported[-1] == "generic"


def test_use_isa_switches_and_restores():
    before = _native.isa()
    for name in _native.supported_isas():
        with _native.use_isa(name):
            assert _native.isa() == name
        assert _native.isa() == before
    with pytest.raises(RuntimeError, match="inside"), _native.use_isa("generic"):
        raise RuntimeError("inside")
    assert _native.isa() == before


def test_emulated_tiles_can_be_asked_for_but_are_not_offered():
    assert "amx_emulated" not in _native.supported_isas()
    if "avx512_bf16" not in ISAS:
        pytest.skip("they need what surrounds the tiles: AVX-512 BF16")
    with _native.use_isa("amx_emulated"):
        assert _native.isa() == "amx_emulated"


def test_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="sse9") as error, _native.use_isa("sse9"):
        pass
    assert "generic" in str(error.value)


def in_subprocess(code: str, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("isa", ISAS)
def test_environment_forces_an_instruction_set(isa):
    done = in_subprocess("from kvq_plugin import _native; print(_native.isa())", KVQ_ISA=isa)
    assert done.stdout.strip() == isa, done.stderr


@pytest.mark.parametrize(
    ("variable", "code"),
    (
        ("KVQ_ISA", "from kvq_plugin import _native; _native.load()"),
        ("KVQ_KERNELS", "from kvq_plugin import ops; ops._use_reference()"),
    ),
)
def test_misspelt_environment_is_refused(variable, code):
    done = in_subprocess(code, **{variable: "avx513"})
    assert done.returncode != 0
    assert re.search(rf"ValueError: .*{variable}.*avx513.*expected one of", done.stderr)


# --- operators as torch sees them ----------------------------------------------------------------


def store_arguments(format, dtype):
    key, value = (torch.randn(5, 2, 64).to(dtype) for _ in "kv")
    size = format.block_size_step
    cache = torch.zeros(3, 2, size, format.bytes_per_token(64, size), dtype=torch.uint8)
    slots = torch.tensor([3, 17, -1, 31, 0])
    scales = (None,) * 4 if format.is_dynamic else (torch.ones(2, 64), None) * 2
    recent = ()
    if format.recent is not None:
        recent_cache = torch.zeros(3, 2, 32, format.recent.bytes_per_token(64), dtype=torch.uint8)
        recent = (recent_cache, slots + 32)
    return (key, value, cache, slots, format.id, *scales, *recent)


def attend_arguments(format, dtype):
    p = oracle.build(format, ((40, 1), (20, 3)), dtype=dtype)
    scales = (None,) * 4 if format.is_dynamic else (torch.ones(2, 64), None) * 2
    tensors = (p.query, p.cache, p.block_table, p.seq_lens, p.query_start_loc)
    options = (True, 16, 0.0, None, torch.zeros(8))
    return (torch.zeros_like(p.query), *tensors, format.id, p.scale, *scales, *options)


ARGUMENTS = {"store": store_arguments, "attend": attend_arguments}
WRITES = {"store": {"cache", "recent_cache"}, "attend": {"out"}}


@pytest.fixture(autouse=True)
def loaded():
    """Fakes are registered with the first use of the operators."""
    ops._use_reference()


@pytest.mark.parametrize("name", ARGUMENTS)
def test_schema_declares_what_is_written(name):
    schema = getattr(torch.ops.kvq, name).default._schema
    written = {a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write}
    assert written == WRITES[name]
    assert not schema.returns


@pytest.mark.parametrize(
    ("name", "format"),
    [
        *((n, f) for n in ARGUMENTS for f in ("fp8", "int8_per_token_head", "int4_per_token_head")),
        ("store", "int4"),
    ],
)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=name_of)
def test_opcheck(name, format, dtype):
    """Runs the kernel and the fake: mutation as declared, no aliasing, traceable."""
    torch.library.opcheck(
        getattr(torch.ops.kvq, name).default,
        ARGUMENTS[name](get_format(format), dtype),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("name", ARGUMENTS)
def test_fake_tensors_reach_no_kernel(name):
    arguments = ARGUMENTS[name](get_format("fp8"), torch.bfloat16)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        assert getattr(torch.ops.kvq, name)(*fake) is None


def test_compiled_graph_keeps_the_mutation():
    """Functionalization must carry the write into the cache through to the caller."""
    format = get_format("int8_per_token_head")
    key, value, cache, slots, *rest = store_arguments(format, torch.bfloat16)
    want = cache.clone()
    torch.ops.kvq.store(key * 2, value, want, slots, *rest)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(key, value, cache, slots):
        torch.ops.kvq.store(key * 2, value, cache, slots, *rest)
        return cache.sum(dtype=torch.int64)

    total = step(key, value, cache, slots)
    assert torch.equal(cache, want) and total == want.sum(dtype=torch.int64)
