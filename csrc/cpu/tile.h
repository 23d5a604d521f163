// The shapes every dot-product policy shares: a tile of 128 cached tokens of one kv head, and the
// scratch one thread owns.
#pragma once

#include "kernels.h"
#include "load.h"
#include "simd.h"

namespace kvq {
namespace {

// Tokens attended at once: sums of V are scaled and added once for all of them (64: prefill on AMX
// took 1.1 times as long for int8, 1.2 times for int4).
constexpr int kTile = 128;
constexpr int kGroups = kTile / kLanes;          // 16-token groups; each lies in one page
constexpr int kSealedGroups = kSealed / kLanes;  // that share the scales of sealed K
constexpr int kMaxRows = 64;  // query rows (tokens x heads that share a kv head) of an item

// Where the groups of one kv head lie.
struct Lines {
  const uint8_t* key[kGroups];
  const uint8_t* value[kGroups];
  const uint8_t* key_metadata[kGroups];
  const uint8_t* value_metadata[kGroups];
};

// Which lines of the next tile the first rows' products ask for while they read this one's.
// Two streams come faster than one on a processor with AMX (int8 from DRAM: 0.93 of the time),
// perhaps because hardware prefetchers follow each 4 KiB on their own: K's first half beside V's
// first half while K is read, the second halves while V is. `kWide`: K's codes are twice as wide,
// so all of V comes beside K's first half, and K's third quarter beside its last.
enum class Fetch { kNone, kOwn, kSide, kWide };

// Groups past the context repeat the last valid one. `next` is what comes after this tile, for the
// prefetcher, which neither crosses pages nor follows block tables.
struct Tile {
  const Lines &now, &next;
  Fetch fetch;
  int begin, end;  // tokens of the tile that any row may see, within [0, kTile]

  // Groups that hold them. Scores of the others are not asked for.
  KVQ_HD int first_group(int step) const { return begin / kLanes / step * step; }
  KVQ_HD int past_group() const { return (end + kLanes - 1) / kLanes; }
  KVQ_HD bool whole() const { return first_group(1) == 0 && past_group() == kGroups; }
};

constexpr int kPassRows = 4;  // rows that share each load of a line

template <int N>
struct Int {
  static constexpr int value = N;
  constexpr operator int() const { return N; }
};

// body(Int<0>{}), ..., body(Int<N - 1>{}): indices that are constants in the front end. With loops
// and unroll pragmas gcc 12 kept some accumulator arrays in memory (half the speed).
#define KVQ_UNROLLED __attribute__((always_inline))
template <class F, int... I>
KVQ_HD void unroll_list(const F& body, IndexList<I...>) {
  (body(Int<I>{}), ...);
}
template <int N, class F>
KVQ_HD void unroll(const F& body) {
  unroll_list(body, typename MakeIndices<N>::type{});
}

// body(g) for a tile's groups. A loop where their vectors do not fit the registers: as fast (0.97
// to 1.01 of the time, portable prefill of int4 0.88), and the portable kernels take 40 s to
// compile and not 155. Under a sanitizer it saves a third.
template <class F>
KVQ_HD void each_group(const F& body) {
#if defined(__AVX512F__) && !defined(__SANITIZE_ADDRESS__)
  unroll<kGroups>(body);
#else
  for (int g = 0; g < kGroups; ++g) body(g);
#endif
}

// visit(Int<R>, first row) for every N rows and for what is left of them.
template <int N = kPassRows, class Visit>
KVQ_HD void for_each_pass(int rows, const Visit& visit) {
  int r = 0;
  for (; r + N <= rows; r += N) visit(Int<N>{}, r);
  unroll<N - 1>([&](auto i) KVQ_UNROLLED {
    constexpr int left = N - 1 - decltype(i)::value;
    if (rows - r == left) visit(Int<left>{}, r);
  });
}

// visit(FetchOf<>) for rows from `row` on. Without pairs of lines there is one stream.
template <Fetch F>
struct FetchOf {
  static constexpr Fetch value = F;
};
template <bool kPairs, class Visit>
KVQ_HD void with_fetch(Fetch fetch, int row, const Visit& visit) {
  if (row != 0) return visit(FetchOf<Fetch::kNone>{});
  if constexpr (kPairs) {
    if (fetch == Fetch::kSide) return visit(FetchOf<Fetch::kSide>{});
    if (fetch == Fetch::kWide) return visit(FetchOf<Fetch::kWide>{});
  }
  visit(FetchOf<Fetch::kOwn>{});
}

// The code that V's mins are to be taken at, where integers for weights leave rounding errors that
// are worth it: errors then multiply codes' distance from it, half of what they are (2.8 to 1.4
// times the row they stand for).
template <class ValueDot>
constexpr float kMiddleOf = 0.0f;

// Largest integer whose two 8-bit limbs, 256 * high + low with both in [-128, 127], stay in range.
constexpr float kLimbMax = 32639.0f;

// How exact weights need to be for outputs of `type`, with or without tokens' scales in them; the
// one policy that asks overloads it.
template <class Weights>
KVQ_HD void fit_output(Weights&, Activation /*type*/, bool /*scaled*/) {}

// Into L2: a tile's K and V, and those of the next, are more than L1 holds. There already, int8
// took 1.07 times as long.
KVQ_HD void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// The same, right behind what makes `x`. gcc 12 gathers prefetches at the start of a loop: int4
// took 1.05 times as long from DRAM so (on Zen 4; why was not found).
template <class V>
KVQ_HD void prefetch_behind(V& x, const void* p) {
#if defined(__AVX512F__)
  asm("prefetcht1 %1" : "+v"(x) : "m"(*static_cast<const char*>(p)));
#elif defined(__AVX2__)
  asm("prefetcht1 %1" : "+x"(x) : "m"(*static_cast<const char*>(p)));
#else
  (void)x;
  prefetch(p);
#endif
}
template <class T>
KVQ_HD void prefetch_behind(Pair<T>& x, const void* p) {
  prefetch_behind(x.low, p);
}

// While line `at` of K's groups g and, for `second`, g + 1 is read.
template <Fetch kFetch>
KVQ_HD const uint8_t* beside_key(const Lines& next, int g, bool second, long at) {
  if (kFetch == Fetch::kOwn) return next.key[g + second] + at;
  if (!second) return next.key[g / 2] + at;
  return next.value[kFetch == Fetch::kSide ? g / 2 : g] + at;
}

// While V's group g is read, of `bits` a code: of its word w the line of channels from `dim` on or,
// for `second`, the one behind.
template <Fetch kFetch, int kBits>
KVQ_HD const uint8_t* beside_value(const Lines& next, int g, int w, long d, long dim, bool second) {
  if (kFetch == Fetch::kOwn) return next.value[g] + (w * d + dim) * 4 + second * 64;
  const long at = dim * (8 * kBits) + (g * (kBits / 2) + w) * 64;
  constexpr int kHalf = kGroups / 2;
  const uint8_t* beside = kFetch == Fetch::kSide ? next.value[kHalf] : next.key[kHalf * 3 / 2];
  return (second ? beside : next.key[kHalf]) + at;
}

}  // namespace
}  // namespace kvq
