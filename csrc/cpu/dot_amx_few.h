// Products of up to four query rows in the order in which TDPBF16PS adds them, by FMA: of 32
// channels (or tokens) the elements at even places of the pairs are summed apart from those at odd
// ones, from zero, then both are added to what came before. The tile instruction takes subnormals
// for zeros; neither operand has any here, and no sum can be one.
#pragma once

#include "amx_tiles.h"
#include "dot_bf16.h"

#if defined(KVQ_AMX)

namespace kvq {
namespace {

constexpr int kFewLines = 8;  // lines of four channels (or tokens) that are summed from zero

// Values too small to matter (2^-60) as zeros: whatever is left of limbs and products is normal.
KVQ_HD __m512 without_traces(F16 x) {
  return reinterpret_cast<__m512>(select(abs16(x) < 0x1p-60f, F16{}, x));
}

// Limbs as bf16_limbs leaves them, all high ones first.
KVQ_HD __m512i apart(__m512i limbs) {
  return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), limbs);
}

// The first rows' limbs in fp32, as elements follow each other in decoded pairs.
template <int kMost>
struct FewRows {
  alignas(64) float limbs[2][kPassRows][kMost];

  KVQ_HD void set(int row, long at, __m512i both) {
    if (row >= kPassRows) return;
    const auto wide = [](__m256i half) KVQ_UNROLLED {
      return reinterpret_cast<F16>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    };
    save16(limbs[0][row] + at, wide(_mm512_castsi512_si256(both)));
    save16(limbs[1][row] + at, wide(_mm512_extracti64x4_epi64(both, 1)));
  }
};

// A line of codes in fp32: elements at even places of its two pairs, then those at odd ones.
template <Code C>
KVQ_HD void decode_few(const Bf16Decoder<C>& decode, __m512i codes, F16 (&even)[2], F16 (&odd)[2]) {
  __m512bh pairs[2];
  decode(codes, pairs[0], pairs[1]);
  unroll<2>([&](auto i) KVQ_UNROLLED {
    const U16 words = reinterpret_cast<U16>(pairs[i]);
    even[i] = bits_as<F16>(words << 16);
    odd[i] = bits_as<F16>(words & 0xFFFF0000u);
  });
}

// sums[row][column] of `kLimbs` limbs, kFewLines lines of kColumns columns; line(w, j): codes.
template <Code C, int kRows, int kColumns, int kLimbs, int kMost, class Line>
KVQ_HD void add_lines(const Bf16Decoder<C>& decode, const FewRows<kMost>& few, long at, int lines,
                      const Line& line, F16 (&sums)[kRows][kColumns]) {
  F16 even[kLimbs][kRows][kColumns] = {}, odd[kLimbs][kRows][kColumns] = {};
  for (int w = 0; w < lines; ++w) {
    unroll<kColumns>([&](auto j) KVQ_UNROLLED {
      F16 e[2], o[2];
      decode_few(decode, line(w, j), e, o);
      unroll<kLimbs>([&](auto limb) KVQ_UNROLLED {
        unroll<kRows>([&](auto r) KVQ_UNROLLED {
          const float* q = few.limbs[limb][r] + at + w * 4;
          even[limb][r][j] = fma(e[0], splat(q[0]), even[limb][r][j]);
          odd[limb][r][j] = fma(o[0], splat(q[1]), odd[limb][r][j]);
          even[limb][r][j] = fma(e[1], splat(q[2]), even[limb][r][j]);
          odd[limb][r][j] = fma(o[1], splat(q[3]), odd[limb][r][j]);
        });
      });
    });
  }
  unroll<kRows>([&](auto r) KVQ_UNROLLED {
    unroll<kColumns>([&](auto j) KVQ_UNROLLED {
      unroll<kLimbs>([&](auto limb)
                         KVQ_UNROLLED { sums[r][j] += even[limb][r][j] + odd[limb][r][j]; });
    });
  });
}

// Columns at once: accumulators of two limbs fill the registers alone.
template <bool kSingle>
constexpr int kFewColumns = kSingle ? 2 : 1;

template <Code C, int kRows, bool kExact>
void score_few(const FewRows<kMaxHead>& few, const Tile& tile, long d, const float* step,
               float* scores) {
  constexpr int kColumns = kFewColumns<kExact>;
  const Bf16Decoder<C> decode;
  const long all = d / 4;
  for (int g = 0; g < kGroups; g += kColumns) {
    F16 sums[kRows][kColumns] = {};
    for (long first = 0; first < all; first += kFewLines) {
      const auto line = [&](int w, int j) KVQ_UNROLLED {
        const long at = (first + w) * 64;
        prefetch(tile.next.key[g + j] + at);
        return _mm512_loadu_si512(tile.now.key[g + j] + at);
      };
      const int lines = static_cast<int>(all - first < kFewLines ? all - first : kFewLines);
      add_lines<C, kRows, kColumns, kExact ? 1 : 2>(decode, few, first * 4, lines, line, sums);
    }
    unroll<kRows>([&](auto r) KVQ_UNROLLED {
      unroll<kColumns>([&](auto j) KVQ_UNROLLED {
        save16(scores + r * kTile + (g + j) * kLanes, sums[r][j] * step[r]);
      });
    });
  }
}

template <Code C, int kRows, int kColumns, bool kSingle, bool kEdge>
KVQ_HD void accumulate_few_channels(const FewRows<kTile>& few, const Tile& tile, long d, long dim,
                                    const float* alpha, const float* gamma, float* acc) {
  const Bf16Decoder<C> decode;
  F16 sums[kRows][kColumns] = {};
  for (int first = 0; first < kTile / 4; first += kFewLines) {
    const auto line = [&](int w, int j) KVQ_UNROLLED {
      const int word = first + w;
      const long at = (word % 4 * d + dim) * 4 + j * 64;
      prefetch(tile.next.value[word / 4] + at);
      const __m512i codes = _mm512_loadu_si512(tile.now.value[word / 4] + at);
      if constexpr (!kEdge) return codes;
      return _mm512_and_si512(codes, Bf16Dot<C>::live_bytes(tile, word * 4));
    };
    add_lines<C, kRows, kColumns, kSingle ? 1 : 2>(decode, few, first * 4, kFewLines, line, sums);
  }
  unroll<kRows>([&](auto r) KVQ_UNROLLED {
    unroll<kColumns>([&](auto j) KVQ_UNROLLED {
      float* a = acc + r * d + dim + j * kLanes;
      save16(a, fma(load16(a), splat(alpha[r]), sums[r][j] * gamma[r]));
    });
  });
}

template <Code C, int kRows, bool kSingle>
void accumulate_few(const FewRows<kTile>& few, const Tile& tile, long d, const float* alpha,
                    const float* gamma, float* acc) {
  constexpr int kColumns = kFewColumns<kSingle>;
  const auto run = [&](auto edge) KVQ_UNROLLED {
    long dim = 0;
    for (; dim + kColumns * kLanes <= d; dim += kColumns * kLanes) {
      accumulate_few_channels<C, kRows, kColumns, kSingle, edge>(few, tile, d, dim, alpha, gamma,
                                                                 acc);
    }
    if (dim < d) {
      accumulate_few_channels<C, kRows, 1, kSingle, edge>(few, tile, d, dim, alpha, gamma, acc);
    }
  };
  tile.begin > 0 || tile.end < kTile ? run(Int<true>{}) : run(Int<false>{});
}

}  // namespace
}  // namespace kvq
#endif  // KVQ_AMX
