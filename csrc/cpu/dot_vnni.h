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

// acc += u8 . s8. Written as asm because gcc 12 shuffles sixteen accumulators through register
// copies when the intrinsic builds them (a quarter of the loop; seen in its disassembly).
KVQ_HD void dpbusd(__m512i& acc, __m512i u8, __m512i s8) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(u8), "v"(s8));
}

template <Code C>
struct VnniDot {
  static constexpr int kWord = 32 / code_bits(C);
  static constexpr int kParts = kWord / 4;  // byte operands in one line
  static constexpr int kOffset = C == Code::kInt8 ? 128 : 0;

  struct Query {
    alignas(64) int8_t high[kMaxRows * kMaxHead];
    alignas(64) int8_t low[kMaxRows * kMaxHead];
    int32_t total[kMaxRows];  // sum of the limbs' integers
    float step[kMaxRows];     // value of one unit of them
    float sum[kMaxRows];      // sum of q as they hold it
  };
  struct Weights {
    alignas(64) int8_t high[kMaxRows * kTile];
    alignas(64) int8_t low[kMaxRows * kTile];
  };

  // `uniform` is a factor all channels share; it joins the step, out of the rounding.
  static void set_query(Query& s, int row, long d, const float* q, float uniform) {
    F16 peak{}, nan{};
    for (long i = 0; i < d; i += kLanes) {
      const F16 v = load16(q + i);
      const F16 a = v < 0.0f ? -v : v;
      peak = a > peak ? a : peak;
      nan += v * 0.0f;  // integers would drop a NaN
    }
    const float amax = reduce_max(peak);
    const float inverse = amax > 0.0f ? kLimbMax / amax : 0.0f;
    I16 total{};
    for (long i = 0; i < d; i += kLanes) {
      total += save_limbs(load16(q + i) * inverse, s.high + row * d + i, s.low + row * d + i);
    }
    s.total[row] = _mm512_reduce_add_epi32(reinterpret_cast<__m512i>(total));
    s.step[row] = amax / kLimbMax * uniform + reduce_add(nan);
    s.sum[row] = static_cast<float>(s.total[row]) * s.step[row];
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

  // Exact: |limbs| * |codes| * 512 stays below 2^31.
  static KVQ_HD F16 combine(__m512i high, __m512i low) {
    const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
    return reinterpret_cast<F16>(_mm512_cvtepi32_ps(sum));
  }

  template <int R, int P>
  static KVQ_HD void score_part(const Query& s, int row, long d, long dim, __m512i k0, __m512i k1,
                                __m512i (&high)[R][2], __m512i (&low)[R][2]) {
    const __m512i c0 = operand<P>(k0), c1 = operand<P>(k1);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const long at = (row + r) * d + dim + P * 4;
      const __m512i qh = broadcast(s.high + at), ql = broadcast(s.low + at);
      dpbusd(high[r][0], c0, qh);
      dpbusd(high[r][1], c1, qh);
      dpbusd(low[r][0], c0, ql);
      dpbusd(low[r][1], c1, ql);
    }
  }

