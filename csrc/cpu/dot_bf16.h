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

KVQ_HD void load_pair(const uint8_t* p, __m512bh& even, __m512bh& odd) {
  even = (__m512bh)_mm512_load_si512(p);
  odd = (__m512bh)_mm512_load_si512(p + 64);
}

KVQ_HD void save_pair(uint8_t* p, __m512bh even, __m512bh odd) {
  _mm512_store_si512(p, (__m512i)even);
  _mm512_store_si512(p + 64, (__m512i)odd);
}

// Sixteen values as bf16 limbs (high + low keeps 16 bits of mantissa), in the pair order that
// the decoder gives codes: 0, 2, 1, 3 of every four. Returns whether the low limbs are all zero.
KVQ_HD bool save_limbs(F16 x, uint32_t* high, uint32_t* low) {
  const __m512 v = reinterpret_cast<__m512>(x);
  const __m256i h = (__m256i)_mm512_cvtneps_pbh(v);
  const __m512 back = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
  const __m512 rest = _mm512_sub_ps(v, back);
  const __m256i l = (__m256i)_mm512_cvtneps_pbh(rest);
  constexpr int kOrder = 0 | 2 << 2 | 1 << 4 | 3 << 6;
  const auto arrange = [](__m256i b) {
    return _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(b, kOrder), kOrder);
  };
  _mm256_store_si256(reinterpret_cast<__m256i*>(high), arrange(h));
  _mm256_store_si256(reinterpret_cast<__m256i*>(low), arrange(l));
  return _mm512_cmp_ps_mask(rest, _mm512_setzero_ps(), _CMP_NEQ_UQ) == 0;
}

