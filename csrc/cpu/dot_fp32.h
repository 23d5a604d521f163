// Portable dot products: decode the tile to fp32 once, then fp32 multiply-adds over it. Used for
// every code on AVX2 and generic machines, and for 8-bit floats on AVX-512 without BF16 + VBMI.
#pragma once

#include "tile.h"

namespace kvq {
namespace {

#if defined(__AVX512F__)
constexpr int kFp32Rows = 4, kFp32Lanes = 4;  // 16 zmm accumulators
#else
constexpr int kFp32Rows = 2, kFp32Lanes = 2;  // 8 ymm accumulators
#endif

// A field of sixteen 32-bit words as fp32 values of code C.
template <Code C>
KVQ_HD F16 decode_field(U16 words, int field) {
  constexpr int kBits = code_bits(C);
  const U16 c = (words >> (8 * (field % 4) + kBits * (field / 4))) & ((1u << kBits) - 1u);
  if constexpr (C == Code::kInt8) {
    return convert<F16>(cast<I16>(c) - 128);
  } else if constexpr (C == Code::kInt4) {
    return convert<F16>(cast<I16>(c));
  } else {
    // As Float8::decode in codec.h. Subnormals go through an integer conversion: as fp32
    // subnormals they would vanish where the process flushes those to zero.
    constexpr int kMantissa = C == Code::kFp8E5M2 ? 2 : 3;
    constexpr int kBias = C == Code::kFp8E5M2 ? 15 : 7;
    constexpr uint32_t kInf = C == Code::kFp8E5M2 ? 0x7Cu : 0x80u;
    constexpr uint32_t kNan = C == Code::kFp8E5M2 ? 0x7Du : 0x7Fu;
    const U16 mag = c & 0x7Fu;
    const F16 small = convert<F16>(cast<I16>(mag)) *
                      bits_float(static_cast<uint32_t>(127 + 1 - kBias - kMantissa) << 23);
    const U16 normal = (mag << (23 - kMantissa)) + (static_cast<uint32_t>(127 - kBias) << 23);
    U16 bits = select(mag < (1u << kMantissa), cast<U16>(small), normal);
    if constexpr (kInf < 0x80u) bits = select(mag == kInf, U16{} + 0x7F800000u, bits);
    bits = select(mag >= kNan, U16{} + 0x7FC00000u, bits);
    return cast<F16>(bits | ((c & 0x80u) << 24));
  }
}

template <Code C>
struct Fp32Dot {
  static constexpr int kWord = 32 / code_bits(C);

  struct Query {
    alignas(64) float q[kMaxRows * kMaxHead];
    float sum[kMaxRows];
  };
  struct Weights {
    alignas(64) float p[kMaxRows * kTile];
  };
  struct Tiles {  // a tile's K or V, decoded
    alignas(64) float decoded[kTile * kMaxHead];
  };

  static void set_query(Query& s, int row, long d, const float* q, float uniform) {
    F16 sum{};
    for (long i = 0; i < d; i += kLanes) {
      const F16 v = load16(q + i) * uniform;
      sum += v;
      save16(s.q + row * d + i, v);
    }
    s.sum[row] = reduce_add(sum);
  }

  template <int R>
  static void score_rows(const Query& s, const Tiles& tiles, int row, long d, float* scores) {
    for (int g = 0; g < kGroups; g += kFp32Lanes) {
      F16 acc[R][kFp32Lanes] = {};
      for (long i = 0; i < d; ++i) {
        F16 k[kFp32Lanes];
        for (int j = 0; j < kFp32Lanes; ++j)
          k[j] = load16(tiles.decoded + i * kTile + (g + j) * 16);
        for (int r = 0; r < R; ++r) {
          const float q = s.q[(row + r) * d + i];
          for (int j = 0; j < kFp32Lanes; ++j) acc[r][j] = fma(k[j], splat(q), acc[r][j]);
        }
      }
      for (int r = 0; r < R; ++r) {
        for (int j = 0; j < kFp32Lanes; ++j) {
          save16(scores + (row + r) * kTile + (g + j) * 16, acc[r][j]);
        }
      }
    }
  }

  // scores[row][token] = q . code, for all rows.
  static void score(const Query& s, Tiles& tiles, const Tile& tile, int rows, long d,
                    float* scores) {
    for (int g = 0; g < kGroups; ++g) {
      for (long w = 0; w < d / kWord; ++w) {
        prefetch(tile.next.key[g] + w * 64);
        const U16 words = load<U16>(tile.now.key[g] + w * 64);
        for (int f = 0; f < kWord; ++f) {
          save16(tiles.decoded + (w * kWord + f) * kTile + g * 16, decode_field<C>(words, f));
        }
      }
    }
    int r = 0;
    for (; r + kFp32Rows <= rows; r += kFp32Rows) score_rows<kFp32Rows>(s, tiles, r, d, scores);
    for (; r < rows; ++r) score_rows<1>(s, tiles, r, d, scores);
  }

  template <int N, bool kScaled>
  static KVQ_HD void set_weights(Weights& s, int row, const F16 (&w)[N][kGroups], F16 (&unit)[N],
                                 F16* /*bias*/) {
    for (int r = 0; r < N; ++r) {
      unit[r] = splat(1.0f);
      for (int g = 0; g < kGroups; ++g) save16(s.p + (row + r) * kTile + g * kLanes, w[r][g]);
    }
  }

  template <int R>
  static void accumulate_rows(const Weights& s, const Tiles& tiles, int row, long d,
                              const float* alpha, const float* gamma, float* acc) {
    for (long i = 0; i < d; i += kLanes) {
      F16 t[R] = {};
      for (int n = 0; n < kTile; ++n) {
        const F16 v = load16(tiles.decoded + n * d + i);
        for (int r = 0; r < R; ++r) t[r] = fma(v, splat(s.p[(row + r) * kTile + n]), t[r]);
      }
      for (int r = 0; r < R; ++r) {
        float* a = acc + (row + r) * d + i;
        save16(a, fma(load16(a), splat(alpha[row + r]), t[r] * gamma[row + r]));
      }
    }
  }

  // acc[row] = acc[row] * alpha[row] + (weights . code) * gamma[row].
  static void accumulate(const Weights& s, Tiles& tiles, const Tile& tile, int rows, long d,
                         const float* alpha, const float* gamma, float* acc) {
    for (int g = 0; g < kGroups; ++g) {
      for (int w = 0; w < kLanes / kWord; ++w) {
        for (long i = 0; i < d; i += kLanes) {
          const long at = (w * d + i) * 4;
          prefetch(tile.next.value[g] + at);
          const U16 words = load<U16>(tile.now.value[g] + at);
          for (int f = 0; f < kWord; ++f) {
            const int token = g * 16 + w * kWord + f;
            // Stale bytes may decode to NaN, and 0 * NaN is not 0.
            const bool live = token >= tile.begin && token < tile.end;
            save16(tiles.decoded + token * d + i, live ? decode_field<C>(words, f) : F16{});
          }
        }
      }
    }
    int r = 0;
    for (; r + kFp32Rows <= rows; r += kFp32Rows)
      accumulate_rows<kFp32Rows>(s, tiles, r, d, alpha, gamma, acc);
    for (; r < rows; ++r) accumulate_rows<1>(s, tiles, r, d, alpha, gamma, acc);
  }
};

}  // namespace
}  // namespace kvq
