// Attention over one kind of a sequence's rows: all of them, or the sealed ones, or the recent
// ones.
#pragma once

#include "dot_amx.h"
#include "dot_amx_bf16.h"
#include "dot_bf16.h"
#include "dot_folded_amx.h"
#include "dot_fp32.h"
#include "dot_vnni.h"
#include "load.h"
#include "softmax.h"

namespace kvq {
namespace {

// Which dot product serves a code on this ISA.
template <Code C>
struct DotOf {
  using type = Fp32Dot<C>;
};
#if defined(KVQ_AMX)
template <Code C>
using IntegerDot = AmxDot<C>;
template <Code C, Grouping G>
using SealedKey = AmxFoldedKey<C, G>;
template <Code C>
using SealedValue = AmxFoldedValue<C>;
#elif defined(KVQ_VNNI)
#if defined(KVQ_NIBBLES)
// Numbers of 12 bits for codes of 4.
template <Code C>
using IntegerDot = VnniDot<C, std::conditional_t<C == Code::kInt4, Nibbles, TwoLimbs<C> > >;
template <Code C, Grouping G>
using SealedKey =
    FoldedKey<C, G, std::conditional_t<C == Code::kInt4, FoldedNibbles, FoldedLimbs<C> > >;
#else
template <Code C>
using IntegerDot = VnniDot<C>;
template <Code C, Grouping G>
using SealedKey = FoldedKey<C, G>;
#endif
template <Code C>
using SealedValue = FoldedValue<C>;
#else
template <Code C, Grouping G>
using SealedKey = SealedFp32Key<C, G>;
template <Code C>
using SealedValue = SealedFp32Value<C>;
#endif
#if defined(KVQ_VNNI)
template <>
struct DotOf<Code::kInt8> {
  using type = IntegerDot<Code::kInt8>;
};
template <>
struct DotOf<Code::kInt4> {
  using type = IntegerDot<Code::kInt4>;
};
#endif
#if defined(KVQ_AMX)
template <Code C>
using FloatDot = AmxBf16Dot<C>;
#elif defined(__AVX512BF16__) && defined(__AVX512VBMI__)
template <Code C>
using FloatDot = Bf16Dot<C>;
#endif
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
template <>
struct DotOf<Code::kFp8E4M3> {
  using type = FloatDot<Code::kFp8E4M3>;
};
template <>
struct DotOf<Code::kFp8E5M2> {
  using type = FloatDot<Code::kFp8E5M2>;
};
#endif

template <Code C, Grouping G>
struct KeyDotOf {
  using type = SealedKey<C, G>;
};
template <Code C>
struct KeyDotOf<C, Grouping::kNone> : DotOf<C> {};
template <Code C, Grouping G>
struct ValueDotOf {
  using type = SealedValue<C>;
};
template <Code C>
struct ValueDotOf<C, Grouping::kNone> : DotOf<C> {};

template <int kFormat>
struct Range {
  static constexpr Format kF = kFormats[kFormat];
  using KeyDot = typename KeyDotOf<kF.key.code, kF.key.grouping>::type;
  using ValueDot = typename ValueDotOf<kF.value.code, kF.value.grouping>::type;

  // What one kv head of an item keeps between tiles.
  struct Head {
    typename KeyDot::Query query;
    RowFacts facts;
  };

  // What a worker needs for whatever it works on.
  struct Scratch {
    typename KeyDot::Tiles key_tiles;
    typename ValueDot::Tiles value_tiles;
    typename ValueDot::Weights weights;
    alignas(64) float scores[kMaxRows * kTile];
    alignas(64) uint8_t numbers[has_nan(kF.value.code) ? kTile * kMaxHead : 64];  // of a tile's V
    float alpha[kMaxRows], gamma[kMaxRows];
  };

  const Item& item;
  const Cache& cache;
  const int32_t* blocks;  // the sequence's
  PageLayout layout;
  int begin, end;  // rows of this kind that any query of the item sees
  Scratch& s;
  const long d;

