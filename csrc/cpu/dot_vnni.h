// Integer dot products (AVX-512 VNNI or AVX-VNNI) for int8 and int4 codes. Codes are the unsigned
// operand; q and the softmax weights are split into two signed 8-bit limbs, 15 bits in all, so that
// their rounding stays far below bf16's. Offset-binary codes cost nothing: -128 * sum(limbs) is the
// accumulators' initial value.
#pragma once

#include "vnni.h"

#if defined(KVQ_VNNI)

namespace kvq {
namespace {

// What limbs are, whatever the code.
struct VnniLimbs {
  // Two rows' values times their factors, rounded, as limbs: per four lanes 4 high bytes and 4 low
  // ones of the first row, then the second's. Totals gather kRaised + the integers, modulo 2^32.
  static KVQ_HD Ints limbs(Floats a, Floats fa, Floats b, Floats fb, Words& ta, Words& tb) {
    // 1.5 * 2^23 rounds to an integer in the mantissa; 128 more makes the low limb a flipped byte.
    const Floats magic = Floats{} + (12582912.0f + 128.0f);
    const Ints x = reinterpret_cast<Ints>(fma(a, fa, magic));
    const Ints y = reinterpret_cast<Ints>(fma(b, fb, magic));
    ta += reinterpret_cast<Words>(x);
    tb += reinterpret_cast<Words>(y);
    const Ints order = quads(0x0D090501, 0x0C080400, 0x0F0B0703, 0x0E0A0602);
    const Ints flip = quads(0, 0x80808080, 0, 0x80808080);
    return shuffle_bytes(low_halves(x, y), order) ^ flip;
  }
  static constexpr int32_t kRaised = 0x4B400000 + 128;

  // Exact: |limbs| * |codes| * 512 stays below 2^31. On the way, and for NaN rows, modulo 2^32.
  static KVQ_HD Floats combine(Ints high, Ints low) {
    const Words sum = (reinterpret_cast<Words>(high) << 8) + reinterpret_cast<Words>(low);
    return convert<Floats>(reinterpret_cast<Ints>(sum));
  }
};

template <Code C>
struct VnniDot : VnniLimbs {
  static constexpr bool kPairs = kVnniPairs;
  static constexpr int kWord = 32 / code_bits(C);
  static constexpr int kOperands = kWord / 4;  // byte operands in one line
  static constexpr int kOffset = C == Code::kInt8 ? 128 : 0;

  // Limbs as the loops read them: four rows side by side.
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

  static KVQ_HD long query_at(int row, long dim) {
    return row / kPassRows * (kPassRows * kMaxHead * 2) + dim / 4 * (kPassRows * 8) +
           row % kPassRows * 8;
  }
  static KVQ_HD const int8_t* weights_at(const Weights& s, int row, int token) {
    return s.limbs + row / 2 * (kTile * 4) + token / 4 * 16 + row % 2 * 8;
  }

  // `uniform` is a factor all channels share; it joins the step, out of the rounding.
  static void set_query(Query& s, int row, long d, const float* q, float uniform) {
    F16 peak{}, nan{};
    for (long i = 0; i < d; i += kLanes) {
      const F16 v = load16(q + i);
      peak = max16(peak, abs16(v));
      nan += v * 0.0f;  // integers would drop a NaN
    }
    const float amax = peak16(peak)[0];
    const Floats inverse = Floats{} + (amax > 0.0f ? kLimbMax / amax : 0.0f);
    const Floats zero{};
    Words total{}, unused{};
    int8_t* out = s.limbs + query_at(row, 0);
    for (long i = 0; i < d; i += kVectorLanes) {
      alignas(kVector) int8_t pair[kVector];
      save(pair, limbs(load<Floats>(q + i), inverse, zero, zero, total, unused));
      for (int j = 0; j < kVectorLanes / 4; ++j) {
        memcpy(out + (i / 4 + j) * (kPassRows * 8), pair + j * 16, 8);
      }
    }
    const uint32_t raised = static_cast<uint32_t>(kRaised) * static_cast<uint32_t>(d);
    s.total[row] = static_cast<int32_t>(total_of(total) - raised);
    s.step[row] = amax / kLimbMax * uniform + reduce_add(nan);
    s.sum[row] = static_cast<float>(s.total[row]) * s.step[row];
  }

  // What a row's sums over codes start from. Modulo 2^32: a NaN row's total is anything.
  static KVQ_HD int32_t offset(const Query& s, int row) {
    return static_cast<int32_t>(0u - static_cast<uint32_t>(kOffset) *
                                         static_cast<uint32_t>(s.total[row]));
  }

  template <int P>
  static KVQ_HD Ints operand(Ints line) {
    if constexpr (kOperands == 1) {
      return line;
    } else {
      constexpr int kBits = code_bits(C);
      return (line >> (P * kBits)) & (0x01010101 * ((1 << kBits) - 1));
    }
  }

