"""Decoding and storing, timed beside a device copy, PyTorch's attention and vLLM's.

Every measurement replays a CUDA graph of several calls, so that no launch overhead of Python is
in it, and streams more than any GPU's L2 holds. Bytes are those of the cache: a kernel's rate
divided by the copy's is what it reaches of the memory's speed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import cache as memoize
from functools import partial

import torch

from kvq_plugin.calls import Attend
from kvq_plugin.formats import KVFormat
from kvq_plugin.gpu_check import stock
from kvq_plugin.gpu_check.candidates import Candidate
from kvq_plugin.gpu_check.context import Case, Context, Refused, captured
from kvq_plugin.gpu_check.evidence import COLUMNS
from kvq_plugin.gpu_check.problems import Pool, decode, fill

#: Contexts of the sequences of a batch: one long one, an awkward number, many, and a long one among
#: short ones.
SHAPES = ([131072], [16384] * 17, [8192] * 64, [131072] + [1024] * 63)
KV_HEADS, GROUP, HEAD_SIZE, PAGE = 8, 4, 128, 16
FORMATS_TIMED = ("fp8_e4m3", "int8_per_token_head", "int4_per_token_head", "k8v4", "int4", "k3v2")
#: Tokens of a store: a step of decoding, and a chunk of prefill.
STORES = (64, 8192)
#: Sequences, new tokens of each and tokens of its context, those included: short to long queries,
#: which says from where FlashAttention is the faster way, then a prompt and a chunk of a long one.
PREFILLS = ((4, 32, 8192), (4, 128, 8192), (4, 512, 8192), (1, 2048, 2048), (1, 2048, 32768))
QUICK_SHAPES, QUICK_STORES = ([64], [64, 16]), (16,)


def microseconds(call: Callable[[], None], device, calls: int = 5, repeats: int = 15) -> float:
    """Median time of one *call* among *repeats* replays of a graph of *calls* of them; on a CPU,
    of one call."""
    if device.type == "cpu":
        begin = time.perf_counter()
        call()
        return (time.perf_counter() - begin) * 1e6

    def some() -> None:
        for _ in range(calls):
            call()

    replay = captured(some, device)
    replay()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in "be")
        begin.record()
        replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / calls)
    return statistics.median(times)


@memoize
def copy_bandwidth(device: torch.device) -> float:
    """GB/s of a device-to-device copy of 2 GB, read and written bytes together."""
    size = 1 << (31 if device.type == "cuda" else 20)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / microseconds(lambda: target.copy_(source), device) / 1e3


def _context(lengths: list[int]) -> str:
    """``8192``, or ``131072+63x1024``."""
    rest = lengths[1:]
    return str(lengths[0]) if len(set(lengths)) == 1 else f"{lengths[0]}+{len(rest)}x{rest[0]}"


def page_of(format: KVFormat) -> int:
    """PAGE, or the block that vLLM has where rows are sealed."""
    return PAGE if format.recent is None else 128


def bytes_read(pool: Pool, lengths: list[int]) -> int:
    """By a decoding step: of sealed rows before a bound, of recent ones from there on."""
    format, d = pool.format, pool.head_size
    if format.recent is None:
        return sum(lengths) * KV_HEADS * pool.cache.shape[3]
    old = sum(format.sealed_before(n - 1) for n in lengths)
    each = sum(s.code.bits * d // 8 + s.metadata_bytes(d) for s in (format.key, format.value))
    return KV_HEADS * (old * each + (sum(lengths) - old) * format.recent.bytes_per_token(d))


def _row(device, what, kernel, format, batch, context, size: int, call, page=PAGE) -> dict:
    """*call*, which moves *size* bytes of cache, timed."""
    time = microseconds(call, device)
    rate = size / time / 1e3
    shape = (batch, context, KV_HEADS, GROUP, HEAD_SIZE, page)
    values = (what, kernel, format, *shape, time, rate, rate / copy_bandwidth(device))
    return dict(zip(COLUMNS, values, strict=True))


def _attend(candidate: Candidate, context: Context, format: KVFormat, lengths: list[int]) -> dict:
    device, batch, page = context.device, len(lengths), page_of(format)
    each = [-(-n // page) for n in lengths]
    blocks = sum(each)
    pool = fill(candidate, format, HEAD_SIZE, page, blocks, KV_HEADS, device)
    problem = decode(pool, batch, max(lengths), GROUP, torch.bfloat16, ragged=False)
    # Every sequence has pages of its own, in shuffled order.
    order = torch.randperm(blocks).int().split(each)
    for s, mine in enumerate(order):
        problem.table[s, : len(mine)] = mine.to(device)
    problem.lengths.copy_(torch.tensor(lengths))
    out, scratch = torch.empty_like(problem.query), context.scratch()
    call = partial(problem.run, candidate, scratch, out)
    size, text = bytes_read(pool, lengths), _context(lengths)
    return _row(device, "attend", candidate.name, format.name, batch, text, size, call, page)


def _store(candidate: Candidate, context: Context, format: KVFormat, tokens: int) -> dict:
    device, page = context.device, page_of(format)
    blocks = -(-tokens // page)
    pool = fill(candidate, format, HEAD_SIZE, page, blocks, KV_HEADS, device)
    shape = (tokens, KV_HEADS, HEAD_SIZE)
    rows = [torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in "kv"]
    slots = torch.randperm(tokens, device=device)
    size = sum(x.numel() // (blocks * page) * tokens for x in pool.caches)
    size += sum(x.numel() * 2 for x in rows)
    call = partial(candidate.store, *rows, pool.cache, slots, format, *pool.statics,
                   **pool.storing(slots))  # fmt: skip
    return _row(device, "store", candidate.name, format.name, tokens, "", size, call, page)


def _sdpa(context: Context, batch: int, length: int) -> dict:
    like = {"device": context.device, "dtype": torch.bfloat16}
    keys, values = (torch.randn(batch, KV_HEADS, length, HEAD_SIZE, **like) for _ in "kv")
    query = torch.randn(batch, KV_HEADS * GROUP, 1, HEAD_SIZE, **like)
    attention = torch.nn.functional.scaled_dot_product_attention
    call = partial(attention, query, keys, values, enable_gqa=True)
    size, text = 4 * keys.numel(), str(length)
    return _row(context.device, "attend", "torch sdpa", "bf16", batch, text, size, call)


def _prefill(
    candidate: Candidate | None, context: Context, format: KVFormat | None, kernel: str, shape
) -> dict:
    """Through FlashAttention ("flash"), by the fused kernel ("fused"), or FlashAttention alone over
    an unquantized context in one piece (no *format*)."""
    from kvq_plugin.kernels import prefill, triton_paged

    device, (batch, new, length) = context.device, shape
    heads, text = KV_HEADS * GROUP, f"{new} of {length}"
    query = torch.randn(batch * new, heads, HEAD_SIZE, device=device, dtype=torch.bfloat16)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device) * new
    if format is None:
        keys, values = torch.randn(2, batch * length, KV_HEADS, HEAD_SIZE, device=device,
                                   dtype=torch.bfloat16)  # fmt: skip
        call = partial(prefill.flash_attention, query, keys, values, starts, starts // new * length,
                       new, length, True, HEAD_SIZE**-0.5)  # fmt: skip
        return _row(device, "prefill", "torch flash", "bf16", batch, text, 4 * keys.numel(), call)
    blocks = batch * length // PAGE
    pool = fill(candidate, format, HEAD_SIZE, PAGE, blocks, KV_HEADS, device)
    table = torch.randperm(blocks, device=device).int().view(batch, -1)
    lengths = torch.full((batch,), length, dtype=torch.int32, device=device)
    attend = {"flash": prefill, "fused": triton_paged}[kernel].attend
    asked = Attend(torch.empty_like(query), query, pool.cache, table, lengths, starts, format,
                   HEAD_SIZE**-0.5, *pool.statics, max_query_len=new, max_seq_len=length,
                   workspace=context.scratch())  # fmt: skip
    call = partial(attend, asked)
    return _row(device, "prefill", kernel, format.name, batch, text, pool.cache.numel(), call)


def _vllm(context: Context, mode: str, batch: int, length: int) -> dict:
    missing = "they need a GPU" if context.device.type == "cpu" else stock.missing()
    if missing:
        raise Refused(f"vLLM's own kernels: {missing}")
    shape = (batch, length, KV_HEADS, GROUP, HEAD_SIZE, PAGE)
    call, size = stock.decode(mode, *shape, context.device)
    return _row(context.device, "attend", "vllm triton", mode, batch, str(length), size, call)


def cases(candidate: Candidate | None, context: Context) -> Iterator[Case]:
    """All of *candidate*'s; for None, the others it is compared with."""
    shapes, stores = (QUICK_SHAPES, QUICK_STORES) if context.quick else (SHAPES, STORES)

    def copy() -> dict:
        rate = copy_bandwidth(context.device)
        return dict(zip(COLUMNS, ("copy", "torch", *[""] * 7, 0.0, rate, 1.0), strict=True))

    yield "copy", copy
    if candidate is None:
        for lengths in (s for s in shapes if len(set(s)) == 1):
            shape = len(lengths), lengths[0]
            yield f"torch sdpa {shape}", partial(_sdpa, context, *shape)
            for mode in stock.MODES:
                yield f"vllm {mode} {shape}", partial(_vllm, context, mode, *shape)
        for shape in () if context.quick else PREFILLS:
            yield f"torch prefill {shape}", partial(_prefill, None, context, None, "", shape)
        return
    formats = [f for f in context.formats if f.name in FORMATS_TIMED]
    for lengths in shapes:
        for format in formats:
            name = f"{format.name} B={len(lengths)} context {_context(lengths)}"
            yield name, partial(_attend, candidate, context, format, lengths)
    for tokens in stores:
        for format in formats:
            name = f"{format.name} store of {tokens}"
            yield name, partial(_store, candidate, context, format, tokens)
    # Through Triton whoever decodes, and so timed with it alone.
    for shape in PREFILLS if candidate.name == "triton" else ():
        for format in (f for f in formats if f.recent is None and f.name != "k8v4"):
            for kernel in ("flash", "fused"):
                name = f"{format.name} prefill {kernel} {shape}"
                yield name, partial(_prefill, candidate, context, format, kernel, shape)
