"""Every shape, dtype and tolerance of the kernel tests, in one place, with its reason.

Three tolerances are kept apart (codes, arithmetic, quantization):

1. *Codes and scales* written by a kernel equal the reference bit for bit: no tolerance.
2. *Attention* is compared with the float64 reference on the same codes. Two bounds apply:
   ``attention_oracle.attention_bound`` (worst case, element by element, from the constants
   below) and ``nrmse_bound`` (root mean square over a whole batch, which catches a systematic
   loss such as a dropped limb that the worst case would still admit).
3. *Quantization error* on N(0, 1) stays under ``KVFormat.max_error``, 1.0 x, no slack.
"""

from __future__ import annotations

import os
from contextlib import nullcontext

import torch

from kvq_plugin.formats import FORMATS, LOWBIT, Granularity, Kind, KVFormat, Stream

#: One entry per row of the table, aliases dropped.
ROWS = tuple({f.id: f for f in FORMATS.values()}.values())
#: Rows that kernels know and vLLM is not offered yet: those that store like the rows above, and
#: those with recent rows (``test_sealed.py``).
PLAIN_ROWS = (*ROWS, *(f for f in LOWBIT.values() if f.recent is None))
WINDOW_ROWS = tuple(f for f in LOWBIT.values() if f.recent is not None)
ALL_ROWS = (*PLAIN_ROWS, *WINDOW_ROWS)
STATIC_ROWS = tuple(f for f in ROWS if not f.is_dynamic)
DYNAMIC_ROWS = tuple(f for f in ROWS if f.is_dynamic)
SIGNED_STATIC_ROWS = tuple(f for f in STATIC_ROWS if f.key.code.kind is Kind.SIGNED)
FLOAT_STATIC_ROWS = tuple(f for f in STATIC_ROWS if f.key.code.kind is Kind.FLOAT)
GRANULARITIES = (Granularity.TENSOR, Granularity.HEAD, Granularity.CHANNEL)

ACTIVATIONS = (torch.bfloat16, torch.float16, torch.float32)

#: Head sizes stock CPU_ATTN accepts (vLLM 0.32 ``CPUAttentionBackend.get_supported_head_sizes``).
HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
BLOCK_SIZES = (16, 32, 64, 128)
#: Odd counts on either side of a 4-byte word, a 16-lane line and two lines.
TOKENS = (1, 3, 7, 17, 33)
#: Query heads per kv head; 7 and 3 leave a partial tile, 16 is where stock falls off a cliff.
GROUPS = (1, 2, 3, 4, 7, 8, 16)

#: (sequence length, query length) of each sequence of a batch.
BATCHES = {
    "decode": ((1, 1), (15, 1), (16, 1), (17, 1), (63, 1), (64, 1), (65, 1), (1000, 1)),
    "prefill": ((1, 1), (17, 17), (64, 64), (33, 33)),
    "chunked": ((100, 7), (257, 64), (65, 33), (70, 2), (80, 3), (64, 16)),
    "mixed": ((40, 40), (1000, 1), (130, 5), (17, 1), (64, 63)),
    "speculative": ((200, 4), (77, 4), (5, 4), (1000, 6)),
    "empty": ((20, 0), (33, 1), (0, 0), (12, 12), (50, 0)),
}
#: Small batch for the wide products of head sizes and group sizes.
SMALL_BATCH = ((65, 1), (40, 9), (16, 16))
#: One sequence long enough that a kernel must split it over threads to use them.
LONG_CONTEXT = 20_000

# --- Attention tolerance ---------------------------------------------------------------------
# Kernels hold q and p either as two 8-bit limbs relative to the largest element of the query row
# (of the 128-token tile for p), or as a pair of bf16. Two signed limbs q = s * (256 hi + lo) reach
# |256 hi + lo| <= 127 * 256 + 127 = 32,639, so rounding costs at most s / 2 = max|q| / 65,278 =
# 2**-15.99 of the maximum; a bf16 pair keeps 16 bits, 2**-17 of the element. 2**-15.5 covers
# both with the scale and the log2(e) factor rounded to fp32 on top.
LIMB = 2.0**-15.5
# Against 4-bit codes they may be integers up to 1,919 (csrc/cpu/nibbles.h): 2**-11.9. Errors
# multiply the code's distance from 7.5 then, half of what this bound takes: the code itself.
NIBBLE = 2.0**-11.75


def limb(stream: Stream) -> float:
    """Rounding of what multiplies a stream's codes, relative to its largest element."""
    return NIBBLE if is_nibble(stream) else LIMB


def is_nibble(stream: Stream) -> bool:
    return stream.code.kind is Kind.AFFINE and stream.code.bits == 4


