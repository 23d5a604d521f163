// The shapes every dot-product policy shares: a tile of 64 cached tokens of one kv head, and the
// scratch one thread owns.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace kvq {
namespace {

constexpr int kTile = 64;                // tokens attended at once: K and V of it fit L1
constexpr int kGroups = kTile / kLanes;  // 16-token groups; each lies in one page
constexpr int kMaxRows = 32;             // query rows (tokens x heads of the group) of one item
constexpr int kMaxHead = 512;

// Where the tile's four groups lie. Groups past the context repeat the last valid one.
struct Tile {
  const uint8_t* key[kGroups];
  const uint8_t* value[kGroups];
  const uint8_t* key_metadata[kGroups];
  const uint8_t* value_metadata[kGroups];
  // The next tile's, for the prefetcher, which neither crosses pages nor follows block tables.
  const uint8_t* next_key[kGroups];
  const uint8_t* next_value[kGroups];
  int begin, end;  // tokens of the tile that any row may see, within [0, 64]
};

// Largest integer whose two 8-bit limbs, 256 * high + low with both in [-128, 127], stay in range.
constexpr float kLimbMax = 32639.0f;

KVQ_HD void save_bytes(int8_t* out, I16 v) {
  typedef int8_t B16 __attribute__((vector_size(16)));
  const B16 b = __builtin_convertvector(v, B16);
  memcpy(out, &b, 16);
}

// Rounds sixteen values of at most kLimbMax and saves their limbs. Returns the integers.
KVQ_HD I16 save_limbs(F16 x, int8_t* high, int8_t* low) {
  // 1.5 * 2^23 rounds to an integer in the mantissa; 128 more makes `low` a flipped low byte.
  const I16 raised = reinterpret_cast<I16>(x + 12582912.0f) - (0x4B400000 - 128);
  save_bytes(high, raised >> 8);
  save_bytes(low, raised ^ 0x80);
  return raised - 128;
}

KVQ_HD void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

}  // namespace
}  // namespace kvq
