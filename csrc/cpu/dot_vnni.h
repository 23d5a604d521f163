// Integer dot products (AVX-512 VNNI) for int8 and int4 codes. Codes are the unsigned operand;
// q and the softmax weights are split into two signed 8-bit limbs, 15 bits in all, so that their
// rounding stays far below bf16's. Offset-binary codes cost nothing: -128 * sum(limbs) is the
// accumulators' initial value.
#pragma once

#if defined(__AVX512VNNI__)
#include <immintrin.h>

#include "tile.h"

namespace kvq {
namespace {

template <Code C>
struct VnniDot {
  static constexpr int kWord = 32 / code_bits(C);
  static constexpr int kParts = kWord / 4;  // byte operands in one line
  static constexpr int kOffset = C == Code::kInt8 ? 128 : 0;

  struct Query {
    alignas(64) int8_t high[kMaxRows * kMaxHead];
    alignas(64) int8_t low[kMaxRows * kMaxHead];
    int32_t sum_high[kMaxRows], sum_low[kMaxRows];
    float step[kMaxRows];  // value of one unit of the limbs
    float sum[kMaxRows];   // sum of q as the limbs hold it
  };
  struct Weights {
    alignas(64) int8_t high[kMaxRows * kTile];
    alignas(64) int8_t low[kMaxRows * kTile];
    int32_t sum_high[kMaxRows], sum_low[kMaxRows];
  };

  static KVQ_HD int reduce(I16 v) {
    return _mm512_reduce_add_epi32(reinterpret_cast<__m512i>(v));
  }

  // `uniform` is a factor all channels share; it joins the step, out of the rounding.
  static void set_query(Query& s, int row, long d, const float* q, float uniform) {
    F16 peak{};
    for (long i = 0; i < d; i += kLanes) {
      const F16 v = load16(q + i);
      const F16 a = v < 0.0f ? -v : v;
      peak = a > peak ? a : peak;
    }
    const float amax = reduce_max(peak);
    const float inverse = amax > 0.0f ? kLimbMax / amax : 0.0f;
    I16 high{}, low{};
    F16 nan{};
    for (long i = 0; i < d; i += kLanes) {
      const F16 v = load16(q + i);
      nan += v * 0.0f;  // integers would drop a NaN
      const Limbs l = split_limbs(v * inverse);
      high += l.high;
      low += l.low;
      save_bytes(s.high + row * d + i, l.high);
      save_bytes(s.low + row * d + i, l.low);
    }
    s.sum_high[row] = reduce(high);
    s.sum_low[row] = reduce(low);
    s.step[row] = amax / kLimbMax * uniform + reduce_add(nan);
    s.sum[row] = (256.0f * s.sum_high[row] + s.sum_low[row]) * s.step[row];
  }

  template <int P>
  static KVQ_HD __m512i operand(__m512i line) {
    if constexpr (kParts == 1) return line;
    const __m512i mask = _mm512_set1_epi8(0x0F);
    return _mm512_and_si512(P == 0 ? line : _mm512_srli_epi32(line, 4), mask);
  }

  static KVQ_HD __m512i broadcast(const int8_t* p) {
    int32_t w;
    memcpy(&w, p, 4);
    return _mm512_set1_epi32(w);
  }

  static KVQ_HD F16 combine(__m512i high, __m512i low, float step) {
    const F16 h = reinterpret_cast<F16>(_mm512_cvtepi32_ps(high));
    const F16 l = reinterpret_cast<F16>(_mm512_cvtepi32_ps(low));
    return (h * 256.0f + l) * step;
  }

  template <int R, int P>
  static KVQ_HD void score_part(const Query& s, int row, long d, long dim, __m512i k0, __m512i k1,
                                __m512i (&high)[R][2], __m512i (&low)[R][2]) {
    const __m512i c0 = operand<P>(k0), c1 = operand<P>(k1);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const long at = (row + r) * d + dim + P * 4;
      const __m512i qh = broadcast(s.high + at), ql = broadcast(s.low + at);
      high[r][0] = _mm512_dpbusd_epi32(high[r][0], c0, qh);
      high[r][1] = _mm512_dpbusd_epi32(high[r][1], c1, qh);
      low[r][0] = _mm512_dpbusd_epi32(low[r][0], c0, ql);
      low[r][1] = _mm512_dpbusd_epi32(low[r][1], c1, ql);
    }
  }

  template <int R>
  static void score_rows(const Query& s, const Tile& tile, int row, long d, float* scores,
                         bool fetch) {
    for (int g = 0; g < kGroups; g += 2) {
      __m512i high[R][2], low[R][2];
      for (int r = 0; r < R; ++r) {
        high[r][0] = high[r][1] = _mm512_set1_epi32(-kOffset * s.sum_high[row + r]);
        low[r][0] = low[r][1] = _mm512_set1_epi32(-kOffset * s.sum_low[row + r]);
      }
      const uint8_t *k0 = tile.key[g], *k1 = tile.key[g + 1];
      const uint8_t *n0 = tile.next_key[g], *n1 = tile.next_key[g + 1];
      for (long w = 0; w < d / kWord; ++w) {
        if (fetch) {
          prefetch(n0 + w * 64);
          prefetch(n1 + w * 64);
        }
        const __m512i l0 = _mm512_loadu_si512(k0 + w * 64);
        const __m512i l1 = _mm512_loadu_si512(k1 + w * 64);
        score_part<R, 0>(s, row, d, w * kWord, l0, l1, high, low);
        if constexpr (kParts == 2) score_part<R, 1>(s, row, d, w * kWord, l0, l1, high, low);
      }
      for (int r = 0; r < R; ++r) {
        float* out = scores + (row + r) * kTile + g * 16;
        save16(out, combine(high[r][0], low[r][0], s.step[row + r]));
        save16(out + 16, combine(high[r][1], low[r][1], s.step[row + r]));
      }
    }
  }

