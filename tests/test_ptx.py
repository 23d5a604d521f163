"""NVIDIA's decoders without an NVIDIA GPU: their PTX run on a model of the few instructions used,
over every byte, against the definition of each code."""

import re

import numpy as np
import oracle
import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from kvq_plugin.formats import FP8_E4M3, FP8_E5M2, INT4, INT8, Code, Kind
from kvq_plugin.kernels import codec

U32 = np.uint32


def prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Byte i of the result is byte ``selector.nibble[i]`` of ``b:a``."""
    pool = [(x >> U32(8 * i)) & U32(0xFF) for x in (a, b) for i in range(4)]
    nibbles = [int(selector.flat[0]) >> (4 * i) & 0xF for i in range(4)]
    assert all(n < 8 for n in nibbles), "sign replication is not modelled"
    return sum((pool[n].astype(U32) << U32(8 * i) for i, n in enumerate(nibbles)), U32(0))


def pairs(operation):
    """An operation on fp16 pairs, rounded to nearest even as numpy does."""

    def run(a, b):
        halves = [np.ascontiguousarray(x).view(np.float16) for x in (a, b)]
        with np.errstate(invalid="ignore"):
            return operation(*halves).astype(np.float16).view(U32)

    return run


INSTRUCTIONS = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "add.u32": lambda a, b: a + b,
    "shr.b32": lambda a, b: a >> b,
    "shl.b32": lambda a, b: a << b,
    "prmt.b32": prmt,
    "sub.f16x2": pairs(np.subtract),
    "mul.f16x2": pairs(np.multiply),
}


def run(program: str, words: np.ndarray, more: np.ndarray | None = None) -> np.ndarray:
    """fp16 ``[words, 4]`` that an inline assembly with operands "=r,=r,r" gives for *words*, or
    with operands "=r,=r,r,r" for *words* and *more*."""
    registers = {"$2": words.astype(U32), "$3": more}
    for line in program.strip().strip("{}").split(";"):
        line = line.strip()
        if not line or line.startswith(".reg"):
            continue
        name, _, operands = line.partition(" ")
        target, *sources = [o.strip() for o in operands.split(",")]
        values = [
            np.full_like(words, int(o, 0), dtype=U32) if re.match(r"\d", o) else registers[o]
            for o in sources
        ]
        registers[target] = INSTRUCTIONS[name](*values)
    out = [np.ascontiguousarray(registers[r]).view(np.float16).reshape(-1, 2) for r in ("$0", "$1")]
    return np.concatenate(out, 1)


def value(code: Code, byte: np.ndarray, high: bool) -> np.ndarray:
    if code.bits == 4:
        return (byte >> 4 if high else byte & 15).astype(np.float64)
    if code.kind is Kind.SIGNED:
        return byte.astype(np.float64) - 128
    return oracle.float8_values(code.name)[byte]


@pytest.mark.parametrize(
    ("program", "code", "high", "center"),
    (
        ("INT8", INT8, False, 0),
        ("INT4_LOW", INT4, False, 0),
        ("INT4_HIGH", INT4, True, 0),
        ("INT4_LOW_CENTERED", INT4, False, 8),
        ("INT4_HIGH_CENTERED", INT4, True, 8),
        ("E5M2", FP8_E5M2, False, 0),
        ("E4M3_SM80", FP8_E4M3, False, 0),
    ),
)
def test_decoder_over_every_byte(program, code, high, center):
    """Each byte in each of the four places, among random others."""
    g = np.random.default_rng(0)
    bytes_ = g.integers(0, 256, (4, 256, 4)).astype(np.uint8)
    for place in range(4):
        bytes_[place, :, place] = np.arange(256)
    bytes_ = bytes_.reshape(-1, 4)
    got = run(getattr(codec, f"_{program}_PTX").value, bytes_.view(U32).reshape(-1))
    expected = value(code, bytes_.astype(np.int64), high) - center
    assert np.array_equal(got.astype(np.float64), expected, equal_nan=True)


@pytest.mark.parametrize("planes", (1, 2))
@pytest.mark.parametrize("field", range(4))
def test_fields_of_two_bits_and_their_third_over_every_byte(field, planes):
    g = np.random.default_rng(field)
    low = np.arange(256, dtype=np.uint8).repeat(4)[g.permutation(1024)]
    third = g.integers(0, 256, 1024).astype(np.uint8)
    got = run(codec.field_ptx(field, planes), low.view(U32), third.view(U32))
    expected = low >> 2 * field & 3
    if planes == 2:
        expected |= (third >> field & 1) << 2
    assert np.array_equal(got.reshape(-1).astype(np.float64), expected)


def test_the_model_notices_a_wrong_program():
    wrong = codec._INT8_PTX.value.replace("0x64806480", "0x64816480")
    assert run(wrong, np.zeros(1, U32)).tolist() == [[-128.0, -129.0, -128.0, -129.0]]


def test_programs_use_registers_they_declare():
    """ptxas would say so too, on a machine that compiles them (test_triton_compile.py)."""
    programs = {name: x.value for name, x in vars(codec).items() if name.endswith("_PTX")}
    programs |= {f"field of {n}": codec.field_ptx(1, n) for n in (1, 2)}
    for name, text in programs.items():
        declared = set(re.findall(r"\w+", " ".join(re.findall(r"\.b(?:32|16) (.*?);", text))))
        used = set(re.findall(r"\b[a-z]+[01]?\b", re.sub(r"\b[\w]+(\.[\w]+)+", "", text)))
        assert used - declared <= {"reg", "b32", "b16"}, name
