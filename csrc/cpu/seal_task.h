// The groups that a store seals: as soon as their rows are written, or afterwards.
#pragma once

#include "kernels.h"
#include "seal.h"
#include "split.h"

namespace kvq {
namespace {

// A call's groups to seal, each under the token that filled it.
struct SealTask {
  const StoreParams* params;
  PageLayout layout, recent_layout;
  Split split;
  const int64_t* tokens;
  uint8_t* done;  // [tokens of the call] what was sealed as soon as its rows were written
  bool stream;
  // Heads [begin, end) of the group that token `last` filled, from the recent cache or, one head,
  // from a page of its rows alone.
  void (*seal)(const SealTask&, long last, long begin, long end, const uint8_t* rows);
};

inline bool seals(const StoreParams& p, long t) {
  return p.slots[t] >= 0 && p.recent_slots[t] >= 0 && p.slots[t] % kSealed == kSealed - 1;
}

template <int kFormat>
void seal_heads(const SealTask& task, long last, long begin, long end, const uint8_t* rows) {
  const Cache &to = task.params->cache, &from = task.params->recent;
  const int64_t slot = task.params->slots[last] - (kSealed - 1), block = slot / to.block_size;
  const int64_t row = task.params->recent_slots[last] - (kSealed - 1), page = row / from.block_size;
  SealBatch batch;
  const long d = to.head_size;
  const PageLayout recent =
      rows == nullptr ? task.recent_layout : page_layout(kFormats[kRecentFormat], d, kSealed);
  const Sealer<kFormat> sealer{task.layout, recent, d, batch};
  for (long h = begin; h < end; ++h) {
    const uint8_t* const from_page =
        rows == nullptr ? from.data + page * from.block_stride + h * from.head_stride : rows;
    const long within = rows == nullptr ? row - page * from.block_size : 0;
    if (rows == nullptr && h + 1 < end) {
      const uint8_t* const next = from_page + from.head_stride + within * d;
      for (long i = 0; i < kSealed * d; i += 64) {
        __builtin_prefetch(next + recent.key_codes + i, 0, 3);
        __builtin_prefetch(next + recent.value_codes + i, 0, 3);
      }
    }
    uint8_t* const to_page = to.data + block * to.block_stride + h * to.head_stride;
    if (task.stream) {
      sealer.template seal<true>(from_page, within, to_page, slot - block * to.block_size);
    } else {
      sealer.template seal<false>(from_page, within, to_page, slot - block * to.block_size);
    }
  }
}

inline auto pick_seal(int format) {
  static_assert(kNumFormats == kNumPlainFormats + 2, "name the new row");
  return format == kNumPlainFormats ? seal_heads<kNumPlainFormats>
                                    : seal_heads<kNumPlainFormats + 1>;
}

// Sealed already, and by no other token.
inline bool is_sealed(const SealTask& task, const Run& run) {
  return run.alone && task.done[task.tokens[run.token]];
}

inline void seal_part(void* context, int /*worker*/, long part) {
  const SealTask& task = *static_cast<const SealTask*>(context);
  const Run* const last = task.split.runs + task.split.begin[part + 1];
  for (const Run* run = task.split.runs + task.split.begin[part]; run < last; ++run) {
    if (is_sealed(task, *run)) continue;
    task.seal(task, task.tokens[run->token], 0, task.params->cache.num_kv_heads, nullptr);
  }
  fence();
}

}  // namespace
}  // namespace kvq