  static void score(Query& s, const Tile& tile, int rows, long d, float* scores) {
    int r = 0;
    for (; r + 4 <= rows; r += 4) score_rows<4>(s, tile, r, d, scores, r == 0);
    switch (rows - r) {
      case 3: return score_rows<3>(s, tile, r, d, scores, r == 0);
      case 2: return score_rows<2>(s, tile, r, d, scores, r == 0);
      case 1: return score_rows<1>(s, tile, r, d, scores, r == 0);
    }
  }

  // Quantized relative to this tile's own maximum: relative to the running one, a long flat
  // context would round to zero while it still counts in the denominator.
  static float set_weights(Weights& s, int row, const F16* p) {
    F16 peak{}, nan{};
    for (int g = 0; g < kGroups; ++g) {
      const F16 a = p[g] < 0.0f ? -p[g] : p[g];
      peak = a > peak ? a : peak;
      nan += p[g] * 0.0f;
    }
    const float amax = reduce_max(peak);
    const float inverse = amax > 0.0f ? kLimbMax / amax : 0.0f;
    I16 high{}, low{};
    for (int g = 0; g < kGroups; ++g) {
      const Limbs l = split_limbs(p[g] * inverse);
      high += l.high;
      low += l.low;
      save_bytes(s.high + row * kTile + g * 16, l.high);
      save_bytes(s.low + row * kTile + g * 16, l.low);
    }
    if (kOffset) {
      s.sum_high[row] = reduce(high);
      s.sum_low[row] = reduce(low);
    } else {
      s.sum_high[row] = s.sum_low[row] = 0;
    }
    return amax / kLimbMax + reduce_add(nan);
  }

  template <int R, int N>
  static void accumulate_rows(const Weights& s, const Tile& tile, int row, long d, long dim,
                              const float* alpha, const float* gamma, float* acc, bool fetch) {
    __m512i high[R][N], low[R][N];
    for (int r = 0; r < R; ++r) {
      for (int j = 0; j < N; ++j) {
        high[r][j] = _mm512_set1_epi32(-kOffset * s.sum_high[row + r]);
        low[r][j] = _mm512_set1_epi32(-kOffset * s.sum_low[row + r]);
      }
    }
    for (int g = 0; g < kGroups; ++g) {
      for (int w = 0; w < kLanes / kWord; ++w) {
        const long at = (w * d + dim) * 4;
        __m512i line[N];
        for (int j = 0; j < N; ++j) {
          if (fetch) prefetch(tile.next_value[g] + at + j * 64);
          line[j] = _mm512_loadu_si512(tile.value[g] + at + j * 64);
        }
        const int token = g * 16 + w * kWord;
        accumulate_part<R, N, 0>(s, row, token, line, high, low);
        if constexpr (kParts == 2) accumulate_part<R, N, 1>(s, row, token, line, high, low);
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int j = 0; j < N; ++j) {
        float* a = acc + (row + r) * d + dim + j * 16;
        save16(a, load16(a) * alpha[row + r] + combine(high[r][j], low[r][j], gamma[row + r]));
      }
    }
  }

  template <int R, int N, int P>
  static KVQ_HD void accumulate_part(const Weights& s, int row, int token, const __m512i (&line)[N],
                                     __m512i (&high)[R][N], __m512i (&low)[R][N]) {
    __m512i c[N];
    for (int j = 0; j < N; ++j) c[j] = operand<P>(line[j]);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const long at = (row + r) * kTile + token + P * 4;
      const __m512i ph = broadcast(s.high + at), pl = broadcast(s.low + at);
#pragma GCC unroll 2
      for (int j = 0; j < N; ++j) {
        high[r][j] = _mm512_dpbusd_epi32(high[r][j], c[j], ph);
        low[r][j] = _mm512_dpbusd_epi32(low[r][j], c[j], pl);
      }
    }
  }

  template <int R>
  static void accumulate_all(const Weights& s, const Tile& tile, int row, long d,
                             const float* alpha, const float* gamma, float* acc, bool fetch) {
    long i = 0;
    for (; i + 32 <= d; i += 32) accumulate_rows<R, 2>(s, tile, row, d, i, alpha, gamma, acc, fetch);
    if (i < d) accumulate_rows<R, 1>(s, tile, row, d, i, alpha, gamma, acc, fetch);
  }

  static void accumulate(Weights& s, const Tile& tile, int rows, long d, const float* alpha,
                         const float* gamma, float* acc) {
    int r = 0;
    for (; r + 4 <= rows; r += 4) accumulate_all<4>(s, tile, r, d, alpha, gamma, acc, r == 0);
    switch (rows - r) {
      case 3: return accumulate_all<3>(s, tile, r, d, alpha, gamma, acc, r == 0);
      case 2: return accumulate_all<2>(s, tile, r, d, alpha, gamma, acc, r == 0);
      case 1: return accumulate_all<1>(s, tile, r, d, alpha, gamma, acc, r == 0);
    }
  }
};

}  // namespace
}  // namespace kvq
#endif  // __AVX512VNNI__
