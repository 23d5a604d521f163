// The running result of some context for the rows of an item, and how two of them merge.
#pragma once

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
  for (int r = 0; r < rows; ++r) {
    const long at = r * kLanes;
    const Shares<F16> s = shares(splat(into.max[r]), splat(from.max[r]));
    into.max[r] = s.max[0];
    merge_lanes(into.sum + at, load16(from.sum + at), s.a, s.b);
    merge_lanes(into.bias + at, load16(from.bias + at), s.a, s.b);
    for (long i = r * d; i < (r + 1) * d; i += kLanes) {
      merge_lanes(into.acc + i, load16(from.acc + i), s.a, s.b);
    }
  }
}

}  // namespace
}  // namespace kvq
