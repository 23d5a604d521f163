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

// Groups past the context repeat the last valid one. `next` is what comes after this tile, for the
// prefetcher, which neither crosses pages nor follows block tables.
struct Tile {
  Lines now, next;
  int begin, end;  // tokens of the tile that any row may see, within [0, kTile]
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

// Largest integer whose two 8-bit limbs, 256 * high + low with both in [-128, 127], stay in range.
constexpr float kLimbMax = 32639.0f;

// How exact weights need to be for outputs of `type`, with or without tokens' scales in them; the
// one policy that asks overloads it.
template <class Weights>
KVQ_HD void fit_output(Weights&, Activation /*type*/, bool /*scaled*/) {}

// Into L2: a tile's K and V, and those of the next, are more than L1 holds. There already, int8
// took 1.07 times as long.
KVQ_HD void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

}  // namespace
}  // namespace kvq
