// Integer dot products for codes whose scales do not leave the sum: those of K per channel, and of
// V per group of channels. The rows' numbers take them in: q (or the softmax weights) times a
// group's scales, as limbs of dot_vnni.h, made anew for every group: per row of K 12 vector
// operations and 64 dot products for 32 tokens of 64 channels. The mins are a sum of their own, in
// fp32.
#pragma once

#include "dot_vnni.h"
#include "folded.h"
#include "key_scales.h"

#if defined(KVQ_VNNI)

namespace kvq {
namespace {

KVQ_HD F16 peak_magnitude(F16 peak, F16 x) {
#if defined(__AVX512F__)
  return reinterpret_cast<F16>(  // the larger magnitude, its sign cleared
      _mm512_range_ps(reinterpret_cast<__m512>(peak), reinterpret_cast<__m512>(x), 0x0B));
#else
  return max16(peak, abs16(x));
#endif
}

// Up to kMost numbers of rows, folded: [row/2][number/4][row%2][limb][4 numbers].
template <int kMost, int kRows>
struct Folded {
  static constexpr int kPair = kMost * 4;  // bytes of two rows
  alignas(64) int8_t limbs[kRows / 2 * kPair];
  alignas(64) float product[kPassRows * kMost];
  alignas(64) float step[kRows], bias[kRows];

  // R rows from an even one on; `from` is the first one's n numbers, `stride` apart from the next
  // one's. Numbers up to a multiple of 64 become zeros.
  template <int R>
  KVQ_HD void fold(int row, const float* from, long stride, const GroupScales& by, long n) {
    F16 peak[R] = {}, sum[R] = {};
    for (long i = 0; i < n; i += kLanes) {
      const F16 scale = load16(by.scale + i), minimum = load16(by.minimum + i);
      unroll<R>([&](auto r) KVQ_UNROLLED {
        const F16 x = load16(from + r * stride + i), y = x * scale;
        save16(product + r * kMost + i, y);
        peak[r] = peak_magnitude(peak[r], y);
        sum[r] = fma(x, minimum, sum[r]);
      });
    }
    alignas(16) float inverse[kPassRows];
    F4 most{};
    unroll<R>([&](auto r) KVQ_UNROLLED { most[r.value] = peak16(peak[r])[0]; });
    save4(inverse, most > 0.0f ? kLimbMax / most : F4{});
    unroll<R>([&](auto r) KVQ_UNROLLED {
      step[row + r] = most[r.value] * (1.0f / kLimbMax);
      bias[row + r] = reduce_add(sum[r]) + most[r.value] * 0.0f;  // integers would drop a NaN
    });
    unroll<(R + 1) / 2>([&](auto pair) KVQ_UNROLLED {
      constexpr int r = 2 * decltype(pair)::value, second = r + 1 < R ? r + 1 : r;
      int8_t* out = limbs + (row + r) / 2 * kPair;
      const Floats a = Floats{} + inverse[r], b = Floats{} + inverse[second];
      Words unused{};
      for (long i = 0; i < n; i += kVectorLanes) {
        save(out + i * 4,
             VnniLimbs::limbs(load<Floats>(product + r * kMost + i), a,
                              load<Floats>(product + second * kMost + i), b, unused, unused));
      }
      for (long i = n; i % 64 != 0; i += kVectorLanes) save(out + i * 4, Ints{});
    });
  }

