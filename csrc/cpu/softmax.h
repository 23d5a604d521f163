// From a tile's scores to its weights: scales, masks, the running maximum, the exponential.
#pragma once

#include "plan.h"
#include "sealed.h"

namespace kvq {
namespace {

constexpr float kLog2e = 1.44269504f;
constexpr float kMinusInf = -__builtin_inff();

constexpr bool is_affine(Code c) { return c == Code::kInt4; }

// Per-token scale and min of one stream, over the tile's groups.
struct TokenScales {
  F16 scale[kGroups], minimum[kGroups];

  template <Code C>
  KVQ_HD void load(const uint8_t* const* words, const uint8_t* const* next) {
    for (int g = 0; g < kGroups; ++g) prefetch(next[g]);
    if constexpr (is_affine(C)) {
#if defined(__AVX512F__)
      unroll<kGroups / 2>([&](auto pair) KVQ_UNROLLED {
        const int g = 2 * pair;
        const WordHalves both =
            WordHalves::split(_mm512_loadu_si512(words[g]), _mm512_loadu_si512(words[g + 1]));
        unroll<2>([&](auto i) KVQ_UNROLLED {
          scale[g + i] = WordHalves::widen<decltype(i)::value>(both.low);
          minimum[g + i] = WordHalves::widen<decltype(i)::value>(both.high);
        });
      });
#else
      for (int g = 0; g < kGroups; ++g) {
        const U16 w = kvq::load<U16>(words[g]);
        scale[g] = halves(w);
        minimum[g] = halves(w >> 16);
      }
#endif
    } else {
      for (int g = 0; g < kGroups; ++g) scale[g] = load16(words[g]);
    }
  }
};

// What the softmax knows of an item's rows.
struct RowFacts {
  float key_bias[kMaxRows];  // score of a zero code: -q . (scale * zero point)
  float slope[kMaxRows];     // ALiBi, in log2 units
  Span span[kMaxRows];
  Span common;  // what all rows see
  int position[kMaxRows];
  bool sees_first[kMaxRows];  // the first row, where that is kept beside the sealed ones
  float softcap;
  bool shaped;  // softcap or ALiBi: scores go through shape() first
};

// Softcap and ALiBi, for the models that have them.
KVQ_HD F16 shape_score(F16 x, const RowFacts& facts, int row, I16 tokens) {
  if (facts.softcap > 0.0f) x = tanh16(x) * (facts.softcap * kLog2e);
  const F16 distance = convert<F16>(facts.position[row] - tokens);
  return fma(distance, splat(-facts.slope[row]), x);
}

template <int kFormat, class KeyDot, class ValueDot>
struct TileSoftmax {
  static constexpr Stream kKey = kFormats[kFormat].key, kValue = kFormats[kFormat].value;
  static constexpr bool kKeyAffine = kKey.per_token && is_affine(kKey.code);
  static constexpr bool kValueAffine = kValue.per_token && is_affine(kValue.code);
  // Scales of the codes belong to the dot products; what is no number belongs here.
  static constexpr bool kValueLite = kValue.grouping == Grouping::kTokenLite;
  static constexpr bool kScalesMayBeNan = kValue.per_token || kValueLite;

  const typename KeyDot::Query& query;
  typename ValueDot::Weights& weights;
  const RowFacts& facts;
  float* scores;  // [rows, kTile] in, weights on the way out
  float* alpha;   // [rows] out: what the accumulators shrink by
  float* gamma;   // [rows] out: what one unit of the tile's products is worth
  TokenScales key, value;
  F16 none[kGroups];  // lite V: NaN where a token's is
  F16 poison;         // NaN where V's scale of a token is no number, else 0

  // As an aggregate's, the arrays above would be zeroed for every tile (2 % of int4).
  TileSoftmax(const typename KeyDot::Query& query, typename ValueDot::Weights& weights,
              const RowFacts& facts, float* scores, float* alpha, float* gamma)
      : query(query), weights(weights), facts(facts), scores(scores), alpha(alpha), gamma(gamma) {}

  KVQ_HD void load(const Tile& tile, long d) {
    if constexpr (kKey.per_token) {
      key.load<kKey.code>(tile.now.key_metadata, tile.next.key_metadata);
    }
    if constexpr (kValue.per_token) {
      value.load<kValue.code>(tile.now.value_metadata, tile.next.value_metadata);
      if constexpr (kValueAffine && kMiddleOf<ValueDot> != 0.0f) {
        each_group([&](auto g) KVQ_UNROLLED {
          value.minimum[g] = fma(value.scale[g], splat(kMiddleOf<ValueDot>), value.minimum[g]);
        });
      }
    }
    if constexpr (kValueLite) {
      for (int g = 0; g < kGroups; ++g) {
        U16 found{};
        for (long at = 0; at < d * 2; at += kSealed * 2) {
          prefetch(tile.next.value_metadata[g] + at);
          found |= is_no_scale(load_words(tile.now.value_metadata[g] + at));
        }
        none[g] = select(cast<I16>(found) == 0, F16{}, splat(__builtin_nanf("")));
      }
    }
    if constexpr (kScalesMayBeNan) {
      poison = F16{};
      each_group([&](auto g) KVQ_UNROLLED { poison += nan(g); });
    }
  }

