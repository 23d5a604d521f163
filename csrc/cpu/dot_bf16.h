// bf16 dot products (AVX-512 BF16 + VBMI) for 8-bit floats. Two 128-entry byte tables in
// registers turn a line of codes into bf16, exactly, subnormals and NaN included (a bare shift
// would leave bf16 denormals, which vdpbf16ps reads as zero). q is one bf16 when that is exact
// and a pair of bf16 limbs otherwise; softmax weights are always a pair.
#pragma once

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#include <immintrin.h>

#include "tile.h"

namespace kvq {
namespace {

// High and low bytes of the bf16 value of every code magnitude.
template <Code C>
struct Bf16Table {
  alignas(64) uint8_t high[128], low[128];
  Bf16Table() {
    for (int i = 0; i < 128; ++i) {
      const uint16_t b = float_to_bf16(Codec<C>::decode(static_cast<uint8_t>(i)));
      high[i] = static_cast<uint8_t>(b >> 8);
      low[i] = static_cast<uint8_t>(b);
    }
  }
};

template <Code C>
struct Bf16Decoder {
  __m512i high0, high1, low0, low1;

  Bf16Decoder() {
    static const Bf16Table<C> table;
    high0 = _mm512_load_si512(table.high);
    high1 = _mm512_load_si512(table.high + 64);
    low0 = _mm512_load_si512(table.low);
    low1 = _mm512_load_si512(table.low + 64);
  }

  // Codes 0 and 2 of each 32-bit word as a bf16 pair in `even`, codes 1 and 3 in `odd`.
  KVQ_HD void operator()(__m512i codes, __m512bh& even, __m512bh& odd) const {
    const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
    const __m512i low_byte = _mm512_set1_epi16(0x00FF);
    __m512i h = _mm512_permutex2var_epi8(high0, codes, high1);
    const __m512i l = _mm512_permutex2var_epi8(low0, codes, low1);
    h = _mm512_ternarylogic_epi32(h, codes, sign, 0xF8);  // h | (codes & sign)
    even = (__m512bh)_mm512_ternarylogic_epi32(_mm512_slli_epi16(h, 8), l, low_byte, 0xF8);
    odd = (__m512bh)_mm512_ternarylogic_epi32(_mm512_srli_epi16(l, 8), h, low_byte, 0xF4);
  }
};

KVQ_HD uint32_t bf16_pair(uint16_t first, uint16_t second) {
  return first | static_cast<uint32_t>(second) << 16;
}

// x as bf16 limbs: high + low keeps 16 bits of mantissa.
KVQ_HD bool split_bf16(float x, uint16_t& high, uint16_t& low) {
  high = float_to_bf16(x);
  const float rest = x - bf16_to_float(high);
  low = float_to_bf16(rest);
  return rest == 0.0f;
}

// Four values -> the even and odd pair words of one limb.
KVQ_HD void save_pairs(uint32_t* out, const uint16_t* b) {
  out[0] = bf16_pair(b[0], b[2]);
  out[1] = bf16_pair(b[1], b[3]);
}

template <Code C>
struct Bf16Dot {
  static constexpr int kWord = 4;

  struct Query {
    alignas(64) uint32_t high[kMaxRows * kMaxHead / 2];
    alignas(64) uint32_t low[kMaxRows * kMaxHead / 2];
    float step[kMaxRows];
    float sum[kMaxRows];  // affine codes only; no 8-bit float is
    bool exact[kMaxRows];
  };
  struct Weights {
    alignas(64) uint32_t high[kMaxRows * kTile / 2];
    alignas(64) uint32_t low[kMaxRows * kTile / 2];
  };

  static void set_query(Query& s, int row, long d, const float* q, float uniform) {
    bool exact = true;
    for (long i = 0; i < d; i += 4) {
      uint16_t high[4], low[4];
      for (int j = 0; j < 4; ++j) exact &= split_bf16(q[i + j], high[j], low[j]);
      save_pairs(s.high + (row * d + i) / 2, high);
      save_pairs(s.low + (row * d + i) / 2, low);
    }
    s.exact[row] = exact;
    s.step[row] = uniform;
    s.sum[row] = 0.0f;
  }

  static KVQ_HD __m512bh broadcast(const uint32_t* p) {
    return (__m512bh)_mm512_set1_epi32(static_cast<int32_t>(*p));
  }

  template <int R, bool kExact>
  static void score_rows(const Query& s, const Tile& tile, int row, long d, float* scores,
                         bool fetch) {
    const Bf16Decoder<C> decode;
    __m512 acc[R][kGroups];
    for (int r = 0; r < R; ++r) {
      for (int g = 0; g < kGroups; ++g) acc[r][g] = _mm512_setzero_ps();
    }
    for (long w = 0; w < d / kWord; ++w) {
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g) {
        if (fetch) prefetch(tile.next_key[g] + w * 64);
        __m512bh even, odd;
        decode(_mm512_loadu_si512(tile.key[g] + w * 64), even, odd);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const long at = (row + r) * d / 2 + w * 2;
          acc[r][g] = _mm512_dpbf16_ps(acc[r][g], even, broadcast(s.high + at));
          acc[r][g] = _mm512_dpbf16_ps(acc[r][g], odd, broadcast(s.high + at + 1));
          if constexpr (!kExact) {
            acc[r][g] = _mm512_dpbf16_ps(acc[r][g], even, broadcast(s.low + at));
            acc[r][g] = _mm512_dpbf16_ps(acc[r][g], odd, broadcast(s.low + at + 1));
          }
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int g = 0; g < kGroups; ++g) {
        _mm512_storeu_ps(scores + (row + r) * kTile + g * 16,
                         _mm512_mul_ps(acc[r][g], _mm512_set1_ps(s.step[row + r])));
      }
    }
  }

