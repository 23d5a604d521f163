// Portable dot products: decode the tile to fp32 once, then fp32 multiply-adds over it. Used for
// every code on AVX2 and generic machines, and for 8-bit floats on those with integer dot products
// but without AVX-512 BF16 + VBMI.
#pragma once

#include "sealed.h"
#include "tile.h"

namespace kvq {
namespace {

// Rows of a pass over the decoded tile, and the F16 of it that a pass of so many rows takes.
#if defined(__AVX512F__)
constexpr int kFp32Rows = 4;
constexpr int fp32_vectors(int /*rows*/) { return 4; }  // 16 zmm accumulators
#elif defined(__AVX2__)
constexpr int kFp32Rows = 2;
constexpr int fp32_vectors(int rows) { return rows == 1 ? 4 : 2; }  // 8 ymm accumulators
#else
constexpr int kFp32Rows = 2;
constexpr int fp32_vectors(int rows) { return rows == 1 ? 2 : 1; }  // 8 xmm accumulators
#endif

// A field of sixteen 32-bit words as fp32 values of code C.
template <Code C>
KVQ_HD F16 decode_field(U16 words, int field) {
  constexpr int kBits = code_bits(C);
  const U16 c = (words >> (8 * (field % 4) + kBits * (field / 4))) & ((1u << kBits) - 1u);
  if constexpr (C == Code::kInt8) {
    return convert<F16>(cast<I16>(c) - 128);
  } else if constexpr (C == Code::kInt4 || C == Code::kInt2) {
    return convert<F16>(cast<I16>(c));
  } else {
    // As Float8::decode in codec.h. Subnormals go through an integer conversion: as fp32
    // subnormals they would vanish where the process flushes those to zero.
    constexpr int kMantissa = C == Code::kFp8E5M2 ? 2 : 3;
    constexpr int kBias = C == Code::kFp8E5M2 ? 15 : 7;
    constexpr int kInf = C == Code::kFp8E5M2 ? 0x7C : 0x80;
    constexpr int kNan = C == Code::kFp8E5M2 ? 0x7D : 0x7F;
    const I16 mag = cast<I16>(c & 0x7Fu);  // signed: SSE and AVX2 compare no others
    const F16 small =
        convert<F16>(mag) * bits_float(static_cast<uint32_t>(127 + 1 - kBias - kMantissa) << 23);
    const I16 normal = (mag << (23 - kMantissa)) + ((127 - kBias) << 23);
    I16 bits = select(mag < (1 << kMantissa), cast<I16>(small), normal);
    if constexpr (kInf < 0x80) bits = select(mag == kInf, I16{} + 0x7F800000, bits);
    bits = select(mag >= kNan, I16{} + 0x7FC00000, bits);
    return cast<F16>(cast<U16>(bits) | ((c & 0x80u) << 24));
  }
}

template <Code C>
struct Fp32Dot {
  static constexpr bool kPairs = false;
  static constexpr int kWord = 32 / code_bits(C);

  struct Query {
    alignas(64) float q[kMaxRows * kMaxHead];
    float sum[kMaxRows];
  };
  struct Weights {
    alignas(64) float p[kMaxRows * kTile];
  };
  // What is decoded at once, which L1 holds: K of kStepGroups groups, [channel][token], or V of as
  // many times sixteen channels, [token][channel].
  static constexpr int kStepGroups = 4, kStep = kStepGroups * kLanes;
  struct Tiles {
    alignas(64) float decoded[kStep * (kMaxHead > kTile ? kMaxHead : kTile)];
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
  static void score_rows(const Query& s, const Tiles& tiles, int row, long d, int first,
                         float* scores) {
    constexpr int kVectors = fp32_vectors(R);
    for (int g = 0; g < kStepGroups; g += kVectors) {
      F16 sum[R][kVectors] = {};
      for (long i = 0; i < d; ++i) {
        F16 k[kVectors];
        const float* at = tiles.decoded + i * kStep + g * kLanes;
        unroll<kVectors>([&](auto j) KVQ_UNROLLED { k[j] = load16(at + j * kLanes); });
        unroll<R>([&](auto r) KVQ_UNROLLED {
          const F16 q = splat(s.q[(row + r) * d + i]);
          unroll<kVectors>([&](auto j) KVQ_UNROLLED { sum[r][j] = fma(k[j], q, sum[r][j]); });
        });
      }
      unroll<R>([&](auto r) KVQ_UNROLLED {
        float* out = scores + (row + r) * kTile + (first + g) * kLanes;
        unroll<kVectors>([&](auto j) KVQ_UNROLLED { save16(out + j * kLanes, sum[r][j]); });
      });
    }
  }

