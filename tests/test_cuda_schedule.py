"""How CUDA C++ attention deals a batch out to blocks (plan.h), and how well that fills a GPU.

``tests/cuda/schedule.cpp`` runs plan.h on a CPU; tests/test_cuda_emulated.py runs the kernels.
"""

import ctypes
import itertools
import random
from functools import cache as memoize

import emulator
import numpy as np
import pytest

from kvq_plugin.formats import get_format
from kvq_plugin.gpu_check import checks, timing
from kvq_plugin.kernels import cuda, structs

H100 = 132  # multiprocessors
COLUMNS = ("block", "sequence", "kv_head", "row", "first", "last", "dealt", "rounds", "tiles")
#: What a piece costs beside its rounds, in rounds: its sequence, pages and queries are looked up
#: one after the other, 1.5 us, where a round of 8-bit rows at D = 128 takes a block 4 us at 3 TB/s.
PIECE = 0.5


@memoize
def library():
    source = emulator.ROOT / "tests" / "cuda" / "schedule.cpp"
    command = [emulator.compiler(), "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC",
               "-Wno-unused-function", f"-I{emulator.ROOT / 'csrc' / 'cuda'}", "-shared",
               str(source)]  # fmt: skip
    found = ctypes.CDLL(str(emulator.cached("schedule", command, *emulator.SOURCES)))
    found.kvq_schedule.restype = ctypes.c_int64
    found.kvq_schedule.argtypes = [
        ctypes.POINTER(structs.AttendParams), ctypes.c_void_p, ctypes.c_int64,
    ]  # fmt: skip
    return found


def schedule(requests, *, heads=8, group=4, head_size=128, name="int8_per_token_head",
             longest=None, tokens=None, multiprocessors=H100, window=0, causal=True):  # fmt: skip
    """``(params, pieces)`` of a batch of (tokens in the cache, query tokens), launched with bounds
    *longest* and rows of query *tokens* (default: the batch's own); pieces by COLUMNS."""
    lengths, counts = (np.array(x, dtype=np.int32) for x in zip(*requests, strict=True))
    starts = np.concatenate([[0], counts.cumsum()]).astype(np.int32)
    params = structs.AttendParams(
        cache=structs.Cache(None, 0, 0, 16, heads, head_size, get_format(name).id),
        recent_table=1 if get_format(name).recent else None,  # never looked at
        num_tokens=tokens or int(starts[-1]), num_seqs=len(requests), num_heads=heads * group,
        max_query_len=int(counts.max()), window=window, causal=causal,
        seq_lens=lengths.ctypes.data, query_start=starts.ctypes.data,
    )  # fmt: skip
    longest = longest or int(lengths.max())
    cuda.plan(emulator.host_library(), params, longest, multiprocessors)
    count = library().kvq_schedule(params, None, 0)
    out = np.zeros((count, len(COLUMNS)), np.int32)
    library().kvq_schedule(params, out.ctypes.data, count)
    return params, dict(zip(COLUMNS, out.T, strict=True))


