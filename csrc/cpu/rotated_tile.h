// Sixteen tokens of one kv head, rotated, to codes with a scale each, on AVX-512: tokens are the
// lanes, so that only the turning round shuffles: neither butterflies nor extremes do, and K's
// words are what they come to. (A row at a time: 43 ns a row of 128 from L1.)
#pragma once

#include "affine_bytes.h"
#include "quantize.h"
#include "transpose.h"

namespace kvq {
namespace {

constexpr long kWidestTile = 256;  // channels

// Whether rows of `d` activations have tiles.
template <Activation A>
constexpr bool has_tile(long d) {
#if defined(__AVX512BW__)
  return A != Activation::kFloat && (d == 64 || d == 128 || d == kWidestTile);
#else
  return d < 0;
#endif
}

#if defined(__AVX512BW__)

// Rows on their way: [channel][token].
struct Tile {
  alignas(64) float at[kWidestTile][kLanes];
};

// Words are two channels. Times its factor either is exact: 16-bit floats times 2^-m, m <= 5.
template <Activation A>
KVQ_HD void mix_words(U16 words, const float* factors, F16& sum, F16& difference) {
  F16 a, b;
  if constexpr (A == Activation::kBFloat16) {
    a = bits_as<F16>(words << 16);
    b = bits_as<F16>(words & 0xFFFF0000u);
  } else {
    a = halves(words);
    b = halves(words >> 16);
  }
  b = b * factors[1];
  const F16 factor = splat(factors[0]);
  sum = fma(a, factor, b);
  difference = cast<F16>(_mm512_fmsub_ps(cast<__m512>(a), cast<__m512>(factor), cast<__m512>(b)));
}

template <int kFrom, int kCount>
KVQ_HD void mix_vectors(F16 (&v)[kCount]) {
#pragma GCC unroll 4
  for (int h = kFrom; h < kCount; h *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) {
      if (i & h) continue;
      const F16 a = v[i], b = v[i + h];
      v[i] = a + b;
      v[i + h] = a - b;
    }
  }
}

// The larger magnitude, or infinity or NaN where one is.
KVQ_HD __m512i larger_magnitude(F16 a, F16 b) {
  return _mm512_castps_si512(_mm512_range_ps(cast<__m512>(a), cast<__m512>(b), 0b1011));
}

// Rows of 16 * kCount channels, their extremes to `s`. Of a sum and a difference, both are NaN if
// one of what they are of is; if it takes two infinities, only one: no NaN is overlooked. `ahead`:
// rows that are read next.
template <Activation A, Code C, int kCount>
KVQ_HD void rotate_tile(const uint16_t* rows, long stride, const uint16_t* ahead, Tile& to,
                        RowScales& s) {
  constexpr long d = kCount * kLanes;
  using Indices = MakeIndices<kSide>::type;
  const float* factors = rotation_factors(d);
  for (long c = 0; c < d; c += 2 * kLanes) {
    Side words[kSide];
#pragma GCC unroll 16
    for (int t = 0; t < kSide; ++t) {
      memcpy(&words[t], rows + t * stride + c, sizeof(Side));
      __builtin_prefetch(ahead + t * stride + c, 0, 3);
    }
    swap_step<1>(words, Indices{});
    swap_step<2>(words, Indices{});
    swap_step<4>(words, Indices{});
    swap_step<8>(words, Indices{});
#pragma GCC unroll 2
    for (int half = 0; half < kSide; half += kSide / 2) {
      F16 v[kLanes];
#pragma GCC unroll 8
      for (int w = 0; w < kSide / 2; ++w) {
        mix_words<A>(words[half + w], factors + c + 2 * (half + w), v[2 * w], v[2 * w + 1]);
      }
      mix_vectors<2>(v);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) save16(to.at[c + 2 * half + i], v[i]);
    }
  }
  __m512i peak = _mm512_setzero_si512();
  F16 low = splat(__builtin_inff()), high = splat(-__builtin_inff());
  for (int i = 0; i < kLanes; ++i) {
    F16 v[kCount];
#pragma GCC unroll 16
    for (int j = 0; j < kCount; ++j) v[j] = load16(to.at[j * kLanes + i]);
    mix_vectors<1>(v);
#pragma GCC unroll 16
    for (int j = 0; j < kCount; ++j) save16(to.at[j * kLanes + i], v[j]);
#pragma GCC unroll 8
    for (int j = 0; j < kCount / 2; ++j) {
      peak = _mm512_max_epu32(peak, larger_magnitude(v[j], v[j + kCount / 2]));
    }
    if constexpr (kAffine<C>) {
#pragma GCC unroll 16
      for (int j = 0; j < kCount; ++j) low = min16(low, v[j]), high = max16(high, v[j]);
    }
  }
  save(s.peak, cast<U16>(peak));
  if constexpr (kAffine<C>) save16(s.low, low), save16(s.high, high);
}

// int8 codes, in offset binary, as the lowest bytes of words of 0x4B4000..: the offset goes into
// what rounds, and is even, so that ties stay ties.
KVQ_HD __m512i rounded_codes(const float* x, F16 inverse) {
  return cast<__m512i>(load16(x) * inverse + (12582912.0f + 128.0f));
}

