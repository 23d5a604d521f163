// Rotates rows sixteen channels at a time (rotation.h). Each stage rounds an element once: products
// are with 1 and -1, so a fused one rounds as the sum does, and every ISA gives the same bits.
#pragma once

#include <initializer_list>

#include "../rotation.h"
#include "load.h"
#include "simd.h"

namespace kvq {
namespace {

constexpr int kRotateExponents = 6;  // 2^-m for head sizes up to kMaxHead

// Channels in the order of registers, or of pairs of registers: thirty-two channels' even ones,
// then their odd ones, as bf16 is widened at no cost (channels.h).
enum class ChannelOrder { kPlain, kEvenOdd };

constexpr int channel_at(int i, ChannelOrder order) {
  const int within = i % (2 * kLanes);
  const int pair = within % kLanes * 2 + within / kLanes;
  return order == ChannelOrder::kPlain ? i : i - within + pair;
}

struct RotationFactors {
  alignas(64) float of[2][kRotateExponents][kMaxHead];
};
constexpr RotationFactors make_rotation_factors() {
  RotationFactors f{};
  for (int m = 0; m < kRotateExponents; ++m) {
    const float size = 1.0f / static_cast<float>(1 << m);
    for (int i = 0; i < kMaxHead; ++i) {
      for (const ChannelOrder order : {ChannelOrder::kPlain, ChannelOrder::kEvenOdd}) {
        const uint32_t channel = static_cast<uint32_t>(channel_at(i, order));
        f.of[static_cast<int>(order)][m][i] = rotation_negates(channel) ? -size : size;
      }
    }
  }
  return f;
}
constexpr RotationFactors kRotationFactors = make_rotation_factors();
static_assert(rotation_exponent(kMaxHead) < kRotateExponents, "a row of factors for every m");

inline const float* rotation_factors(long d, ChannelOrder order = ChannelOrder::kPlain) {
  return kRotationFactors.of[static_cast<int>(order)][rotation_exponent(static_cast<int>(d))];
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

template <int kCount>
KVQ_HD void mix_between(F16 (&v)[kCount], int h) {
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
    if (i & h) continue;
    const F16 a = v[i], b = v[i + h];
    v[i] = a + b;
    v[i + h] = a - b;
  }
}

// Channels of kCount registers: strides 1 to 8 * kCount, in this order.
template <ChannelOrder kOrder, int kCount>
KVQ_HD void mix_registers(F16 (&v)[kCount]) {
  constexpr bool kPairs = kOrder == ChannelOrder::kEvenOdd;
  if constexpr (kPairs) mix_between(v, 1);
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) v[i] = mix<8>(mix<4>(mix<2>(mix<1>(v[i]))));
#pragma GCC unroll 8
  for (int h = kPairs ? 2 : 1; h < kCount; h *= 2) mix_between(v, h);
}

template <ChannelOrder kOrder, int kCount, class Source, class Sink>
KVQ_HD void mix_stretches(const Source& from, long d, const Sink& to) {
  for (long i = 0; i < d; i += kCount * kLanes) {
    F16 v[kCount];
#pragma GCC unroll 8
    for (int j = 0; j < kCount; ++j) v[j] = from(i + j * kLanes);
    mix_registers<kOrder>(v);
#pragma GCC unroll 8
    for (int j = 0; j < kCount; ++j) to(i + j * kLanes, v[j]);
  }
}

// to = H from, where from(i) gives sixteen channels, in the order that `to` gets them; `to` may be
// what it reads. done(v) sees every sixteen channels of the result once.
template <ChannelOrder kOrder, class Source, class Done>
KVQ_HD void hadamard(const Source& from, long d, float* to, const Done& done) {
  constexpr int kMost = 8;  // registers that hold a stretch; a wider one goes through memory
  const long width = rotation_width(static_cast<int>(d));
  const auto keep = [&](long i, F16 v) { save16(to + i, v); };
  const auto finish = [&](long i, F16 v) {
    keep(i, v);
    done(v);
  };
  switch (width / kLanes) {
    case 1:  // has no pairs
      return mix_stretches<ChannelOrder::kPlain, 1>(from, d, finish);
    case 2:
      return mix_stretches<kOrder, 2>(from, d, finish);
    case 4:
      return mix_stretches<kOrder, 4>(from, d, finish);
    case kMost:
      return mix_stretches<kOrder, kMost>(from, d, finish);
    default:
      mix_stretches<kOrder, kMost>(from, d, keep);
  }
  const auto mix_halves = [&](long h, const auto& out) {
    for (long start = 0; start < d; start += 2 * h) {
      for (long i = start; i < start + h; i += kLanes) {
        const F16 a = load16(to + i), b = load16(to + i + h);
        out(i, a + b);
        out(i + h, a - b);
      }
    }
  };
  long h = kMost * kLanes;
  for (; 2 * h < width; h *= 2) mix_halves(h, keep);
  mix_halves(h, finish);
}
template <class Source>
KVQ_HD void hadamard(const Source& from, long d, float* to) {
  hadamard<ChannelOrder::kPlain>(from, d, to, [](F16) {});
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
