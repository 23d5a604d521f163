// How attention is dealt to blocks of threads. Everything here follows from the launch's shapes or
// is computed on the device from seq_lens and query_start: the host looks at no data.
//
// An item is one kv head of one sequence and up to `abreast` tiles of its query rows; a round is
// one tile of tokens for each of a block's warps. The rounds of all items, one item after the
// other, are dealt out in equal shares (stream-K, arXiv:2301.03598), each to as many blocks as
// tiles of rows lie abreast: they read the same pages at the same time, the first from memory and
// the others from L2. A share ends where it ends, so most cut an item at either end; such pieces
// are merged by the block that finishes last (attend.h).
#pragma once

#include "lane.h"

namespace kvq {
namespace gpu {
namespace {

// A kernel of one (format, head size class, rows): how its tiles look.
template <int kFormatRow, int kHead, int kRowTiles>
struct Shape {
  static constexpr Format kFormat = kFormats[kFormatRow];
  static constexpr Stream kKey = kFormat.key, kValue = kFormat.value;
  static constexpr int kD = kHead;             // head sizes up to this; channels beyond are zeros
  static constexpr int kN = kRowTiles;         // row tiles of 8
  static constexpr int kRows = 8 * kRowTiles;  // (query token, head of the group) pairs

  // Bytes of one token, of one lane's share of it, and of one load.
  static constexpr int kKeyRow = kHead * code_bits(kKey.code) / 8;
  static constexpr int kValueRow = kHead * code_bits(kValue.code) / 8;
  static constexpr int kKeyShare = kKeyRow / 4, kValueShare = kValueRow / 8;
  static constexpr int kKeyLoad = kKeyShare < 16 ? kKeyShare : 16;
  static constexpr int kValueLoad = kValueShare < 16 ? kValueShare : 16;

  // Sub-tiles of 16 tokens that one warp holds at a time: up to 4 KB of K, and as much of V, in up
  // to 32 registers each. Twelve such warps on a multiprocessor keep 48 KB of either in flight; 26
  // KB hide the latency of an H200's memory (4.3 TB/s x 0.8 us / 132).
  static constexpr int kWidest = kKeyRow > kValueRow ? kKeyRow : kValueRow;
  static constexpr int kM = kWidest >= 256 ? 1 : 2;
  static constexpr int kTile = 16 * kM;
  // Blocks that share a multiprocessor: what the accumulators leave of its registers.
  static constexpr int kBlocks = kHead > 128 || kRowTiles > 1 ? 2 : kHead > 64 ? 3 : 4;

  // Whether scores have a part that no code decides: offsets, mins or zero points (integers only).
  static constexpr bool kBias = kKey.code == Code::kInt8 || kKey.code == Code::kInt4;
  // What its running sums hold: outputs relative to V's loudest token, mins of V.
  static constexpr bool kLoud = kValue.per_token || kFormat.recent;
  static constexpr bool kMinimum = kValue.per_token && kValue.code == Code::kInt4;

  // Dim of the output that lane 4 g + t holds in place i, and of the next one: as V's codes lie.
  static KVQ_CONSTEXPR int value_dim(int g, int i) {
    if (kFormat.recent) return g * (kHead / 8) + 2 * i;
    constexpr int kCodes = 32 / code_bits(kValue.code);
    constexpr int kWords = kValueLoad < 4 ? 1 : kValueLoad / 4;
    const int word = i / (kCodes / 2), at = (word / kWords * 8 + g) * kWords + word % kWords;
    return at * kCodes + i % (kCodes / 2) * 2;
  }
};

struct Span {
  int begin, end;  // tokens
};

// What query token `index` of a sequence sees.
KVQ_HD Span visible(const AttendParams& p, int length, int count, int index) {
  const int position = length - count + index;
  int begin = 0, end = p.causal ? position + 1 : length;
  if (p.window > 0) {
    begin = max_of(0, position - p.window + 1);
    if (!p.causal) end = min_of(end, position + p.window);
  }
  end = max_of(0, end);
  return {min_of(begin, end), end};
}

// A tile of rows: (query token, head) pairs of one sequence and kv head, token-major.
struct RowTile {
  int sequence, kv_head, first, count;  // first row and number of rows
  int start, length, queries, group;    // first query token, cached tokens, query tokens, G

