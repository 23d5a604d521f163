// fp16 numbers, as pages keep them, and other words of 16 bits, in vectors.
#pragma once

#include "simd.h"

namespace kvq {
namespace {

// Sixteen words of 16 bits, from any address.
KVQ_HD U16 load_words(const void* at) {
#if defined(__AVX512F__)
  return reinterpret_cast<U16>(
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(at))));
#elif defined(__AVX2__)
  const __m128i* from = static_cast<const __m128i*>(at);
  return {reinterpret_cast<U8>(_mm256_cvtepu16_epi32(_mm_loadu_si128(from))),
          reinterpret_cast<U8>(_mm256_cvtepu16_epi32(_mm_loadu_si128(from + 1)))};
#else
  uint16_t narrow[kLanes];
  memcpy(narrow, at, sizeof narrow);
  uint32_t words[kLanes];
  for (int i = 0; i < kLanes; ++i) words[i] = narrow[i];
  return load<U16>(words);
#endif
}

// The low halves of sixteen words, fp16, as fp32.
KVQ_HD F16 halves(U16 words) {
#if defined(__AVX512F__)
  const __m256i h = _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(words));
  return reinterpret_cast<F16>(_mm512_cvtph_ps(h));
#elif defined(__AVX2__)
  // Packing takes 4 words of either half in turn; the permutation sorts that out.
  const U16 low = words & 0xFFFFu;
  const __m256i h = _mm256_permute4x64_epi64(
      _mm256_packus_epi32(reinterpret_cast<__m256i>(low.low), reinterpret_cast<__m256i>(low.high)),
      0xD8);
  return {reinterpret_cast<F8>(_mm256_cvtph_ps(_mm256_castsi256_si128(h))),
          reinterpret_cast<F8>(_mm256_cvtph_ps(_mm256_extracti128_si256(h, 1)))};
#elif defined(__aarch64__)
  const auto four = [](U4 w) { return F4(vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32(w)))); };
  return {{four(words.low.low), four(words.low.high)},
          {four(words.high.low), four(words.high.high)}};
#else
  alignas(64) float x[16];
  for (int i = 0; i < 16; ++i) x[i] = half_to_float(static_cast<uint16_t>(words[i]));
  return load16(x);
#endif
}

// Thirty-two words of two fp16 each, the low ones apart from the high ones. With AVX-512 they stay
// fp16 until they are asked for, and the largest low one, none below 0, is a maximum of integers:
// NaN above all.
#if defined(__AVX512F__)
struct HalfPlaces {
  alignas(64) int16_t low[32], high[32];
  constexpr HalfPlaces() : low(), high() {
    for (int i = 0; i < 32; ++i) {
      low[i] = static_cast<int16_t>(2 * i);
      high[i] = static_cast<int16_t>(2 * i + 1);
    }
  }
};

struct WordHalves {
  __m512i low, high;

  static KVQ_HD WordHalves split(__m512i first, __m512i second) {
    static constexpr HalfPlaces kPlaces;
    return {_mm512_permutex2var_epi16(first, _mm512_load_si512(kPlaces.low), second),
            _mm512_permutex2var_epi16(first, _mm512_load_si512(kPlaces.high), second)};
  }
  static KVQ_HD F16 widen(__m256i halves) { return reinterpret_cast<F16>(_mm512_cvtph_ps(halves)); }
  // Sixteen of them, the first or the last.
  template <int I>
  static KVQ_HD F16 widen(__m512i halves) {
    return widen(I == 0 ? _mm512_castsi512_si256(halves) : _mm512_extracti64x4_epi64(halves, 1));
  }
  static KVQ_HD float largest(__m512i x) {
    const __m256i a = _mm256_max_epu16(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
    const __m128i b = _mm_max_epu16(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    const __m128i ones = _mm_set1_epi32(-1);
    const __m128i most = _mm_xor_si128(_mm_minpos_epu16(_mm_xor_si128(b, ones)), ones);
    return _mm_cvtss_f32(_mm_cvtph_ps(most));
  }
};
#endif

// The reverse of halves(), rounded to nearest even.
KVQ_HD U16 half_bits(F16 x) {
#if defined(__AVX512F__)
  const __m256i h = _mm512_cvtps_ph(reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT);
  return reinterpret_cast<U16>(_mm512_cvtepu16_epi32(h));
#elif defined(__aarch64__)
  const auto four = [](F4 y) { return U4(vmovl_u16(vreinterpret_u16_f16(vcvt_f16_f32(y)))); };
  return {{four(x.low.low), four(x.low.high)}, {four(x.high.low), four(x.high.high)}};
#else
  alignas(64) uint32_t words[16];
  for (int i = 0; i < 16; ++i) words[i] = float_to_half(x[i]);
  return load<U16>(words);
#endif
}

}  // namespace
}  // namespace kvq