  template <int R>
  static void score_block(const Query& s, const Tile& tile, int row, long d, float* scores) {
    bool exact = true;
    for (int r = 0; r < R; ++r) exact &= s.exact[row + r];
    // A zero low limb adds exact zeros, so a row's result does not depend on its neighbours.
    if (exact) return score_rows<R, true>(s, tile, row, d, scores, row == 0);
    score_rows<R, false>(s, tile, row, d, scores, row == 0);
  }

  static void score(Query& s, const Tile& tile, int rows, long d, float* scores) {
    int r = 0;
    for (; r + 4 <= rows; r += 4) score_block<4>(s, tile, r, d, scores);
    switch (rows - r) {
      case 3: return score_block<3>(s, tile, r, d, scores);
      case 2: return score_block<2>(s, tile, r, d, scores);
      case 1: return score_block<1>(s, tile, r, d, scores);
    }
  }

  static float set_weights(Weights& s, int row, const F16* p) {
    float x[kTile];
    for (int g = 0; g < kGroups; ++g) save16(x + g * 16, p[g]);
    uint16_t high[kTile], low[kTile];
    for (int i = 0; i < kTile; ++i) split_bf16(x[i], high[i], low[i]);
    for (int i = 0; i < kTile; i += 4) {
      save_pairs(s.high + (row * kTile + i) / 2, high + i);
      save_pairs(s.low + (row * kTile + i) / 2, low + i);
    }
    return 1.0f;
  }

  template <int R, int N, bool kEdge>
  static void accumulate_rows(const Weights& s, const Tile& tile, int row, long d, long dim,
                              const float* alpha, const float* gamma, float* acc, bool fetch) {
    const Bf16Decoder<C> decode;
    __m512 t[R][N];
    for (int r = 0; r < R; ++r) {
      for (int j = 0; j < N; ++j) t[r][j] = _mm512_setzero_ps();
    }
    for (int g = 0; g < kGroups; ++g) {
      for (int w = 0; w < kLanes / kWord; ++w) {
        const int token = g * 16 + w * kWord;
        uint32_t live = 0xFFFFFFFFu;
        if constexpr (kEdge) {
          // Stale bytes may decode to NaN, and 0 * NaN is not 0: clear them.
          for (int f = 0; f < kWord; ++f) {
            if (token + f < tile.begin || token + f >= tile.end) live &= ~(0xFFu << (8 * f));
          }
        }
        const long at = (w * d + dim) * 4;
        const uint32_t* high = s.high + (row * kTile + token) / 2;
        const uint32_t* low = s.low + (row * kTile + token) / 2;
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) {
          if (fetch) prefetch(tile.next_value[g] + at + j * 64);
          __m512i line = _mm512_loadu_si512(tile.value[g] + at + j * 64);
          if constexpr (kEdge) line = _mm512_and_si512(line, _mm512_set1_epi32(live));
          __m512bh even, odd;
          decode(line, even, odd);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) {
            t[r][j] = _mm512_dpbf16_ps(t[r][j], even, broadcast(high + r * kTile / 2));
            t[r][j] = _mm512_dpbf16_ps(t[r][j], odd, broadcast(high + r * kTile / 2 + 1));
            t[r][j] = _mm512_dpbf16_ps(t[r][j], even, broadcast(low + r * kTile / 2));
            t[r][j] = _mm512_dpbf16_ps(t[r][j], odd, broadcast(low + r * kTile / 2 + 1));
          }
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int j = 0; j < N; ++j) {
        float* a = acc + (row + r) * d + dim + j * 16;
        save16(a, load16(a) * alpha[row + r] + reinterpret_cast<F16>(t[r][j]) * gamma[row + r]);
      }
    }
  }

  template <int R, bool kEdge>
  static void accumulate_all(const Weights& s, const Tile& tile, int row, long d,
                             const float* alpha, const float* gamma, float* acc) {
    const bool fetch = row == 0;
    long i = 0;
    for (; i + 64 <= d; i += 64) {
      accumulate_rows<R, 4, kEdge>(s, tile, row, d, i, alpha, gamma, acc, fetch);
    }
    for (; i < d; i += 16) {
      accumulate_rows<R, 1, kEdge>(s, tile, row, d, i, alpha, gamma, acc, fetch);
    }
  }

  template <bool kEdge>
  static void accumulate_tile(Weights& s, const Tile& tile, int rows, long d, const float* alpha,
                              const float* gamma, float* acc) {
    int r = 0;
    for (; r + 4 <= rows; r += 4) accumulate_all<4, kEdge>(s, tile, r, d, alpha, gamma, acc);
    switch (rows - r) {
      case 3: return accumulate_all<3, kEdge>(s, tile, r, d, alpha, gamma, acc);
      case 2: return accumulate_all<2, kEdge>(s, tile, r, d, alpha, gamma, acc);
      case 1: return accumulate_all<1, kEdge>(s, tile, r, d, alpha, gamma, acc);
    }
  }

  static void accumulate(Weights& s, const Tile& tile, int rows, long d, const float* alpha,
                         const float* gamma, float* acc) {
    if (tile.begin > 0 || tile.end < kTile) {
      return accumulate_tile<true>(s, tile, rows, d, alpha, gamma, acc);
    }
    accumulate_tile<false>(s, tile, rows, d, alpha, gamma, acc);
  }
};

}  // namespace
}  // namespace kvq
#endif
