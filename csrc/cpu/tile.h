// The shapes every dot-product policy shares: a tile of 64 cached tokens of one kv head, and the
// scratch one thread owns.
#pragma once

#include "simd.h"
#include "kernels.h"

namespace kvq {
namespace {

constexpr int kTile = 64;              // tokens attended at once: K and V of it fit L1
constexpr int kGroups = kTile / kLanes;  // 16-token groups; each lies in one page
constexpr int kMaxRows = 32;           // query rows (tokens x heads of the group) of one item
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

// Split x into high and low 8-bit limbs: x = 256 * high + low, both in [-128, 127].
struct Limbs {
  I16 high, low;
};
KVQ_HD Limbs split_limbs(F16 x) {
  const I16 v = reinterpret_cast<I16>(x + 12582912.0f) - 0x4B400000;
  const I16 high = (v + 128) >> 8;
  return {high, v - (high << 8)};
}
// Largest integer whose limbs stay in range.
constexpr float kLimbMax = 32639.0f;

KVQ_HD void save_bytes(int8_t* out, I16 v) {
  typedef int8_t B16 __attribute__((vector_size(16)));
  const B16 b = __builtin_convertvector(v, B16);
  memcpy(out, &b, 16);
}

KVQ_HD void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

}  // namespace
}  // namespace kvq
