// Rows of K or V, on their way into a page: measured, scaled, encoded. Any ISA gives the same codes
// (codec.h).
#pragma once

#include "channels.h"
#include "rotate.h"

namespace kvq {
namespace {

constexpr float kAmaxFloor = 0x1p-100f;
constexpr float kHalfMax = 65504.0f;
constexpr float kFloatMax = 0x1.fffffep127f;

template <Code C>
constexpr bool kAffine = C == Code::kInt4;

// A row's extremes: the bits of its largest magnitude, where a NaN is larger than any number, and
// for affine codes its smallest and largest value.
struct Extremes {
  uint32_t peak;
  float low, high;
};

// A row's extremes lane by lane, while its channels go by.
template <Code C>
struct LaneExtremes {
  F16 low = splat(__builtin_inff()), high = splat(-__builtin_inff());
  I16 peak{};

  KVQ_HD void see(F16 v) {
    const I16 m = bits_as<I16>(v) & 0x7FFFFFFF;
    peak = select(m > peak, m, peak);
    if constexpr (kAffine<C>) {
      low = min16(low, v);
      high = max16(high, v);
    }
  }
  KVQ_HD Extremes of_row() const {
    Extremes s{static_cast<uint32_t>(largest(peak)), 0.0f, 0.0f};
    if constexpr (kAffine<C>) {
      s.low = -peak16(-low)[0];
      s.high = peak16(high)[0];
    }
    return s;
  }
};

// The same of a rotated row: one operation a lane finds what is no finite number.
template <Code C>
struct RotatedExtremes {
  F16 low = splat(__builtin_inff()), high = splat(-__builtin_inff()), odd{};

  KVQ_HD void see(F16 v) {
    low = min16(low, v);
    high = max16(high, v);
    odd = fma(v, F16{}, odd);
  }
  KVQ_HD Extremes of_row() const {
    const float least = -peak16(-low)[0], most = peak16(high)[0];
    const uint32_t a = float_bits(least) & 0x7FFFFFFFu, b = float_bits(most) & 0x7FFFFFFFu;
    return {any_nan(odd) ? 0x7FC00000u : a > b ? a : b, least, most};
  }
};

template <Activation A, Code C>
KVQ_HD Extremes extremes_of_lanes(const void* data, long at, long d) {
  LaneExtremes<C> lanes;
  for (long i = 0; i < d; i += kLanes) lanes.see(load_lanes<A>(data, at + i));
  return lanes.of_row();
}

#if defined(__AVX512BW__)
KVQ_HD uint32_t smallest_u16(__m512i v) {
  const __m256i half = _mm256_min_epu16(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
  const __m128i all =
      _mm_min_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  return static_cast<uint32_t>(_mm_extract_epi16(_mm_minpos_epu16(all), 0));
}

// bf16 is ordered as its bits are, once negative numbers' are turned round; 32 at a time. With
// offset binary (^ 0x8000) the order is that of unsigned integers.
template <Code C>
KVQ_HD Extremes extremes_of_bf16(const uint16_t* row, long d) {
  const __m512i all = _mm512_set1_epi16(-1), magnitude = _mm512_set1_epi16(0x7FFF);
  __m512i low = all, inverted_high = all;
  for (long i = 0; i < d; i += 2 * kLanes) {
    const bool whole = d - i > kLanes;  // half a register: twice the same, which moves nothing
    const __m512i x =
        whole
            ? _mm512_loadu_si512(row + i)
            : _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + i)));
    if constexpr (kAffine<C>) {
      // x >= 0: 0x8000 | x; else ~x.
      const __m512i ordered = _mm512_xor_si512(
          x, _mm512_or_si512(_mm512_srai_epi16(x, 15), _mm512_set1_epi16(-0x8000)));
      low = _mm512_min_epu16(low, ordered);
      inverted_high = _mm512_min_epu16(inverted_high, _mm512_xor_si512(ordered, all));
    } else {
      inverted_high = _mm512_min_epu16(inverted_high, _mm512_andnot_si512(x, magnitude));
    }
  }
  if constexpr (kAffine<C>) {
    const auto value = [](uint32_t ordered) {
      return ((ordered & 0x8000u ? ordered ^ 0x8000u : ~ordered) & 0xFFFFu) << 16;
    };
    const uint32_t least = value(smallest_u16(low)),
                   most = value(~smallest_u16(inverted_high) & 0xFFFFu);
    const uint32_t a = least & 0x7FFFFFFFu, b = most & 0x7FFFFFFFu;
    return {a > b ? a : b, bits_float(least), bits_float(most)};
  }
  return {(smallest_u16(inverted_high) ^ 0x7FFFu) << 16, 0.0f, 0.0f};
}
#endif