  template <int R, bool kFetch>
  static void score_rows(const Query& s, const Tile& tile, int row, long d, float* scores) {
    for (int g = 0; g < kGroups; g += 2) {
      __m512i high[R][2], low[R][2];
      for (int r = 0; r < R; ++r) {
        high[r][0] = high[r][1] = _mm512_setzero_si512();
        low[r][0] = low[r][1] = _mm512_set1_epi32(-kOffset * s.total[row + r]);
      }
      const uint8_t *k0 = tile.key[g], *k1 = tile.key[g + 1];
      const uint8_t *n0 = tile.next_key[g], *n1 = tile.next_key[g + 1];
      for (long w = 0; w < d / kWord; ++w) {
        if constexpr (kFetch) {
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
        save16(out, combine(high[r][0], low[r][0]) * s.step[row + r]);
        save16(out + 16, combine(high[r][1], low[r][1]) * s.step[row + r]);
      }
    }
  }

  template <int R>
  static void score_block(const Query& s, const Tile& tile, int row, long d, float* scores) {
    if (row == 0) return score_rows<R, true>(s, tile, row, d, scores);
    score_rows<R, false>(s, tile, row, d, scores);
  }

  static void score(Query& s, const Tile& tile, int rows, long d, float* scores) {
    int r = 0;
    for (; r + 4 <= rows; r += 4) score_block<4>(s, tile, r, d, scores);
    switch (rows - r) {
      case 3:
        return score_block<3>(s, tile, r, d, scores);
      case 2:
        return score_block<2>(s, tile, r, d, scores);
      case 1:
        return score_block<1>(s, tile, r, d, scores);
    }
  }

  // Quantized relative to this tile's own maximum: relative to the running one, a long flat
  // context would round to zero while it still counts in the denominator. That maximum is 1
  // unless scales joined the weights (`scaled`). The codes' offset goes to `bias`.
  static float set_weights(Weights& s, int row, const F16* p, bool scaled, F16& bias) {
    float amax = 1.0f;
    __mmask16 nan = 0;
    F16 peak{};
    for (int g = 0; g < kGroups; ++g) {
      const F16 a = p[g] < 0.0f ? -p[g] : p[g];
      peak = a > peak ? a : peak;
      const __m512 v = reinterpret_cast<__m512>(p[g]);
      nan |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    }
    if (scaled) amax = reduce_max(peak);
    const float inverse = amax > 0.0f ? kLimbMax / amax : 0.0f;
    I16 total{};
    for (int g = 0; g < kGroups; ++g) {
      const int at = row * kTile + g * kLanes;
      total += save_limbs(p[g] * inverse, s.high + at, s.low + at);
    }
    const float factor = nan ? __builtin_nanf("") : amax / kLimbMax;
    if (kOffset) bias -= __builtin_convertvector(total, F16) * (kOffset * factor);
    return factor;
  }

  template <int R, int N, bool kFetch>
  static void accumulate_rows(const Weights& s, const Tile& tile, int row, long d, long dim,
                              const float* alpha, const float* gamma, float* acc) {
    __m512i high[R][N], low[R][N];
    for (int r = 0; r < R; ++r) {
      for (int j = 0; j < N; ++j) {
        high[r][j] = low[r][j] = _mm512_setzero_si512();
      }
    }
    for (int g = 0; g < kGroups; ++g) {
      for (int w = 0; w < kLanes / kWord; ++w) {
        const long at = (w * d + dim) * 4;
        __m512i line[N];
        for (int j = 0; j < N; ++j) {
          if constexpr (kFetch) prefetch(tile.next_value[g] + at + j * 64);
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
        save16(a, load16(a) * alpha[row + r] + combine(high[r][j], low[r][j]) * gamma[row + r]);
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
        dpbusd(high[r][j], c[j], ph);
        dpbusd(low[r][j], c[j], pl);
      }
    }
  }

  template <int R, bool kFetch>
  static void accumulate_dims(const Weights& s, const Tile& tile, int row, long d,
                              const float* alpha, const float* gamma, float* acc) {
    long i = 0;
    for (; i + 32 <= d; i += 32) {
      accumulate_rows<R, 2, kFetch>(s, tile, row, d, i, alpha, gamma, acc);
    }
    if (i < d) accumulate_rows<R, 1, kFetch>(s, tile, row, d, i, alpha, gamma, acc);
  }

  template <int R>
  static void accumulate_block(const Weights& s, const Tile& tile, int row, long d,
                               const float* alpha, const float* gamma, float* acc) {
    if (row == 0) return accumulate_dims<R, true>(s, tile, row, d, alpha, gamma, acc);
    accumulate_dims<R, false>(s, tile, row, d, alpha, gamma, acc);
  }

  static void accumulate(Weights& s, const Tile& tile, int rows, long d, const float* alpha,
                         const float* gamma, float* acc) {
    int r = 0;
    for (; r + 4 <= rows; r += 4) accumulate_block<4>(s, tile, r, d, alpha, gamma, acc);
    switch (rows - r) {
      case 3:
        return accumulate_block<3>(s, tile, r, d, alpha, gamma, acc);
      case 2:
        return accumulate_block<2>(s, tile, r, d, alpha, gamma, acc);
      case 1:
        return accumulate_block<1>(s, tile, r, d, alpha, gamma, acc);
    }
  }
};

}  // namespace
}  // namespace kvq
#endif  // __AVX512VNNI__