  // Rows' sums over the tokens, or channels, of a pass: a pair per limb.
  template <int R>
  struct Sums {
    Ints high[R][vectors(R)], low[R][vectors(R)];
  };

  // One operand of a pass's lines against R rows. `at`: the first row's limbs; `next(r)` bytes
  // further on are row r's.
  template <int P, int R, class Next>
  static KVQ_HD void multiply(Sums<R>& sums, const Ints (&line)[vectors(R)], const int8_t* at,
                              const Next& next) {
    Ints codes[vectors(R)];
    unroll<vectors(R)>([&](auto v) KVQ_UNROLLED { codes[v] = operand<P>(line[v]); });
    multiply_codes(sums, codes, at, next);
  }

  // `low` bytes behind a high limb is its low one.
  template <int R, class Next>
  static KVQ_HD void multiply_codes(Sums<R>& sums, const Ints (&codes)[vectors(R)],
                                    const int8_t* at, const Next& next, long low = 4) {
    unroll<R>([&](auto r) KVQ_UNROLLED {
      const Ints high = broadcast(at + next(r)), low_limb = broadcast(at + next(r) + low);
      unroll<vectors(R)>([&](auto v) KVQ_UNROLLED { dpbusd(sums.high[r][v], codes[v], high); });
      unroll<vectors(R)>([&](auto v) KVQ_UNROLLED { dpbusd(sums.low[r][v], codes[v], low_limb); });
    });
  }

  // Line i of n that a step's operands ask for, evenly: behind operand P's products.
  template <int P, int kOperands, int kAsked, int R, class Line>
  static KVQ_HD void ask(Sums<R>& sums, const Line& line) {
    unroll<kAsked>([&](auto i) KVQ_UNROLLED {
      constexpr int kBehind = decltype(i)::value * kOperands / kAsked;
      // The first row's sums; of two lines behind one operand, the second one's are the last row's.
      constexpr int kRow = kAsked > kOperands && decltype(i)::value % 2 ? R - 1 : 0;
      if constexpr (kBehind == P) prefetch_behind(sums.high[kRow][0], line(i));
    });
  }

  template <int R, Fetch kFetch>
  static KVQ_APART void score_rows(const Query& s, const Tile& tile, int row, long d,
                                   float* scores) {
    constexpr int kVectors = vectors(R), kStep = kVectors / kPerLine;
    const auto next = [](int r) KVQ_UNROLLED { return r * 8; };
    const int past = tile.past_group();
    for (int g = tile.first_group(kStep); g < past; g += kStep) {
      Sums<R> sums;
      unroll<R>([&](auto r) KVQ_UNROLLED {
        unroll<kVectors>([&](auto v) KVQ_UNROLLED {
          sums.high[r][v] = Ints{};
          sums.low[r][v] = Ints{} + offset(s, row + r);
        });
      });
      const uint8_t* now[kStep];
      unroll<kStep>([&](auto i) KVQ_UNROLLED { now[i] = tile.now.key[g + i]; });
      const int8_t* q = s.limbs + query_at(row, 0);
      for (long at = 0; at < d / kWord * 64; at += 64) {
        Ints line[kVectors];
        unroll<kVectors>([&](auto v) KVQ_UNROLLED {
          line[v] = load<Ints>(now[v / kPerLine] + at + v % kPerLine * kVector);
        });
        unroll<kOperands>([&](auto i) KVQ_UNROLLED {
          multiply<i>(sums, line, q, next);
          q += kPassRows * 8;
          if constexpr (kFetch != Fetch::kNone) {
            ask<i, kOperands, kStep>(
                sums, [&](int j) KVQ_UNROLLED { return beside_key<kFetch>(tile.next, g, j, at); });
          }
        });
      }
      unroll<R>([&](auto r) KVQ_UNROLLED {
        float* out = scores + (row + r) * kTile + g * kLanes;
        unroll<kVectors>([&](auto v) KVQ_UNROLLED {
          const Floats sum = combine(sums.high[r][v], sums.low[r][v]);
          save(out + v * kVectorLanes, sum * s.step[row + r]);
        });
      });
    }
  }

  static void score(const Query& s, Tiles&, const Tile& tile, int rows, long d, float* scores) {
    for_each_pass<kVnniRows>(rows, [&](auto n, int row) {
      constexpr int R = decltype(n)::value;
      with_fetch<kPairs>(tile.fetch, row, [&](auto fetch) {
        score_rows<R, decltype(fetch)::value>(s, tile, row, d, scores);
      });
    });
  }

