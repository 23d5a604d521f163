// Channels of a row, sixteen or thirty-two at a time: from activations, and to bytes.
#pragma once

#include "halves.h"
#include "load.h"

namespace kvq {
namespace {

// Sixteen bytes as words.
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
  const U16 words = load_words(static_cast<const uint16_t*>(data) + at);
  if constexpr (A == Activation::kBFloat16) return bits_as<F16>(words << 16);
  return halves(words);
}

// Thirty-two channels at a time, in two registers. A register of bf16 is widened by a shift and a
// mask, which leaves the even channels in one and the odd ones in the other.
template <Activation A>
struct Channels32 {
#if defined(__AVX512F__)
  static constexpr bool kEvenOdd = A == Activation::kBFloat16;
#else
  static constexpr bool kEvenOdd = false;
#endif
  F16 first, second;

  static KVQ_HD Channels32 load(const void* data, long at) {
    if constexpr (kEvenOdd) {
      const U16 raw = kvq::load<U16>(static_cast<const uint16_t*>(data) + at);
      return {bits_as<F16>(raw << 16), bits_as<F16>(raw & 0xFFFF0000u)};
    }
    return {load_lanes<A>(data, at), load_lanes<A>(data, at + kLanes)};
  }
  // What belongs to the same channels, fp32.
  static KVQ_HD Channels32 of_channels(const float* from) {
    const F16 low = load16(from), high = load16(from + kLanes);
#if defined(__AVX512F__)
    if constexpr (kEvenOdd) {
      const I16 even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
      return {__builtin_shuffle(low, high, even), __builtin_shuffle(low, high, even + 1)};
    }
#endif
    return {low, high};
  }
  static KVQ_HD void save_codes(uint8_t* out, U16 a, U16 b) {
#if defined(__AVX512F__)
    if constexpr (kEvenOdd) {
      const __m512i words = reinterpret_cast<__m512i>(a | b << 8);
      return _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16(words));
    }
#endif
    save_bytes(out, a);
    save_bytes(out + kLanes, b);
  }
};

}  // namespace
}  // namespace kvq
