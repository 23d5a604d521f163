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

// Sixteen values as bf16 limbs, high + low, 16 bits of mantissa in all. Per four lanes, in the
// pair order that the decoder gives codes: high 0 2 1 3, then low 0 2 1 3.
KVQ_HD __m512i bf16_limbs(__m512 x, __mmask16& inexact) {
  const __m512i bits = _mm512_castps_si512(x),
                top = _mm512_set1_epi32(static_cast<int>(0xFFFF0000));
  const __m512 rest = _mm512_sub_ps(x, _mm512_castsi512_ps(_mm512_and_si512(bits, top)));
  inexact |= _mm512_cmp_ps_mask(rest, _mm512_setzero_ps(), _CMP_NEQ_UQ);
  const __m512i both =
      _mm512_mask_blend_epi16(0xAAAAAAAAu, _mm512_srli_epi32(bits, 16), _mm512_castps_si512(rest));
  const __m512i order = _mm512_set4_epi32(0x0F0E0706, 0x0B0A0302, 0x0D0C0504, 0x09080100);
  return _mm512_shuffle_epi8(both, order);
}

struct Bf16Weights {
  alignas(64) uint32_t limbs[kMaxRows * kTile];  // [row][token/4][limb][2 pairs]
  bool single;                                   // low limbs are zero
};

// One limb for bf16 outputs, unless scales of tokens joined the weights: a third less of a
// prefill's products (1.2x to 1.5x of vLLM's). RMS error up to 1.36 of vLLM's bf16 kernel's, up
// to 1.65 with token scales: the largest weight is 1, exactly, only without them.
KVQ_HD void fit_output(Bf16Weights& s, Activation type, bool scaled) {
  s.single = type == Activation::kBFloat16 && !scaled;
}

// Sixteen weights, rounded to nearest even, in the order of bf16_limbs.
KVQ_HD __m512i bf16_single(__m512 x) {
  const __m512i order = _mm512_set4_epi32(-1, -1, 0x0D0C0504, 0x09080100);
  return _mm512_shuffle_epi8(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)), order);
}

// acc += pairs of bf16; asm for the reason given in dot_vnni.h.
KVQ_HD void dpbf16(__m512& acc, __m512bh a, __m512bh b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
}

template <Code C>
struct Bf16Dot {
  static constexpr bool kPairs = false;
  static constexpr int kWord = 4;

  struct Query {
    // [row/4][dim/4][row%4][limb][2 pairs]: one line holds four dims of four rows.
    alignas(64) uint32_t limbs[kMaxRows * kMaxHead];
    float step[kMaxRows];
    float sum[kMaxRows];  // affine codes only; no 8-bit float is
    bool exact[kMaxRows];
  };
  using Weights = Bf16Weights;
  // What is decoded at once: K of kStepGroups groups, or V of as many times sixteen channels. A
  // whole tile of either would leave L1.
  static constexpr int kStepGroups = 4;
  struct Tiles {
    alignas(64) uint8_t decoded[kMaxHead * kStepGroups * kLanes * 2];
  };

  static void set_query(Query& s, int row, long d, const float* q, float uniform) {
    __mmask16 inexact = 0;
    uint32_t* to = s.limbs + row / kPassRows * (kPassRows * kMaxHead) + row % kPassRows * 4;
    for (long i = 0; i < d; i += kLanes) {
      alignas(64) uint32_t words[kLanes];
      _mm512_store_si512(words, bf16_limbs(reinterpret_cast<__m512>(load16(q + i)), inexact));
      for (int j = 0; j < 4; ++j) memcpy(to + (i / 4 + j) * (kPassRows * 4), words + j * 4, 16);
    }
    s.exact[row] = inexact == 0;
    s.step[row] = uniform;
    s.sum[row] = 0.0f;
  }

  static KVQ_HD __m512bh broadcast(const uint32_t* p) {
    return (__m512bh)_mm512_set1_epi32(static_cast<int32_t>(*p));
  }

