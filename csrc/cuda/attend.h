// Split-KV attention of a few query rows per kv head over quantized pages, for decoding.
//
// A block of four warps owns up to 16 rows of one (sequence, kv head) at a time, over all tiles of
// tokens or some (plan.h); its warps take tiles in turn and never wait for each other until the
// end. Tokens are the M dimension of both products and
// rows (query token x head of the group) the N dimension, so that a group of 4 heads wastes half of
// a tile and not three quarters:
//
//     S^T [tokens, rows] = K [tokens, D] q^T        O^T [D, rows] += V^T [D, tokens] P^T
//
// Fragments are permuted so that each lane's share of a page is contiguous, which lets codes go
// from memory to registers in loads of 16 bytes, without shared memory or barriers. With lane = 4 g
// + t:
//
// * K: lane (g, t) holds tokens 2 kM g .. 2 kM (g + 1) of the tile, and of each the t-th 16 bytes
//   of every 64. The dims of a product may come in any order, and q is loaded in the same one.
// * V: lane (g, t) holds tokens 4 kM t .. 4 kM (t + 1), and of each the g-th 16 bytes of every 128.
// * Row r of S's sub-tile m is token 2 kM (r % 8) + 2 m + r / 8 of the tile. Sixteen-aligned runs
//   of tokens share a page, so each lane looks up one block for K and one for V.
//
// Scales never touch an element: those of K's channels go into q, of K's tokens onto the scores, of
// V's tokens onto the weights, of V's channels onto the output; mins and zero points are rank-1.
#pragma once

#include "deal.h"
#include "finish.h"
#include "softmax.h"

