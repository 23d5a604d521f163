// Which kernel runs a call, and with how many blocks: from the launch's shapes alone.
#pragma once

#include <type_traits>

#include "plan.h"

namespace kvq {
namespace gpu {
namespace {

// f(std::integral_constant) of a row of kFormats.
template <int kRow = 0, class F>
auto with_format(int format, const F& f) {
  if constexpr (kRow + 1 < kNumFormats) {
    if (format != kRow) return with_format<kRow + 1>(format, f);
  }
  return f(std::integral_constant<int, kRow>());
}

// f(Shape) of the kernel for a head size and tiles of more than 8 rows, or not. Head sizes above
// 128 take 8 rows at a time: 16 would need more registers than there are.
template <int kFormatRow, class F>
auto with_shape(int head_size, bool wide, const F& f) {
  if (head_size > 128) return f(Shape<kFormatRow, 256, 1>());
  if (head_size > 64) {
    return wide ? f(Shape<kFormatRow, 128, 2>()) : f(Shape<kFormatRow, 128, 1>());
  }
  return wide ? f(Shape<kFormatRow, 64, 2>()) : f(Shape<kFormatRow, 64, 1>());
}

struct Choice {
  int tile_tokens, tile_rows, blocks;
};

inline Choice choose(int format, int head_size, int rows) {
  return with_format(format, [&](auto row) {
    return with_shape<row.value>(head_size, rows > 8, [](auto shape) {
      using S = decltype(shape);
      return Choice{S::kTile, S::kRows, S::kBlocks};
    });
  });
}

// Rows a kv head whose tiles lie abreast, at most: those of 8 tokens of 16 heads. With more, as
// prompts have them, tiles come one after the other: the decodes beside them need all blocks.
constexpr int kAbreastRows = 128;

}  // namespace
}  // namespace gpu
}  // namespace kvq
