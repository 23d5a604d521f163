"""The compiled library as such: memory, threads, symbols, tensors too large for 32 bits."""

import os
import re
import shutil
import struct
import subprocess
import sys
import threading
from pathlib import Path

import oracle
import pytest
import torch
from attending import run
from cases import ALL_ROWS, ISAS, ROWS, name_of, use_isa

from kvq_plugin import _native, ops, reference
from kvq_plugin.formats import get_format

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"

pytestmark = pytest.mark.skipif(
    ISAS == ["reference"], reason="KVQ_KERNELS=reference: there is no library to look at"
)


def in_subprocess(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def compiled(tmp_path, *arguments) -> str:
    """Compile with g++ and run; the output."""
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    program = tmp_path / "program"
    command = ["g++", "-std=c++17", "-O1", "-Wno-psabi", *map(str, arguments), "-o", str(program)]
    subprocess.run(command, check=True, timeout=250)
    done = subprocess.run([program], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- what is in the file -------------------------------------------------------------------------


def segments() -> list[tuple[int, int]]:
    """(type, bytes in memory) of each segment of the library, from its ELF headers."""
    raw = _native.LIBRARY.read_bytes()
    assert raw[:5] == b"\x7fELF\x02", "expected a 64-bit ELF file"
    (start,) = struct.unpack_from("<Q", raw, 32)
    size, count = struct.unpack_from("<HH", raw, 54)
    headers = (struct.unpack_from("<II6Q", raw, start + i * size) for i in range(count))
    return [(header[0], header[6]) for header in headers]


def test_thread_local_storage_is_small():
    """Every thread of the process pays for it. 5.2 MB once: 660 MB of 128 threads."""
    pt_tls = 7
    assert sum(size for kind, size in segments() if kind == pt_tls) <= 256


SHARED = """
#include "codec.h"
#include "cpu/kernels.h"
using namespace kvq;
const void* volatile used[] = {
    reinterpret_cast<void*>(&page_layout), reinterpret_cast<void*>(&code_bits), &kFormats};
long metadata(const Stream* s) { return s->metadata_bytes(64); }
"""


def test_no_function_is_shared_between_instruction_sets(tmp_path):
    """A linker keeps one body of a weak symbol, which could be AVX-512's for all."""
    if not shutil.which("g++") or not shutil.which("nm"):
        pytest.skip("needs g++ and nm")
    source, object_file = tmp_path / "shared.cpp", tmp_path / "shared.o"
    source.write_text(SHARED)
    subprocess.run(
        ["g++", "-std=c++17", "-O0", "-Wno-attributes", f"-I{CSRC}", "-c", source, "-o",
         object_file], check=True, timeout=100)  # fmt: skip
    for file in (object_file, _native.LIBRARY):
        listed = subprocess.run(["nm", file], capture_output=True, text=True, check=True)
        weak = re.findall(r" [VWu] (\S*3kvq\S*)", listed.stdout)
        assert not weak, f"{file.name}: {weak}"


# --- threads -------------------------------------------------------------------------------------


def test_work_is_cut_and_merged_by_position_alone(tmp_path):
    """plan.h over random batches and random orders of finishing; what 100 sequences of 128k tokens
    reserve on 64 threads; and the merging left to one thread."""
    compiled(tmp_path, "-fsanitize=undefined", "-fno-sanitize-recover=all",
             ROOT / "tests/cpu/plan.cpp", CSRC / "cpu/workspace.cpp")  # fmt: skip


def test_first_use_from_many_threads(tmp_path):
    """The thread sanitizer sees a race whoever wins it."""
    x86 = ["-DKVQ_X86"] if len(_native.supported_isas()) > 1 else []
    compiled(tmp_path, "-g", "-fsanitize=thread", "-pthread", *x86,
             ROOT / "tests/cpu/first_use.cpp", CSRC / "cpu/dispatch.cpp")  # fmt: skip


def test_callers_do_not_disturb_each_other():
    """Four Python threads, each with its own cache and sizes, all at once."""
    names = ("int8_per_token_head", "fp8", "int4_per_token_head", "int8")
    batches = (((2500, 1), (70, 1)), ((300, 64),), ((40, 9), (600, 1)), ((17, 17),))
    problems = [
        oracle.build(get_format(n), b, group=4, dtype=torch.bfloat16)
        for n, b in zip(names, batches, strict=True)
    ]
    want = [run(p, ISAS[0]) for p in problems]
    stored = []
    for p in problems:
        cache = torch.zeros_like(p.cache)
        keys, slots = p.query[:, :2].contiguous(), torch.arange(p.query.shape[0])
        ops.store(keys, keys, cache, slots, p.format, p.key_static, p.value_static)
        stored.append((keys, slots, cache))
    wrong = []

    def call(i: int) -> None:
        p, (keys, slots, cache) = problems[i], stored[i]
        for _ in range(60):
            out, again = torch.empty_like(p.query), torch.zeros_like(cache)
            ops.attend(out, *p.arguments())
            ops.store(keys, keys, again, slots, p.format, p.key_static, p.value_static)
            if not torch.equal(out, want[i]) or not torch.equal(again, cache):
                wrong.append(i)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(problems))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


# --- memory --------------------------------------------------------------------------------------

LONG_BATCH = """
import resource, torch
from kvq_plugin import ops
from kvq_plugin.formats import get_format

format = get_format("int8_per_token_head")
torch.set_num_threads(64)
cache = torch.zeros(1, 1, 128, format.bytes_per_token(16), dtype=torch.uint8)

def attend(sequences, length):
    query = torch.zeros(sequences, 32, 16)
    ops.attend(torch.empty_like(query), query, cache,
        torch.zeros(sequences, length // 128, dtype=torch.int32),
        torch.full((sequences,), length, dtype=torch.int32),
        torch.arange(sequences + 1, dtype=torch.int32), format, 1.0)

attend(100, 4096)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
attend(100, 131072)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


def test_a_long_context_needs_no_more_memory_than_a_short_one():
    """100 sequences of 128k tokens on 64 threads, all in one block: 25,600 chunks, whose results of
    6 KB (160 MB) were all kept until the last had come."""
    assert int(in_subprocess(LONG_BATCH)) < 30


OUT_OF_MEMORY = """
import resource, torch
from kvq_plugin import ops
from kvq_plugin.formats import get_format

format = get_format("int8_per_token_head")
tokens = 1 << 20
cache = torch.zeros(2, 1, 128, format.bytes_per_token(16), dtype=torch.uint8)
key, slots = torch.zeros(tokens, 1, 16), torch.full((tokens,), -1)
query = torch.zeros(tokens, 1, 16)
lengths, starts = torch.ones(tokens, dtype=torch.int32), torch.arange(tokens + 1).int()
table = torch.zeros(tokens, 1, dtype=torch.int32)
calls = {
    "store": lambda n: ops.store(key[:n], key[:n], cache, slots[:n], format),
    "attend": lambda n: ops.attend(query[:n], query[:n], cache, table, lengths[:n],
                                   starts[:n + 1], format, 1.0),
}
for call in calls.values():
    call(100)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 20), resource.RLIM_INFINITY))
