// Which kernel runs a call and how far its sequences are split: from the launch's shapes alone.
#pragma once

#include "plan.h"

namespace kvq {
namespace gpu {

struct Choice {
  int head_class, row_tiles, tile_tokens, tile_rows, blocks;
};

namespace {

template <int kFormatRow, int kHead, int kRowTiles>
constexpr Choice choice_of() {
  using S = Shape<kFormatRow, kHead, kRowTiles>;
  return {kHead, kRowTiles, S::kTile, S::kRows, S::kBlocks};
}

template <int kFormatRow>
Choice choose_in(int head_size, int rows) {
  const int row_tiles = kvq::gpu::row_tiles(head_size <= 64    ? 64
                                            : head_size <= 128 ? 128
                                                               : 256,
                                            rows);
  if (head_size > 128) return choice_of<kFormatRow, 256, 1>();
  if (head_size > 64) {
    return row_tiles == 2 ? choice_of<kFormatRow, 128, 2>() : choice_of<kFormatRow, 128, 1>();
  }
  return row_tiles == 2 ? choice_of<kFormatRow, 64, 2>() : choice_of<kFormatRow, 64, 1>();
}

template <int kFormatRow = 0>
Choice choose(int format, int head_size, int rows) {
  if constexpr (kFormatRow + 1 < kNumFormats) {
    if (format != kFormatRow) return choose<kFormatRow + 1>(format, head_size, rows);
  }
  return choose_in<kFormatRow>(head_size, rows);
}

// Splits of every sequence, when `blocks` blocks are there without and `slots` run at a time. The
// fewest that keep nearly as many slots busy as any number would, because each costs a partial
// result; of sequences as long as they may be. At most kWaves of blocks, which bounds the workspace
// whatever the batch.
constexpr int kWaves = 4;

inline int splits_for(int64_t blocks, int64_t max_seq_len, int64_t slots) {
  constexpr double kEnough = 0.95;
  if (blocks <= 0) return 1;
  const int64_t longest = (max_seq_len + kSplitTokens - 1) / kSplitTokens;
  const int64_t room = kWaves * slots / blocks;
  const int most = static_cast<int>(longest < room ? longest : room);
  const auto busy = [&](int splits) {
    const int64_t work = blocks * splits, waves = (work + slots - 1) / slots;
    return static_cast<double>(work) / static_cast<double>(waves * slots);
  };
  double best = 0.0;
  for (int s = 1; s <= most; ++s) best = busy(s) > best ? busy(s) : best;
  int s = 1;
  while (busy(s) < kEnough * best) ++s;
  return s;
}

}  // namespace
}  // namespace gpu
}  // namespace kvq
