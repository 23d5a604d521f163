// The scales of sealed codes: what a group's values are encoded with, and the words a page keeps.
#pragma once

#include "quantize.h"

namespace kvq {
namespace {

constexpr uint32_t kHalfNans = 0x7E007E00u;

// Sixteen words below 65536, as 16-bit words.
KVQ_HD void save_shorts(uint8_t* out, U16 words) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                      _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(words)));
#else
  alignas(64) uint32_t wide[kLanes];
  save(wide, words);
  uint16_t narrow[kLanes];
  for (int i = 0; i < kLanes; ++i) narrow[i] = static_cast<uint16_t>(wide[i]);
  memcpy(out, narrow, sizeof narrow);
#endif
}

// What sixteen groups of values, one a lane, have in common: from their extremes, and NaN in
// `poison` where one of them was. `word`: the page's; lite ones in the low half.
struct GroupScales {
  F16 inverse, base;
  U16 word;
};

template <Code C, bool kLite>
KVQ_HD GroupScales group_scales(F16 low, F16 high, F16 poison) {
  low = low + 0.0f;  // whether a -0 is found would depend on the order of looking
  const F16 step = (high + 0.0f - low) * (1.0f / Codec<C>::kMax);
  GroupScales s;
  if constexpr (kLite) {
    const F16 least = abs16(low) * (1.0f / LiteScale::kRange);
    const U16 byte = LiteScale::encode<F16, U16>(max16(least, step));
    const F16 scale = halves(byte << 7);
    s.inverse = select(scale > 0.0f, 1.0f / scale, F16{});
    const F16 wanted = low * s.inverse * (1.0f / LiteScale::kStep);
    const U16 steps = round_clamped<F16, U16, true>(wanted, -128.0f, 127.0f);
    s.base = convert<F16>(cast<I16>(steps)) * (scale * LiteScale::kStep);
    s.word = select(poison == poison, byte | (steps & 0xFFu) << 8, U16{} + LiteScale::kNan);
  } else {
    const U16 scale = half_bits(step), minimum = half_bits(low);
    const F16 wide = halves(scale);
    s.inverse = select(wide > 0.0f, 1.0f / wide, F16{});
    s.base = halves(minimum);
    s.word = select(poison == poison, scale | minimum << 16, U16{} + kHalfNans);
  }
  return s;
}

}  // namespace
}  // namespace kvq