  KVQ_HD int query(int row) const { return (first + row) / group; }
  KVQ_HD int head(int row) const { return kv_head * group + (first + row) % group; }
};

// Tile `tile` of the rows; its count is not positive if there are fewer.
KVQ_HD RowTile row_tile(const AttendParams& p, int sequence, int kv_head, int tile) {
  RowTile r;
  r.sequence = sequence;
  r.kv_head = kv_head;
  r.start = p.query_start[sequence];
  r.queries = p.query_start[sequence + 1] - r.start;
  r.length = p.seq_lens[sequence];
  r.group = p.group;
  r.first = tile * p.tile_rows;
  r.count = min_of(p.tile_rows, r.queries * r.group - r.first);
  return r;
}

// Tiles of formats with recent rows, kSealed tokens each and in this order: sealed ones from
// `sealed_begin` on, one for the sequence's first row, recent ones from `recent_begin` on. Where
// rows of one block differ in what is sealed to them, both kinds have tiles of the same tokens.
struct Ranges {
  int sealed_begin, sealed, first, recent_begin, recent;
};

KVQ_HD Ranges ranges_of(const RowTile& r, Span tokens) {
  const int offset = r.length - r.queries;
  const int low = static_cast<int>(sealed_before(offset + r.query(0)));
  const int high = static_cast<int>(sealed_before(offset + r.query(r.count - 1)));
  Ranges x;
  x.sealed_begin = tokens.begin / kSealed * kSealed;
  x.sealed = max_of(0, high - x.sealed_begin) / kSealed;
  x.first = tokens.begin == 0 && high > 0 ? 1 : 0;
  x.recent_begin = max_of(x.sealed_begin, low);
  x.recent = max_of(0, tokens.end - x.recent_begin + kSealed - 1) / kSealed;
  return x;
}

// The tokens any of the rows sees.
KVQ_HD Span tokens_of(const AttendParams& p, const RowTile& r) {
  return {visible(p, r.length, r.queries, r.query(0)).begin,
          visible(p, r.length, r.queries, r.query(r.count - 1)).end};
}

// Tiles that hold them.
KVQ_HD Span tiles_of(const AttendParams& p, Span tokens) {
  return {tokens.begin / p.tile_tokens, (tokens.end + p.tile_tokens - 1) / p.tile_tokens};
}

// The tiles of a tile of rows; those of formats with recent rows are numbered as Ranges says.
KVQ_HD Span tiles_of(const AttendParams& p, const RowTile& r, Span tokens) {
  if (p.recent_table == nullptr) return tiles_of(p, tokens);
  const Ranges x = ranges_of(r, tokens);
  return {0, x.sealed + x.first + x.recent};
}

// Tiles that Ranges may have beside those that hold a tile of rows' tokens: the first row's, and
// second ones of tokens that are sealed to some of the rows alone.
KVQ_HD int tiles_besides(const AttendParams& p, int queries, bool first) {
  if (p.recent_table == nullptr) return 0;
  const int span = min_of(queries, (p.tile_rows + p.group - 2) / p.group + 1);
  return (first ? 1 : 0) + (span + kSealed - 2) / kSealed;
}

// One sequence's items, and rounds of each: as many as the longest of its tiles of rows needs. A
// window's tiles are bounded apart from each other, so that a long prompt's are not as long as it.
struct Work {
  int items, rounds;
};

KVQ_HD Work work_of(const AttendParams& p, int sequence) {
  const int queries = p.query_start[sequence + 1] - p.query_start[sequence];
  if (queries <= 0) return {0, 1};
  const int length = p.seq_lens[sequence];
  const int rows = p.tile_rows * p.abreast;
  const Span all = tiles_of(
      p, {visible(p, length, queries, 0).begin, visible(p, length, queries, queries - 1).end});
  int tiles = all.end - all.begin;
  if (p.window > 0) {
    // Of the queries of one tile of rows, the first sees this far back and the last this far on.
    const int reach = min_of(p.window, length), more = (p.tile_rows + p.group - 2) / p.group;
    const int seen = (p.causal ? reach : 2 * reach) + more;
    tiles = min_of(tiles, (seen + p.tile_tokens - 2) / p.tile_tokens + 1);
  }
  tiles += tiles_besides(p, queries, all.begin == 0 && sealed_before(length - 1) > 0);
  return {(queries * p.group + rows - 1) / rows * p.cache.num_kv_heads,
          max_of(1, (tiles + kWarps - 1) / kWarps)};
}

// How `total` rounds are dealt out. No more shares than the launch has blocks for, nor than there
// are items or rounds to make them worth kShareTokens: a share costs some microseconds.
constexpr int kShareTokens = 256;

struct Deal {
  int64_t total;
  int shares;

