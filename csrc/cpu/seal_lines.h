// Sealing on AVX-512 where all values are numbers within fp16: straight from the lines of the
// recent page, in which K's words have tokens in the lanes and V's have channels. The bytes are
// those of seal.h's other loops.
#pragma once

#include "affine_bytes.h"
#include "group_scales.h"
#include "quantize.h"

#if defined(__AVX512BW__)

namespace kvq {
namespace {

// The numbers of byte kByte of sixteen words, codes in offset binary.
template <int kByte>
KVQ_HD F16 code_numbers(U16 words) {
  // The byte as the last one of 2^23.
  const __m512i from = _mm512_set4_epi32(12 + kByte, 8 + kByte, 4 + kByte, kByte);
  const __m512i bits = _mm512_mask_shuffle_epi8(_mm512_set1_epi32(0x4B000000), 0x1111111111111111u,
                                                reinterpret_cast<__m512i>(words), from);
  return reinterpret_cast<F16>(bits) - (0x1p23f + 128.0f);
}

// Extremes of lanes of numbers, and of words of four codes.
template <class V>
struct Span {
  V low, high;
};

KVQ_HD Span<F16> join(Span<F16> a, Span<F16> b) {
  return {min16(a.low, b.low), max16(a.high, b.high)};
}
KVQ_HD Span<U16> join(Span<U16> a, Span<U16> b) {
  return {cast<U16>(_mm512_min_epu8(cast<__m512i>(a.low), cast<__m512i>(b.low))),
          cast<U16>(_mm512_max_epu8(cast<__m512i>(a.high), cast<__m512i>(b.high)))};
}

// Lanes l without the bit kStep of `a`, those with it of `b`; kAcross: of l ^ kStep.
template <int kStep, bool kAcross, class V, int... I>
KVQ_HD V interleave(V a, V b, IndexList<I...>) {
  constexpr int kFlip = kAcross ? kStep : 0;
  return __builtin_shuffle(a, b, I16{((I & kStep ? kLanes : 0) + (I ^ kFlip))...});
}
template <int kStep, class V>
KVQ_HD Span<V> fold(Span<V> a, Span<V> b) {
  const MakeIndices<kLanes>::type lanes{};
  return join(Span<V>{interleave<kStep, false>(a.low, b.low, lanes),
                      interleave<kStep, false>(a.high, b.high, lanes)},
              Span<V>{interleave<kStep, true>(a.low, b.low, lanes),
                      interleave<kStep, true>(a.high, b.high, lanes)});
}

// The extremes over all lanes of spans(kFirst) and on, kCount of them, in lanes of their order.
// kWidth: neighbours that stay apart.
template <int kWidth, int kCount, int kFirst = 0, class Spans>
KVQ_HD auto fold_all(const Spans& spans) {
  if constexpr (kCount == 1) {
    return spans(std::integral_constant<int, kFirst>{});
  } else {
    constexpr int kHalf = kCount / 2;
    const auto a = fold_all<kWidth, kHalf, kFirst>(spans);
    return fold<kHalf * kWidth>(a, fold_all<kWidth, kHalf, kFirst + kHalf>(spans));
  }
}

// K of a group: `lines` of its first sixteen tokens, then those of the others. Words of four
// channels' codes go to `out`, likewise, the scales' to `words`. kStream: past the caches.
template <Code C, bool kLite, bool kStream>
KVQ_HD void seal_key_lines(const uint8_t* lines, long d, const float* scale, bool starts_page,
                           uint8_t* words, U16* out) {
  constexpr int kMax = static_cast<int>(Codec<C>::kMax);
  const F16 scales[2] = {load16(scale), load16(scale + kLanes)};
  const __mmask16 heard = starts_page ? 0xFFFE : 0xFFFF;
  alignas(64) float x[2][kLanes][kLanes], inverse[kLanes], base[kLanes];
  for (long c = 0; c < d; c += kLanes) {
    const uint8_t* at = lines + c * kLanes;
    const Span<F16> s = fold_all<1, kLanes>([&](auto i) __attribute__((always_inline)) {
      const long line = i / 4 * 64;
      const F16 a = code_numbers<i % 4>(load<U16>(at + line)) * scales[0];
      const F16 b = code_numbers<i % 4>(load<U16>(at + kLanes * d + line)) * scales[1];
      save16(x[0][i], a);
      save16(x[1][i], b);
      const __m512 p = cast<__m512>(a), q = cast<__m512>(b);
      return Span<F16>{cast<F16>(_mm512_mask_min_ps(q, heard, p, q)),
                       cast<F16>(_mm512_mask_max_ps(q, heard, p, q))};
    });
    const GroupScales found = group_scales<C, kLite>(s.low, s.high, F16{});
    kLite ? save_shorts(words + c * 2, found.word) : put16<kStream>(words + c * 4, found.word);
    save16(inverse, found.inverse);
    save16(base, found.base);
#pragma GCC unroll 4
    for (int i = 0; i < kLanes; i += 4) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        __m512i codes[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          codes[j] =
              nearest_codes(load16(x[half][i + j]), splat(base[i + j]), splat(inverse[i + j]));
        }
        out[half * d / 4 + (c + i) / 4] =
            clamped_bytes<kMax>(codes[0], codes[1], codes[2], codes[3]);
      }
    }
  }
}

