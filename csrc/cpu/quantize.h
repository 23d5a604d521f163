// Rows of K or V, on their way into a page: loaded, measured, scaled, encoded, sixteen channels at
// a time. Any ISA gives the same codes (codec.h).
#pragma once

#include "load.h"
#include "simd.h"

namespace kvq {
namespace {

constexpr int kGroup = kLanes;  // tokens whose K shares cache lines
constexpr float kAmaxFloor = 0x1p-100f;
constexpr float kHalfMax = 65504.0f;
constexpr float kFloatMax = 0x1.fffffep127f;

KVQ_HD U16 words_of(const uint16_t* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<U16>(
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__AVX2__)
  const __m128i* half = reinterpret_cast<const __m128i*>(from);
  return {reinterpret_cast<U8>(_mm256_cvtepu16_epi32(_mm_loadu_si128(half))),
          reinterpret_cast<U8>(_mm256_cvtepu16_epi32(_mm_loadu_si128(half + 1)))};
#else
  uint32_t words[kLanes];
  for (int i = 0; i < kLanes; ++i) words[i] = from[i];
  return load<U16>(words);
#endif
}

KVQ_HD U16 words_of(const uint8_t* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<U16>(
      _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(__AVX2__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return {reinterpret_cast<U8>(_mm256_cvtepu8_epi32(bytes)),
          reinterpret_cast<U8>(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)))};
#else
  uint32_t words[kLanes];
  for (int i = 0; i < kLanes; ++i) words[i] = from[i];
  return load<U16>(words);
#endif
}

// Sixteen words below 256, as bytes.
KVQ_HD void save_bytes(uint8_t* out, U16 words) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                   _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(words)));
#elif defined(__AVX2__)
  // Packing goes 128 bits by 128 bits; the permutation puts their quarters in order.
  const __m256i h =
      _mm256_permute4x64_epi64(_mm256_packus_epi32(reinterpret_cast<__m256i>(words.low),
                                                   reinterpret_cast<__m256i>(words.high)),
                               0xD8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                   _mm_packus_epi16(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1)));
#else
  for (int i = 0; i < kLanes; ++i) out[i] = static_cast<uint8_t>(words[i]);
#endif
}

// Sixteen activations from element `at` on.
template <Activation A>
KVQ_HD F16 load_lanes(const void* data, long at) {
  if constexpr (A == Activation::kFloat) return load16(static_cast<const float*>(data) + at);
  const uint16_t* from = static_cast<const uint16_t*>(data) + at;
  const U16 words = words_of(from);
  if constexpr (A == Activation::kBFloat16) return bits_as<F16>(words << 16);
  return halves(words);
}

// What the codes of one row need: value = (x - base) * inverse; metadata is the page's word.
struct RowScale {
  float inverse, base;
  uint32_t metadata;
};

// NaN becomes 0 and infinities the largest finite value. Returns whether a NaN was seen.
inline bool sanitize(float* x, long d, float limit) {
  bool nan = false;
  for (long i = 0; i < d; ++i) {
    nan |= x[i] != x[i];
    float v = x[i] == x[i] ? x[i] : 0.0f;
    v = v < -limit ? -limit : v;
    x[i] = v > limit ? limit : v;
  }
  return nan;
}

// What a row spans. Magnitudes are compared as integers, so that a NaN is the largest.
struct Extent {
  F16 low, high;
  I16 magnitude;

  KVQ_HD void add(F16 v) {
    low = min16(low, v);
    high = max16(high, v);
    const I16 m = bits_as<I16>(v) & 0x7FFFFFFF;
    magnitude = select(m > magnitude, m, magnitude);
  }
};

template <Code C>
constexpr bool kAffine = C == Code::kInt4;

// Scale of one token and head, from what its row spans. Rows with a NaN or beyond the format's
// range are made finite first.
template <Code C>
KVQ_HD RowScale measure(Extent e, float* x, long d) {
  constexpr float kLimit = kAffine<C> ? kHalfMax : kFloatMax;
  bool poison = false;
  if (largest(e.magnitude) > static_cast<int32_t>(float_bits(kLimit))) {
    poison = sanitize(x, d, kLimit);
    e = {load16(x), load16(x), I16{}};
    for (long i = 0; i < d; i += kLanes) e.add(load16(x + i));
  }
  if constexpr (kAffine<C>) {
    // Adding 0: -0 would depend on the order of the reduction.
    const float low = -peak16(-e.low)[0] + 0.0f, high = peak16(e.high)[0] + 0.0f;
    const uint16_t scale = float_to_half((high - low) * (1.0f / Codec<C>::kMax));
    const uint16_t minimum = float_to_half(low);
    const float wide = half_to_float(scale);
    return {wide > 0.0f ? 1.0f / wide : 0.0f, half_to_float(minimum),
            poison ? 0x7E007E00u : scale | static_cast<uint32_t>(minimum) << 16};
  } else {
    const float peak = bits_float(static_cast<uint32_t>(largest(e.magnitude)));
    const float amax = peak < kAmaxFloor ? kAmaxFloor : peak;
    return {Codec<C>::kMax / amax, 0.0f,
            poison ? 0x7FC00000u : float_bits(amax * (1.0f / Codec<C>::kMax))};
  }
}

// One row to fp32; its scale, if it has one of its own.
template <Activation A, Code C, bool kPerToken>
KVQ_HD void load_scaled(const Rows& rows, long token, long head, long d, float* x,
                        RowScale& scale) {
  const long at = token * rows.token_stride + head * rows.head_stride;
  const F16 first = load_lanes<A>(rows.data, at);
  Extent e{first, first, I16{}};
  for (long i = 0; i < d; i += kLanes) {
    const F16 v = load_lanes<A>(rows.data, at + i);
    if constexpr (kPerToken) e.add(v);
    save16(x + i, v);
  }
  if constexpr (kPerToken) scale = measure<C>(e, x, d);
}

// Codes of sixteen channels, one a lane.
template <Code C, bool kPerToken>
KVQ_HD U16 encode_lanes(const float* x, long i, const RowScale& row, const StaticScale& channels) {
  F16 y = load16(x + i);
  if constexpr (kPerToken) {
    if constexpr (kAffine<C>) y -= row.base;
    y *= row.inverse;
    // At most 127 and half an ulp: no clamp needed.
    if constexpr (C == Code::kInt8) return bits_as<U16>(y + 12582912.0f) - (0x4B400000u - 128u);
  } else {
    y *= load16(channels.factor + i);
    if (channels.zero_point != nullptr) {
      // Round before adding the zero point, so that it does not move ties.
      constexpr float kLimit = 4 * Codec<C>::kMax;
      const I16 whole = bits_as<I16>(round_clamped<F16, U16>(y, -kLimit, kLimit));
      y = convert<F16>(whole) + load16(channels.zero_point + i);
    }
  }
  return Codec<C>::template encode<F16, U16>(y);
}

// Every eight codes become a word, channels 4 to 7 in the high nibbles. In place is fine.
inline void pack_nibbles(const uint8_t* codes, long n, uint32_t* words) {
  for (long i = 0; i < n / 8; ++i) {
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