namespace kvq {
namespace gpu {
namespace {

// One warp's tiles: first, first + kWarps, ... below last. The first of them is on its way before
// the queries are.
template <class L, class S>
KVQ_HD void attend_tiles(const AttendParams& p, const RowTile& r, Span seen, int first, int last,
                         Shared<S>& shared, Running<L, S>& run) {
  constexpr Format kFormat = S::kFormat;
  const PageLayout at = page_layout(kFormat, p.cache.head_size, p.cache.block_size);
  const int32_t* table = p.block_table + r.sequence * p.block_table_stride;
  Tile<L, S> tile;
  tile.look_up(p, table, seen, first, last);
  if (first < last) {
    tile.load_key(p, at, r.kv_head, seen, first);
    tile.load_value(p, at, r.kv_head, seen, first);
  }
  tile.look_up(p, table, seen, first + kWarps, last);
  rotate_queries<L, S>(p, r, shared);
  Query<L, S> query;
  query.load(p, r, shared);
  L::sync();
  run.clear();
  // What every row sees: tiles inside need no mask.
  const int all_begin = shared.span[r.count - 1].begin, all_end = shared.span[0].end;
  for (int i = first; i < last; i += kWarps) {
    const int next = i + kWarps;
    float scores[S::kM][S::kN][4];
    scores_of<L, S>(tile, query, scores);
    uint32_t key_words[2 * S::kM] = {}, value_words[2 * S::kM] = {};
    KVQ_UNROLL for (int j = 0; j < 2 * S::kM; ++j) {
      if constexpr (S::kKey.per_token) key_words[j] = tile.key_metadata[j];
      if constexpr (S::kValue.per_token) value_words[j] = tile.value_metadata[j];
    }
    if (next < last) tile.load_key(p, at, r.kv_head, seen, next);
    const bool masked = i * S::kTile < all_begin || (i + 1) * S::kTile > all_end;
    uint32_t weights[S::kM][S::kN][2];
    softmax<L, S>(p, shared, shared.span, tile.key_token(i), masked, key_words, value_words, scores,
                  weights, run);
    accumulate<L, S>(tile.value, weights, run);
    if (next < last) {
      tile.load_value(p, at, r.kv_head, seen, next);
      tile.look_up(p, table, seen, next + kWarps, last);
    }
  }
}

// This warp's result to shared memory, in units of its peak.
template <class L, class S>
KVQ_HD void put(const Running<L, S>& run, Shared<S>& shared) {
  const int g = L::id() / 4, t = L::id() % 4, warp = L::warp();
  const auto add = [](float a, float b) { return a + b; };
  KVQ_UNROLL for (int n = 0; n < S::kN; ++n) {
    KVQ_UNROLL for (int j = 0; j < 2; ++j) {
      const int row = 8 * n + 2 * t + j;
      const float sum = reduce<L>(run.sum[n][j], 4, 32, add);
      const float minimum = reduce<L>(run.minimum[n][j], 4, 32, add);
      float grow = 1.0f;
      if constexpr (S::kLoud) {
        grow = run.loudest[n][j] == kMinusInf
                   ? 0.0f
                   : L::exp2(unit(run.loudest[n][j]) - unit(run.peak[n][j]));
      }
      KVQ_UNROLL for (int i = 0; i < S::kD / 16; ++i) {
        float* out = &shared.out[warp][row][S::value_dim(g, i)];
        out[0] = run.out[i][n][j] * grow + minimum;
        out[1] = run.out[i][n][j + 2] * grow + minimum;
      }
      if (g == 0) {
        shared.exponent[warp][row] = run.peak[n][j] == kMinusInf ? kMinusInf : unit(run.peak[n][j]);
        shared.sum[warp][row] = sum;
      }
    }
  }
}

// The warps' results together: element(i, exponent, sum, out) of each element i of the tile of
// rows, all in units of 2^exponent.
template <class L, class S, class Element>
KVQ_HD void combine(const AttendParams& p, const RowTile& r, const Shared<S>& shared,
                    const Element& element) {
  const int d = p.cache.head_size;
  for (int i = L::thread(); i < r.count * d; i += kThreads) {
    const int row = i / d, dim = i % d;
    float exponent = kMinusInf;
    KVQ_UNROLL for (int w = 0; w < kWarps; ++w) {
      exponent = L::max(exponent, shared.exponent[w][row]);
    }
    float sum = 0.0f, out = 0.0f;
    KVQ_UNROLL for (int w = 0; w < kWarps; ++w) {
      const float share = share_of<L>(shared.exponent[w][row], exponent);
      sum += shared.sum[w][row] * share;
      out += shared.out[w][row][dim] * share;
    }
    element(row, dim, exponent, sum, out);
  }
}

// One element of the output; those of rotated V, which finish_rows() turns back, by way of
// shared.out[0].
template <class S>
KVQ_HD void finish(const AttendParams& p, const RowTile& r, int row, int dim, float x,
                   Shared<S>& shared) {
  if constexpr (S::kValue.rotated) {
    shared.out[0][row][dim] = x;
  } else {
    put_out(p, r, row, dim, x);
  }
}

template <class L, class S>
KVQ_HD void finish_rows(const AttendParams& p, const RowTile& r, Shared<S>& shared) {
  if constexpr (S::kValue.rotated) {
    L::sync();
    for (int row = L::warp(); row < r.count; row += kWarps) {
      put_rotated<L>(p, r, row, [&](int dim) { return shared.out[0][row][dim]; });
    }
  }
}

// The tiles of formats with recent rows, numbered as in Ranges (sealed.h).
template <class L, class S>
KVQ_HD void attend_ranges(const AttendParams& p, const RowTile& r, Span tokens, int first, int last,
                          Shared<S>& shared, Running<L, S>& run);

// A piece's result is written down; the block that does so last of the item's merges them, in the
// order of the tokens whichever it is.
template <class L, class S>
KVQ_HD void hand_in(const AttendParams& p, Shared<S>& shared) {
  const RowTile& r = shared.rows;
  const Piece& piece = shared.share.piece;
  const Deal& deal = shared.share.deal;
  const int d = p.cache.head_size, member = shared.share.member;
  float* mine = partial(p, L::block(), piece.first == 0);
  combine<L, S>(p, r, shared, [&](int row, int dim, float exponent, float sum, float out) {
    mine[row * d + dim] = out;
    if (dim == 0) {
      mine[p.tile_rows * d + 2 * row] = exponent;
      mine[p.tile_rows * d + 2 * row + 1] = sum;
    }
  });
  const int64_t begin = piece.at - piece.first;
  const int first = deal.holder(begin), pieces = deal.holder(begin + piece.rounds - 1) - first + 1;
  uint32_t* counter = p.counters + first * p.abreast + member;
  L::sync();
  if (L::thread() == 0) shared.before = L::arrive(counter);
  L::sync();
  if (shared.before + 1 != static_cast<uint32_t>(pieces)) return;
  if (L::thread() == 0) *counter = 0;
  const auto find = [&](int i) { return partial(p, (first + i) * p.abreast + member, i == 0); };
  const int vectors = d / kVector;
  for (int i = L::thread(); i < r.count * vectors; i += kThreads) {
    const int row = i / vectors, dim = i % vectors * kVector;
    merged<L>(p, r, row, dim, pieces, find,
              [&](int j, float x) { finish<S>(p, r, row, dim + j, x, shared); });
  }
  finish_rows<L, S>(p, r, shared);
}

// The tiles of one piece. What is known of it lies in shared memory: the loop over tiles needs all
// registers.
template <class L, class S>
KVQ_HD void attend_piece(const AttendParams& p, Shared<S>& shared) {
  Running<L, S> run;
  const int first = shared.tiles.begin + L::warp(), last = shared.tiles.end;
  if constexpr (S::kFormat.recent) {
    attend_ranges<L, S>(p, shared.rows, shared.seen, first, last, shared, run);
  } else {
    attend_tiles<L, S>(p, shared.rows, shared.seen, first, last, shared, run);
  }
  put<L, S>(run, shared);
  L::sync();
  if (!shared.share.piece.whole()) return hand_in<L, S>(p, shared);
  const RowTile& r = shared.rows;
  combine<L, S>(p, r, shared, [&](int row, int dim, float exponent, float sum, float out) {
    finish<S>(p, r, row, dim, result<L>(p, r, row, dim, exponent, sum, out), shared);
  });
  finish_rows<L, S>(p, r, shared);
}

template <class L, class S>
KVQ_HD void attend_block(const AttendParams& p, Shared<S>& shared) {
  take_share<L>(p, shared.share);
  for (;;) {
    if (L::thread() == 0) {
      shared.rows.count = 0;
      while (shared.rows.count <= 0 && shared.share.next(p)) {
        shared.rows = shared.share.piece.rows(p, shared.share.member);
      }
      if (shared.rows.count > 0) {
        const Piece& piece = shared.share.piece;
        shared.seen = tokens_of(p, shared.rows);
        const Span all = tiles_of(p, shared.rows, shared.seen);
        shared.tiles.begin = all.begin + piece.first * kWarps;
        shared.tiles.end = min_of(all.end, shared.tiles.begin + piece.count * kWarps);
      }
    }
    L::sync();
    if (shared.rows.count <= 0) return;
    attend_piece<L, S>(p, shared);
    L::sync();
  }
}

}  // namespace
}  // namespace gpu
}  // namespace kvq