  // Quantized relative to this tile's own maximum: relative to the running one, a long flat
  // context would round to zero while it still counts in the denominator. That maximum is 1
  // unless scales joined the weights (`kScaled`). The codes' offset goes to `bias`; `unit` is what
  // one step of the products is worth. One row or two, from an even one on.
  template <int N, bool kScaled>
  static KVQ_HD void set_weights(Weights& s, int row, const F16 (&w)[N][kGroups], F16 (&unit)[N],
                                 F16* bias) {
    Floats factor[2] = {};
    Words total[2] = {};
    F16 most[2] = {splat(1.0f), splat(1.0f)};
    if constexpr (kScaled) {
      unroll<N>([&](auto r) KVQ_UNROLLED {
        most[r] = F16{};
        unroll<kGroups>([&](auto g) KVQ_UNROLLED { most[r] = max16(most[r], w[r][g]); });
      });
      peak_two(most);
    }
    unroll<N>([&](auto r) KVQ_UNROLLED {
      factor[r] = vector_of(select(most[r] > 0.0f, kLimbMax / most[r], F16{}), 0);
      unit[r] = most[r] * (1.0f / kLimbMax);
    });
    int8_t* out = s.limbs + row / 2 * (kTile * 4);
    unroll<kGroups>([&](auto g) KVQ_UNROLLED {
      unroll<kPerLine>([&](auto i) KVQ_UNROLLED {
        const Floats a = vector_of(w[0][g], i), b = vector_of(w[N - 1][g], i);
        save(out + g * 64 + i * kVector, limbs(a, factor[0], b, factor[1], total[0], total[1]));
      });
    });
    if constexpr (kOffset == 0) return;
    unroll<N>([&](auto r) KVQ_UNROLLED {
      const uint32_t raised = static_cast<uint32_t>(kRaised) * (kTile / kVectorLanes);
      const Floats sum = convert<Floats>(reinterpret_cast<Ints>(total[r] - raised));
      bias[r] = fma(widened(sum), unit[r] * static_cast<float>(-kOffset), bias[r]);
    });
  }

  // Channels from `dim` on: those of one line, or of two, the last line twice where d ends.
  template <int R, Fetch kFetch, bool kWhole>
  static KVQ_HD void accumulate_rows(const Weights& s, const Tile& tile, int row, long d, long dim,
                                     const float* alpha, const float* gamma, float* acc) {
    constexpr int kVectors = vectors(R), kStep = kVectors / kPerLine;
    const auto next = [](int r) KVQ_UNROLLED { return r / 2 * (kTile * 4) + r % 2 * 8; };
    const long second = kStep == 2 && dim + kLanes < d ? 64 : 0;
    Sums<R> sums = {};
    // The other groups' weights are 0.
    const int past = kWhole ? kGroups : tile.past_group();
    int g = kWhole ? 0 : tile.first_group(1);
    const int8_t* p = weights_at(s, row, g * kLanes);
    for (; g < past; ++g) {
      unroll<kLanes / kWord>([&](auto w) KVQ_UNROLLED {
        const long at = (w * d + dim) * 4;
        Ints line[kVectors];
        unroll<kVectors>([&](auto v) KVQ_UNROLLED {
          line[v] =
              load<Ints>(tile.now.value[g] + at + v / kPerLine * second + v % kPerLine * kVector);
        });
        unroll<kOperands>([&](auto i) KVQ_UNROLLED {
          multiply<i>(sums, line, p, next);
          p += 16;
          if constexpr (kFetch != Fetch::kNone) {
            ask<i, kOperands, kStep>(sums, [&](int j) KVQ_UNROLLED {
              return beside_value<kFetch, code_bits(C)>(tile.next, g, w, d, dim, j);
            });
          }
        });
      });
    }
    unroll<R>([&](auto r) KVQ_UNROLLED {
      float* a = acc + (row + r) * d + dim;
      const Floats shrink = Floats{} + alpha[row + r], unit = Floats{} + gamma[row + r];
      unroll<kVectors>([&](auto v) KVQ_UNROLLED {
        if (v >= kPerLine && second == 0) return;
        const Floats sum = combine(sums.high[r][v], sums.low[r][v]);
        save(a, fma(load<Floats>(a), shrink, sum * unit));
        a += kVectorLanes;
      });
    });
  }

  template <int R, Fetch kFetch, bool kWhole>
  static KVQ_APART void accumulate_dims(const Weights& s, const Tile& tile, int row, long d,
                                        const float* alpha, const float* gamma, float* acc) {
    for (long i = 0; i < d; i += vectors(R) * kVectorLanes) {
      accumulate_rows<R, kFetch, kWhole>(s, tile, row, d, i, alpha, gamma, acc);
    }
  }

  static void accumulate(const Weights& s, Tiles&, const Tile& tile, int rows, long d,
                         const float* alpha, const float* gamma, float* acc) {
    for_each_pass<kVnniRows>(rows, [&](auto n, int row) {
      constexpr int R = decltype(n)::value;
      with_fetch<kPairs>(tile.fetch, row, [&](auto fetch) {
        constexpr Fetch kFetch = decltype(fetch)::value;
        tile.whole() ? accumulate_dims<R, kFetch, true>(s, tile, row, d, alpha, gamma, acc)
                     : accumulate_dims<R, kFetch, false>(s, tile, row, d, alpha, gamma, acc);
      });
    });
  }
};

}  // namespace
}  // namespace kvq
#endif  // KVQ_VNNI
