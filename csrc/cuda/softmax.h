// From one tile's products to its weights, and both products' fragments; attend.h says how they are
// permuted.
#pragma once

#include "tile.h"

namespace kvq {
namespace gpu {
namespace {

// Weights are held as 2^15 times theirs, so that fp16 keeps 11 bits of those above 2^-29.
constexpr float kWeightShift = 15.0f;
constexpr float kMinusInf = -__builtin_inff();

template <class L>
KVQ_HD float metadata_scale(Stream s, uint32_t word) {
  return is_affine(s) ? L::widen(word & 0xFFFFu) : bits_float(word);
}

// The softmax of one warp's rows, 8 n + 2 t + j in lane (g, t), and what it has summed up.
template <class L, class S>
struct Running {
  // Largest score so far, and largest score + log2(V's token scale): weights are relative to the
  // second, so that they fill fp16's range whatever V's scales are. The same without such scales.
  float peak[S::kN][2], loudest[S::kN][2];
  float sum[S::kN][2],
      minimum[S::kN][2];  // of weights, and of weights times V's mins; a lane's own
  float out[S::kD / 16][S::kN][4];

  KVQ_HD void clear() {
    KVQ_UNROLL for (int n = 0; n < S::kN; ++n) {
      KVQ_UNROLL for (int j = 0; j < 2; ++j) {
        peak[n][j] = loudest[n][j] = kMinusInf;
        sum[n][j] = minimum[n][j] = 0.0f;
      }
      KVQ_UNROLL for (int i = 0; i < S::kD / 16; ++i) {
        KVQ_UNROLL for (int j = 0; j < 4; ++j) out[i][n][j] = 0.0f;
      }
    }
  }
};

// What exponents are subtracted from scores: rows that saw nothing yet have none.
KVQ_HD float unit(float peak) { return (peak == kMinusInf ? 0.0f : peak) - kWeightShift; }

// Raises `peak` to the largest of x over the tokens of the tile. Returns what older sums shrink by.
template <class L, int kTokens>
KVQ_HD float raise(float& peak, const float (&x)[kTokens]) {
  float largest = x[0];
  KVQ_UNROLL for (int i = 1; i < kTokens; ++i) largest = L::max(largest, x[i]);
  largest = reduce<L>(largest, 4, 32, [](float a, float b) { return L::max(a, b); });
  const float before = unit(peak);
  const bool first = peak == kMinusInf;
  peak = L::max(peak, largest);
  return first ? 0.0f : L::exp2(before - unit(peak));
}

template <class L, class S>
KVQ_HD void scores_of(const Tile<L, S>& tile, const Query<L, S>& query,
                      float (&scores)[S::kM][S::kN][4]) {
  using Key = Decoder<S::kKey.code>;
  constexpr int kSteps = Key::kCodes / 4;  // products of 16 dims per word
  KVQ_UNROLL for (int m = 0; m < S::kM; ++m) {
    KVQ_UNROLL for (int n = 0; n < S::kN; ++n) {
      KVQ_UNROLL for (int j = 0; j < 4; ++j) scores[m][n][j] = 0.0f;
    }
    KVQ_UNROLL for (int w = 0; w < Tile<L, S>::kKeyWords; ++w) {
      uint32_t low[Key::kCodes / 2], high[Key::kCodes / 2];  // tokens of rows g and g + 8
      Key::template along<L>(tile.key[2 * m][w], low);
      Key::template along<L>(tile.key[2 * m + 1][w], high);
      KVQ_UNROLL for (int s = 0; s < kSteps; ++s) {
        KVQ_UNROLL for (int n = 0; n < S::kN; ++n) {
          const uint32_t (&b)[2] = query.fragment[n][w * kSteps + s];
          L::mma(scores[m][n], low[2 * s], high[2 * s], low[2 * s + 1], high[2 * s + 1], b[0],
                 b[1]);
        }
      }
    }
  }
}

// `words`: of each of a lane's tokens, codes of dims side by side.
template <class L, class S, Code C = S::kValue.code, int kWords>
KVQ_HD void accumulate(const uint32_t (&words)[4 * S::kM][kWords],
                       const uint32_t (&weights)[S::kM][S::kN][2], Running<L, S>& run) {
  using Value = Decoder<C>;
  constexpr int kPairs = Value::kCodes / 2;
  KVQ_UNROLL for (int m = 0; m < S::kM; ++m) {
    KVQ_UNROLL for (int w = 0; w < kWords; ++w) {
      uint32_t low[Value::kCodes], high[Value::kCodes];  // tokens 2 t, 2 t + 1 and those + 8
      Value::template across<L>(words[2 * m][w], words[2 * S::kM + 2 * m][w], low);
      Value::template across<L>(words[2 * m + 1][w], words[2 * S::kM + 2 * m + 1][w], high);
      KVQ_UNROLL for (int i = 0; i < kPairs; ++i) {
        KVQ_UNROLL for (int n = 0; n < S::kN; ++n) {
          L::mma(run.out[w * kPairs + i][n], low[2 * i], low[2 * i + 1], high[2 * i],
                 high[2 * i + 1], weights[m][n][0], weights[m][n][1]);
        }
      }
    }
  }
}

// Rows n, j of a tile: products to log2 scores, with -inf for what the row does not see. K: what
// the tile holds (kKey, kValue, kBias), which is S but for formats with recent rows.
template <class L, class S, class K>
KVQ_HD void shape_scores(const AttendParams& p, const Shared<S>& shared, int row, const Span* spans,
                         int token, bool masked, const float (&scale)[2 * S::kM],
                         const float (&minimum)[2 * S::kM], float (&x)[2 * S::kM]) {
  const float factor = shared.factor[row], bias = K::kBias ? shared.bias[row] : 0.0f;
  KVQ_UNROLL for (int i = 0; i < 2 * S::kM; ++i) {
    if constexpr (is_affine(K::kKey)) {
      x[i] = scale[i] * x[i] + minimum[i] * bias;
    } else {
      if constexpr (K::kBias) x[i] += bias;
      if constexpr (K::kKey.per_token) x[i] *= scale[i];
    }
    x[i] *= factor;
  }
  if (p.softcap > 0.0f) {
    // tanh(s) = 1 - 2 / (1 + e^2s); x is in units of log2(e).
    const float inner = 2.0f / p.softcap, outer = p.softcap * kLog2e;
    KVQ_UNROLL for (int i = 0; i < 2 * S::kM; ++i) {
      x[i] = outer - 2.0f * outer * L::reciprocal(1.0f + L::exp2(x[i] * inner));
    }
  }
  if (p.alibi_slopes != nullptr) {
    const int position = shared.position[row];
    KVQ_UNROLL for (int i = 0; i < 2 * S::kM; ++i) {
      x[i] -= shared.slope[row] * static_cast<float>(position - (token + i));
    }
  }
  if (masked) {
    const Span seen = spans[row];
    KVQ_UNROLL for (int i = 0; i < 2 * S::kM; ++i) {
      x[i] = token + i >= seen.begin && token + i < seen.end ? x[i] : kMinusInf;
    }
  }
}

// V's values of sealed tokens with scales of their own are held as 2^-kLift times theirs, within
// fp16's range whatever they are.
constexpr float kLift = 4.0f;

// From products to weights, as the B operand of the second product; shrinks what `run` holds.
// `token`: of the first score this lane holds; `spans`: what each row sees. value_words of V with
// scales per token and group of channels: a NaN (as bits) or 0, which joins the score.
template <class L, class S, class K = S>
KVQ_HD void softmax(const AttendParams& p, const Shared<S>& shared, const Span* spans, int token,
                    bool masked, const uint32_t (&key_words)[2 * S::kM],
                    const uint32_t (&value_words)[2 * S::kM],
                    const float (&scores)[S::kM][S::kN][4], uint32_t (&weights)[S::kM][S::kN][2],
                    Running<L, S>& run) {
  constexpr int kTokens = 2 * S::kM;
  constexpr bool kGrouped = K::kValue.grouping == Grouping::kTokenLite;
  float key_scale[kTokens] = {}, key_minimum[kTokens] = {};
  float value_log[kTokens] = {}, value_offset[kTokens] = {};
  KVQ_UNROLL for (int i = 0; i < kTokens; ++i) {
    if constexpr (K::kKey.per_token) key_scale[i] = metadata_scale<L>(K::kKey, key_words[i]);
    if constexpr (is_affine(K::kKey)) key_minimum[i] = L::widen(key_words[i] >> 16);
    if constexpr (K::kValue.per_token) {
      const float scale = metadata_scale<L>(K::kValue, value_words[i]);
      value_log[i] = L::log2(scale);
      if constexpr (is_affine(K::kValue)) {
        constexpr float kCenter = Decoder<K::kValue.code>::kCenter;
        value_offset[i] = L::widen(value_words[i] >> 16) + kCenter * scale;
      }
    }
  }
  KVQ_UNROLL for (int n = 0; n < S::kN; ++n) {
    float held[2][kTokens];  // weights of rows 2 t and 2 t + 1
    KVQ_UNROLL for (int j = 0; j < 2; ++j) {
      float x[kTokens];
      KVQ_UNROLL for (int i = 0; i < kTokens; ++i) {
        x[i] = scores[i / 2][n][i % 2 * 2 + j];
        if constexpr (kGrouped) x[i] += bits_float(value_words[i]);
      }
      const int row = 8 * n + L::id() % 4 * 2 + j;
      shape_scores<L, S, K>(p, shared, row, spans, token, masked, key_scale, key_minimum, x);
      const float shrink = raise<L>(run.peak[n][j], x);
      const float base = unit(run.peak[n][j]);
      float sum = 0.0f, minimum = 0.0f, shrink_out = shrink;
      KVQ_UNROLL for (int i = 0; i < kTokens; ++i) {
        const float weight = L::exp2(x[i] - base);
        sum += weight;
        held[j][i] = weight;
        if constexpr (is_affine(K::kValue)) {
          minimum += weight == 0.0f ? 0.0f : weight * value_offset[i];
        }
      }
      if constexpr (K::kValue.per_token) {
        // Stale metadata of a token that is not seen may be NaN.
        KVQ_UNROLL for (int i = 0; i < kTokens; ++i) {
          x[i] = x[i] == kMinusInf ? kMinusInf : x[i] + value_log[i];
        }
        shrink_out = raise<L>(run.loudest[n][j], x);
        const float loudest = unit(run.loudest[n][j]);
        KVQ_UNROLL for (int i = 0; i < kTokens; ++i) held[j][i] = L::exp2(x[i] - loudest);
      } else if constexpr (S::kLoud) {
        const float before = run.loudest[n][j];
        run.loudest[n][j] = L::max(before, run.peak[n][j] + kLift);
        const float loudest = unit(run.loudest[n][j]), share = L::exp2(base + kLift - loudest);
        shrink_out = before == kMinusInf ? 0.0f : L::exp2(unit(before) - loudest);
        KVQ_UNROLL for (int i = 0; i < kTokens; ++i) held[j][i] *= share;
      }
      run.sum[n][j] = run.sum[n][j] * shrink + sum;
      if constexpr (S::kMinimum) {
        run.minimum[n][j] = run.minimum[n][j] * shrink + minimum;
      }
      KVQ_UNROLL for (int i = 0; i < S::kD / 16; ++i) {
        run.out[i][n][j] *= shrink_out;
        run.out[i][n][j + 2] *= shrink_out;
      }
    }
    KVQ_UNROLL for (int i = 0; i < kTokens; ++i) {
      weights[i / 2][n][i % 2] = L::transpose(L::pack_halves(held[0][i], held[1][i]));
    }
  }
}

}  // namespace
}  // namespace gpu
}  // namespace kvq
