// Scales and mins of K's groups, as folding takes them: words of 16 bits, and fp32.
#pragma once

#include "sealed.h"
#include "vnni.h"

#if defined(KVQ_VNNI)

namespace kvq {
namespace {

// Words for 64 numbers, or a vector's worth, that are integers in their mantissas: of every kVector
// of them a vector with N::place(i, false) at place i, then one with N::place(i, true).
#if defined(__AVX512F__)
template <class N>
struct WordOrder {
  alignas(64) int16_t first[32], second[32];  // in two vectors of words: channels 0, 16, 1, 17, ...
  constexpr WordOrder() : first(), second() {
    for (int i = 0; i < 32; ++i) {
      first[i] = at(N::place(i, false));
      second[i] = at(N::place(i, true));
    }
  }
  static constexpr int16_t at(int channel) {
    const int vector = channel / 16;
    return static_cast<int16_t>(channel % 16 * 2 + vector % 2 + vector / 2 * 32);
  }
};

// rounded(i): the numbers from i on.
template <class N, class Rounded>
KVQ_HD void save_words(long n, int16_t* to, const Rounded& rounded) {
  static constexpr WordOrder<N> kOrder;
  const Native first = _mm512_load_si512(kOrder.first), second = _mm512_load_si512(kOrder.second);
  for (long i = 0; i < n; i += 64) {
    Ints w[4];
    unroll<4>([&](auto v) KVQ_UNROLLED { w[v] = reinterpret_cast<Ints>(rounded(i + v * kLanes)); });
    const Native low = reinterpret_cast<Native>(low_halves(w[0], w[1]));
    const Native high = reinterpret_cast<Native>(low_halves(w[2], w[3]));
    _mm512_store_si512(to + i, _mm512_permutex2var_epi16(low, first, high));
    _mm512_store_si512(to + i + 32, _mm512_permutex2var_epi16(low, second, high));
  }
}
#elif defined(__aarch64__)
template <class N>
struct WordOrder {
  alignas(16) uint8_t first[16], second[16];  // in words of channels 0, 4, 1, 5, ..., 8, 12, ...
  constexpr WordOrder() : first(), second() {
    for (int i = 0; i < 16; ++i) {
      first[i] = at(N::place(i / 2, false), i % 2);
      second[i] = at(N::place(i / 2, true), i % 2);
    }
  }
  static constexpr uint8_t at(int channel, int byte) {
    return static_cast<uint8_t>((channel / 8 * 8 + channel % 4 * 2 + channel / 4 % 2) * 2 + byte);
  }
};

template <class N, class Rounded>
KVQ_HD void save_words(long n, int16_t* to, const Rounded& rounded) {
  static constexpr WordOrder<N> kOrder;
  const uint8x16_t first = vld1q_u8(kOrder.first), second = vld1q_u8(kOrder.second);
  for (long i = 0; i < n; i += kVector) {
    Ints w[4];
    unroll<4>([&](auto v) KVQ_UNROLLED { w[v] = Ints(rounded(i + v * kVectorLanes)); });
    const uint8x16x2_t words = {{Native(low_halves(w[0], w[1])), Native(low_halves(w[2], w[3]))}};
    save(to + i, vqtbl2q_u8(words, first));
    save(to + i + kVector / 2, vqtbl2q_u8(words, second));
  }
}
#else
template <class N, class Rounded>
KVQ_HD void save_words(long n, int16_t* to, const Rounded& rounded) {
  constexpr int kHalf = kVector / 2;
  for (long i = 0; i < n; i += kVector) {
    alignas(64) uint32_t bits[kVector];
    for (int v = 0; v < kVector; v += kVectorLanes) save(bits + v, rounded(i + v));
    for (int j = 0; j < kHalf; ++j) {
      to[i + j] = static_cast<int16_t>(bits[N::place(j, false)]);
      to[i + kHalf + j] = static_cast<int16_t>(bits[N::place(j, true)]);
    }
  }
}
#endif

// A group's scales of K: the largest, and all as fractions of it, in words; and its mins. With
// AVX-512 what is fp16 stays fp16 until it is multiplied: half the stores, and the largest is a
// maximum of integers (0.66 of the time).
#if defined(__AVX512F__)
template <Grouping G, class N>
struct KeyScales {
  static constexpr float kOne = N::kOne;
  static constexpr bool kHalves = G == Grouping::kChannel;

