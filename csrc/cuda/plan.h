// How attention is cut into blocks of threads. Everything here follows from the launch's shapes or
// is computed on the device from seq_lens: the host looks at no data.
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

// Head sizes above 128 take 8 rows at a time: 16 would need more registers than there are.
constexpr int kHeadClasses[] = {64, 128, 256};
KVQ_CONSTEXPR int row_tiles(int head_class, int rows) {
  return rows > 8 && head_class <= 128 ? 2 : 1;
}

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

// One block's rows: (query token, head) pairs of one sequence and kv head, token-major.
struct RowTile {
  int sequence, kv_head, first, count;  // first row and number of rows
  int start, length, queries, group;    // first query token, cached tokens, query tokens, G

  KVQ_HD int query(int row) const { return (first + row) / group; }
  KVQ_HD int head(int row) const { return kv_head * group + (first + row) % group; }
};

// Of blocks (x, ., z): x counts row tiles and kv heads, and has no limit that a prompt reaches.
KVQ_HD RowTile row_tile(const AttendParams& p, int x, int z) {
  RowTile r;
  r.sequence = z;
  r.kv_head = x % p.cache.num_kv_heads;
  r.start = p.query_start[z];
  r.queries = p.query_start[z + 1] - r.start;
  r.length = p.seq_lens[z];
  r.group = p.num_heads / p.cache.num_kv_heads;
  r.first = x / p.cache.num_kv_heads * p.tile_rows;
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

// The tokens any of the rows sees, cut into splits of whole tiles. Splits get shorter until each
// has kSplitTokens, so that short sequences of a long launch do not pay for the merge.
constexpr int kSplitTokens = 256;
struct Splits {
  Span tokens;
  int first_tile, tiles, per_split, active;
};

KVQ_HD Splits splits_of(const AttendParams& p, const RowTile& r) {
  Splits s;
  s.tokens.begin = visible(p, r.length, r.queries, r.query(0)).begin;
  s.tokens.end = visible(p, r.length, r.queries, r.query(r.count - 1)).end;
  s.first_tile = s.tokens.begin / p.tile_tokens;
  const int end = (s.tokens.end + p.tile_tokens - 1) / p.tile_tokens;
  s.tiles = max_of(0, end - s.first_tile);
  if (p.recent_table != nullptr) {
    const Ranges x = ranges_of(r, s.tokens);
    s.first_tile = 0;
    s.tiles = x.sealed + x.first + x.recent;
  }
  const int shortest = (kSplitTokens + p.tile_tokens - 1) / p.tile_tokens;
  s.per_split = max_of((s.tiles + p.splits - 1) / p.splits, shortest);
  s.active = max_of(1, (s.tiles + s.per_split - 1) / s.per_split);
  return s;
}

// Where row `row` keeps split `split`: index of its D floats, and of its two statistics over 2.
KVQ_HD int64_t partial(const AttendParams& p, const RowTile& r, int row, int split) {
  const int64_t token = r.start + r.query(row);
  return (token * p.num_heads + r.head(row)) * p.splits + split;
}
KVQ_HD float* statistics(const AttendParams& p) {
  return p.workspace + p.num_tokens * p.num_heads * p.splits * p.cache.head_size;
}

}  // namespace
}  // namespace gpu
}  // namespace kvq
