// What a warp holds while it attends: the rows' queries, and one tile of a page's codes, in the
// fragments of PTX's mma.m16n8k16 (attend.h says how they are permuted).
#pragma once

#include "deal.h"
#include "decode.h"
#include "rotate.h"

namespace kvq {
namespace gpu {
namespace {

constexpr float kLog2e = 1.44269504f;

KVQ_CONSTEXPR bool is_affine(Stream s) { return s.per_token && s.code == Code::kInt4; }

// What formats with recent rows need besides (sealed.h).
template <class S, bool kRecent = S::kFormat.recent>
struct SealedPart {};

// A group's scales and mins of K of four channels, as the products take them.
struct alignas(16) KeyScales {
  uint32_t scale[2], minimum[2];
};

template <class S>
struct SealedPart<S, true> {
  KeyScales scales[kWarps][S::kD / 4];     // each warp's own
  Span seals[S::kRows], firsts[S::kRows];  // what rows see of sealed rows, and of the first row
};

template <class S>
struct alignas(16) Shared {
  float out[kWarps][S::kRows][S::kD];
  float exponent[kWarps][S::kRows], sum[kWarps][S::kRows];
  // Of each row: score = factor * (q . codes + bias), what it sees, ALiBi.
  float factor[S::kRows], bias[S::kRows], slope[S::kRows];
  Span span[S::kRows];
  int position[S::kRows];
  SealedPart<S> sealed;
  Dealing share;
  // Of the piece at hand: its rows, the tokens they see, the tiles to go through.
  RowTile rows;
  Span seen, tiles;
  uint32_t before;  // pieces of an item that came in before this one
};

// The queries of rotated K, rotated, in shared.out[0], which is free until the tiles are done.
// Costs a pass through shared memory and a barrier a block; all warps then read their fragments
// from it.
template <class L, class S>
KVQ_HD void rotate_queries(const AttendParams& p, const RowTile& r, Shared<S>& shared) {
  if constexpr (!S::kKey.rotated) return;
  const int d = p.cache.head_size, dim = L::id() * kShare;
  for (int row = L::warp(); row < r.count; row += kWarps) {
    const int64_t at =
        (r.start + r.query(row)) * p.query.token_stride + r.head(row) * p.query.head_stride + dim;
    float x[kShare];
    load_activations(p.query.data, p.activation, at, d - dim, [](int i) { return i; }, x);
    rotate<L>(x, dim, d);
    if (dim < d) {
      KVQ_UNROLL for (int i = 0; i < kShare; ++i) shared.out[0][row][dim + i] = x[i];
    }
  }
  L::sync();
}

// q as the B operand, in the order in which K's codes leave their words.
template <class L, class S>
struct Query {
  using Key = Decoder<S::kKey.code>;
  static constexpr int kSteps = S::kD / 16;
  uint32_t fragment[S::kN][kSteps][2];

  // Dim of K's pair `pair` in word `word` of lane t's share.
  static KVQ_HD int dim(int t, int word, int pair, int which) {
    constexpr int kWords = S::kKeyLoad / 4;
    const int at = (word / kWords * 4 + t) * kWords + word % kWords;
    return at * Key::kCodes + Key::dim(pair, which);
  }