  KVQ_HD const int8_t* at(int row) const { return limbs + row / 2 * kPair; }
  static KVQ_HD int next(int r) { return r / 2 * kPair + r % 2 * 8; }
};

#if defined(__AVX512F__)
// The sums of four rows' lanes, each in an order that does not depend on the others.
KVQ_HD F4 reduce_rows(const F16 (&x)[kPassRows]) {
  const auto pairs = [](F16 low, F16 high) {
    const __m512 a = reinterpret_cast<__m512>(low), b = reinterpret_cast<__m512>(high);
    return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  };
  const __m512d ab = reinterpret_cast<__m512d>(pairs(x[0], x[1]));
  const __m512d cd = reinterpret_cast<__m512d>(pairs(x[2], x[3]));
  const F16 sum = reinterpret_cast<F16>(_mm512_unpacklo_pd(ab, cd)) +
                  reinterpret_cast<F16>(_mm512_unpackhi_pd(ab, cd));
  const __m512 v = reinterpret_cast<__m512>(sum);
  const F8 half = reinterpret_cast<F8>(_mm512_castps512_ps256(v)) +
                  reinterpret_cast<F8>(_mm512_extractf32x8_ps(v, 1));
  const __m256 w = reinterpret_cast<__m256>(half);
  return reinterpret_cast<F4>(_mm256_castps256_ps128(w)) +
         reinterpret_cast<F4>(_mm256_extractf128_ps(w, 1));
}
#else
KVQ_HD F4 reduce_rows(const F16 (&x)[kPassRows]) {
  return F4{reduce_add(x[0]), reduce_add(x[1]), reduce_add(x[2]), reduce_add(x[3])};
}
#endif

// K with a scale and a min per channel and kSealed tokens. Rows are words of 16 bits such that
// their largest number is kLimbMax, scales such that their largest is almost 1: `N`'s numbers are
// their rounded products, one instruction for a vector of them. Each of the three roundings is as
// far off as q's own alone: scores are off by 1.2 times as much on N(0, 1), 1.7 times at most.
template <Code C, Grouping G, class N = FoldedLimbs<C>>
struct FoldedKey {
  static constexpr bool kPairs = kVnniPairs;
  using Step = KeyStep<C>;
  // Numbers of a row: a line more than there are, so that rows' lines differ in their sets of L1.
  static constexpr int kRow = kMaxHead + kLanes;
  static constexpr int kParts = kTile / kSealed;  // groups of a tile
  static constexpr int kFoldRows = 16;            // folded at once, at most
  static constexpr int kFoldParts = 2;            // likewise: their sums fit the registers

  struct Query {
    alignas(64) float q[kMaxRows * kRow];  // [row][d], in units of `step`
    alignas(64) int16_t words[kMaxRows * kMaxHead];
    alignas(64) float step[kMaxRows + kPassRows];  // a pass reads and writes four
  };
  // One group's, up to a whole tile of AMX, zeros there; a unit of the products, what mins add.
  struct Fold {
    KeyScales<G, N> scales;
    alignas(64) int8_t limbs[kFoldRows * kMaxHead * 2];
    alignas(64) float unit[kFoldRows + kPassRows], bias[kFoldRows + kPassRows];
  };
  struct Tiles {
    Fold part[kParts];
  };

  static KVQ_HD long whole(long d) { return (d + 63) / 64 * 64; }

  static void set_query(Query& s, int row, long d, const float* q, float uniform) {
    F16 peak{};
    for (long i = 0; i < d; i += kLanes) peak = max16(peak, abs16(load16(q + i)));
    const float most = peak16(peak)[0], inverse = most > 0.0f ? kLimbMax / most : 0.0f;
    float* to = s.q + row * kRow;
    for (long i = 0; i < d; i += kLanes) save16(to + i, load16(q + i) * inverse);
    for (long i = d; i < whole(d); i += kLanes) save16(to + i, F16{});
    save_words<N>(whole(d), s.words + row * kMaxHead,
                  [&](long i) KVQ_UNROLLED { return load<Floats>(to + i) + kRounds; });
    s.step[row] = most * (1.0f / kLimbMax) * uniform;
  }

  static float first_score(const Query& s, int row, const FirstRow& first) {
    return first.score(s.q + row * kRow) * s.step[row];
  }

  // R rows by the scales of kFoldParts parts, into places from `at` on.
  template <int R>
  static KVQ_APART void fold(const Query& s, Fold* parts, int row, int at, long d) {
    const float* q = s.q + row * kRow;
    const int16_t* words = s.words + row * kMaxHead;
    const F4 step = load4(s.step + row);
    const long n = whole(d);
    F16 sum[kFoldParts][kPassRows] = {};
    for (long i = 0; i < d; i += kLanes) {
      F16 x[R];
      unroll<R>([&](auto r) KVQ_UNROLLED { x[r] = load16(q + r * kRow + i); });
      unroll<kFoldParts>([&](auto part) KVQ_UNROLLED {
        const F16 middle = parts[part].scales.middle(i);
        unroll<R>([&](auto r) KVQ_UNROLLED { sum[part][r] = fma(x[r], middle, sum[part][r]); });
      });
    }
    Ints total[R][kFoldParts] = {};  // of the integers
    for (long i = 0; i < n; i += kVector) {
      Shorts x[R], y[R];
      unroll<R>([&](auto r) KVQ_UNROLLED {
        x[r] = load<Shorts>(words + r * kMaxHead + i);
        y[r] = load<Shorts>(words + r * kMaxHead + i + kVector / 2);
      });
      Shorts first[kFoldParts], second[kFoldParts];
      unroll<kFoldParts>([&](auto part) KVQ_UNROLLED {
        first[part] = load<Shorts>(parts[part].scales.scale + i);
        second[part] = load<Shorts>(parts[part].scales.scale + i + kVector / 2);
      });
      unroll<R>([&](auto r) KVQ_UNROLLED {
        Shorts a[kFoldParts], b[kFoldParts];
        unroll<kFoldParts>([&](auto part) KVQ_UNROLLED {
          a[part] = multiply_rounded(x[r], first[part]);
          b[part] = multiply_rounded(y[r], second[part]);
        });
        const long to = (at + r) * 2 * n;
        N::save_rows(a, b, {parts[0].limbs + to, parts[1].limbs + to}, i, n, total[r]);
      });
    }
    unroll<kFoldParts>([&](auto part) KVQ_UNROLLED {
      Fold& to = parts[part];
      const float unit = to.scales.most * (32768.0f / to.scales.kOne);
      if constexpr (N::kMiddle != 0.0f) {
        unroll<R>([&](auto r) KVQ_UNROLLED {
          sum[part][r] = fma(widened(convert<Floats>(total[r][part])), splat(unit * -N::kMiddle),
                             sum[part][r]);
        });
      }
      save4(to.unit + at, step * unit);
      save4(to.bias + at, step * reduce_rows(sum[part]));
    });
  }

