// Sixteen rows of words become lines of sixteen words: how K reaches its layout.
#pragma once

#include "load.h"
#include "simd.h"

namespace kvq {
namespace {

#if defined(__AVX512F__)
constexpr int kSide = 16;
#elif defined(__AVX2__)
constexpr int kSide = 8;
#else
constexpr int kSide = 4;
#endif
typedef uint32_t Side __attribute__((vector_size(kSide * 4)));

// Swaps the off-diagonal quarters of every square of 2 * kStep rows and columns.
template <int kStep, int... I>
KVQ_HD void swap_step(Side (&row)[kSide], IndexList<I...>) {
  // Of rows a and b, kStep apart: a keeps its columns without the bit kStep and takes b's; b the
  // reverse.
  const Side to_a = {((I & kStep) ? kSide + I - kStep : I)...};
  const Side to_b = {((I & kStep) ? kSide + I : I + kStep)...};
#pragma GCC unroll 16
  for (int i = 0; i < kSide; ++i) {
    if (i & kStep) continue;
    const Side a = row[i], b = row[i + kStep];
    row[i] = __builtin_shuffle(a, b, to_a);
    row[i + kStep] = __builtin_shuffle(a, b, to_b);
  }
}

// out[w][t] = in[t * stride + w], for `lines` of the sixteen w; reads sixteen words of each row.
// kStream: past the caches.
template <bool kStream>
KVQ_HD void transpose(const uint32_t* in, long stride, long lines, uint8_t* out) {
  using Indices = MakeIndices<kSide>::type;
  for (int t = 0; t < kLanes; t += kSide) {
    for (int w = 0; w < lines; w += kSide) {
      Side row[kSide];
      for (int i = 0; i < kSide; ++i) memcpy(&row[i], in + (t + i) * stride + w, sizeof(Side));
      swap_step<1>(row, Indices{});
      swap_step<2>(row, Indices{});
      if constexpr (kSide > 4) swap_step<4>(row, Indices{});
      if constexpr (kSide > 8) swap_step<8>(row, Indices{});
      for (int i = 0; i < kSide && w + i < lines; ++i) {
        uint8_t* at = out + (w + i) * 64 + t * 4;
        if constexpr (kStream && kSide == kLanes) {
          stream16(at, load<U16>(&row[i]));
        } else {
          memcpy(at, &row[i], sizeof(Side));
        }
      }
    }
  }
}

}  // namespace
}  // namespace kvq