  // Row 8 n + g of the tile; warp 0 also notes what the softmax needs of it.
  KVQ_HD void load(const AttendParams& p, const RowTile& r, Shared<S>& shared) {
    const int g = L::id() / 4, t = L::id() % 4;
    constexpr int kPairs = Key::kCodes / 2;
    KVQ_UNROLL for (int n = 0; n < S::kN; ++n) {
      const int row = 8 * n + g;
      const bool real = row < r.count;
      const int64_t at =
          real ? (r.start + r.query(row)) * p.query.token_stride + r.head(row) * p.query.head_stride
               : 0;
      const int64_t channels = static_cast<int64_t>(r.kv_head) * p.cache.head_size;
      const float* factor = S::kKey.per_token ? nullptr : p.key_scale.factor + channels;
      const float* zero_point = p.key_scale.zero_point;
      if (zero_point != nullptr) zero_point += channels;
      float x[4 * kSteps], peak = 0.0f;
      const auto dim_of = [&](int i) { return dim(t, i / 2 / kPairs, i / 2 % kPairs, i % 2); };
      const int limit = real ? p.cache.head_size : 0;
      if constexpr (S::kKey.rotated) {
        KVQ_UNROLL for (int i = 0; i < 4 * kSteps; ++i) {
          x[i] = dim_of(i) < limit ? shared.out[0][row][dim_of(i)] : 0.0f;
        }
      } else {
        load_activations(p.query.data, p.activation, at, limit, dim_of, x);
      }
      KVQ_UNROLL for (int i = 0; i < 4 * kSteps; ++i) {
        if constexpr (!S::kKey.per_token) {
          x[i] *= dim_of(i) < limit ? factor[dim_of(i)] : 0.0f;
        }
        peak = L::max(peak, x[i] < 0.0f ? -x[i] : x[i]);
      }
      peak = reduce<L>(peak, 1, 4, [](float a, float b) { return L::max(a, b); });
      // A power of two puts the largest element of the row into [2^13, 2^14).
      uint32_t exponent = (float_bits(peak) >> 23) & 0xFFu;
      exponent = exponent < 27u ? 27u : exponent > 227u ? 227u : exponent;
      const float shrink = bits_float((127u + 13u + 127u - exponent) << 23);
      float bias = 0.0f;
      KVQ_UNROLL for (int i = 0; i < 2 * kSteps; ++i) {
        const float gain = 1.0f / Key::gain(i % kPairs);
        const uint32_t pair =
            L::pack_halves(x[2 * i] * shrink * gain, x[2 * i + 1] * shrink * gain);
        fragment[n][i / 2][i % 2] = pair;
        // What offsets of the codes add to the score, from q as rounded.
        if constexpr (S::kBias) {
          KVQ_UNROLL for (int j = 0; j < 2; ++j) {
            const int d = dim(t, i / kPairs, i % kPairs, j);
            float offset = is_affine(S::kKey) ? 1.0f : -Key::kOffset;
            if constexpr (!S::kKey.per_token) {
              if (zero_point != nullptr && d < p.cache.head_size) {
                offset -= zero_point[d];
              }
            }
            bias += L::widen(j ? pair >> 16 : pair & 0xFFFFu) * Key::gain(i % kPairs) * offset;
          }
        }
      }
      bias = reduce<L>(bias, 1, 4, [](float a, float b) { return a + b; });
      if (L::warp() == 0 && t == 0) {
        const int query = real ? r.query(row) : r.query(0);
        const float gain = S::kKey.rotated ? rotation_gain(p.cache.head_size) : 1.0f;
        shared.factor[row] =
            p.scale * gain * kLog2e * bits_float((exponent - 13u) << 23) / Key::kUnit;
        shared.bias[row] = bias * Key::kUnit;
        shared.slope[row] =
            real && p.alibi_slopes != nullptr ? p.alibi_slopes[r.head(row)] * kLog2e : 0.0f;
        shared.position[row] = r.length - r.queries + query;
        shared.span[row] = visible(p, r.length, r.queries, query);
      }
    }
  }
};

// One tile's bytes, in registers, and where they come from.
template <class L, class S>
struct Tile {
  static constexpr int kKeyWords = S::kKeyShare / 4, kValueWords = S::kValueShare / 4;
  uint32_t key[2 * S::kM][kKeyWords], value[4 * S::kM][kValueWords];
  uint32_t key_metadata[2 * S::kM], value_metadata[2 * S::kM];
  // Blocks of the tile to be loaded next.
  int key_block, value_block;

  static KVQ_HD int key_token(int tile) { return tile * S::kTile + L::id() / 4 * 2 * S::kM; }
  static KVQ_HD int value_token(int tile) { return tile * S::kTile + L::id() % 4 * 4 * S::kM; }

