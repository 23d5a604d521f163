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

  // Limbs as the loops read them: blocks of four rows side by side.
  struct Query {
    alignas(64) int8_t limbs[kMaxRows * kMaxHead * 2];  // [row/4][dim/4][row%4][limb][4 dims]
    int32_t total[kMaxRows];                            // sum of the limbs' integers
    float step[kMaxRows];                               // value of one unit of them
    float sum[kMaxRows];                                // sum of q as they hold it
  };
  struct Weights {
    alignas(64) int8_t limbs[kMaxRows * kTile * 2];  // [row/2][token/4][row%2][limb][4 tokens]
  };

  struct Tiles {};  // codes are multiplied as they lie

  static KVQ_HD const int8_t* query_at(const Query& s, int row, long dim) {
    return s.limbs + row * (kMaxHead * 2) + dim / 4 * (kBlockRows * 8);
  }
  static KVQ_HD const int8_t* weights_at(const Weights& s, int row, int token) {
    return s.limbs + row / 2 * (kTile * 4) + token / 4 * 16 + row % 2 * 8;
  }

  // Two rows' values times their factors, rounded, as limbs: per four lanes 4 high bytes and 4 low
  // ones of the first row, then the second's. Totals gather kRaised + the integers, modulo 2^32.
  static KVQ_HD __m512i limbs(__m512 a, __m512 fa, __m512 b, __m512 fb, __m512i& ta, __m512i& tb) {
    // 1.5 * 2^23 rounds to an integer in the mantissa; 128 more makes the low limb a flipped byte.
    const __m512 magic = _mm512_set1_ps(12582912.0f + 128.0f);
    const __m512i x = _mm512_castps_si512(_mm512_fmadd_ps(a, fa, magic));
    const __m512i y = _mm512_castps_si512(_mm512_fmadd_ps(b, fb, magic));
    ta = _mm512_add_epi32(ta, x);
    tb = _mm512_add_epi32(tb, y);
    const __m512i both = _mm512_mask_blend_epi16(0xAAAAAAAAu, x, _mm512_slli_epi32(y, 16));
    const __m512i order = _mm512_set4_epi32(0x0E0A0602, 0x0F0B0703, 0x0C080400, 0x0D090501);
    const __m512i flip =
        _mm512_set4_epi32(static_cast<int>(0x80808080), 0, static_cast<int>(0x80808080), 0);
    return _mm512_xor_si512(_mm512_shuffle_epi8(both, order), flip);
  }
  static constexpr int32_t kRaised = 0x4B400000 + 128;

  // `uniform` is a factor all channels share; it joins the step, out of the rounding.
  static void set_query(Query& s, int row, long d, const float* q, float uniform) {
    F16 peak{}, nan{};
    for (long i = 0; i < d; i += kLanes) {
      const F16 v = load16(q + i);
      peak = max16(peak, v < 0.0f ? -v : v);
      nan += v * 0.0f;  // integers would drop a NaN
    }
    const float amax = peak16(peak)[0];
    const __m512 inverse = _mm512_set1_ps(amax > 0.0f ? kLimbMax / amax : 0.0f);
    __m512i total = _mm512_setzero_si512(), unused = total;
    const __m512 zero = _mm512_setzero_ps();
    for (long i = 0; i < d; i += kLanes) {
      alignas(64) int8_t pair[64];
      const __m512 v = reinterpret_cast<__m512>(load16(q + i));
      _mm512_store_si512(pair, limbs(v, inverse, zero, zero, total, unused));
      const long at = row / kBlockRows * (kBlockRows * kMaxHead * 2) + row % kBlockRows * 8;
      for (int j = 0; j < 4; ++j) {
        memcpy(s.limbs + at + (i / 4 + j) * (kBlockRows * 8), pair + j * 16, 8);
      }
    }
    const uint32_t raised = static_cast<uint32_t>(kRaised) * static_cast<uint32_t>(d);
    s.total[row] =
        static_cast<int32_t>(static_cast<uint32_t>(_mm512_reduce_add_epi32(total)) - raised);
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

  // Rows' sums over two groups of sixteen tokens, or two of sixteen channels: a pair per limb.
  template <int R>
  struct Sums {
    __m512i high[R][2], low[R][2];
  };

  // One part of two lines against R rows. `at`: the first row's limbs; `next(r)` bytes further on
  // are row r's.
  template <int P, int R, class Next>
  static KVQ_HD void multiply(Sums<R>& sums, __m512i line0, __m512i line1, const int8_t* at,
                              const Next& next) {
    const __m512i c0 = operand<P>(line0), c1 = operand<P>(line1);
    unroll<R>([&](auto r) KVQ_UNROLLED {
      const __m512i high = broadcast(at + next(r)), low = broadcast(at + next(r) + 4);
      dpbusd(sums.high[r][0], c0, high);
      dpbusd(sums.high[r][1], c1, high);
      dpbusd(sums.low[r][0], c0, low);
      dpbusd(sums.low[r][1], c1, low);
    });
  }

  template <int R, bool kFetch>
  static void score_rows(const Query& s, const Tile& tile, int row, long d, float* scores) {
    const auto next = [](int r) KVQ_UNROLLED { return r * 8; };
    for (int g = 0; g < kGroups; g += 2) {
      Sums<R> sums;
      unroll<R>([&](auto r) KVQ_UNROLLED {
        sums.high[r][0] = sums.high[r][1] = _mm512_setzero_si512();
        sums.low[r][0] = sums.low[r][1] = _mm512_set1_epi32(-kOffset * s.total[row + r]);
      });
      const uint8_t *k0 = tile.now.key[g], *k1 = tile.now.key[g + 1];
      const uint8_t *n0 = tile.next.key[g], *n1 = tile.next.key[g + 1];
      const int8_t* q = query_at(s, row, 0);
      for (long at = 0; at < d / kWord * 64; at += 64) {
        if constexpr (kFetch) {
          prefetch(n0 + at);
          prefetch(n1 + at);
        }
        const __m512i line0 = _mm512_loadu_si512(k0 + at), line1 = _mm512_loadu_si512(k1 + at);
        unroll<kParts>([&](auto part) KVQ_UNROLLED {
          multiply<part>(sums, line0, line1, q, next);
          q += kBlockRows * 8;
        });
      }
      unroll<R>([&](auto r) KVQ_UNROLLED {
        float* out = scores + (row + r) * kTile + g * kLanes;
        save16(out, combine(sums.high[r][0], sums.low[r][0]) * s.step[row + r]);
        save16(out + kLanes, combine(sums.high[r][1], sums.low[r][1]) * s.step[row + r]);
      });
    }
  }

  static void score(const Query& s, Tiles&, const Tile& tile, int rows, long d, float* scores) {
    for_row_blocks(rows, [&](auto n, int row) {
      constexpr int R = decltype(n)::value;
      if (row == 0) return score_rows<R, true>(s, tile, row, d, scores);
      score_rows<R, false>(s, tile, row, d, scores);
    });
  }

  // Quantized relative to this tile's own maximum: relative to the running one, a long flat
  // context would round to zero while it still counts in the denominator. That maximum is 1
  // unless scales joined the weights (`kScaled`). The codes' offset goes to `bias`; `unit` is what
  // one step of the products is worth. One row or two, from an even one on.
  template <int N, bool kScaled>
  static KVQ_HD void set_weights(Weights& s, int row, const F16 (&w)[N][kGroups], F16 (&unit)[N],
                                 F16* bias) {
    __m512 factor[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    __m512i total[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    unroll<N>([&](auto r) KVQ_UNROLLED {
      F16 most = splat(1.0f);
      if constexpr (kScaled) {
        most = F16{};
        unroll<kGroups>([&](auto g) KVQ_UNROLLED { most = max16(most, w[r][g]); });
        most = peak16(most);
      }
      factor[r] = reinterpret_cast<__m512>(most > 0.0f ? kLimbMax / most : F16{});
      unit[r] = most * (1.0f / kLimbMax);
    });
    int8_t* out = s.limbs + row / 2 * (kTile * 4);
    unroll<kGroups>([&](auto g) KVQ_UNROLLED {
      const __m512 a = reinterpret_cast<__m512>(w[0][g]), b = reinterpret_cast<__m512>(w[N - 1][g]);
      _mm512_store_si512(out + g * 64, limbs(a, factor[0], b, factor[1], total[0], total[1]));
    });
    if constexpr (kOffset == 0) return;
    unroll<N>([&](auto r) KVQ_UNROLLED {
      const __m512i raised = _mm512_set1_epi32(
          static_cast<int>(static_cast<uint32_t>(kRaised) * static_cast<uint32_t>(kGroups)));
      const __m512 sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(total[r], raised));
      bias[r] = fma(reinterpret_cast<F16>(sum), unit[r] * static_cast<float>(-kOffset), bias[r]);
    });
  }

  // 32 channels from `dim` on, or the last 16 twice (d is a multiple of 16).
  template <int R, bool kFetch>
  static void accumulate_rows(const Weights& s, const Tile& tile, int row, long d, long dim,
                              const float* alpha, const float* gamma, float* acc) {
    const auto next = [](int r) KVQ_UNROLLED { return r / 2 * (kTile * 4) + r % 2 * 8; };
    const long second = dim + kLanes < d ? 64 : 0;
    Sums<R> sums;
    unroll<R>([&](auto r) KVQ_UNROLLED {
      sums.high[r][0] = sums.high[r][1] = _mm512_setzero_si512();
      sums.low[r][0] = sums.low[r][1] = _mm512_setzero_si512();
    });
    const int8_t* p = weights_at(s, row, 0);
    for (int g = 0; g < kGroups; ++g) {
      unroll<kLanes / kWord>([&](auto w) KVQ_UNROLLED {
        const long at = (w * d + dim) * 4;
        if constexpr (kFetch) {
          prefetch(tile.next.value[g] + at);
          prefetch(tile.next.value[g] + at + second);
        }
        const __m512i line0 = _mm512_loadu_si512(tile.now.value[g] + at);
        const __m512i line1 = _mm512_loadu_si512(tile.now.value[g] + at + second);
        unroll<kParts>([&](auto part) KVQ_UNROLLED {
          multiply<part>(sums, line0, line1, p, next);
          p += 16;
        });
      });
    }
    unroll<R>([&](auto r) KVQ_UNROLLED {
      float* a = acc + (row + r) * d + dim;
      const F16 shrink = splat(alpha[row + r]), unit = splat(gamma[row + r]);
      save16(a, fma(load16(a), shrink, combine(sums.high[r][0], sums.low[r][0]) * unit));
      if (second == 0) return;
      a += kLanes;
      save16(a, fma(load16(a), shrink, combine(sums.high[r][1], sums.low[r][1]) * unit));
    });
  }

  template <int R, bool kFetch>
  static void accumulate_dims(const Weights& s, const Tile& tile, int row, long d,
                              const float* alpha, const float* gamma, float* acc) {
    for (long i = 0; i < d; i += 32) {
      accumulate_rows<R, kFetch>(s, tile, row, d, i, alpha, gamma, acc);
    }
  }

  static void accumulate(const Weights& s, Tiles&, const Tile& tile, int rows, long d,
                         const float* alpha, const float* gamma, float* acc) {
    for_row_blocks(rows, [&](auto n, int row) {
      constexpr int R = decltype(n)::value;
      if (row == 0) return accumulate_dims<R, true>(s, tile, row, d, alpha, gamma, acc);
      accumulate_dims<R, false>(s, tile, row, d, alpha, gamma, acc);
    });
  }
};

}  // namespace
}  // namespace kvq
#endif  // __AVX512VNNI__