template <Activation A, Code C>
KVQ_HD Extremes extremes_of(const void* data, long at, long d) {
#if defined(__AVX512BW__)
  if constexpr (A == Activation::kBFloat16) {
    return extremes_of_bf16<C>(static_cast<const uint16_t*>(data) + at, d);
  }
#endif
  return extremes_of_lanes<A, C>(data, at, d);
}

// What the codes of one row need: value = (x - base) * inverse.
struct RowScale {
  float inverse, base;
};

// The same for up to sixteen rows, one a lane, with their extremes before and the page's words
// after.
struct RowScales {
  alignas(64) uint32_t peak[kLanes], metadata[kLanes];
  alignas(64) float low[kLanes], high[kLanes], inverse[kLanes], base[kLanes];

  RowScale operator[](int row) const { return {inverse[row], base[row]}; }
};

// Scales of rows from their extremes. Rows at a time, because one row's is a chain of a reduction,
// a division and a broadcast that takes longer than encoding it.
template <Code C>
KVQ_HD void find_scales(RowScales& s) {
  if constexpr (kAffine<C>) {
    // Adding 0: whether a -0 is found would depend on the order of looking.
    const F16 low = load16(s.low) + 0.0f, high = load16(s.high) + 0.0f;
    const U16 scale = half_bits((high - low) * (1.0f / Codec<C>::kMax)), minimum = half_bits(low);
    const F16 wide = halves(scale);
    save16(s.inverse, select(wide > 0.0f, 1.0f / wide, F16{}));
    save16(s.base, halves(minimum));
    save(s.metadata, scale | minimum << 16);
  } else {
    const F16 amax = max16(bits_as<F16>(load<U16>(s.peak)), splat(kAmaxFloor));
    save16(s.inverse, Codec<C>::kMax / amax);
    save16(s.base, F16{});
    save(s.metadata, bits_as<U16>(amax * (1.0f / Codec<C>::kMax)));
  }
}

// Codes of sixteen channels, one a lane.
template <Code C, bool kPerToken>
KVQ_HD U16 encode_lanes(F16 x, const RowScale& row, F16 factor, F16 zero_point, bool moved) {
  F16 y = x;
  if constexpr (kPerToken) {
    if constexpr (kAffine<C>) y -= row.base;
    y *= row.inverse;
  } else {
    y *= factor;
    if (moved) {
      // Round before adding the zero point, so that it does not move ties.
      constexpr float kLimit = 4 * Codec<C>::kMax;
      const I16 whole = bits_as<I16>(round_clamped<F16, U16>(y, -kLimit, kLimit));
      y = convert<F16>(whole) + zero_point;
    }
  }
  return Codec<C>::template encode<F16, U16, kPerToken>(y);
}

template <Activation A, Code C, bool kPerToken>
KVQ_HD void encode_values(const void* data, long at, long d, const RowScale& row,
                          const StaticScale& channels, uint8_t* codes) {
  const bool moved = !kPerToken && channels.zero_point != nullptr;
  long i = 0;
  for (; i + 2 * kLanes <= d; i += 2 * kLanes) {
    using T = Channels32<A>;
    const T x = T::load(data, at + i);
    T factor{}, zero{};
    if constexpr (!kPerToken) factor = T::of_channels(channels.factor + i);
    if (moved) zero = T::of_channels(channels.zero_point + i);
    const U16 a = encode_lanes<C, kPerToken>(x.first, row, factor.first, zero.first, moved);
    const U16 b = encode_lanes<C, kPerToken>(x.second, row, factor.second, zero.second, moved);
    T::save_codes(codes + i, a, b);
  }
  if (i == d) return;
  F16 factor{}, zero{};
  if constexpr (!kPerToken) factor = load16(channels.factor + i);
  if (moved) zero = load16(channels.zero_point + i);
  const F16 x = load_lanes<A>(data, at + i);
  save_bytes(codes + i, encode_lanes<C, kPerToken>(x, row, factor, zero, moved));
}

// How a rotated row of activations lies on its way to its codes.
template <Activation A>
KVQ_HD ChannelOrder rotated_order(long d) {
  const bool paired = Channels32<A>::kEvenOdd && rotation_width(static_cast<int>(d)) > kLanes;
  return paired ? ChannelOrder::kEvenOdd : ChannelOrder::kPlain;
}