  KVQ_HD void look_up(const AttendParams& p, const int32_t* table, Span seen, int tile, int last) {
    const int kt = key_token(tile), vt = value_token(tile);
    const bool any = tile < last;
    const uint32_t size = p.cache.block_size;
    key_block = any && kt < seen.end ? L::load_index(table + kt / size) : 0;
    value_block = any && vt < seen.end ? L::load_index(table + vt / size) : 0;
  }

  static KVQ_HD int place(const AttendParams& p, int token) {
    return static_cast<uint32_t>(token) % static_cast<uint32_t>(p.cache.block_size);
  }
  static KVQ_HD const uint8_t* page(const AttendParams& p, int kv_head, int block) {
    return p.cache.data + block * p.cache.block_stride + kv_head * p.cache.head_stride;
  }

  // The rows of `kTokens` tokens from `token` on: those not seen are zeros, because what lies there
  // may be a NaN, which a weight of 0 would not hide, or no page at all.
  template <int kTokens, int kWords, int kLoad>
  static KVQ_HD void rows(uint32_t (&to)[kTokens][kWords], const uint8_t* from, int token,
                          Span seen, int row_bytes, int lanes, int lane) {
    constexpr int kLoadWords = kLoad / 4;
    KVQ_UNROLL for (int i = 0; i < kTokens; ++i) {
      const bool visible = token + i >= seen.begin && token + i < seen.end;
      KVQ_UNROLL for (int c = 0; c < kWords / kLoadWords; ++c) {
        const int offset = (c * lanes + lane) * kLoad;
        uint32_t words[kLoadWords] = {};
        if (visible && offset < row_bytes) L::load(from + i * row_bytes + offset, words);
        KVQ_UNROLL for (int w = 0; w < kLoadWords; ++w) to[i][c * kLoadWords + w] = words[w];
      }
    }
  }

  // One word a token, of the tokens whose scores this lane holds.
  static KVQ_HD void metadata(uint32_t (&to)[2 * S::kM], const uint8_t* from, bool any) {
    constexpr int kLoad = 2 * S::kM < 4 ? 2 * S::kM : 4;
    KVQ_UNROLL for (int i = 0; i < 2 * S::kM; i += kLoad) {
      uint32_t words[kLoad] = {};
      if (any) L::load(from + 4 * i, words);
      KVQ_UNROLL for (int w = 0; w < kLoad; ++w) to[i + w] = words[w];
    }
  }

  KVQ_HD void load_key(const AttendParams& p, const PageLayout& at, int kv_head, Span seen,
                       int tile) {
    const int token = key_token(tile), position = place(p, token);
    const uint8_t* from = page(p, kv_head, key_block);
    const int row = p.cache.head_size * code_bits(S::kKey.code) / 8;
    rows<2 * S::kM, kKeyWords, S::kKeyLoad>(key, from + at.key_codes + position * row, token, seen,
                                            row, 4, L::id() % 4);
    const bool any = token < seen.end && token + 2 * S::kM > seen.begin;
    if constexpr (S::kKey.per_token) {
      metadata(key_metadata, from + at.key_metadata + 4 * position, any);
    }
    // V's go with K's: both belong to the tokens whose scores this lane holds.
    if constexpr (S::kValue.per_token) {
      metadata(value_metadata, from + at.value_metadata + 4 * position, any);
    }
  }

  KVQ_HD void load_value(const AttendParams& p, const PageLayout& at, int kv_head, Span seen,
                         int tile) {
    const int token = value_token(tile), position = place(p, token);
    const int row = p.cache.head_size * code_bits(S::kValue.code) / 8;
    const uint8_t* from = page(p, kv_head, value_block) + at.value_codes + position * row;
    rows<4 * S::kM, kValueWords, S::kValueLoad>(value, from, token, seen, row, 8, L::id() / 4);
  }
};

}  // namespace
}  // namespace gpu
}  // namespace kvq