  float most;
  alignas(64) int16_t scale[kMaxHead];
  alignas(64) uint16_t raw[kMaxHead];  // scales in fp16
  alignas(64) std::conditional_t<kHalves, uint16_t, float> mins[kMaxHead];

  static KVQ_HD F16 halves_at(const uint16_t* at) {
    return WordHalves::widen(_mm256_load_si256(reinterpret_cast<const __m256i*>(at)));
  }
  // What codes N::kMiddle stand for.
  KVQ_HD F16 middle(long i) const {
    F16 x;
    if constexpr (kHalves) {
      x = halves_at(mins + i);
    } else {
      x = load16(mins + i);
    }
    if constexpr (N::kMiddle != 0.0f) x = fma(halves_at(raw + i), splat(N::kMiddle), x);
    return x;
  }

  KVQ_HD void load(const uint8_t* metadata, const uint8_t* next, long d) {
    __m512i peak = _mm512_setzero_si512();
    for (long i = 0; i < d; i += 32) {
      const bool whole = i + 32 <= d;
      __m512i scales;
      if constexpr (kHalves) {
        const __m512i first = _mm512_loadu_si512(metadata + i * 4);
        const __m512i second =
            whole ? _mm512_loadu_si512(metadata + i * 4 + 64) : _mm512_setzero_si512();
        const WordHalves both = WordHalves::split(first, second);
        scales = both.low;
        _mm512_store_si512(mins + i, both.high);
        // As early as can be, and evenly.
        prefetch_behind(scales, next + i * 4);
        if (whole) prefetch(next + i * 4 + 64);
      } else {
        const __m512i words = _mm512_maskz_loadu_epi16(whole ? ~0u : 0xFFFFu, metadata + i * 2);
        scales = _mm512_slli_epi16(_mm512_and_si512(words, _mm512_set1_epi16(0xFF)), 7);
        prefetch_behind(scales, next + i * 2);
        const __m512i steps = _mm512_srai_epi16(words, 8);
        unroll<2>([&](auto half) KVQ_UNROLLED {
          const __m256i n = _mm512_extracti64x4_epi64(steps, decltype(half)::value);
          const F16 count = convert<F16>(reinterpret_cast<I16>(_mm512_cvtepi16_epi32(n)));
          const F16 step = WordHalves::widen<decltype(half)::value>(scales) * LiteScale::kStep;
          save16(mins + i + half * kLanes, count * step);
        });
      }
      _mm512_store_si512(raw + i, scales);
      peak = _mm512_max_epu16(peak, scales);
    }
    const long n = (d + 63) / 64 * 64;
    for (long i = (d + 31) / 32 * 32; i < n; i += 32) {
      _mm512_store_si512(raw + i, _mm512_setzero_si512());
    }
    most = WordHalves::largest(peak);
    const F16 factor = splat(most > 0.0f ? kOne / most : 0.0f);
    save_words<N>(n, scale, [&](long i) KVQ_UNROLLED {
      return fma(halves_at(raw + i), factor, splat(kRounds));
    });
  }
};
#else
template <Grouping G, class N>
struct KeyScales {
  static constexpr float kOne = N::kOne;

  float most;
  alignas(64) int16_t scale[kMaxHead];
  alignas(64) float mins[kMaxHead];

  alignas(64) float raw[kMaxHead];

  KVQ_HD F16 middle(long i) const {
    F16 x = load16(mins + i);
    if constexpr (N::kMiddle != 0.0f) x = fma(load16(raw + i), splat(N::kMiddle), x);
    return x;
  }

  KVQ_HD void load(const uint8_t* metadata, const uint8_t* next, long d) {
    F16 peak{};
    for (long i = 0; i < d; i += kLanes) {
      GroupScale s = group_scale<G>(metadata, i);
      // As early as can be, and evenly.
      prefetch_behind(s.scale, next + i * (G == Grouping::kChannel ? 4 : 2));
      save16(raw + i, s.scale);
      save16(mins + i, s.minimum);
      peak = max16(peak, s.scale);
    }
    const long n = (d + 63) / 64 * 64;
    for (long i = d; i < n; i += kLanes) save16(raw + i, F16{});
    most = peak16(peak)[0];
    const Floats factor = Floats{} + (most > 0.0f ? kOne / most : 0.0f);
    save_words<N>(n, scale, [&](long i) KVQ_UNROLLED {
      return fma(kvq::load<Floats>(raw + i), factor, Floats{} + kRounds);
    });
  }
};
#endif

}  // namespace
}  // namespace kvq
#endif  // KVQ_VNNI
