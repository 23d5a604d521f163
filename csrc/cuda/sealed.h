// The tiles of formats with recent rows: sealed groups, the sequence's first row, recent rows.
//
// A tile is one group of kSealed tokens, so that K's scales, one a channel and group, belong to the
// whole tile: they go into q, anew for each tile (two packed multiplications per step of 16 dims
// and 8 rows). K's mins are one more row of the product: every row of A holds them, so that each
// lane finds its rows' sums in its own registers. A warp reads a group's scales once, 16 bytes a
// lane, and shares them out in shared memory. V's scales per token and group of channels go into
// the values, because a lane's dims lie in one group of channels, and products add up channels'
// values.
//
// Lane 4 g + t holds of K the tokens 4 g .. 4 g + 3 and runs of kChunk dims, of V the tokens 8 t ..
// 8 t + 7 and kD / 8 dims from g kD / 8 on; int8 rows are held in the same order, for the same q
// and the same sums.
#pragma once

#include "attend.h"
#include "sealed_tile.h"

namespace kvq {
namespace gpu {
namespace {

// How a format's sealed tiles and its int8 ones differ to the softmax.
template <class S>
struct SealedKind {
  static constexpr Stream kKey = S::kKey, kValue = S::kValue;
  static constexpr bool kBias = false;
};
struct RecentKind {
  static constexpr Stream kKey = kFormats[kRecentFormat].key,
                          kValue = kFormats[kRecentFormat].value;
  static constexpr bool kBias = true;
};

// Scores in units of kSubnormal.
template <class L, class S>
KVQ_HD void sealed_scores(const SealedTile<L, S>& tile, const SealedQuery<L, S>& query,
                          const Shared<S>& shared, float (&scores)[S::kM][S::kN][4]) {
  using Dims = KeyDims<S>;
  float minimum[S::kN][4] = {};
  KVQ_UNROLL for (int m = 0; m < S::kM; ++m) {
    KVQ_UNROLL for (int n = 0; n < S::kN; ++n) {
      KVQ_UNROLL for (int j = 0; j < 4; ++j) scores[m][n][j] = 0.0f;
    }
  }
  KVQ_UNROLL for (int c = 0; c < Dims::kChunks; ++c) {
    KVQ_UNROLL for (int w = 0; w < Dims::kWords; ++w) {
      uint32_t codes[4][2 * Dims::kSteps];
      KVQ_UNROLL for (int i = 0; i < 4; ++i) {
        if constexpr (Dims::kBits == 3) {
          int3_along<L>(tile.key[i][c][w], tile.high[i][c] >> 4 * w, codes[i]);
        } else {
          Decoder<S::kKey.code>::template along<L>(tile.key[i][c][w], codes[i]);
        }
      }
      KVQ_UNROLL for (int s = 0; s < Dims::kSteps; ++s) {
        const int quad = w * Dims::kSteps + s, place = Dims::first(L::id() % 4, c) / 4 + quad;
        const KeyScales k = shared.sealed.scales[L::warp()][place];
        KVQ_UNROLL for (int n = 0; n < S::kN; ++n) {
          const uint32_t (&q)[2] = query.fragment[n][c * Dims::kQuads + quad];
          const uint32_t b0 = L::mul2(q[0], k.scale[0]), b1 = L::mul2(q[1], k.scale[1]);
          KVQ_UNROLL for (int m = 0; m < S::kM; ++m) {
            L::mma(scores[m][n], codes[2 * m][2 * s], codes[2 * m + 1][2 * s],
                   codes[2 * m][2 * s + 1], codes[2 * m + 1][2 * s + 1], b0, b1);
          }
          L::mma(minimum[n], k.minimum[0], k.minimum[0], k.minimum[1], k.minimum[1], q[0], q[1]);
        }
      }
    }
  }
  // Lite mins are halved, because the least of them may round to beyond fp16.
  constexpr float kUnit = SealedTile<L, S>::kLite ? 2.0f * kSubnormal : kSubnormal;
  KVQ_UNROLL for (int n = 0; n < S::kN; ++n) {
    KVQ_UNROLL for (int m = 0; m < S::kM; ++m) {
      KVQ_UNROLL for (int j = 0; j < 4; ++j) scores[m][n][j] += kUnit * minimum[n][j];
    }
  }
}

// Values of 2 bits with lite scales, as 2^-kLift times theirs.
template <class L, class S>
KVQ_HD void accumulate_grouped(const SealedTile<L, S>& tile,
                               const uint32_t (&weights)[S::kM][S::kN][2], Running<L, S>& run) {
  constexpr int kFields = S::kD < 128 ? 2 : 4;  // of a word, that are this lane's
  static_assert(kLift == 4.0f, "a scale times 2^-4");
  KVQ_UNROLL for (int m = 0; m < S::kM; ++m) {
    uint32_t scale[2], minimum[2];  // of tokens 2 m and 2 m + 4, and of those after them
    KVQ_UNROLL for (int i = 0; i < 2; ++i) {
      uint32_t words =
          L::permute(tile.group_words[m], tile.group_words[m + 2], i ? 0x7632u : 0x5410u);
      words &= ~(no_scales(words) * 0xFFFFu);  // NaN already is in the score
      const LitePair pair = lite_pair<L>(words, 0x2C002C00u, kHalves);
      scale[i] = pair.scale;
      minimum[i] = pair.minimum;
    }
    KVQ_UNROLL for (int w = 0; w < SealedTile<L, S>::kValueWords; ++w) {
      KVQ_UNROLL for (int field = 0; field < kFields; ++field) {
        uint32_t a[2][4];
        KVQ_UNROLL for (int i = 0; i < 2; ++i) {
          const uint32_t first = tile.value[2 * m + i][w], second = tile.value[2 * m + i + 4][w];
          int2_across<L>(first, second, field, a[i]);
          KVQ_UNROLL for (uint32_t& x : a[i]) x = L::fma2(x, scale[i], minimum[i]);
        }
        KVQ_UNROLL for (int i = 0; i < 2; ++i) {
          KVQ_UNROLL for (int n = 0; n < S::kN; ++n) {
            L::mma(run.out[w * 8 + field * 2 + i][n], a[0][2 * i], a[0][2 * i + 1], a[1][2 * i],
                   a[1][2 * i + 1], weights[m][n][0], weights[m][n][1]);
          }
        }
      }
    }
  }
}

// Rows of int8: 32 of a recent page, or a first row; those outside `seen` are not read.
struct Int8Rows {
  const uint8_t* key;
  int value, key_scale, value_scale;  // bytes from there on
  Span seen;

