// From sums to outputs: V's static scales, sinks and the division, and the merge of an item's
// pieces.
#pragma once

#include "plan.h"
#include "rotate.h"

namespace kvq {
namespace gpu {
namespace {

// 2^(exponent - largest); parts that saw nothing have exponent -inf and count for nothing.
template <class L>
KVQ_HD float share_of(float exponent, float largest) {
  return exponent == -__builtin_inff() ? 0.0f : L::exp2(exponent - largest);
}

// One element: `sum` of the weights and `out` of weights times codes, both in units of 2^exponent.
template <class L>
KVQ_HD float result(const AttendParams& p, const RowTile& r, int row, int dim, float exponent,
                    float sum, float out) {
  const int head = r.head(row);
  float total = sum;
  if (p.sinks != nullptr && exponent != -__builtin_inff()) {
    total += L::exp2(p.sinks[head] * 1.44269504f - exponent);
  }
  if (p.value_scale.factor != nullptr) {
    const int64_t channel = static_cast<int64_t>(r.kv_head) * p.cache.head_size + dim;
    if (p.value_scale.zero_point != nullptr) out -= p.value_scale.zero_point[channel] * sum;
    out *= p.value_scale.factor[channel];
  }
  // A row that sees nothing gets zeros. A NaN sum is not 0.
  return total == 0.0f ? 0.0f : L::divide(out, total);
}

KVQ_HD void put_out(const AttendParams& p, const RowTile& r, int row, int dim, float x) {
  const int64_t at =
      (r.start + r.query(row)) * p.out.token_stride + r.head(row) * p.out.head_stride + dim;
  save_activation(p.out.data, p.activation, at, x);
}

// One row of rotated V's results, element(dim) each, rotated back by a warp.
template <class L, class Element>
KVQ_HD void put_rotated(const AttendParams& p, const RowTile& r, int row, const Element& element) {
  const int d = p.cache.head_size, dim = L::id() * kShare;
  float x[kShare] = {};
  if (dim < d) {
    KVQ_UNROLL for (int i = 0; i < kShare; ++i) x[i] = element(dim + i);
  }
  unrotate<L>(x, dim, d);
  if (dim < d) {
    KVQ_UNROLL for (int i = 0; i < kShare; ++i) put_out(p, r, row, dim + i, x[i]);
  }
}

// kVector elements of a row over all pieces of an item, which `piece` finds: element(i, x) for
// each.
constexpr int kVector = 4;

template <class L, class Find, class Element>
KVQ_HD void merged(const AttendParams& p, const RowTile& r, int row, int dim, int pieces,
                   const Find& piece, const Element& element) {
  const int d = p.cache.head_size;
  const int64_t statistics = static_cast<int64_t>(p.tile_rows) * d + 2 * row;
  const int64_t elements = static_cast<int64_t>(row) * d + dim;
  float exponent = -__builtin_inff(), sum = 0.0f, out[kVector] = {};
  // Unrolled, so that the loads of several pieces are under way at once.
  KVQ_UNROLL_BY(8)
  for (int i = 0; i < pieces; ++i) exponent = L::max(exponent, L::load_new(piece(i) + statistics));
  KVQ_UNROLL_BY(8) for (int i = 0; i < pieces; ++i) {
    const float* from = piece(i);
    const float share = share_of<L>(L::load_new(from + statistics), exponent);
    float x[kVector];
    L::load_new(from + elements, x);
    sum += L::load_new(from + statistics + 1) * share;
    KVQ_UNROLL for (int j = 0; j < kVector; ++j) out[j] += x[j] * share;
  }
  KVQ_UNROLL for (int j = 0; j < kVector; ++j) {
    element(j, result<L>(p, r, row, dim + j, exponent, sum, out[j]));
  }
}

}  // namespace
}  // namespace gpu
}  // namespace kvq