for name, call in calls.items():
    try:
        call(tokens)
    except MemoryError:
        print(name)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
for call in calls.values():
    call(tokens)
print("goes on")
"""


def test_out_of_memory_is_an_exception():
    """And the next call finds everything in order."""
    assert in_subprocess(OUT_OF_MEMORY).split() == ["store", "attend", "goes", "on"]


# --- large caches --------------------------------------------------------------------------------


def virtual(size: int) -> torch.Tensor:
    """Zeros of *size* bytes that take memory where they are written."""
    import mmap

    no_reserve = 0x4000
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    try:
        return torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=torch.uint8)
    except OSError as error:
        pytest.skip(f"this machine gives no {size >> 30} GiB of address space: {error}")


@pytest.mark.parametrize("format", ROWS, ids=name_of)
def test_caches_beyond_32_bits(format):
    """More than 2**31 slots of D = 16, so some 70 GB. What is stored at the far end is there, and
    attends as it does in a cache of few blocks."""
    heads, head_size, size = 1, 16, 128
    content = format.bytes_per_token(head_size)
    blocks = 2**31 // size + 5
    cache = virtual(blocks * heads * size * content).view(blocks, heads, size, content)
    small = torch.zeros(3, heads, size, content, dtype=torch.uint8)
    statics = (None, None)
    if not format.is_dynamic:
        statics = (reference.StaticScale.expand(0.1, heads, head_size),) * 2
    g = torch.Generator().manual_seed(0)
    key, value = (torch.randn(300, heads, head_size, generator=g) for _ in "kv")
    query = torch.randn(1, 4, head_size, generator=g)
    token = torch.arange(300)
    outputs = []
    for pages, order in ((small, (2, 0, 1)), (cache, (blocks - 1, 7, blocks - 3))):
        slots = torch.tensor(order)[token // size] * size + token % size
        ops.store(key, value, pages, slots, format, *statics)
        out = torch.empty_like(query)
        ops.attend(
            out, query, pages, torch.tensor([order], dtype=torch.int32),
            torch.tensor([300], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32),
            format, 0.25, *statics,
        )  # fmt: skip
        outputs.append((out, pages[list(order)]))
    assert slots.max() >= 2**31
    assert torch.equal(outputs[0][1], outputs[1][1])
    assert torch.equal(outputs[0][0], outputs[1][0])


@pytest.mark.parametrize("format", [f for f in ALL_ROWS if f.recent or f.is_dynamic], ids=name_of)
@pytest.mark.parametrize("isa", ISAS)
def test_a_block_of_more_than_2_to_the_29_tokens(isa, format):
    """Where scales lie was an int of bytes: those of the far end went 4 GiB before their places.
    Rows of formats with recent rows are sealed within one such block."""
    heads, head_size, tokens = 1, 64, 40
    formats = [format] if format.recent is None else [format, format.recent]
    size = 2**29 + 2**28
    big = [virtual(size * f.bytes_per_token(head_size, size)).view(1, heads, size, -1)
           for f in formats]  # fmt: skip
    small = [torch.zeros(1, heads, 128, f.bytes_per_token(head_size, 128), dtype=torch.uint8)
             for f in formats]  # fmt: skip
    g = torch.Generator().manual_seed(0)
    key, value = (torch.randn(tokens, heads, head_size, generator=g).bfloat16() for _ in "kv")
    query = torch.randn(1, 4, head_size, generator=g).bfloat16()
    outputs = []
    for caches, end in ((small, 128), (big, size)):
        slots, more, tables = torch.arange(end - tokens, end), {}, {}
        table = torch.zeros(1, 1, dtype=torch.int32)
        if format.recent is not None:
            more = {"recent_cache": caches[1], "recent_slot_mapping": slots}
            tables = {"recent_cache": caches[1], "recent_block_table": table}
        out = torch.empty_like(query)
        with use_isa(isa):
            ops.store(key, value, caches[0], slots, format, **more)
            ops.attend(
                out, query, caches[0], table, torch.tensor([end], dtype=torch.int32),
                torch.tensor([0, 1], dtype=torch.int32), format, 0.25, window=tokens, **tables,
            )  # fmt: skip
        outputs.append(out)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("isa", ISAS)
def test_strides_beyond_32_bits(isa):
    """Heads 3 GiB apart, as a cache of many layers may have them."""
    format = get_format("int8_per_token_head")
    content = format.bytes_per_token(64)
    apart = 3 << 30
    storage = virtual(2 * apart)
    cache = storage.as_strided((2, 2, 16, content), (16 * content, apart, content, 1))
    p = oracle.build(format, ((20, 1),), block_size=16)
    blocks = p.blocks[0].long()
    with use_isa(isa):
        ops.store(
            p.keys[0], p.values[0], cache, torch.arange(20), format,
        )  # fmt: skip
        small = torch.zeros(2, 2, 16, content, dtype=torch.uint8)
        ops.store(p.keys[0], p.values[0], small, torch.arange(20), format)
        assert torch.equal(cache, small)
        outputs = []
        for pages in (small, cache):
            out = torch.empty_like(p.query)
            table = torch.tensor([[0, 1]], dtype=torch.int32)
            ops.attend(out, p.query, pages, table, p.seq_lens, p.query_start_loc, format, p.scale)
            outputs.append(out)
    assert torch.equal(*outputs)
    assert len(blocks) == 2


FORKED = """
import os, signal, warnings
import torch
from kvq_plugin import ops
from kvq_plugin.formats import get_format