  // R rows of scores from folded ones, of groups of tokens [g, g + kSealedGroups).
  // `parts` are folded together; this is one of them.
  template <int R, Fetch kFetch>
  static KVQ_APART void score_rows(const Fold* parts, int part, const Tile& tile, int row,
                                   int group, long d, float* scores) {
    const Fold& fold = parts[part];
    constexpr int kVectors = vectors(R), kStep = kVectors / kPerLine;
    const long n = whole(d);
    const auto next = [n](int r) KVQ_UNROLLED { return r * 2 * n; };
    for (int g = group; g < group + kSealedGroups; g += kStep) {
      typename N::template Sums<R> sums = {};
      const int8_t* q = fold.limbs;
      const int8_t* beside = N::beside(fold.limbs, parts[0].limbs, part, n);
      for (long step = 0; step < d / Step::kChannels; ++step) {
        Ints line[kVectors][Step::kLines];
        unroll<Step::kLines>([&](auto i) KVQ_UNROLLED {
          const long at = Step::line(i, step, d);
          unroll<kVectors>([&](auto v) KVQ_UNROLLED {
            line[v][i] = load<Ints>(tile.now.key[g + v / kPerLine] + at + v % kPerLine * kVector);
          });
        });
        unroll<N::kOperands>([&](auto i) KVQ_UNROLLED {
          N::template multiply<decltype(i)::value, R>(sums, line, q, beside, next);
          if constexpr (kFetch != Fetch::kNone) {
            constexpr int kAsked = Step::kLines * kStep;
            ask<decltype(i)::value, N::kOperands, kAsked, R>(sums, [&](int j) KVQ_UNROLLED {
              const long at = Step::line(j / kStep, step, d);
              return beside_key<kFetch>(tile.next, g, j % kStep, at);
            });
          }
        });
        q += N::kStepBytes;
        beside += N::kStepBytes;
      }
      unroll<R>([&](auto r) KVQ_UNROLLED {
        float* out = scores + (row + r) * kTile + g * kLanes;
        const Floats unit = Floats{} + fold.unit[r], bias = Floats{} + fold.bias[r];
        unroll<kVectors>([&](auto v) KVQ_UNROLLED {
          save(out + v * kVectorLanes, fma(sums.total(r, v), unit, bias));
        });
      });
    }
  }

  static KVQ_HD void load_scales(Tiles& tiles, const Tile& tile, long d) {
    for (int part = 0; part < kParts; ++part) {
      const int g = part * kSealedGroups;
      tiles.part[part].scales.load(tile.now.key_metadata[g], tile.next.key_metadata[g], d);
    }
  }

  static void score(const Query& s, Tiles& tiles, const Tile& tile, int rows, long d,
                    float* scores) {
    load_scales(tiles, tile, d);
    for_each_pass<kVnniRows>(rows, [&](auto n, int row) {
      constexpr int R = decltype(n)::value;
      // Both before the products: what one waits for passes with the other.
      for (int part = 0; part < kParts; part += kFoldParts) {
        fold<R>(s, tiles.part + part, row, 0, d);
      }
      with_fetch<kPairs>(tile.fetch, row, [&](auto fetch) {
        const int past = tile.past_group();
        for (int g = tile.first_group(kSealedGroups); g < past; g += kSealedGroups) {
          const int part = g / kSealedGroups % kFoldParts;
          score_rows<R, decltype(fetch)::value>(tiles.part + g / kSealedGroups - part, part, tile,
                                                row, g, d, scores);
        }
      });
    });
  }
};

// V with a scale and a min per token and kSealed channels.
template <Code C>
struct FoldedValue {
  using Base = TwoLimbs<C>;
  static constexpr bool kPairs = kVnniPairs;
  using Fold = Folded<kTile, kMaxRows>;
  static constexpr int kWord = Base::kWord;

