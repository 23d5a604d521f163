"""csrc/codec.h alone, compiled with the host compiler: every code, those no CPU format uses too.

Nothing else reaches the e4m3fnuz codec (ROCm) from a CPU, and the decoders and 16-bit casts are
only seen through attention elsewhere; here each runs on every input it has.
"""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from cases import name_of

from kvq_plugin.formats import CODES, Kind

CSRC = Path(__file__).parent.parent / "csrc"
FLOAT_CODES = tuple(c for c in CODES.values() if c.kind is Kind.FLOAT)
INTEGER_CODES = tuple(c for c in CODES.values() if c.kind is not Kind.FLOAT)

SOURCE = """
#include "codec.h"
#define EXPORT extern "C" __attribute__((visibility("default")))
template <kvq::Code C> void encode(const float* x, uint8_t* y, long n) {
  for (long i = 0; i < n; ++i) y[i] = kvq::encode<C>(x[i]);
}
template <kvq::Code C> void decode(const uint8_t* x, float* y, long n) {
  for (long i = 0; i < n; ++i) y[i] = kvq::Codec<C>::decode(x[i]);
}
using Encode = void (*)(const float*, uint8_t*, long);
using Decode = void (*)(const uint8_t*, float*, long);
EXPORT void encode_code(int code, const float* x, uint8_t* y, long n) {
  static const Encode table[] = {encode<kvq::Code(0)>, encode<kvq::Code(1)>, encode<kvq::Code(2)>,
                                 encode<kvq::Code(3)>, encode<kvq::Code(4)>, encode<kvq::Code(5)>,
                                 encode<kvq::Code(6)>};
  table[code](x, y, n);
}
EXPORT void decode_code(int code, const uint8_t* x, float* y, long n) {
  static const Decode table[] = {decode<kvq::Code(0)>, decode<kvq::Code(1)>, decode<kvq::Code(2)>,
                                 decode<kvq::Code(3)>, decode<kvq::Code(4)>, decode<kvq::Code(5)>,
                                 decode<kvq::Code(6)>};
  table[code](x, y, n);
}
EXPORT void from_half(const uint16_t* x, float* y, long n) {
  for (long i = 0; i < n; ++i) y[i] = kvq::half_to_float(x[i]);
}
EXPORT void to_half(const float* x, uint16_t* y, long n) {
  for (long i = 0; i < n; ++i) y[i] = kvq::float_to_half(x[i]);
}
EXPORT void to_bf16(const float* x, uint16_t* y, long n) {
  for (long i = 0; i < n; ++i) y[i] = kvq::float_to_bf16(x[i]);
}
"""


@pytest.fixture(scope="module", params=("-O1", "-O3 -march=native"))
def library(request, tmp_path_factory):
    """The header as a shared library: unvectorized, and as the compiler vectorizes it here."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler (the compiled kernels were built elsewhere)")
    folder = tmp_path_factory.mktemp("codec")
    (folder / "codec.cpp").write_text(SOURCE)
    target = folder / "codec.so"
    flags = [*request.param.split(), "-std=c++17", "-ffp-contract=off", "-fPIC", "-shared"]
    command = [compiler, *flags, f"-I{CSRC}", str(folder / "codec.cpp"), "-o", str(target)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return ctypes.CDLL(str(target))


def call(function, x: np.ndarray, out_type, *leading) -> np.ndarray:
    x = np.ascontiguousarray(x)
    out = np.empty(x.shape, out_type)
    function(*leading, ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(out.ctypes.data),
             ctypes.c_long(x.size))  # fmt: skip
    return out


def sweep() -> np.ndarray:
    """fp32: every bf16 and fp16 value, and every 4,099th of all 2**32 bit patterns."""
    values = [oracle.all_inputs(t).float().numpy() for t in (torch.bfloat16, torch.float16)]
    patterns = np.arange(0, 2**32, 4099, dtype=np.uint64).astype(np.uint32)
    return np.concatenate([*values, patterns.view(np.float32)])


@pytest.mark.parametrize("code", FLOAT_CODES, ids=name_of)
def test_float8_encode(library, code):
    x = sweep()
    got = call(library.encode_code, x, np.uint8, code.id)
    assert np.array_equal(got, oracle.float8_encode(x, code.name))
    clamped = torch.from_numpy(x).clamp(-code.qmax, code.qmax)
    by_torch = clamped.to(getattr(torch, code.torch_dtype)).view(torch.uint8).numpy()
    assert np.array_equal(got, by_torch)


@pytest.mark.parametrize("code", FLOAT_CODES, ids=name_of)
def test_float8_decode(library, code):
    got = call(library.decode_code, np.arange(256, dtype=np.uint8), np.float32, code.id)
    expected = oracle.float8_values(code.name)
    assert np.array_equal(got.astype(np.float64), expected, equal_nan=True)
    number = ~np.isnan(expected)
    assert np.array_equal(np.signbit(got)[number], np.signbit(expected)[number])


@pytest.mark.parametrize("code", INTEGER_CODES, ids=name_of)
def test_integer_encode_and_decode(library, code):
    x = np.concatenate([sweep(), np.arange(-600, 600, dtype=np.float32) / 4])
    low, offset = (-127, 128) if code.kind is Kind.SIGNED else (0, 0)
    want = np.rint(np.nan_to_num(x, nan=0.0, posinf=1e9, neginf=-1e9)).clip(low, code.qmax)
    fields = call(library.encode_code, x, np.uint8, code.id)
    assert np.array_equal(fields, (want + offset).astype(np.uint8))
    assert np.array_equal(call(library.decode_code, fields, np.float32, code.id), want)


def test_half_casts(library):
    half = np.arange(65536, dtype=np.uint32).astype(np.uint16)
    got = call(library.from_half, half, np.float32)
    assert np.array_equal(got, half.view(np.float16).astype(np.float32), equal_nan=True)
    x = sweep()
    with np.errstate(over="ignore", invalid="ignore"):
        want = x.astype(np.float16)
    back = call(library.to_half, x, np.uint16)
    number = ~np.isnan(x)
    assert np.array_equal(back[number], want.view(np.uint16)[number])
    assert (back[~number] == 0x7E00).all()


def test_bf16_cast(library):
    x = sweep()
    got = torch.from_numpy(call(library.to_bf16, x, np.uint16).view(np.int16)).view(torch.bfloat16)
    want = torch.from_numpy(x).bfloat16()
    assert torch.equal(got.isnan(), want.isnan())
    number = ~want.isnan()
    assert torch.equal(got[number].view(torch.int16), want[number].view(torch.int16))
