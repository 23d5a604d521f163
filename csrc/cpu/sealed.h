// What sealed rows (formats with recent rows) hold beside their codes, and the codes of K as
// operands of a dot product: shared by dot_fp32.h and dot_folded.h.
#pragma once

#include "halves.h"
#include "tile.h"

namespace kvq {
namespace {

// Sixteen int8 codes in offset binary.
KVQ_HD F16 load_bytes(const uint8_t* at) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
  return convert<F16>(reinterpret_cast<I16>(_mm512_cvtepu8_epi32(bytes)) - 128);
#else
  alignas(64) int32_t words[kLanes];
  for (int i = 0; i < kLanes; ++i) words[i] = at[i] - 128;
  return convert<F16>(load<I16>(words));
#endif
}

// Sixteen scales and mins, from item `i` of a group on: value = code * scale + min.
struct GroupScale {
  F16 scale, minimum;
};

// Lite: the scale is the top byte of a positive fp16, the min a multiple of kStep scales, exactly.
KVQ_HD GroupScale lite_scale(U16 words) {
  const F16 scale = halves((words & 0xFFu) << 7);
  const I16 steps = cast<I16>(words << 16) >> 24;
  return {scale, convert<F16>(steps) * (scale * LiteScale::kStep)};
}

// Past the largest finite scale, 0xF7: a NaN row's, or stale bytes.
KVQ_HD U16 is_no_scale(U16 words) { return ((words & 0xFFu) + 8u) & 0x100u; }

template <Grouping G>
KVQ_HD GroupScale group_scale(const uint8_t* metadata, long i) {
  if constexpr (G == Grouping::kChannel) {
    const U16 w = load<U16>(metadata + i * 4);
    return {halves(w), halves(w >> 16)};
  } else {
    const U16 w = load_words(metadata + i * 2);
    GroupScale s = lite_scale(w);
    if constexpr (G == Grouping::kTokenLite) {
      // Tokens share sums with others, so what is no number is left to the softmax, which adds it
      // to the rows that see the token.
      const auto good = cast<I16>(is_no_scale(w)) == 0;
      s = {select(good, s.scale, F16{}), select(good, s.minimum, F16{})};
    }
    return s;
  }
}

// A group's scales as arrays: what every row multiplies with.
struct GroupScales {
  alignas(64) float scale[kMaxHead], minimum[kMaxHead];

  template <Grouping G>
  KVQ_HD void load(const uint8_t* metadata, long n) {
    for (long i = 0; i < n; i += kLanes) {
      const GroupScale s = group_scale<G>(metadata, i);
      save16(scale + i, s.scale);
      save16(minimum + i, s.minimum);
    }
  }
};

// Channels whose codes of sixteen tokens a step of a loop over K reads, the lines it reads for
// them, and where those lie. Four channels are an operand: a byte each, the first one's lowest.
template <Code C>
struct KeyStep;

template <>
struct KeyStep<Code::kInt4> {
  static constexpr int kChannels = 8, kLines = 1;
  static KVQ_HD long line(int /*i*/, long step, long /*d*/) { return step * 64; }
  template <int P, class V>
  static KVQ_HD V operand(const V (&line)[kLines]) {
    return (P == 0 ? line[0] : line[0] >> 4) & 0x0F0F0F0F;
  }
};

// Two lines of the codes' two low bits, and one of their high bits, which lie behind all of those.
template <>
struct KeyStep<Code::kInt3> {
  static constexpr int kChannels = 32, kLines = 3;
  static KVQ_HD long line(int i, long step, long d) {
    return i < 2 ? (2 * step + i) * 64 : 4 * d + step * 64;
  }
  template <int P, class V>
  static KVQ_HD V operand(const V (&line)[kLines]) {
    const V low = (line[P / 4] >> (2 * (P % 4))) & 0x03030303;
    const V high = (P < 2 ? line[2] << ((2 - P) & 3) : line[2] >> ((P - 2) & 7)) & 0x04040404;
    return low | high;
  }
};

// A sequence's first row as pages keep it: int8 codes of K, those of V, their scales.
struct FirstRow {
  const uint8_t* codes;
  long d;

  float scale(int which) const {
    float x;
    memcpy(&x, codes + 2 * d + which * 4, 4);
    return x;
  }
  float score(const float* q) const {
    F16 sum{};
    for (long i = 0; i < d; i += kLanes) sum = fma(load_bytes(codes + i), load16(q + i), sum);
    return reduce_add(sum) * scale(0);
  }
  void values(float* to) const {
    for (long i = 0; i < d; i += kLanes) save16(to + i, load_bytes(codes + d + i) * scale(1));
  }
};

}  // namespace
}  // namespace kvq
