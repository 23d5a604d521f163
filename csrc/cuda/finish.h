// From sums to outputs: V's static scales, sinks, the division, and the merge of splits.
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
  unrotate<L>(x, d);
  if (dim < d) {
    KVQ_UNROLL for (int i = 0; i < kShare; ++i) put_out(p, r, row, dim + i, x[i]);
  }
}

// One element of all splits together.
template <class L>
KVQ_HD float merged(const AttendParams& p, const RowTile& r, int row, int dim, int active) {
  const float* stats = statistics(p);
  const int d = p.cache.head_size;
  const int64_t at = partial(p, r, row, 0);
  float exponent = -__builtin_inff();
  // Unrolled, so that the loads of several splits are under way at once.
  KVQ_UNROLL_BY(16)
  for (int s = 0; s < active; ++s) exponent = L::max(exponent, stats[2 * (at + s)]);
  float sum = 0.0f, out = 0.0f;
  KVQ_UNROLL_BY(16) for (int s = 0; s < active; ++s) {
    const float share = share_of<L>(stats[2 * (at + s)], exponent);
    sum += stats[2 * (at + s) + 1] * share;
    out += p.workspace[(at + s) * d + dim] * share;
  }
  return result<L>(p, r, row, dim, exponent, sum, out);
}

// One block per (sequence, kv head, row tile), after attend_block of all splits.
template <class L, bool kRotated>
KVQ_HD void merge_block(const AttendParams& p) {
  const RowTile r = row_tile(p, L::block_x(), L::block_z());
  if (r.count <= 0) return;
  const int active = splits_of(p, r).active, d = p.cache.head_size;
  if (active == 1) return;
  if constexpr (kRotated) {
    const int stride = kWarps * L::blocks_y();
    for (int row = L::block_y() * kWarps + L::warp(); row < r.count; row += stride) {
      put_rotated<L>(p, r, row, [&](int dim) { return merged<L>(p, r, row, dim, active); });
    }
    return;
  }
  const int stride = kThreads * L::blocks_y();
  for (int i = L::block_y() * kThreads + L::thread(); i < r.count * d; i += stride) {
    put_out(p, r, i / d, i % d, merged<L>(p, r, i / d, i % d, active));
  }
}

}  // namespace
}  // namespace gpu
}  // namespace kvq