  // More than four rows read a tile more than once: then it is decoded once, to `decoded`.
  static void decode_key(const Tile& tile, long d, int group, uint8_t* decoded) {
    const Bf16Decoder<C> decode;
    for (long w = 0; w < d / kWord; ++w) {
#pragma GCC unroll 8
      for (int g = 0; g < kStepGroups; ++g) {
        prefetch(tile.next.key[group + g] + w * 64);
        __m512bh even, odd;
        decode(_mm512_loadu_si512(tile.now.key[group + g] + w * 64), even, odd);
        save_pair(decoded + (w * kStepGroups + g) * 128, even, odd);
      }
    }
  }

  template <int R, bool kExact, bool kDecoded>
  static void score_rows(const Query& s, const Tiles& tiles, const Tile& tile, int row, long d,
                         int group, float* scores) {
    const Bf16Decoder<C> decode;
    const uint32_t* q = s.limbs + row * kMaxHead;
    __m512 acc[R][kStepGroups];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int g = 0; g < kStepGroups; ++g) acc[r][g] = _mm512_setzero_ps();
    }
    for (long w = 0; w < d / kWord; ++w) {
#pragma GCC unroll 4
      for (int g = 0; g < kStepGroups; ++g) {
        __m512bh even, odd;
        if constexpr (kDecoded) {
          load_pair(tiles.decoded + (w * kStepGroups + g) * 128, even, odd);
        } else {
          prefetch(tile.next.key[group + g] + w * 64);
          decode(_mm512_loadu_si512(tile.now.key[group + g] + w * 64), even, odd);
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const uint32_t* at = q + w * (kPassRows * 4) + r * 4;
          dpbf16(acc[r][g], even, broadcast(at));
          dpbf16(acc[r][g], odd, broadcast(at + 1));
          if constexpr (!kExact) {
            dpbf16(acc[r][g], even, broadcast(at + 2));
            dpbf16(acc[r][g], odd, broadcast(at + 3));
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int g = 0; g < kStepGroups; ++g) {
        _mm512_storeu_ps(scores + (row + r) * kTile + (group + g) * 16,
                         _mm512_mul_ps(acc[r][g], _mm512_set1_ps(s.step[row + r])));
      }
    }
  }

  template <int R, bool kDecoded>
  static void score_pass(const Query& s, const Tiles& tiles, const Tile& tile, int row, long d,
                         int group, float* scores) {
    bool exact = true;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) exact &= s.exact[row + r];
    // A zero low limb adds exact zeros, so a row's result does not depend on its neighbours.
    if (exact) return score_rows<R, true, kDecoded>(s, tiles, tile, row, d, group, scores);
    score_rows<R, false, kDecoded>(s, tiles, tile, row, d, group, scores);
  }

  static void score(const Query& s, Tiles& tiles, const Tile& tile, int rows, long d,
                    float* scores) {
    for (int group = 0; group < kGroups; group += kStepGroups) {
      if (rows > kPassRows) decode_key(tile, d, group, tiles.decoded);
      for_each_pass(rows, [&](auto n, int row) {
        constexpr int R = decltype(n)::value;
        if (rows > kPassRows) {
          return score_pass<R, true>(s, tiles, tile, row, d, group, scores);
        }
        score_pass<R, false>(s, tiles, tile, row, d, group, scores);
      });
    }
  }

  template <int N, bool kScaled>
  static KVQ_HD void set_weights(Weights& s, int row, const F16 (&w)[N][kGroups], F16 (&unit)[N],
                                 F16* /*bias*/) {
    __mmask16 unused = 0;
    unroll<N>([&](auto r) KVQ_UNROLLED {
      unit[r] = splat(1.0f);
      unroll<kGroups>([&](auto g) KVQ_UNROLLED {
        const __m512 x = reinterpret_cast<__m512>(w[r][g]);
        _mm512_store_si512(s.limbs + (row + r) * kTile + g * kLanes,
                           s.single ? bf16_single(x) : bf16_limbs(x, unused));
      });
    });
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

  // N times sixteen channels from `dim` on.
  static void decode_value(const Tile& tile, long d, long dim, int n, uint8_t* decoded) {
    const Bf16Decoder<C> decode;
    for (int w = 0; w < kTile / kWord; ++w) {
      const __m512i live = live_bytes(tile, w * kWord);
      const long at = (w % kWord * d + dim) * 4;
      for (int j = 0; j < n; ++j) {
        prefetch(tile.next.value[w / kWord] + at + j * 64);
        const __m512i line = _mm512_loadu_si512(tile.now.value[w / kWord] + at + j * 64);
        __m512bh even, odd;
        decode(_mm512_and_si512(line, live), even, odd);
        save_pair(decoded + (w * kStepGroups + j) * 128, even, odd);
      }
    }
  }

  template <int R, int N, bool kDecoded, bool kEdge, bool kSingle>
  static void accumulate_rows(const Weights& s, const Tiles& tiles, const Tile& tile, int row,
                              long d, long dim, const float* alpha, const float* gamma,
                              float* acc) {
    const Bf16Decoder<C> decode;
    __m512 t[R][N];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) t[r][j] = _mm512_setzero_ps();
    }
    for (int w = 0; w < kTile / kWord; ++w) {
      const long at = (w % kWord * d + dim) * 4;
      const uint32_t* p = s.limbs + row * kTile + w * kWord;
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) {
        __m512bh even, odd;
        if constexpr (kDecoded) {
          load_pair(tiles.decoded + (w * kStepGroups + j) * 128, even, odd);
        } else {
          prefetch(tile.next.value[w / kWord] + at + j * 64);
          __m512i line = _mm512_loadu_si512(tile.now.value[w / kWord] + at + j * 64);
          if constexpr (kEdge) line = _mm512_and_si512(line, live_bytes(tile, w * kWord));
          decode(line, even, odd);
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          dpbf16(t[r][j], even, broadcast(p + r * kTile));
          dpbf16(t[r][j], odd, broadcast(p + r * kTile + 1));
          if constexpr (!kSingle) {
            dpbf16(t[r][j], even, broadcast(p + r * kTile + 2));
            dpbf16(t[r][j], odd, broadcast(p + r * kTile + 3));
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) {
        float* a = acc + (row + r) * d + dim + j * 16;
        const F16 product = reinterpret_cast<F16>(t[r][j]) * gamma[row + r];
        save16(a, fma(load16(a), splat(alpha[row + r]), product));
      }
    }
  }

  template <int N, bool kSingle>
  static void accumulate_dims(const Weights& s, Tiles& tiles, const Tile& tile, int rows, long d,
                              long dim, const float* alpha, const float* gamma, float* acc) {
    const bool decoded = rows > kPassRows, edge = tile.begin > 0 || tile.end < kTile;
    if (decoded) decode_value(tile, d, dim, N, tiles.decoded);
    for_each_pass(rows, [&](auto n, int row) {
      constexpr int R = decltype(n)::value;
      const auto run = [&](auto decoded, auto edge) {
        accumulate_rows<R, N, decoded, edge, kSingle>(s, tiles, tile, row, d, dim, alpha, gamma,
                                                      acc);
      };
      if (decoded) return run(Int<true>{}, Int<false>{});
      edge ? run(Int<false>{}, Int<true>{}) : run(Int<false>{}, Int<false>{});
    });
  }

  template <bool kSingle>
  static void accumulate_all(const Weights& s, Tiles& tiles, const Tile& tile, int rows, long d,
                             const float* alpha, const float* gamma, float* acc) {
    long dim = 0;
    for (; dim + kStepGroups * kLanes <= d; dim += kStepGroups * kLanes) {
      accumulate_dims<kStepGroups, kSingle>(s, tiles, tile, rows, d, dim, alpha, gamma, acc);
    }
    for (; dim < d; dim += kLanes) {
      accumulate_dims<1, kSingle>(s, tiles, tile, rows, d, dim, alpha, gamma, acc);
    }
  }

  static void accumulate(const Weights& s, Tiles& tiles, const Tile& tile, int rows, long d,
                         const float* alpha, const float* gamma, float* acc) {
    s.single ? accumulate_all<true>(s, tiles, tile, rows, d, alpha, gamma, acc)
             : accumulate_all<false>(s, tiles, tile, rows, d, alpha, gamma, acc);
  }
};

}  // namespace
}  // namespace kvq
#endif