// Of four channels, or eight of 4 bits: words of each token.
template <Code C>
KVQ_HD U16 token_words(const float (*x)[kLanes], F16 inverse, F16 base) {
  if constexpr (kAffine<C>) {
    const U16 low = clamped_bytes<15>(
        nearest_codes(load16(x[0]), base, inverse), nearest_codes(load16(x[1]), base, inverse),
        nearest_codes(load16(x[2]), base, inverse), nearest_codes(load16(x[3]), base, inverse));
    const U16 high = clamped_bytes<15>(
        nearest_codes(load16(x[4]), base, inverse), nearest_codes(load16(x[5]), base, inverse),
        nearest_codes(load16(x[6]), base, inverse), nearest_codes(load16(x[7]), base, inverse));
    return low | high << 4;
  } else {
    const __m512i lowest = _mm512_set4_epi32(0x0C0C0C0C, 0x08080808, 0x04040404, 0);
    __m512i words = rounded_codes(x[0], inverse);
    words =
        _mm512_mask_shuffle_epi8(words, 0x2222222222222222u, rounded_codes(x[1], inverse), lowest);
    words =
        _mm512_mask_shuffle_epi8(words, 0x4444444444444444u, rounded_codes(x[2], inverse), lowest);
    words =
        _mm512_mask_shuffle_epi8(words, 0x8888888888888888u, rounded_codes(x[3], inverse), lowest);
    return cast<U16>(words);
  }
}

// Four channels' words of tokens 0 to 3, then of 4 to 7 and so on, a code a byte.
template <Code C>
KVQ_HD __m512i channel_words(const float (*x)[kLanes], F16 inverse, F16 base) {
  if constexpr (kAffine<C>) {
    return packed_bytes<15>(
        nearest_codes(load16(x[0]), base, inverse), nearest_codes(load16(x[1]), base, inverse),
        nearest_codes(load16(x[2]), base, inverse), nearest_codes(load16(x[3]), base, inverse));
  } else {
    const __m512i lowest = _mm512_set1_epi32(0x0C080400);
    __m512i words = _mm512_shuffle_epi8(rounded_codes(x[0], inverse), lowest);
    words =
        _mm512_mask_shuffle_epi8(words, 0x00F000F000F000F0u, rounded_codes(x[1], inverse), lowest);
    words =
        _mm512_mask_shuffle_epi8(words, 0x0F000F000F000F00u, rounded_codes(x[2], inverse), lowest);
    return _mm512_mask_shuffle_epi8(words, 0xF000F000F000F000u, rounded_codes(x[3], inverse),
                                    lowest);
  }
}

// Into lines of sixteen tokens.
template <Code C, bool kStream>
KVQ_HD void save_key_tile(const Tile& from, long d, F16 inverse, F16 base, uint8_t* out) {
  constexpr int kWord = 32 / code_bits(C);
  for (long c = 0; c < d; c += kWord, out += 64) {
    put16<kStream>(out, token_words<C>(from.at + c, inverse, base));
  }
}

// Into lines of sixteen channels.
template <Code C, bool kStream>
KVQ_HD void save_value_tile(const Tile& from, long d, F16 inverse, F16 base, uint8_t* out) {
  for (long c = 0; c < d; c += kLanes, out += 64) {
    __m512i four[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) four[i] = channel_words<C>(from.at + c + 4 * i, inverse, base);
    const __m512i a = _mm512_shuffle_i32x4(four[0], four[1], 0x44);
    const __m512i b = _mm512_shuffle_i32x4(four[2], four[3], 0x44);
    const __m512i e = _mm512_shuffle_i32x4(four[0], four[1], 0xEE);
    const __m512i f = _mm512_shuffle_i32x4(four[2], four[3], 0xEE);
    const U16 lines[4] = {
        cast<U16>(_mm512_shuffle_i32x4(a, b, 0x88)), cast<U16>(_mm512_shuffle_i32x4(a, b, 0xDD)),
        cast<U16>(_mm512_shuffle_i32x4(e, f, 0x88)), cast<U16>(_mm512_shuffle_i32x4(e, f, 0xDD))};
    if constexpr (kAffine<C>) {
      put16<kStream>(out, lines[0] | lines[1] << 4);
      put16<kStream>(out + d * 4, lines[2] | lines[3] << 4);
    } else {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) put16<kStream>(out + i * d * 4, lines[i]);
    }
  }
}

// Sixteen rows to codes and scales; false, and nothing written, where one must be encoded with
// care.
template <Activation A, Code C, bool kValue, bool kStream>
bool encode_tile(const uint16_t* rows, long stride, const uint16_t* ahead, long d, uint8_t* codes,
                 uint8_t* scales) {
  Tile tile;
  RowScales s;
  if (d == 64) {
    rotate_tile<A, C, 4>(rows, stride, ahead, tile, s);
  } else if (d == 128) {
    rotate_tile<A, C, 8>(rows, stride, ahead, tile, s);
  } else {
    rotate_tile<A, C, 16>(rows, stride, ahead, tile, s);
  }
  const __m512i limit = _mm512_set1_epi32(float_bits(kInRangeLimit<C, true>));
  if (_mm512_cmpgt_epu32_mask(_mm512_load_si512(s.peak), limit) != 0) return false;
  find_scales<C>(s);
  const F16 inverse = load16(s.inverse), base = load16(s.base);
  kValue ? save_value_tile<C, kStream>(tile, d, inverse, base, codes)
         : save_key_tile<C, kStream>(tile, d, inverse, base, codes);
  memcpy(scales, s.metadata, sizeof s.metadata);
  return true;
}

#else

template <Activation A, Code C, bool kValue, bool kStream>
bool encode_tile(const uint16_t*, long, const uint16_t*, long, uint8_t*, uint8_t*) {
  return false;
}

#endif

}  // namespace
}  // namespace kvq
