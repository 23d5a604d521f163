// The vectors that integer dot products run on: a whole line (zmm) with AVX-512 VNNI, half a line
// (ymm) with AVX-VNNI, a quarter with ARM's SDOT.
#pragma once

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__ARM_FEATURE_DOTPROD)
#define KVQ_VNNI 1

#if !defined(__aarch64__)
#include <immintrin.h>
#endif

#include "amx_tiles.h"
#include "tile.h"

namespace kvq {
namespace {

// Inlined into its callers, gcc 12 kept a loop's accumulators on the stack (1.3 to 1.5 times as
// long).
#define KVQ_APART __attribute__((noinline))

// One pass over lines serves kVnniRows rows and takes vectors(rows) vectors at once: 16
// accumulators of 32 registers, or 8 of 16.
#if defined(__aarch64__)
typedef uint8x16_t Native;
constexpr int kVnniRows = 2;
constexpr int vectors(int rows) { return rows == 1 ? 8 : 4; }
#elif defined(__AVX512VNNI__)
typedef __m512i Native;
constexpr int kVnniRows = 4;
constexpr int vectors(int /*rows*/) { return 2; }
#else
typedef __m256i Native;
constexpr int kVnniRows = 2;
constexpr int vectors(int rows) { return rows == 1 ? 4 : 2; }
#endif
// SDOT multiplies signed bytes with signed ones; the others unsigned codes with signed numbers.
constexpr bool kUnsignedCodes = sizeof(Native) > 16;
constexpr int kVector = sizeof(Native);
constexpr int kPerLine = 64 / kVector;
constexpr int kVectorLanes = kVector / 4;
// Whether lines come in two streams (Fetch). It takes passes of two lines, whatever their rows; and
// without AMX there is Zen 4, where one stream takes 0.95 to 1.03 of the time from DRAM, 0.88 and
// 0.96 for k8v4 with a kv head for each query head.
#if defined(KVQ_AMX)
constexpr bool kVnniPairs = true;
static_assert(vectors(kVnniRows) == 2 * kPerLine, "two lines at a time");
#else
constexpr bool kVnniPairs = false;
#endif

typedef int32_t Ints __attribute__((vector_size(kVector)));
typedef uint32_t Words __attribute__((vector_size(kVector)));
typedef float Floats __attribute__((vector_size(kVector)));
// Words of sixteen bits.
typedef int16_t Shorts __attribute__((vector_size(kVector)));
typedef uint16_t Halves __attribute__((vector_size(kVector)));

// Vector i of sixteen lanes; and sixteen lanes, zeros behind a vector's own.
#if defined(__aarch64__)
KVQ_HD Floats vector_of(F16 x, int i) {
  const Pair<F4> half = i < 2 ? x.low : x.high;
  return i % 2 == 0 ? half.low : half.high;
}
KVQ_HD F16 widened(Floats x) { return {{x, Floats{}}, {Floats{}, Floats{}}}; }
#elif defined(__AVX512VNNI__)
KVQ_HD Floats vector_of(F16 x, int /*i*/) { return x; }
KVQ_HD F16 widened(Floats x) { return x; }
#else
KVQ_HD Floats vector_of(F16 x, int i) { return i == 0 ? x.low : x.high; }
KVQ_HD F16 widened(Floats x) { return {x, Floats{}}; }
#endif

// 1.5 * 2^23 rounds to an integer in the mantissa.
constexpr float kRounds = 12582912.0f;

}  // namespace
}  // namespace kvq

#if defined(__aarch64__)
#include "vnni_neon.h"
#else
#include "vnni_x86.h"
#endif

#endif