  // First round of a share, and the share that a round is in.
  KVQ_HD int64_t begin(int share) const { return total * share / shares; }
  KVQ_HD int holder(int64_t round) const {
    return static_cast<int>(((round + 1) * shares - 1) / total);
  }
};

KVQ_HD int64_t shares_for(const AttendParams& p, int64_t rounds, int64_t items) {
  const int64_t least = max_of(1, kShareTokens / (p.tile_tokens * kWarps));
  return rounds / least > items ? rounds / least : items;
}

KVQ_HD Deal deal_out(const AttendParams& p, int64_t rounds, int64_t items) {
  const int64_t shares = shares_for(p, rounds, items), most = p.blocks / p.abreast;
  return {rounds, static_cast<int>(shares < most ? shares : most)};
}

// Rounds [first, first + count) of an item of `rounds`; the first of them is round `at` of all.
struct Piece {
  int sequence, item, first, count, rounds;
  int64_t at;

  KVQ_HD bool whole() const { return count == rounds; }
  KVQ_HD RowTile rows(const AttendParams& p, int member) const {
    const int heads = p.cache.num_kv_heads;
    return row_tile(p, sequence, item % heads, item / heads * p.abreast + member);
  }
};

// One share's pieces, one after the other: from round `at` of all to `end`, which is round `round`
// of an item.
struct Share {
  Deal deal;
  int member;  // which of the tiles of rows abreast
  int64_t at, end;
  int sequence, item, round;
  Piece piece;

  // From `skipped` rounds into the sequence on.
  KVQ_HD void start(const Work& work, int first, int64_t skipped) {
    sequence = first;
    item = static_cast<int>(skipped / work.rounds);
    round = static_cast<int>(skipped % work.rounds);
  }

  // On to the next piece, if there is one.
  KVQ_HD bool next(const AttendParams& p) {
    if (at >= end) return false;
    Work work = work_of(p, sequence);
    while (item >= work.items) {
      item = 0;
      work = work_of(p, ++sequence);
    }
    const int64_t left = end - at, rest = work.rounds - round;
    piece = {sequence, item, round, static_cast<int>(left < rest ? left : rest), work.rounds, at};
    at += piece.count;
    round += piece.count;
    if (round == work.rounds) {
      round = 0;
      ++item;
    }
    return true;
  }
};

// Partial results: fp32 [tile_rows, D], then [tile_rows, 2] (the exponent they are in units of, and
// the sum of weights), two of them a block: for a piece that it goes on with, and for one that it
// begins.
KVQ_HD int64_t partial_size(const AttendParams& p) {
  return static_cast<int64_t>(p.tile_rows) * (p.cache.head_size + 2);
}
KVQ_HD float* partial(const AttendParams& p, int block, bool begins) {
  return p.workspace + (2 * static_cast<int64_t>(block) + (begins ? 1 : 0)) * partial_size(p);
}

}  // namespace
}  // namespace gpu
}  // namespace kvq