  KVQ_HD bool sees(int token) const { return token >= seen.begin && token < seen.end; }
};

template <class L, class S>
KVQ_HD void attend_int8(const AttendParams& p, const Int8Rows& rows, const SealedQuery<L, S>& query,
                        const Shared<S>& shared, const Span* spans, int token, Running<L, S>& run) {
  using Dims = KeyDims<S>;
  constexpr int kValueWords = S::kD / 32;
  const int d = p.cache.head_size, g = L::id() / 4, t = L::id() % 4;
  const auto read = [&](const uint8_t* from, auto& words, bool real) {
    KVQ_UNROLL for (uint32_t& word : words) word = 0;
    if (real) L::load(from, words);
  };
  float scores[S::kM][S::kN][4] = {};
  KVQ_UNROLL for (int f = 0; f < S::kD / 16; f += 4) {  // sixteen dims a lane at a time
    uint32_t codes[4][4];
    const int first = Dims::first(t, f / Dims::kQuads) + f % Dims::kQuads * 4;
    KVQ_UNROLL for (int i = 0; i < 4; ++i) {
      read(rows.key + (4 * g + i) * d + first, codes[i], rows.sees(4 * g + i) && first < d);
    }
    KVQ_UNROLL for (int w = 0; w < 4; ++w) {
      uint32_t a[4][2];
      KVQ_UNROLL for (int i = 0; i < 4; ++i) {
        a[i][0] = L::permute(codes[i][w], 0u, 0x4240u);
        a[i][1] = L::permute(codes[i][w], 0u, 0x4341u);
      }
      KVQ_UNROLL for (int m = 0; m < S::kM; ++m) {
        KVQ_UNROLL for (int n = 0; n < S::kN; ++n) {
          const uint32_t (&q)[2] = query.fragment[n][f + w];
          L::mma(scores[m][n], a[2 * m][0], a[2 * m + 1][0], a[2 * m][1], a[2 * m + 1][1], q[0],
                 q[1]);
        }
      }
    }
  }
  uint32_t key_words[4], value_words[4], weights[S::kM][S::kN][2];
  KVQ_UNROLL for (int i = 0; i < 4; ++i) {
    uint32_t word[1];
    read(rows.key + rows.key_scale + 4 * (4 * g + i), word, rows.sees(4 * g + i));
    key_words[i] = word[0];
    read(rows.key + rows.value_scale + 4 * (4 * g + i), word, rows.sees(4 * g + i));
    value_words[i] = word[0];
  }
  softmax<L, S, RecentKind>(p, shared, spans, token + 4 * g, true, key_words, value_words, scores,
                            weights, run);
  uint32_t value[8][kValueWords];
  constexpr int kLoad = kValueWords < 4 ? kValueWords : 4;
  KVQ_UNROLL for (int i = 0; i < 8; ++i) {
    KVQ_UNROLL for (int w = 0; w < kValueWords; w += kLoad) {
      const int first = g * (S::kD / 8) + 4 * w;
      uint32_t words[kLoad];
      read(rows.key + rows.value + (8 * t + i) * d + first, words,
           rows.sees(8 * t + i) && first < d);
      KVQ_UNROLL for (int j = 0; j < kLoad; ++j) value[i][w + j] = words[j];
    }
  }
  accumulate<L, S, Code::kInt8>(value, weights, run);
}

// Sealed tiles i, i + kWarps, ... below last. Returns the first that is not.
template <class L, class S>
KVQ_HD int attend_sealed(const AttendParams& p, const RowTile& r, const Ranges& x, int i, int last,
                         const SealedQuery<L, S>& query, Shared<S>& shared, Running<L, S>& run) {
  const Places at(page_layout(S::kFormat, p.cache.head_size, p.cache.block_size));
  const int32_t* table = p.block_table + r.sequence * p.block_table_stride;
  // What every row sees: tiles inside need no mask.
  const int all_begin = shared.sealed.seals[r.count - 1].begin,
            all_end = shared.sealed.seals[0].end;
  const auto token = [&](int tile) { return x.sealed_begin + tile * kSealed; };
  SealedTile<L, S> tile;
  tile.look_up(p, table, token(i), i < last);
  if (i < last) {
    tile.load_key(p, at, r.kv_head, token(i));
    tile.load_value(p, at, r.kv_head, token(i));
  }
  tile.look_up(p, table, token(i + kWarps), i + kWarps < last);
  for (; i < last; i += kWarps) {
    const int next = i + kWarps, begin = token(i);
    tile.publish(shared);
    float scores[S::kM][S::kN][4];
    sealed_scores<L, S>(tile, query, shared, scores);
    uint32_t unused[2 * S::kM] = {}, value_words[2 * S::kM];
    KVQ_UNROLL for (int j = 0; j < 2 * S::kM; ++j) {
      if constexpr (SealedTile<L, S>::kGrouped) {
        const uint32_t bad = no_scales(tile.token_words[j / 2]) >> (j % 2 * 16) & 1u;
        value_words[j] = bad * 0x7FC00000u;
      } else {
        value_words[j] = tile.token_words[j];
      }
    }
    if (next < last) tile.load_key(p, at, r.kv_head, token(next));
    const bool masked = begin < all_begin || begin + kSealed > all_end;
    uint32_t weights[S::kM][S::kN][2];
    softmax<L, S, SealedKind<S>>(p, shared, shared.sealed.seals, begin + L::id() / 4 * 4, masked,
                                 unused, value_words, scores, weights, run);
    if constexpr (SealedTile<L, S>::kGrouped) {
      accumulate_grouped<L, S>(tile, weights, run);
    } else {
      accumulate<L, S>(tile.value, weights, run);
    }
    if (next < last) {
      tile.load_value(p, at, r.kv_head, token(next));
      tile.look_up(p, table, token(next + kWarps), next + kWarps < last);
    }
  }
  return i;
}

template <class L, class S>
KVQ_HD void attend_ranges(const AttendParams& p, const RowTile& r, Span tokens, int first, int last,
                          Shared<S>& shared, Running<L, S>& run) {
  static_assert(S::kTile == kSealed && S::kM == 2, "a tile is a group");
  rotate_queries<L, S>(p, r, shared);
  SealedQuery<L, S> query;
  query.load(p, r, shared);
  L::sync();
  run.clear();
  const Ranges x = ranges_of(r, tokens);
  int i = attend_sealed<L, S>(p, r, x, first, min_of(last, x.sealed), query, shared, run);
  const int d = p.cache.head_size;
  for (; i < last; i += kWarps) {
    Int8Rows rows;
    const int nth = i - x.sealed - x.first;
    const bool is_first = nth < 0;
    const int token = is_first ? 0 : x.recent_begin + nth * kSealed;
    if (is_first) {
      const int block = L::load_index(p.block_table + r.sequence * p.block_table_stride);
      rows.key = p.cache.data + block * p.cache.block_stride + r.kv_head * p.cache.head_stride +
                 Places(page_layout(S::kFormat, d, p.cache.block_size)).first;
      rows.value = d;
      rows.key_scale = 2 * d;
      rows.value_scale = 2 * d + 4;
      rows.seen = {0, 1};
    } else {
      const uint32_t size = p.recent.block_size;
      const int position = static_cast<uint32_t>(token) % size;
      const int block = L::load_index(p.recent_table + r.sequence * p.recent_table_stride +
                                      static_cast<uint32_t>(token) / size);
      const Places at(page_layout(kFormats[kRecentFormat], d, p.recent.block_size));
      rows.key = p.recent.data + block * p.recent.block_stride + r.kv_head * p.recent.head_stride +
                 position * d;
      rows.value = at.value_codes;
      rows.key_scale = at.key_metadata + position * (4 - d);
      rows.value_scale = at.value_metadata + position * (4 - d);
      rows.seen = {tokens.begin - token, tokens.end - token};
    }
    const Span* spans = is_first ? shared.sealed.firsts : shared.span;
    attend_int8<L, S>(p, rows, query, shared, spans, token, run);
  }
}

}  // namespace
}  // namespace gpu
}  // namespace kvq
