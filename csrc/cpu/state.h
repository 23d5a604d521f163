// The running result of some context for the rows of an item, and how two of them merge.
#pragma once

#include "exponential.h"
#include "tile.h"

namespace kvq {
namespace {

// What maxima start from: finite, so that differences of maxima never are infinity minus infinity.
constexpr float kNothing = -1e30f;

// Softmax(context) before its division; scores are in log2 units. Rows of lanes start on cache
// lines: unaligned, split decoding ran at 60 % of its speed.
struct State {
  float* max;   // [kMaxRows]
  float* sum;   // [rows, 16] the weights; their sixteen lanes are added up once, at the end
  float* bias;  // [rows, 16] what every channel gets: weight * min, and offsets of the codes
  float* acc;   // [rows, D]

  static constexpr long floats(long rows, long d) { return kMaxRows + rows * (d + 2 * kLanes); }

  static State at(float* memory, int rows) {
    float* lanes = memory + kMaxRows;
    return {memory, lanes, lanes + rows * kLanes, lanes + 2 * rows * kLanes};
  }

  void clear(int rows, long d) const {
    memset(max, 0, static_cast<size_t>(floats(rows, d)) * sizeof(float));
    for (int r = 0; r < kMaxRows; ++r) max[r] = kNothing;
  }
};

// Factors that bring two results to their common maximum; one of them is 1.
template <class F>
struct Shares {
  F a, b, max;
};

template <class F>
KVQ_HD Shares<F> shares(F x, F y) {
  const F one = F{} + 1.0f;
  const auto first = x >= y;
  const F e = exp2(select(first, y - x, x - y));
  return {select(first, one, e), select(first, e, one), select(first, x, y)};
}

KVQ_HD void merge_lanes(float* into, F16 from, F16 a, F16 b) {
  save16(into, fma(load16(into), a, from * b));
}

inline void merge(State into, State from, int rows, long d) {
  for (int first = 0; first < rows; first += 4) {
    const Shares<F4> s = shares(load4(into.max + first), load4(from.max + first));
    save4(into.max + first, s.max);
    for (int r = first; r < rows && r < first + 4; ++r) {
      const F16 a = splat(s.a[r - first]), b = splat(s.b[r - first]);
      const auto add = [&](float* to, const float* more)
                           KVQ_UNROLLED { merge_lanes(to, load16(more), a, b); };
      add(into.sum + r * kLanes, from.sum + r * kLanes);
      add(into.bias + r * kLanes, from.bias + r * kLanes);
      for (long i = r * d; i < (r + 1) * d; i += kLanes) add(into.acc + i, from.acc + i);
    }
  }
}

}  // namespace
}  // namespace kvq