torch.set_num_threads(2)
format, size = get_format("int8_per_token_head"), 64
cache = torch.zeros(64, 4, 128, format.bytes_per_token(size, 128), dtype=torch.uint8)
x, slots = torch.randn(64 * 128, 4, size), torch.arange(64 * 128)
query, out = torch.randn(4, 16, size), torch.empty(4, 16, size)
table = torch.arange(64, dtype=torch.int32).view(4, 16)
lengths, starts = torch.full((4,), 2048, dtype=torch.int32), torch.arange(5, dtype=torch.int32)

def used():
    ops.store(x, x, cache, slots, format)
    ops.attend(out, query, cache, table, lengths, starts, format, 0.125)
    return out.clone()

first = used()
child = os.fork()
if not child:
    signal.alarm(60)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        same = torch.equal(used(), first)
        used()
    print(same, torch.get_num_threads(), [str(w.message) for w in said], flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0, "the forked process hangs"
used()
print(torch.get_num_threads())
"""


def test_a_process_that_is_forked_off_has_one_thread_and_the_same_bits():
    """It waited for ever for the threads of its parent."""
    forked, parent = in_subprocess(FORKED).splitlines()
    assert forked.startswith('True 1 ["kvq_plugin: this process was forked off one that uses the')
    assert forked.count("kvq_plugin:") == 1 and parent == "2"