def used(requests, **options) -> float:
    """Share of all multiprocessors' time that goes into rounds, when each of the blocks that share
    one gets an equal part of it: a step ends when the last block does."""
    params, pieces = schedule(requests, **options)
    rounds = -(-(pieces["last"] - pieces["first"]) // 4)
    times = np.zeros(params.blocks)
    np.add.at(times, pieces["block"], rounds + PIECE)
    slots = H100 * (3 if params.tile_rows == 8 else 2)
    return float(rounds.sum() / (times.max() * slots))


def decodes(lengths) -> list[tuple[int, int]]:
    return [(n, 1) for n in lengths]


#: What the plan before this one, equal splits of every sequence, used by the same model.
BEFORE = (0.94, 0.88, 0.93, 0.09)


@pytest.mark.parametrize(
    ("lengths", "before"),
    [pytest.param(*x, id=timing._context(x[0])) for x in zip(timing.SHAPES, BEFORE, strict=True)],
)
@pytest.mark.parametrize("longest", (None, 131072), ids=("eager", "captured"))
def test_timed_batches_keep_the_gpu_busy(lengths, before, longest):
    found = used(decodes(lengths), longest=longest)
    assert found >= 0.9 and found >= before


def test_a_long_sequence_keeps_every_multiprocessor_busy():
    params, pieces = schedule(decodes([131072] + [1024] * 63))
    assert params.blocks == 3 * H100
    tiles = np.zeros(params.blocks)
    np.add.at(tiles, pieces["block"], pieces["last"] - pieces["first"])
    assert tiles.min() >= 0.95 * tiles.max()


RAGGED = [(n, b) for n, b in itertools.product(checks.GRID.contexts, checks.GRID.batches)]


@pytest.mark.parametrize(("length", "count"), [x for x in RAGGED if x[0] * x[1] >= 1 << 17])
def test_the_grid_s_ragged_batches_keep_the_gpu_busy(length, count):
    """As gpu_check's problems.decode draws them: up to two pages of 64 tokens fewer each."""
    rng = random.Random(length * count)
    lengths = [length, *(length - rng.randrange(128) for _ in range(count - 1))]
    assert used(decodes(lengths)) >= 0.9


def test_decodes_beside_a_prompt_keep_their_blocks():
    """The launch of a mixed batch's decodes does not count the other tokens, and where prompts are
    in the launch themselves, all of it is dealt out: a prompt's first rows see less than its last
    and are dealt as much, which is what is lost here."""
    alone, _ = schedule(decodes([4096] * 8))
    beside, _ = schedule(decodes([4096] * 8), tokens=4096)
    assert beside.blocks == alone.blocks == 3 * H100
    prompt = [*decodes([131072] + [1024] * 7), (4096, 1024)]
    params, _ = schedule(prompt)
    assert params.abreast == 1 and used(prompt) >= 0.85


@pytest.mark.parametrize("tokens", (2, 4, 8))
def test_speculative_decodes_read_the_cache_once(tokens):
    """Blocks beside each other have the same tiles of tokens, but for what the last rows see."""
    params, pieces = schedule([(30000, tokens), (512, tokens), (3000, tokens)])
    assert params.abreast == -(-4 * tokens // params.tile_rows)
    columns = [pieces[c] for c in ("block", "sequence", "kv_head", "first", "last")]
    blocks: dict = {}
    for block, *rest in zip(*columns, strict=True):
        blocks.setdefault(int(block), []).append(rest)
    for block, rest in blocks.items():
        beside = np.array(blocks[block // params.abreast * params.abreast])
        assert np.abs(np.array(rest) - beside).max() <= 1


@pytest.mark.parametrize("name", ("int8", "int4_per_token_head", "k3v2"))
def test_every_tile_once(name):
    """Random batches: each tile of tokens that a tile of rows sees is in one piece; of formats with
    recent rows the first row's too, and both of what is sealed to some of the rows."""
    for seed in range(150):
        rng = random.Random(seed)
        requests = []
        for _ in range(rng.choice((1, 2, 5, 40, 200))):
            length = rng.choice((0, 1, 15, 16, 17, 128, 129, rng.randint(1, 5000)))
            requests.append((length, min(length, rng.choice((0, 1, 1, 3, 9, 700)))))
        if not any(count for _, count in requests):
            continue
        heads, group = rng.choice((1, 2, 8)), rng.choice((1, 3, 8, 20))
        params, pieces = schedule(
            requests, heads=heads, group=group, head_size=rng.choice((64, 128, 256)),
            name=name, causal=rng.random() < 0.8 or get_format(name).recent is not None,
            window=rng.choice((0, 0, 1, 16, 100, 4000)), multiprocessors=rng.choice((1, 3, 132)),
        )  # fmt: skip
        expected = sum(-(-count * group // params.tile_rows) for _, count in requests) * heads
        found: dict = {}
        for piece in zip(*pieces.values(), strict=True):
            _, sequence, head, row, first, last, dealt, rounds, tiles = map(int, piece)
            item = found.setdefault((sequence, head, row), [[], 0, rounds, tiles])
            item[0] += range(first, last)
            item[1] += dealt
        assert len(found) == expected
        for seen, dealt, rounds, tiles in found.values():
            begin = min(seen, default=0)
            assert sorted(seen) == list(range(begin, begin + tiles)) and dealt == rounds
        # No block has more than two pieces that are cut: what the workspace has room for.
        cut = pieces["dealt"] < pieces["rounds"]
        assert np.bincount(pieces["block"][cut], minlength=1).max() <= 2
