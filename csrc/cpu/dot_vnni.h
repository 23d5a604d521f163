// Integer dot products (AVX-512 VNNI or AVX-VNNI) for int8 and int4 codes. Codes are the unsigned
// operand; q and the softmax weights are integers of a kind `N`: limbs.h's of 15 bits, nibbles.h's
// of 12. Offset-binary codes cost nothing: -128 * sum(integers) is the accumulators' initial value.
#pragma once

#include "limbs.h"
#include "nibbles.h"

#if defined(KVQ_VNNI)

namespace kvq {
namespace {

template <Code C, class N = TwoLimbs<C>>
struct VnniDot : N {
  static constexpr bool kPairs = kVnniPairs;
  static constexpr int kWord = N::kWord;
  static constexpr int kOperands = N::kOperands;
  static constexpr int kOffset = N::kOffset;

  // Numbers as the loops read them: four rows side by side.
  struct Query {
    alignas(64) int8_t limbs[kMaxRows * kMaxHead * 2];
    int32_t total[kMaxRows];  // sum of a row's integers
    float step[kMaxRows];     // value of one unit of them
    float sum[kMaxRows];      // sum of q as they hold it
  };
  struct Weights {
    alignas(64) int8_t limbs[kMaxRows * kTile * 2];
  };

  struct Tiles {};  // codes are multiplied as they lie

  static KVQ_HD long query_at(int row, long dim) {
    return row / kPassRows * (kPassRows * kMaxHead * 2) + dim / kWord * N::kQueryLine +
           row % kPassRows * N::kQueryRow;
  }

  // `uniform` is a factor all channels share; it joins the step, out of the rounding.
  static void set_query(Query& s, int row, long d, const float* q, float uniform) {
    F16 peak{}, nan{};
    for (long i = 0; i < d; i += kLanes) {
      const F16 v = load16(q + i);
      peak = max16(peak, abs16(v));
      nan += v * 0.0f;  // integers would drop a NaN
    }
    const float amax = peak16(peak)[0], factor = amax > 0.0f ? N::kMost / amax : 0.0f;
    s.total[row] = static_cast<int32_t>(N::save_query(s.limbs + query_at(row, 0), d, q, factor));
    s.step[row] = amax / N::kMost * uniform + reduce_add(nan);
    s.sum[row] = static_cast<float>(s.total[row]) * s.step[row];
  }

  // What a row's sums over codes start from. Modulo 2^32: a NaN row's total is anything.
  static KVQ_HD int32_t offset(const Query& s, int row) {
    return static_cast<int32_t>(0u - static_cast<uint32_t>(kOffset) *
                                         static_cast<uint32_t>(s.total[row]));
  }