  // NaN where V's scale of a token of a group is no number, else 0.
  KVQ_HD F16 nan(int g) const {
    if constexpr (kValueLite) return none[g];
    return value.scale[g] * 0.0f;
  }

  KVQ_HD F16 scaled(F16 x, int row, int g) const {
    if constexpr (kKey.per_token) x *= key.scale[g];
    if constexpr (kKeyAffine) x = fma(key.minimum[g], splat(query.sum[row]), x);
    if constexpr (kKey.is_static()) x += facts.key_bias[row];
    return x;
  }

  static KVQ_HD I16 tokens(long t0, int g) {
    static constexpr int32_t kLane[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return kvq::load<I16>(kLane) + static_cast<int>(t0 + g * kLanes);
  }

  void shape(int rows, long t0) const {
    for (int r = 0; r < rows; ++r) {
      for (int g = 0; g < kGroups; ++g) {
        float* at = scores + r * kTile + g * kLanes;
        save16(at, shape_score(scaled(load16(at), r, g), facts, r, tokens(t0, g)));
      }
    }
  }

  // One row's scores of a group, scaled and masked.
  template <bool kMasked, bool kShaped>
  KVQ_HD F16 prepared(int row, long t0, int g) const {
    F16 x = load16(scores + row * kTile + g * kLanes);
    if constexpr (!kShaped) x = scaled(x, row, g);
    if constexpr (kMasked) {
      const Span s = facts.span[row];
      const I16 t = tokens(t0, g);
      x = select((t >= s.begin) & (t < s.end), x, splat(kMinusInf));
    }
    return x;
  }

  // Scores to weights, in place. Returns their sum; `bias` is what the mins add.
  template <bool kMasked>
  KVQ_HD F16 weigh(F16 peak, F16 (&x)[kGroups], F16& bias) const {
    F16 sum{};
    bias = F16{};
    each_group([&](auto g) KVQ_UNROLLED {
      // A token that some row must not see may hold stale metadata, NaN even.
      const auto shown = [&, hidden = x[g] == kMinusInf](F16 y)
                             KVQ_UNROLLED { return kMasked ? select(hidden, F16{}, y) : y; };
      F16 p = shown(exp2(x[g] - peak));
      sum += p;
      if constexpr (kValueAffine) bias = fma(p, shown(value.minimum[g]), bias);
      if constexpr (kMasked && kScalesMayBeNan) sum += shown(nan(g));
      if constexpr (kValue.per_token) p *= shown(value.scale[g]);
      x[g] = p;
    });
    if constexpr (!kMasked && kScalesMayBeNan) sum += poison;
    return sum;
  }

  // Up to four rows: their largest scores together, then two at a time (what fits the registers),
  // then their running state together.
  template <int R, bool kMasked, bool kShaped>
  void pass(State state, int row, long t0) {
    F16 most[kPassRows] = {};
    unroll<R>([&](auto r) KVQ_UNROLLED {
      most[r] = splat(kNothing);
      each_group([&](auto g) KVQ_UNROLLED {
        most[r] = max16(most[r], prepared<kMasked, kShaped>(row + r, t0, g));
      });
    });
    const F4 peaks = peak_rows(most);
    F4 units{};
    F16 sum[R], bias[R];
    unroll<(R + 1) / 2>([&](auto pair) KVQ_UNROLLED {
      constexpr int r = 2 * decltype(pair)::value, n = r + 1 < R ? 2 : 1;
      F16 x[n][kGroups], unit[n];
      unroll<n>([&](auto i) KVQ_UNROLLED {
        each_group([&](auto g)
                       KVQ_UNROLLED { x[i][g] = prepared<kMasked, kShaped>(row + r + i, t0, g); });
        sum[r + i] = weigh<kMasked>(splat(peaks[r + i.value]), x[i], bias[r + i]);
      });
      ValueDot::template set_weights<n, kValue.per_token>(weights, row + r, x, unit, &bias[r]);
      unroll<n>([&](auto i) KVQ_UNROLLED { units[r + i.value] = unit[i][0]; });
    });
    const Shares<F4> s = shares(load4(state.max + row), peaks);
    save4(state.max + row, s.max);
    save4(alpha + row, s.a);
    save4(gamma + row, s.b * units);
    unroll<R>([&](auto r) KVQ_UNROLLED {
      const long at = (row + r) * kLanes;
      const F16 a = splat(s.a[r.value]), b = splat(s.b[r.value]);
      merge_lanes(state.sum + at, sum[r], a, b);
      merge_lanes(state.bias + at, bias[r], a, b);
    });
  }

  void run(State state, int rows, long t0) {
    if (facts.shaped) shape(rows, t0);
    for_each_pass(rows, [&](auto n, int row) {
      constexpr int R = decltype(n)::value;
      bool masked = false;
      for (int r = row; r < row + R; ++r) {
        masked |= facts.span[r].begin > t0 || facts.span[r].end < t0 + kTile;
      }
      if (facts.shaped) {
        masked ? pass<R, true, true>(state, row, t0) : pass<R, false, true>(state, row, t0);
      } else {
        masked ? pass<R, true, false>(state, row, t0) : pass<R, false, false>(state, row, t0);
      }
    });
  }
};

}  // namespace
}  // namespace kvq
