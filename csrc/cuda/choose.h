// Which kernel runs a call, and with how many blocks: from the launch's shapes alone.
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

// Rows a kv head whose tiles lie abreast, at most: those of 8 tokens of 16 heads. With more, as
// prompts have them, tiles come one after the other: the decodes beside them need all blocks.
constexpr int kAbreastRows = 128;

}  // namespace
}  // namespace gpu
}  // namespace kvq