  // Of the token or group of tokens at `within` of a page.
  static KVQ_HD long key_metadata_at(long within, long d) {
    if constexpr (kF.key.grouping == Grouping::kNone) return within * 4;
    return within / kSealed * kSealed * kF.key.metadata_bytes(d);
  }
  static KVQ_HD long value_metadata_at(long within, long d) {
    if constexpr (kF.value.grouping == Grouping::kNone) return within * 4;
    return within / kSealed * kSealed * kF.value.metadata_bytes(d) + within % kSealed * 2;
  }

  // Where a tile's groups lie, of the item's first kv head. Groups outside the item's context
  // repeat the nearest one inside it: block tables hold nothing there.
  void find(long t0, Lines& lines) const {
    const long size = cache.block_size;
    const long first = begin / kLanes * kLanes, last = (end - 1) / kLanes * kLanes;
    long block = -1;
    const uint8_t* page = nullptr;
    for (int g = 0; g < kGroups; ++g) {
      long t = t0 + g * kLanes;
      t = t < first ? first : t > last ? last : t;
      if (block < 0 || t - block * size >= size) {  // a division takes longer
        block = static_cast<uint32_t>(t) / static_cast<uint32_t>(size);
        page = cache.data + blocks[block] * cache.block_stride + item.head * cache.head_stride;
      }
      const long within = t - block * size;
      lines.key[g] = page + layout.key_codes + within * d * code_bits(kF.key.code) / 8;
      lines.value[g] = page + layout.value_codes + within * d * code_bits(kF.value.code) / 8;
      lines.key_metadata[g] = page + layout.key_metadata + key_metadata_at(within, d);
      lines.value_metadata[g] = page + layout.value_metadata + value_metadata_at(within, d);
    }
  }

  // The same of a head of the item.
  void locate(const Lines& first, int head, Lines& lines) const {
    const long skip = head * cache.head_stride;
    for (int g = 0; g < kGroups; ++g) lines.key[g] = first.key[g] + skip;
    for (int g = 0; g < kGroups; ++g) lines.value[g] = first.value[g] + skip;
    for (int g = 0; g < kGroups; ++g) lines.key_metadata[g] = first.key_metadata[g] + skip;
    for (int g = 0; g < kGroups; ++g) lines.value_metadata[g] = first.value_metadata[g] + skip;
  }

  void attend_tile(Head& head, State state, long t0, const Tile& tile) const {
    KeyDot::score(head.query, s.key_tiles, tile, item.rows, d, s.scores);
    TileSoftmax<kFormat, KeyDot, ValueDot> softmax(head.query, s.weights, head.facts, s.scores,
                                                   s.alpha, s.gamma);
    softmax.load(tile, d);
    softmax.run(state, item.rows, t0);
    if constexpr (has_nan(kF.value.code)) {
      const Span& common = head.facts.common;
      const bool even = common.begin <= t0 + tile.begin && common.end >= t0 + tile.end;
      if (!even && find_nan(tile)) return accumulate_apart(head, state, t0, tile);
    }
    accumulate(state, tile);
  }

  void accumulate(State state, const Tile& tile) const {
    ValueDot::accumulate(s.weights, s.value_tiles, tile, item.rows, d, s.alpha, s.gamma, state.acc);
  }

  // Whether a tile's V holds a code that is no finite number.
  bool find_nan(const Tile& tile) const {
    U16 found{};
    for (int g = 0; g < kGroups; ++g) {
      for (long i = 0; i < kLanes * d; i += 64) {
        found |= (load<U16>(tile.now.value[g] + i) & 0x7F7F7F7Fu) + 0x01010101u * kPastFinite;
      }
    }
    return largest(cast<I16>((found & 0x80808080u) >> 7)) != 0;
  }
  // Added to a magnitude of 7 bits, sets the eighth where it is past the finite ones.
  static constexpr uint32_t kPastFinite = kF.value.code == Code::kFp8E5M2 ? 4 : 1;