  template <int R, Fetch kFetch>
  static KVQ_APART void score_rows(const Query& s, const Tile& tile, int row, long d,
                                   float* scores) {
    constexpr int kVectors = vectors(R), kStep = kVectors / kPerLine;
    const auto next = [](int r) KVQ_UNROLLED { return r * N::kQueryRow; };
    const int past = tile.past_group();
    for (int g = tile.first_group(kStep); g < past; g += kStep) {
      typename N::template Sums<R> sums;
      unroll<R>([&](auto r) KVQ_UNROLLED {
        unroll<kVectors>([&](auto v) KVQ_UNROLLED { sums.start(r, v, offset(s, row + r)); });
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
          N::template multiply<i>(sums, line, q + i * N::kQueryOperand, next);
          if constexpr (kFetch != Fetch::kNone) {
            ask<i, kOperands, kStep, R>(
                sums, [&](int j) KVQ_UNROLLED { return beside_key<kFetch>(tile.next, g, j, at); });
          }
        });
        q += N::kQueryLine;
      }
      unroll<R>([&](auto r) KVQ_UNROLLED {
        float* out = scores + (row + r) * kTile + g * kLanes;
        unroll<kVectors>([&](auto v) KVQ_UNROLLED {
          save(out + v * kVectorLanes, sums.total(r, v) * s.step[row + r]);
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
  // unless scales joined the weights (`kScaled`). The codes' offset goes to `bias`, or their
  // middle, which `bias` has of exact weights already; `unit` is what one step of the products is
  // worth. One row or two, from an even one on.
  template <int R, bool kScaled>
  static KVQ_HD void set_weights(Weights& s, int row, const F16 (&w)[R][kGroups], F16 (&unit)[R],
                                 F16* bias) {
    Floats factor[2] = {};
    Words total[2] = {};
    F16 most[2] = {splat(1.0f), splat(1.0f)};
    if constexpr (kScaled) {
      unroll<R>([&](auto r) KVQ_UNROLLED {
        most[r] = F16{};
        each_group([&](auto g) KVQ_UNROLLED { most[r] = max16(most[r], w[r][g]); });
      });
      peak_two(most);
    }
    unroll<R>([&](auto r) KVQ_UNROLLED {
      factor[r] = vector_of(select(most[r] > 0.0f, N::kMost / most[r], F16{}), 0);
      unit[r] = most[r] * (1.0f / N::kMost);
    });
    N::template save_weights<R>(s.limbs, row, w, factor, total);
    constexpr float kShift = kOffset + N::kMiddle;
    if constexpr (kShift == 0.0f) return;
    unroll<R>([&](auto r) KVQ_UNROLLED {
      const Floats sum = convert<Floats>(reinterpret_cast<Ints>(total[r]));
      bias[r] = fma(widened(sum), unit[r] * -kShift, bias[r]);
    });
  }

  // Channels from `dim` on: those of one line, or of two, the last line twice where d ends.
  template <int R, Fetch kFetch, bool kWhole>
  static KVQ_HD void accumulate_rows(const Weights& s, const Tile& tile, int row, long d, long dim,
                                     const float* alpha, const float* gamma, float* acc) {
    constexpr int kVectors = vectors(R), kStep = kVectors / kPerLine;
    const long second = kStep == 2 && dim + kLanes < d ? 64 : 0;
    typename N::template Sums<R> sums = {};
    // The other groups' weights are 0.
    const int past = kWhole ? kGroups : tile.past_group();
    int g = kWhole ? 0 : tile.first_group(1);
    const int8_t* p =
        s.limbs + N::template weight_row<false>(row) + g * (kLanes / kWord * N::kWeightLine);
    for (; g < past; ++g) {
      unroll<kLanes / kWord>([&](auto w) KVQ_UNROLLED {
        const long at = (w * d + dim) * 4;
        Ints line[kVectors];
        unroll<kVectors>([&](auto v) KVQ_UNROLLED {
          line[v] =
              load<Ints>(tile.now.value[g] + at + v / kPerLine * second + v % kPerLine * kVector);
        });
        unroll<kOperands>([&](auto i) KVQ_UNROLLED {
          constexpr bool kY = i == N::kBeside;
          const long y = N::template weight_row<kY>(0);
          N::template multiply<i>(sums, line, p + (kY ? y : i * N::kWeightOperand),
                                  [y](int r)
                                      KVQ_UNROLLED { return N::template weight_row<kY>(r) - y; });
          if constexpr (kFetch != Fetch::kNone) {
            ask<i, kOperands, kStep, R>(sums, [&](int j) KVQ_UNROLLED {
              return beside_value<kFetch, code_bits(C)>(tile.next, g, w, d, dim, j);
            });
          }
        });
        p += N::kWeightLine;
      });
    }
    unroll<R>([&](auto r) KVQ_UNROLLED {
      float* a = acc + (row + r) * d + dim;
      const Floats shrink = Floats{} + alpha[row + r], unit = Floats{} + gamma[row + r];
      unroll<kVectors>([&](auto v) KVQ_UNROLLED {
        if (v >= kPerLine && second == 0) return;
        save(a, fma(load<Floats>(a), shrink, sums.total(r, v) * unit));
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

template <Code C, class N>
constexpr float kMiddleOf<VnniDot<C, N>> = N::kMiddle;

}  // namespace
}  // namespace kvq
#endif  // KVQ_VNNI