  // scores[row][token] = q . code, for all rows.
  static void score(const Query& s, Tiles& tiles, const Tile& tile, int rows, long d,
                    float* scores) {
    for (int g = 0; g < kGroups; ++g) {
      float* to = tiles.decoded + g % kStepGroups * kLanes;
      for (long w = 0; w < d / kWord; ++w) {
        prefetch(tile.next.key[g] + w * 64);
        const U16 words = load<U16>(tile.now.key[g] + w * 64);
        unroll<kWord>([&](auto f) KVQ_UNROLLED {
          save16(to + (w * kWord + f) * kStep, decode_field<C>(words, f));
        });
      }
      score_decoded(s, tiles, rows, d, g, scores);
    }
  }

  // All groups that are decoded, once group g, the last of them, is.
  static void score_decoded(const Query& s, const Tiles& tiles, int rows, long d, int g,
                            float* scores) {
    if (g % kStepGroups != kStepGroups - 1) return;
    for_each_pass<kFp32Rows>(rows, [&](auto n, int row) {
      score_rows<decltype(n)::value>(s, tiles, row, d, g + 1 - kStepGroups, scores);
    });
  }

  template <int N, bool kScaled>
  static KVQ_HD void set_weights(Weights& s, int row, const F16 (&w)[N][kGroups], F16 (&unit)[N],
                                 F16* /*bias*/) {
    for (int r = 0; r < N; ++r) {
      unit[r] = splat(1.0f);
      for (int g = 0; g < kGroups; ++g) save16(s.p + (row + r) * kTile + g * kLanes, w[r][g]);
    }
  }

  // 16 * kVectors channels from `dim` on, the decoded ones from `at` on.
  template <int R, int kVectors>
  static void accumulate_rows(const Weights& s, const Tiles& tiles, int row, long d, long dim,
                              long at, const float* alpha, const float* gamma, float* acc) {
    F16 sum[R][kVectors] = {};
    for (int n = 0; n < kTile; ++n) {
      F16 v[kVectors];
      const float* from = tiles.decoded + n * kStep + at;
      unroll<kVectors>([&](auto j) KVQ_UNROLLED { v[j] = load16(from + j * kLanes); });
      unroll<R>([&](auto r) KVQ_UNROLLED {
        const F16 p = splat(s.p[(row + r) * kTile + n]);
        unroll<kVectors>([&](auto j) KVQ_UNROLLED { sum[r][j] = fma(v[j], p, sum[r][j]); });
      });
    }
    unroll<R>([&](auto r) KVQ_UNROLLED {
      float* a = acc + (row + r) * d + dim;
      const F16 shrink = splat(alpha[row + r]), unit = splat(gamma[row + r]);
      unroll<kVectors>([&](auto j) KVQ_UNROLLED {
        save16(a + j * kLanes, fma(load16(a + j * kLanes), shrink, sum[r][j] * unit));
      });
    });
  }

  // acc[row] = acc[row] * alpha[row] + (weights . code) * gamma[row].
  static void accumulate(const Weights& s, Tiles& tiles, const Tile& tile, int rows, long d,
                         const float* alpha, const float* gamma, float* acc) {
    for (long dim = 0; dim < d; dim += kStep) {
      const long end = dim + kStep < d ? dim + kStep : d;
      for (int g = 0; g < kGroups; ++g) {
        for (int w = 0; w < kLanes / kWord; ++w) {
          for (long i = dim; i < end; i += kLanes) {
            const long at = (w * d + i) * 4;
            prefetch(tile.next.value[g] + at);
            const U16 words = load<U16>(tile.now.value[g] + at);
            unroll<kWord>([&](auto f) KVQ_UNROLLED {
              const int token = g * 16 + w * kWord + f;
              // Stale bytes may decode to NaN, and 0 * NaN is not 0.
              const bool live = token >= tile.begin && token < tile.end;
              save16(tiles.decoded + token * kStep + i - dim,
                     live ? decode_field<C>(words, f) : F16{});
            });
          }
        }
      }
      accumulate_decoded(s, tiles, rows, d, dim, end, alpha, gamma, acc);
    }
  }