// acc += pairs of bf16; asm for the reason given in dot_vnni.h.
KVQ_HD void dpbf16(__m512& acc, __m512bh a, __m512bh b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
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
    alignas(64) uint8_t decoded[kMaxHead * kTile * 2];
  };
  struct Weights {
    alignas(64) uint32_t high[kMaxRows * kTile / 2];
    alignas(64) uint32_t low[kMaxRows * kTile / 2];
    alignas(64) uint8_t decoded[kMaxHead * kTile * 2];
  };

  static void set_query(Query& s, int row, long d, const float* q, float uniform) {
    bool exact = true;
    for (long i = 0; i < d; i += kLanes) {
      const long at = (row * d + i) / 2;
      exact &= save_limbs(load16(q + i), s.high + at, s.low + at);
    }
    s.exact[row] = exact;
    s.step[row] = uniform;
    s.sum[row] = 0.0f;
  }

  static KVQ_HD __m512bh broadcast(const uint32_t* p) {
    return (__m512bh)_mm512_set1_epi32(static_cast<int32_t>(*p));
  }

  // More than four rows read a tile more than once: then it is decoded once, to `decoded`.
  static void decode_key(const Tile& tile, long d, uint8_t* decoded) {
    const Bf16Decoder<C> decode;
    for (long w = 0; w < d / kWord; ++w) {
      for (int g = 0; g < kGroups; ++g) {
        prefetch(tile.next_key[g] + w * 64);
        __m512bh even, odd;
        decode(_mm512_loadu_si512(tile.key[g] + w * 64), even, odd);
        save_pair(decoded + (w * kGroups + g) * 128, even, odd);
      }
    }
  }

  template <int R, bool kExact, bool kDecoded>
  static void score_rows(const Query& s, const Tile& tile, int row, long d, float* scores) {
    const Bf16Decoder<C> decode;
    __m512 acc[R][kGroups];
    for (int r = 0; r < R; ++r) {
      for (int g = 0; g < kGroups; ++g) acc[r][g] = _mm512_setzero_ps();
    }
    for (long w = 0; w < d / kWord; ++w) {
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g) {
        __m512bh even, odd;
        if constexpr (kDecoded) {
          load_pair(s.decoded + (w * kGroups + g) * 128, even, odd);
        } else {
          prefetch(tile.next_key[g] + w * 64);
          decode(_mm512_loadu_si512(tile.key[g] + w * 64), even, odd);
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const long at = (row + r) * d / 2 + w * 2;
          dpbf16(acc[r][g], even, broadcast(s.high + at));
          dpbf16(acc[r][g], odd, broadcast(s.high + at + 1));
          if constexpr (!kExact) {
            dpbf16(acc[r][g], even, broadcast(s.low + at));
            dpbf16(acc[r][g], odd, broadcast(s.low + at + 1));
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

  template <int R, bool kDecoded>
  static void score_block(const Query& s, const Tile& tile, int row, long d, float* scores) {
    bool exact = true;
    for (int r = 0; r < R; ++r) exact &= s.exact[row + r];
    // A zero low limb adds exact zeros, so a row's result does not depend on its neighbours.
    if (exact) return score_rows<R, true, kDecoded>(s, tile, row, d, scores);
    score_rows<R, false, kDecoded>(s, tile, row, d, scores);
  }

  template <bool kDecoded>
  static void score_all(const Query& s, const Tile& tile, int rows, long d, float* scores) {
    int r = 0;
    for (; r + 4 <= rows; r += 4) score_block<4, kDecoded>(s, tile, r, d, scores);
    switch (rows - r) {
      case 3:
        return score_block<3, kDecoded>(s, tile, r, d, scores);
      case 2:
        return score_block<2, kDecoded>(s, tile, r, d, scores);
      case 1:
        return score_block<1, kDecoded>(s, tile, r, d, scores);
    }
  }

  static void score(Query& s, const Tile& tile, int rows, long d, float* scores) {
    if (rows <= 4) return score_all<false>(s, tile, rows, d, scores);
    decode_key(tile, d, s.decoded);
    score_all<true>(s, tile, rows, d, scores);
  }

  static float set_weights(Weights& s, int row, const F16* p, bool /*scaled*/, F16& /*bias*/) {
    for (int g = 0; g < kGroups; ++g) {
      const int at = (row * kTile + g * kLanes) / 2;
      save_limbs(p[g], s.high + at, s.low + at);
    }
    return 1.0f;
  }

  // Which bytes of the four tokens from `token` on any row sees. Stale bytes may decode to NaN,
  // and 0 * NaN is not 0: they are cleared.
  static KVQ_HD __m512i live_bytes(const Tile& tile, int token) {
    uint32_t live = 0;
    for (int f = 0; f < kWord; ++f) {
      if (token + f >= tile.begin && token + f < tile.end) live |= 0xFFu << (8 * f);
    }
    return _mm512_set1_epi32(static_cast<int32_t>(live));
  }

  static void decode_value(const Tile& tile, long d, uint8_t* decoded) {
    const Bf16Decoder<C> decode;
    for (int w = 0; w < kTile / kWord; ++w) {
      const __m512i live = live_bytes(tile, w * kWord);
      const long at = (w % kWord) * d * 4;
      for (long i = 0; i < d * 4; i += 64) {
        prefetch(tile.next_value[w / kWord] + at + i);
        const __m512i line = _mm512_loadu_si512(tile.value[w / kWord] + at + i);
        __m512bh even, odd;
        decode(_mm512_and_si512(line, live), even, odd);
        save_pair(decoded + (w * d * 4 + i) * 2, even, odd);
      }
    }
  }

  template <int R, int N, bool kDecoded, bool kEdge>
  static void accumulate_rows(const Weights& s, const Tile& tile, int row, long d, long dim,
                              const float* alpha, const float* gamma, float* acc) {
    const Bf16Decoder<C> decode;
    __m512 t[R][N];
    for (int r = 0; r < R; ++r) {
      for (int j = 0; j < N; ++j) t[r][j] = _mm512_setzero_ps();
    }
    for (int w = 0; w < kTile / kWord; ++w) {
      const long at = (w % kWord * d + dim) * 4;
      const uint32_t* high = s.high + (row * kTile + w * kWord) / 2;
      const uint32_t* low = s.low + (row * kTile + w * kWord) / 2;
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) {
        __m512bh even, odd;
        if constexpr (kDecoded) {
          load_pair(s.decoded + ((w * d + dim) * 4 + j * 64) * 2, even, odd);
        } else {
          prefetch(tile.next_value[w / kWord] + at + j * 64);
          __m512i line = _mm512_loadu_si512(tile.value[w / kWord] + at + j * 64);
          if constexpr (kEdge) line = _mm512_and_si512(line, live_bytes(tile, w * kWord));
          decode(line, even, odd);
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          dpbf16(t[r][j], even, broadcast(high + r * kTile / 2));
          dpbf16(t[r][j], odd, broadcast(high + r * kTile / 2 + 1));
          dpbf16(t[r][j], even, broadcast(low + r * kTile / 2));
          dpbf16(t[r][j], odd, broadcast(low + r * kTile / 2 + 1));
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

  template <int R, bool kDecoded, bool kEdge>
  static void accumulate_block(const Weights& s, const Tile& tile, int row, long d,
                               const float* alpha, const float* gamma, float* acc) {
    long i = 0;
    for (; i + 64 <= d; i += 64) {
      accumulate_rows<R, 4, kDecoded, kEdge>(s, tile, row, d, i, alpha, gamma, acc);
    }
    for (; i < d; i += 16) {
      accumulate_rows<R, 1, kDecoded, kEdge>(s, tile, row, d, i, alpha, gamma, acc);
    }
  }

  template <bool kDecoded, bool kEdge>
  static void accumulate_all(const Weights& s, const Tile& tile, int rows, long d,
                             const float* alpha, const float* gamma, float* acc) {
    int r = 0;
    for (; r + 4 <= rows; r += 4) {
      accumulate_block<4, kDecoded, kEdge>(s, tile, r, d, alpha, gamma, acc);
    }
    switch (rows - r) {
      case 3:
        return accumulate_block<3, kDecoded, kEdge>(s, tile, r, d, alpha, gamma, acc);
      case 2:
        return accumulate_block<2, kDecoded, kEdge>(s, tile, r, d, alpha, gamma, acc);
      case 1:
        return accumulate_block<1, kDecoded, kEdge>(s, tile, r, d, alpha, gamma, acc);
    }
  }

  static void accumulate(Weights& s, const Tile& tile, int rows, long d, const float* alpha,
                         const float* gamma, float* acc) {
    if (rows > 4) {
      decode_value(tile, d, s.decoded);
      return accumulate_all<true, false>(s, tile, rows, d, alpha, gamma, acc);
    }
    if (tile.begin > 0 || tile.end < kTile) {
      return accumulate_all<false, true>(s, tile, rows, d, alpha, gamma, acc);
    }
    accumulate_all<false, false>(s, tile, rows, d, alpha, gamma, acc);
  }
};

}  // namespace
}  // namespace kvq
#endif