#: Relative error of everything in fp32 that is not a limb: a degree-4 exp2 (4e-6 = 2**-18 at
#: most), sums over up to 20,000 tokens held in at least 16 lanes (1,250 * 2**-24 = 2**-13.7 in
#: the worst case, 2**-19 as a random walk), and the final division.
FP32_SLACK = 2.0**-14

#: Half a unit in the last place of the output, relative; and absolute for fp16's subnormals.
OUTPUT_ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
OUTPUT_FLOOR = {torch.bfloat16: 1e-38, torch.float16: 2.0**-25, torch.float32: 1e-38}

# RMS error over RMS output for N(0, 1) data. Rounding to a p-bit significand costs at most
# 2**-p / sqrt(3) RMS: 2.3e-3 for bf16, 2.8e-4 for fp16. The limbs add, as independent uniform
# errors: q 2**-16 * max|q| / sqrt(3) = 2.6e-5 (max|q| = 3) and p at most
# 2**-16 * sqrt(128 / 3) = 1e-4 (one token of a 128-token tile dominates, which those of N(0, 1)
# do not); 1e-4 is about their sum. A single 8-bit limb would cost 3e-3 and fail every fp32 and
# fp16 case.
LIMB_NRMSE = 1e-4
# Affine codes are unsigned: kernels multiply the limbs with c in [0, 15], whose RMS is
# sqrt(7.5**2 + (1 / 0.35)**2) * 0.35 = 2.8 times that of the N(0, 1) row it stands for (range
# 5.3 = 15 steps of 0.35), and the limb errors grow with it.
OPERAND_GAIN = {Kind.FLOAT: 1.0, Kind.SIGNED: 1.0, Kind.AFFINE: 2.8}
# As integers up to 1,919, taken at the middle of the codes (gain 1): q 2**-11.9 * 3 / sqrt(3) =
# 4.5e-4, p at most 2**-11.9 * sqrt(128 / 3) = 1.7e-3, for the same reason half of that here.
NIBBLE_NRMSE = 1.5e-3


# Signed codes are stored as code + 128, and a kernel may add 128 * scale * sum(p) to the output and
# take it away again in fp32. That leaves a rounding of up to 2**-22 of it however small the output
# is, which shows where V cancels: long flat contexts, zero rows. Scales here are at most
# 2 * 4 / 127 = 0.063 (oracle.static_scale), so 128 * scale is at most 8.
OFFSET_SLACK = {Kind.FLOAT: 0.0, Kind.SIGNED: 8 * 2.0**-22, Kind.AFFINE: 0.0}


def weight_rounding(format: KVFormat, dtype: torch.dtype) -> float:
    """Relative rounding of a softmax weight where a kernel may keep it in one bf16: for a bf16
    output and 8-bit floats whose tokens have no scales."""
    single = format.value.code.kind is Kind.FLOAT and not format.value.is_dynamic
    return 2.0**-8 if single and dtype == torch.bfloat16 else 0.0


def nrmse_bound(format: KVFormat, dtype: torch.dtype) -> float:
    """Largest RMS error over RMS output of one attention call on N(0, 1) data.

    Rounded weights move the output by their rounding times ``sqrt(sum (p v)^2)``, which for V of
    zero mean is the output's own root mean square.
    """
    streams = format.key, format.value
    limbs = LIMB_NRMSE * max(OPERAND_GAIN[s.code.kind] for s in streams)
    if any(map(is_nibble, streams)):
        limbs = NIBBLE_NRMSE
    rounding = OUTPUT_ROUNDING[dtype] + weight_rounding(format, dtype)
    return limbs + rounding / 3**0.5


#: The float64 reference against an independent dense float64 implementation: both read codes
#: decoded in fp32 (one rounding of code * scale), then differ by summation order alone.
REFERENCE_RTOL = 1e-5

# --- Instruction sets --------------------------------------------------------------------------


def instruction_sets() -> list[str]:
    """Every instruction set this CPU can run, best first; "reference" under KVQ_KERNELS."""
    if os.environ.get("KVQ_KERNELS") == "reference":
        return ["reference"]
    from kvq_plugin import _native

    return list(_native.supported_isas())


ISAS = instruction_sets()

#: AMX's kernels with its instructions emulated: what a machine without AMX runs of them. It is
#: no instruction set of its own, and only attention differs from ``avx512_bf16``.
ATTEND_ISAS = [*ISAS, *(["amx_emulated"] if "avx512_bf16" in ISAS else [])]


def use_isa(isa: str):
    """Context manager that runs the compiled ops with *isa*'s function table."""
    if isa == "reference":
        return nullcontext()
    from kvq_plugin import _native

    return _native.use_isa(isa)


def name_of(item) -> str:
    """Test id of a format, granularity, dtype or shape."""
    if isinstance(item, torch.dtype):
        return str(item).removeprefix("torch.")
    if isinstance(item, Granularity):
        return item.value
    return str(getattr(item, "name", item))