  struct Weights {
    alignas(64) float p[kMaxRows * kTile];
  };
  struct Tiles {
    GroupScales scales;
    Fold fold;
  };

  template <int N, bool kScaled>
  static KVQ_HD void set_weights(Weights& s, int row, const F16 (&w)[N][kGroups], F16 (&unit)[N],
                                 F16* /*bias*/) {
    unroll<N>([&](auto r) KVQ_UNROLLED {
      unit[r] = splat(1.0f);
      each_group([&](auto g)
                     KVQ_UNROLLED { save16(s.p + (row + r) * kTile + g * kLanes, w[r][g]); });
    });
  }

  // Tokens' scales of the channels from `dim` on.
  static KVQ_HD void load_scales(Tiles& tiles, const Tile& tile, long dim) {
    for (int g = 0; g < kGroups; ++g) {
      const GroupScale s =
          group_scale<Grouping::kTokenLite>(tile.now.value_metadata[g] + dim * 2, 0);
      save16(tiles.scales.scale + g * kLanes, s.scale);
      save16(tiles.scales.minimum + g * kLanes, s.minimum);
    }
  }

  // kSealed channels from `dim` on.
  template <int R, Fetch kFetch, bool kWhole>
  static KVQ_APART void accumulate_rows(const Fold& fold, const Tile& tile, int row, long d,
                                        long dim, const float* alpha, const float* gamma,
                                        float* acc) {
    constexpr int kVectors = vectors(R), kStep = kVectors / kPerLine;
    for (long at = dim; at < dim + kSealed; at += kStep * kLanes) {
      typename Base::template Sums<R> sums = {};
      // The other groups' weights are 0.
      const int past = kWhole ? kTile : tile.past_group() * kLanes;
      int n = kWhole ? 0 : tile.first_group(1) * kLanes;
      const int8_t* p = fold.at(row) + n * 4;
      for (; n < past; n += kWord) {
        const int g = n / kLanes;
        const long from = (n % kLanes / kWord * d + at) * 4;
        Ints line[kVectors];
        unroll<kVectors>([&](auto v) KVQ_UNROLLED {
          line[v] = load<Ints>(tile.now.value[g] + from + v * kVector);
        });
        unroll<kWord / 4>([&](auto i) KVQ_UNROLLED {
          Base::template multiply<i>(sums, line, p, Fold::next);
          p += Base::kWeightOperand;
          if constexpr (kFetch != Fetch::kNone) {
            ask<i, kWord / 4, kStep, R>(sums, [&](int j) KVQ_UNROLLED {
              return beside_value<kFetch, code_bits(C)>(tile.next, g, n % kLanes / kWord, d, at, j);
            });
          }
        });
      }
      unroll<R>([&](auto r) KVQ_UNROLLED {
        float* a = acc + (row + r) * d + at;
        const Floats unit = Floats{} + fold.step[row + r], bias = Floats{} + fold.bias[row + r];
        const Floats shrink = Floats{} + alpha[row + r], worth = Floats{} + gamma[row + r];
        unroll<kVectors>([&](auto v) KVQ_UNROLLED {
          const Floats sum = fma(sums.total(r, v), unit, bias);
          save(a, fma(load<Floats>(a), shrink, sum * worth));
          a += kVectorLanes;
        });
      });
    }
  }

  static void accumulate(const Weights& s, Tiles& tiles, const Tile& tile, int rows, long d,
                         const float* alpha, const float* gamma, float* acc) {
    for (long dim = 0; dim < d; dim += kSealed) {
      load_scales(tiles, tile, dim);
      for_each_pass<kVnniRows>(rows, [&](auto n, int row) {
        constexpr int R = decltype(n)::value;
        tiles.fold.template fold<R>(row, s.p + row * kTile, kTile, tiles.scales, kTile);
        with_fetch<kPairs>(tile.fetch, row, [&](auto fetch) {
          constexpr Fetch kFetch = decltype(fetch)::value;
          tile.whole()
              ? accumulate_rows<R, kFetch, true>(tiles.fold, tile, row, d, dim, alpha, gamma, acc)
              : accumulate_rows<R, kFetch, false>(tiles.fold, tile, row, d, dim, alpha, gamma, acc);
        });
      });
    }
  }
};

}  // namespace
}  // namespace kvq
#endif  // KVQ_VNNI