  // Channels [dim, end), which are decoded.
  static void accumulate_decoded(const Weights& s, const Tiles& tiles, int rows, long d, long dim,
                                 long end, const float* alpha, const float* gamma, float* acc) {
    for_each_pass<kFp32Rows>(rows, [&](auto n, int row) {
      constexpr int R = decltype(n)::value, kVectors = fp32_vectors(R);
      long i = dim;
      for (; i + kVectors * kLanes <= end; i += kVectors * kLanes) {
        accumulate_rows<R, kVectors>(s, tiles, row, d, i, i - dim, alpha, gamma, acc);
      }
      for (; i < end; i += kLanes) {
        accumulate_rows<R, 1>(s, tiles, row, d, i, i - dim, alpha, gamma, acc);
      }
    });
  }
};

// K of sealed rows: a scale and a min per channel and kSealed tokens, into the decoded tile.
template <Code C, Grouping G>
struct SealedFp32Key : Fp32Dot<C> {
  using Base = Fp32Dot<C>;
  struct Tiles : Base::Tiles {
    GroupScales scales;
  };

  static float first_score(const typename Base::Query& s, int row, const FirstRow& first) {
    return first.score(s.q + row * first.d);
  }

  static void score(const typename Base::Query& s, Tiles& tiles, const Tile& tile, int rows, long d,
                    float* scores) {
    using Step = KeyStep<C>;
    for (int g = 0; g < kGroups; ++g) {
      if (g % kSealedGroups == 0) tiles.scales.template load<G>(tile.now.key_metadata[g], d);
      for (long step = 0; step < d / Step::kChannels; ++step) {
        U16 line[Step::kLines];
        unroll<Step::kLines>([&](auto i) KVQ_UNROLLED {
          const long at = Step::line(i, step, d);
          prefetch(tile.next.key[g] + at);
          line[i] = load<U16>(tile.now.key[g] + at);
        });
        unroll<Step::kChannels / 4>([&](auto operand) KVQ_UNROLLED {
          const U16 codes = Step::template operand<operand>(line);
          for (int f = 0; f < 4; ++f) {
            const long i = step * Step::kChannels + operand * 4 + f;
            const F16 code = convert<F16>(cast<I16>((codes >> (8 * f)) & 0xFFu));
            save16(tiles.decoded + i * Base::kStep + g % Base::kStepGroups * kLanes,
                   fma(code, splat(tiles.scales.scale[i]), splat(tiles.scales.minimum[i])));
          }
        });
      }
      Base::score_decoded(s, tiles, rows, d, g, scores);
    }
  }
};

// V of sealed rows with a scale and a min per token and kSealed channels.
template <Code C>
struct SealedFp32Value : Fp32Dot<C> {
  using Base = Fp32Dot<C>;
  struct Tiles : Base::Tiles {
    alignas(64) float scale[kTile], minimum[kTile];
  };

  static void accumulate(const typename Base::Weights& s, Tiles& tiles, const Tile& tile, int rows,
                         long d, const float* alpha, const float* gamma, float* acc) {
    constexpr int kWord = Base::kWord;
    for (long dim = 0; dim < d; dim += kSealed) {
      for (int g = 0; g < kGroups; ++g) {
        const long at = dim / kSealed * (kSealed * 2);
        const GroupScale scale =
            group_scale<Grouping::kTokenLite>(tile.now.value_metadata[g] + at, 0);
        save16(tiles.scale + g * kLanes, scale.scale);
        save16(tiles.minimum + g * kLanes, scale.minimum);
      }
      for (int n = 0; n < kTile; n += kWord) {
        const int g = n / kLanes, w = n % kLanes / kWord;
        for (long i = dim; i < dim + kSealed; i += kLanes) {
          const long at = (w * d + i) * 4;
          prefetch(tile.next.value[g] + at);
          const U16 words = load<U16>(tile.now.value[g] + at);
          unroll<kWord>([&](auto f) KVQ_UNROLLED {
            const int token = n + f;
            save16(tiles.decoded + token * Base::kStep + i - dim,
                   fma(decode_field<C>(words, f), splat(tiles.scale[token]),
                       splat(tiles.minimum[token])));
          });
        }
      }
      Base::accumulate_decoded(s, tiles, rows, d, dim, dim + kSealed, alpha, gamma, acc);
    }
  }
};

}  // namespace
}  // namespace kvq