  // Rows that do not see the same tokens share a tile's V, and 0 * NaN is NaN: such codes are taken
  // out, and added to the rows that see their tokens.
  __attribute__((noinline, cold)) void accumulate_apart(const Head& head, State state, long t0,
                                                        const Tile& tile) const {
    Lines numbers = tile.now;
    const auto for_each_nan = [&](const auto& visit) {
      for (int g = 0; g < kGroups; ++g) {
        for (long i = 0; i < kLanes * d; ++i) {
          const uint8_t code = tile.now.value[g][i];
          if (((code & 0x7Fu) + kPastFinite) & 0x80u) visit(g, i, code);
        }
      }
    };
    for (int g = 0; g < kGroups; ++g) {
      uint8_t* to = s.numbers + g * kLanes * d;
      memcpy(to, tile.now.value[g], static_cast<size_t>(kLanes * d));
      numbers.value[g] = to;
    }
    for_each_nan([&](int g, long i, uint8_t) { s.numbers[g * kLanes * d + i] = 0; });
    accumulate(state, {numbers, tile.next, tile.fetch, tile.begin, tile.end});
    for_each_nan([&](int g, long i, uint8_t code) {
      const long token = t0 + g * kLanes + i / (4 * d) * 4 + i % 4, channel = i % (4 * d) / 4;
      for (int r = 0; r < item.rows; ++r) {
        const Span& seen = head.facts.span[r];
        if (token < seen.begin || token >= seen.end) continue;
        state.acc[r * d + channel] += Codec<kF.value.code>::decode(code);
      }
    });
  }

  // A sequence's first row, which its first page keeps as int8, for queries that find it sealed.
  // Their states hold nothing yet.
  void attend_first(const Head& head, int h, State state) const {
    for (int r = 0; r < item.rows; ++r) {
      if (!head.facts.sees_first[r]) continue;
      const uint8_t* page =
          cache.data + blocks[0] * cache.block_stride + (item.head + h) * cache.head_stride;
      const FirstRow first{page + layout.first, d};
      const F16 x =
          shape_score(splat(KeyDot::first_score(head.query, r, first)), head.facts, r, I16{});
      state.max[r] = x[0];
      state.sum[r * kLanes] = 1.0f;
      first.values(state.acc + r * d);
    }
  }

  // Halves are runs of lines where blocks hold them whole.
  Fetch fetch_order() const {
    constexpr int kKeyBits = code_bits(kF.key.code), kValueBits = code_bits(kF.value.code);
    if (!KeyDot::kPairs || !ValueDot::kPairs || cache.block_size % (kTile / 2)) return Fetch::kOwn;
    return kKeyBits == kValueBits       ? Fetch::kSide
           : kKeyBits == 2 * kValueBits ? Fetch::kWide
                                        : Fetch::kOwn;
  }

  // What a chunk has of these rows, for every head into its state. Blocks outside, heads inside:
  // in the order of memory.
  template <class HeadOf, class StateOf>
  void attend_chunk(long chunk, const HeadOf& head_of, const StateOf& state_of) const {
    long start = chunk * kChunk;
    const long stop = start + kChunk < end ? start + kChunk : end;
    if (begin > start) start += (begin - start) / kTile * kTile;
    const long size = cache.block_size;
    const int run = size % kTile == 0 && size < kChunk ? static_cast<int>(size / kTile) : 1;
    // A window may begin past the sealed rows.
    if (begin >= end || start >= stop) return;
    Lines places[kChunk / kTile + 1];
    Lines lines[2];
    const Fetch fetch = fetch_order();
    find(start, places[0]);
    locate(places[0], 0, lines[0]);
    int now = 0;
    for (long t0 = start; t0 < stop; t0 += run * kTile) {
      int n = 0;
      while (n < run && t0 + n * kTile < stop) {
        ++n;
        find(t0 + n * kTile, places[n]);
      }
      for (int h = 0; h < item.heads; ++h) {
        for (int i = 0; i < n; ++i) {
          const bool last_tile = i + 1 == n, last_head = h + 1 == item.heads;
          if (!last_tile) {
            locate(places[i + 1], h, lines[now ^ 1]);
          } else {
            locate(places[last_head ? n : 0], last_head ? 0 : h + 1, lines[now ^ 1]);
          }
          const long t = t0 + i * kTile;
          const Tile tile{lines[now], lines[now ^ 1], fetch,
                          begin > t ? static_cast<int>(begin - t) : 0,
                          end - t < kTile ? static_cast<int>(end - t) : kTile};
          attend_tile(head_of(h), state_of(h), t, tile);
          now ^= 1;
        }
      }
      places[0] = places[n];
    }
  }
};

}  // namespace
}  // namespace kvq
