// Rotates rows sixteen channels at a time (rotation.h). Each stage rounds an element once: products
// are with 1 and -1, so a fused one rounds as the sum does, and every ISA gives the same bits.
#pragma once

#include "../rotation.h"
#include "load.h"
#include "simd.h"

namespace kvq {
namespace {

constexpr int kRotateExponents = 6;  // 2^-m for head sizes up to kMaxHead

struct RotationFactors {
  alignas(64) float of[kRotateExponents][kMaxHead];
};
constexpr RotationFactors make_rotation_factors() {
  RotationFactors f{};
  for (int m = 0; m < kRotateExponents; ++m) {
    const float size = 1.0f / static_cast<float>(1 << m);
    for (int i = 0; i < kMaxHead; ++i) {
      f.of[m][i] = rotation_negates(static_cast<uint32_t>(i)) ? -size : size;
    }
  }
  return f;
}
constexpr RotationFactors kRotationFactors = make_rotation_factors();
static_assert(rotation_exponent(kMaxHead) < kRotateExponents, "a row of factors for every m");

inline const float* rotation_factors(long d) {
  return kRotationFactors.of[rotation_exponent(static_cast<int>(d))];
}

// Lanes i and i ^ kStep become their sum and difference.
template <int kStep, class V, int... I>
KVQ_HD V mix_lanes(V x, IndexList<I...>) {
  typedef int32_t Index __attribute__((vector_size(sizeof(V))));
  const Index other = {(I ^ kStep)...};
  const V sign = {((I & kStep) ? -1.0f : 1.0f)...};
  return fma(x, sign, __builtin_shuffle(x, other));
}
template <int kStep, class V>
KVQ_HD V mix(V x) {
  return mix_lanes<kStep>(x, typename MakeIndices<sizeof(V) / 4>::type{});
}
template <int kStep, class T>
KVQ_HD Pair<T> mix(Pair<T> x) {
  if constexpr (kStep == sizeof(T) / 4) {
    return {x.low + x.high, x.low - x.high};
  } else {
    return {mix<kStep>(x.low), mix<kStep>(x.high)};
  }
}

// Channels of one register or of kCount, whose lanes and registers are mixed: strides 1 to
// 8 * kCount.
template <int kCount>
KVQ_HD void mix_registers(F16 (&v)[kCount]) {
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) v[i] = mix<8>(mix<4>(mix<2>(mix<1>(v[i]))));
#pragma GCC unroll 8
  for (int h = 1; h < kCount; h *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      if (i & h) continue;
      const F16 a = v[i], b = v[i + h];
      v[i] = a + b;
      v[i + h] = a - b;
    }
  }
}

template <int kCount, class Source>
KVQ_HD void mix_stretches(const Source& from, long d, float* to) {
  for (long i = 0; i < d; i += kCount * kLanes) {
    F16 v[kCount];
#pragma GCC unroll 8
    for (int j = 0; j < kCount; ++j) v[j] = from(i + j * kLanes);
    mix_registers(v);
#pragma GCC unroll 8
    for (int j = 0; j < kCount; ++j) save16(to + i + j * kLanes, v[j]);
  }
}

// to = H from, where from(i) gives channels i to i + 15; `to` may be what it reads.
template <class Source>
KVQ_HD void hadamard(const Source& from, long d, float* to) {
  constexpr int kMost = 8;  // registers that hold a stretch; a wider one goes through memory
  const long width = rotation_width(static_cast<int>(d));
  switch (width / kLanes) {
    case 1:
      return mix_stretches<1>(from, d, to);
    case 2:
      return mix_stretches<2>(from, d, to);
    case 4:
      return mix_stretches<4>(from, d, to);
    default:
      mix_stretches<kMost>(from, d, to);
  }
  for (long h = kMost * kLanes; h < width; h *= 2) {
    for (long start = 0; start < d; start += 2 * h) {
      for (long i = start; i < start + h; i += kLanes) {
        const F16 a = load16(to + i), b = load16(to + i + h);
        save16(to + i, a + b);
        save16(to + i + h, a - b);
      }
    }
  }
}

// In place.
inline void rotate(float* row, long d) {
  const float* factors = rotation_factors(d);
  hadamard([&](long i) { return load16(row + i) * load16(factors + i); }, d, row);
}

// The inverse but for rotation_gain(d), which the caller has in a factor of its own.
inline void unrotate(float* row, long d) {
  const float* factors = rotation_factors(d);
  hadamard([&](long i) { return load16(row + i); }, d, row);
  for (long i = 0; i < d; i += kLanes) save16(row + i, load16(row + i) * load16(factors + i));
}

}  // namespace
}  // namespace kvq