// A row as it is encoded, where the stream is rotated; its extremes on the way. (8 heads of 128,
// 2,048 tokens: 0.93 ms with the row in plain order and its extremes from a second reading.)
template <Activation A, Code C>
KVQ_HD Extremes rotate_row(const void* data, long at, long d, float* to) {
  RotatedExtremes<C> lanes;
  const auto see = [&](F16 v) { lanes.see(v); };
  if constexpr (Channels32<A>::kEvenOdd) {
    if (rotated_order<A>(d) == ChannelOrder::kEvenOdd) {
      const float* factors = rotation_factors(d, ChannelOrder::kEvenOdd);
      const auto from = [&](long i) {
        const U16 raw = load<U16>(static_cast<const uint16_t*>(data) + at + i / 32 * 32);
        const U16 wide = i & kLanes ? raw & 0xFFFF0000u : raw << 16;
        return bits_as<F16>(wide) * load16(factors + i);
      };
      hadamard<ChannelOrder::kEvenOdd>(from, d, to, see);
      return lanes.of_row();
    }
  }
  const float* factors = rotation_factors(d);
  const auto from = [&](long i) { return load_lanes<A>(data, at + i) * load16(factors + i); };
  hadamard<ChannelOrder::kPlain>(from, d, to, see);
  return lanes.of_row();
}

// The codes of what rotate_row left.
template <Activation A, Code C>
KVQ_HD void encode_rotated(const float* row, long d, const RowScale& scale, uint8_t* codes) {
  if (rotated_order<A>(d) == ChannelOrder::kPlain) {
    return encode_values<Activation::kFloat, C, true>(row, 0, d, scale, {}, codes);
  }
  for (long i = 0; i < d; i += 2 * kLanes) {
    const auto codes_at = [&](long j) {
      return encode_lanes<C, true>(load16(row + j), scale, F16{}, F16{}, false);
    };
    const U16 even = codes_at(i), odd = codes_at(i + kLanes);
    Channels32<A>::save_codes(codes + i, even, odd);
  }
}

template <Code C>
constexpr float kRowLimit = kAffine<C> ? kHalfMax : kFloatMax;

// Rows whose largest magnitude is above are encoded with care. An element that is not finite, or
// beyond kRotationLimit, leaves its rotated row at least one beyond kRotationLimit / 32.
template <Code C, bool kRotated>
constexpr float kInRangeLimit =
    kRotated && kRotationLimit / 32 < kRowLimit<C> ? kRotationLimit / 32 : kRowLimit<C>;

// A row with a NaN, which becomes 0 and poisons the scale, or beyond the format's range, which
// becomes its largest value. Returns the metadata word.
template <Activation A, Code C, bool kRotated>
__attribute__((noinline, cold)) uint32_t encode_out_of_range_row(const void* data, long at, long d,
                                                                 uint8_t* codes) {
  alignas(64) float x[kMaxHead];
  for (long i = 0; i < d; i += kLanes) save16(x + i, load_lanes<A>(data, at + i));
  if constexpr (kRotated) {
    for (long i = 0; i < d; ++i) {
      x[i] = x[i] < -kRotationLimit ? -kRotationLimit : x[i];
      x[i] = x[i] > kRotationLimit ? kRotationLimit : x[i];
    }
    rotate(x, d);
  }
  bool poison = false;
  for (long i = 0; i < d; ++i) {
    constexpr float kLimit = kRowLimit<C>;
    poison |= x[i] != x[i];
    float v = x[i] == x[i] ? x[i] : 0.0f;
    v = v < -kLimit ? -kLimit : v;
    x[i] = v > kLimit ? kLimit : v;
  }
  const Extremes extremes = extremes_of<Activation::kFloat, C>(x, 0, d);
  RowScales s{};
  s.peak[0] = extremes.peak;
  s.low[0] = extremes.low;
  s.high[0] = extremes.high;
  find_scales<C>(s);
  encode_values<Activation::kFloat, C, true>(x, 0, d, s[0], {}, codes);
  return !poison ? s.metadata[0] : kAffine<C> ? 0x7E007E00u : 0x7FC00000u;
}

// Every eight codes become a word, channels 4 to 7 in the high nibbles. In place is fine.
inline void pack_nibbles(const uint8_t* codes, long n, uint32_t* words) {
  long i = 0;
#if defined(__AVX512F__)
  for (; i + 8 <= n / 8; i += 8) {
    const __m512i eights = _mm512_loadu_si512(codes + i * 8);
    const __m512i packed = _mm512_or_si512(eights, _mm512_srli_epi64(eights, 28));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(words + i), _mm512_cvtepi64_epi32(packed));
  }
#endif
  for (; i < n / 8; ++i) {
    uint64_t eight;
    memcpy(&eight, codes + i * 8, 8);
    words[i] = static_cast<uint32_t>(eight | eight >> 28);
  }
}

template <Code C>
constexpr int field_shift(int f) {
  return 8 * (f % 4) + code_bits(C) * (f / 4);
}

// Words of sixteen channels whose fields [from, to) are the codes of tokens, D apart.
template <Code C>
KVQ_HD U16 fields(const uint8_t* codes, long d, int from, int to) {
  U16 words{};
  for (int f = from; f < to; ++f) {
    words |= words_of(codes + f * d) << field_shift<C>(f);
  }
  return words;
}

}  // namespace
}  // namespace kvq