// V of a group, sixteen channels of four tokens a line, to lines of the sealed page.
template <Code C, bool kLite, bool kStream>
KVQ_HD void seal_value_lines(const uint8_t* lines, long d, const float* scale, uint8_t* words,
                             uint8_t* out) {
  constexpr int kMax = static_cast<int>(Codec<C>::kMax), kWord = 32 / code_bits(C);
  const long unit = kLite ? kSealed : d;
  for (long begin = 0; begin < d; begin += unit) {
    // Products with a token's scale are in the order of its codes, or in the reverse.
    Span<U16> s = fold_all<2, kSealed / 4>([&](auto quad) __attribute__((always_inline)) {
      const uint8_t* at = lines + (quad * d + begin) * 4;
      const U16 first = load<U16>(at);
      Span<U16> all{first, first};
      for (long c = kLanes; c < unit; c += kLanes) {
        const U16 line = load<U16>(at + c * 4);
        all = join(all, Span<U16>{line, line});
      }
      return all;
    });
    s = fold<1>(s, s);
    alignas(32) uint8_t low[kSealed], high[kSealed];
    _mm256_store_si256(reinterpret_cast<__m256i*>(low),
                       _mm512_cvtepi64_epi32(cast<__m512i>(s.low)));
    _mm256_store_si256(reinterpret_cast<__m256i*>(high),
                       _mm512_cvtepi64_epi32(cast<__m512i>(s.high)));
    alignas(64) float inverse[kSealed], base[kSealed];
    for (int t = 0; t < kSealed; t += kLanes) {
      const F16 factor = load16(scale + t);
      const F16 a = convert<F16>(cast<I16>(words_of(low + t)) - 128) * factor;
      const F16 b = convert<F16>(cast<I16>(words_of(high + t)) - 128) * factor;
      const GroupScales found = group_scales<C, kLite>(min16(a, b), max16(a, b), F16{});
      save16(inverse + t, found.inverse);
      save16(base + t, found.base);
      kLite ? save_shorts(words + (begin + t) * 2, found.word)
            : put16<kStream>(words + t * 4, found.word);
    }
    for (int t = 0; t < kSealed; t += kWord) {
      for (long c = begin; c < begin + unit; c += kLanes) {
        U16 word{};
#pragma GCC unroll 4
        for (int quad = 0; quad < kWord / 4; ++quad) {
          const U16 line = load<U16>(lines + ((t / 4 + quad) * d + c) * 4);
          const int at = t + quad * 4;
          const auto codes = [&](auto i) __attribute__((always_inline)) {
            return nearest_codes(code_numbers<i>(line) * scale[at + i], splat(base[at + i]),
                                 splat(inverse[at + i]));
          };
          const U16 bytes = clamped_bytes<kMax>(
              codes(std::integral_constant<int, 0>{}), codes(std::integral_constant<int, 1>{}),
              codes(std::integral_constant<int, 2>{}), codes(std::integral_constant<int, 3>{}));
          word |= bytes << (code_bits(C) * quad);
        }
        put16<kStream>(out + (t / kWord * d + c) * 4, word);
      }
    }
  }
}

}  // namespace
}  // namespace kvq
#endif
