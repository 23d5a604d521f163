// Rotates rows that lanes hold, kShare dims a lane, neighbours neighbouring ones (../rotation.h):
// the same additions in the same order as csrc/cpu/rotate.h, first within lanes, then between them.
#pragma once

#include "../rotation.h"
#include "lane.h"

namespace kvq {
namespace gpu {
namespace {

constexpr int kShare = 8;  // dims of one lane: 32 lanes hold the largest head

template <class L>
KVQ_HD void hadamard(float (&x)[kShare], int head_size) {
  KVQ_UNROLL for (int h = 1; h < kShare; h *= 2) {
    KVQ_UNROLL for (int i = 0; i < kShare; ++i) {
      if (i & h) continue;
      const float a = x[i], b = x[i + h];
      x[i] = a + b;
      x[i + h] = a - b;
    }
  }
  const int width = rotation_width(head_size);
  for (int mask = 1; mask * kShare < width; mask *= 2) {
    const bool second = (L::id() & mask) != 0;
    KVQ_UNROLL for (int i = 0; i < kShare; ++i) {
      const float other = L::shuffle_xor(x[i], mask);
      x[i] = second ? other - x[i] : x[i] + other;
    }
  }
}

// All lanes of a warp together, this one with the dims from `dim` on; lanes past the head hold
// zeros. Some 90 instructions at D = 128.
template <class L>
KVQ_HD void rotate(float (&x)[kShare], int dim, int head_size) {
  KVQ_UNROLL for (int i = 0; i < kShare; ++i) x[i] *= rotation_factor(dim + i, head_size);
  hadamard<L>(x, head_size);
}

template <class L>
KVQ_HD void unrotate(float (&x)[kShare], int dim, int head_size) {
  hadamard<L>(x, head_size);
  const float gain = rotation_gain(head_size);
  KVQ_UNROLL for (int i = 0; i < kShare; ++i) x[i] *= rotation_factor(dim + i, head_size) * gain;
}

}  // namespace
}  // namespace gpu
}  // namespace kvq
