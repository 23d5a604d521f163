// Quantize on write: a group of lanes per (token, kv head), as many as the row has eighths,
// measures, encodes and writes the row of K or that of V. The same codec and the same order of
// roundings as csrc/cpu/quantize.h; compile with -fmad=false, because a fused multiply-add rounds
// once where the specification rounds twice.
#pragma once

#include "rotate.h"

namespace kvq {
namespace gpu {
namespace {

constexpr float kAmaxFloor = 0x1p-100f;
constexpr float kHalfMax = 65504.0f;
constexpr float kFloatMax = 0x1.fffffep127f;

// What the codes of one row need: value = (x - base) * inverse; metadata is the page's word.
struct RowScale {
  float inverse, base;
  uint32_t metadata;
};

// Lanes that share a row of K or V. The others of a warp have rows of their own: with a whole warp
// a row, heads of 128 left half of it idle and stores took twice as long (H100).
KVQ_HD int lanes_of_row(int head_size) {
  return head_size > 128 ? 32 : head_size > 64 ? 16 : head_size > 32 ? 8 : 4;
}

// Blocks that store K; as many store V.
KVQ_HD int64_t store_blocks(const StoreParams& p) {
  const int64_t rows = kThreads / lanes_of_row(p.cache.head_size);
  return (p.num_tokens * p.cache.num_kv_heads + rows - 1) / rows;
}

// This lane's share of a row; zeros where there is none.
template <class L>
KVQ_HD void load_share(const StoreParams& p, const Rows& rows, int64_t token, int head, int dim,
                       bool real, float (&x)[kShare]) {
  const int64_t at = token * rows.token_stride + head * rows.head_stride + dim;
  KVQ_UNROLL for (int i = 0; i < kShare; ++i) x[i] = 0.0f;
  if (!real) return;
  if (p.aligned && p.activation != Activation::kFloat) {
    uint32_t words[4];
    L::load(static_cast<const uint8_t*>(rows.data) + 2 * at, words);
    KVQ_UNROLL for (int i = 0; i < kShare; ++i) {
      const uint16_t half = static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16));
      x[i] = p.activation == Activation::kHalf ? half_to_float(half) : bf16_to_float(half);
    }
    return;
  }
  KVQ_UNROLL for (int i = 0; i < kShare; ++i) {
    x[i] = load_activation(rows.data, p.activation, at + i);
  }
}

// Scale of one row, whose values become finite: NaN counts as 0 and poisons the scale, infinities
// count as the largest finite value.
template <class L, Code C>
KVQ_HD RowScale measure(float (&x)[kShare], int lanes, bool real) {
  constexpr bool kAffine = C == Code::kInt4;
  constexpr float kLimit = kAffine ? kHalfMax : kFloatMax, kMax = Codec<C>::kMax;
  uint32_t poison = 0;
  float low = kLimit, high = -kLimit, peak = 0.0f;
  KVQ_UNROLL for (int i = 0; i < kShare; ++i) {
    poison |= x[i] != x[i] ? 1u : 0u;
    float v = x[i] == x[i] ? x[i] : 0.0f;
    v = v < -kLimit ? -kLimit : v;
    v = v > kLimit ? kLimit : v;
    x[i] = v;
    if (real) {
      low = v < low ? v : low;
      high = v > high ? v : high;
      const float magnitude = bits_float(float_bits(v) & 0x7FFFFFFFu);
      peak = magnitude > peak ? magnitude : peak;
    }
  }
  poison = reduce<L>(poison, 1, lanes, [](uint32_t a, uint32_t b) { return a | b; });
  const auto larger = [](float a, float b) { return a > b ? a : b; };
  if constexpr (kAffine) {
    // Adding 0: -0 would depend on the order of the reduction.
    low = reduce<L>(low, 1, lanes, [](float a, float b) { return a < b ? a : b; }) + 0.0f;
    high = reduce<L>(high, 1, lanes, larger) + 0.0f;
    const uint16_t scale = float_to_half((high - low) * (1.0f / kMax));
    const uint16_t minimum = float_to_half(low);
    const float wide = half_to_float(scale);
    return {wide > 0.0f ? L::divide(1.0f, wide) : 0.0f, half_to_float(minimum),
            poison ? 0x7E007E00u : scale | static_cast<uint32_t>(minimum) << 16};
  } else {
    peak = reduce<L>(peak, 1, lanes, larger);
    const float amax = peak < kAmaxFloor ? kAmaxFloor : peak;
    return {L::divide(kMax, amax), 0.0f, poison ? 0x7FC00000u : float_bits(amax * (1.0f / kMax))};
  }
}

template <Code C>
KVQ_HD void encode_row(const float (&x)[kShare], const RowScale& row, uint32_t (&codes)[kShare]) {
  KVQ_UNROLL for (int i = 0; i < kShare; ++i) {
    const float y = (C == Code::kInt4 ? x[i] - row.base : x[i]) * row.inverse;
    codes[i] = encode<C>(y);
  }
}

template <class L, Code C>
KVQ_HD void encode_channels(const float (&x)[kShare], const StaticScale& scale, int64_t channel,
                            uint32_t (&codes)[kShare]) {
  KVQ_UNROLL for (int i = 0; i < kShare; ++i) {
    float y = L::multiply(x[i], scale.factor[channel + i]);
    if constexpr (has_nan(C)) {
      // The product of a NaN loses its sign on a GPU; a positive scale keeps that of any other.
      y = bits_float((float_bits(y) & 0x7FFFFFFFu) | (float_bits(x[i]) & 0x80000000u));
    }
    if (scale.zero_point != nullptr) {
      // Round before adding the zero point, so that it does not move ties.
      constexpr float kLimit = 4 * Codec<C>::kMax;
      const uint32_t whole = round_clamped<float, uint32_t>(y, -kLimit, kLimit);
      y = static_cast<float>(static_cast<int32_t>(whole)) + scale.zero_point[channel + i];
    }
    codes[i] = encode<C>(y);
  }
}

// Eight codes to words of gpu-v1.
template <Code C>
KVQ_HD void pack(const uint32_t (&codes)[kShare], uint32_t (&words)[code_bits(C) / 4]) {
  constexpr int kPer = 32 / code_bits(C);
  KVQ_UNROLL for (int w = 0; w < kShare / kPer; ++w) {
    words[w] = 0;
    KVQ_UNROLL for (int i = 0; i < kPer; ++i) {
      words[w] |= codes[w * kPer + i] << (i % 4 * 8 + i / 4 * code_bits(C));
    }
  }
}

// One row of K or V, of this lane's group. All lanes of a warp come here, those without a row too.
template <class L, Code C, bool kPerToken, bool kRotated>
KVQ_HD void store_row(const StoreParams& p, const Rows& rows, const StaticScale& scale,
                      int64_t token, int head, bool stored, uint8_t* codes_at,
                      uint8_t* metadata_at) {
  const int d = p.cache.head_size, lanes = lanes_of_row(d), lane = L::id() % lanes;
  const int dim = lane * kShare;
  const bool real = stored && dim < d;
  float x[kShare];
  load_share<L>(p, rows, token, head, dim, real, x);
  uint32_t codes[kShare];
  if constexpr (kRotated) {
    KVQ_UNROLL for (int i = 0; i < kShare; ++i) {  // a NaN stays
      x[i] = x[i] < -kRotationLimit ? -kRotationLimit : x[i];
      x[i] = x[i] > kRotationLimit ? kRotationLimit : x[i];
    }
    rotate<L>(x, dim, d);
  }
  if constexpr (kPerToken) {
    const RowScale row = measure<L, C>(x, lanes, real);
    encode_row<C>(x, row, codes);
    if (stored && lane == 0) *reinterpret_cast<uint32_t*>(metadata_at) = row.metadata;
  } else if (real) {
    encode_channels<L, C>(x, scale, static_cast<int64_t>(head) * d + dim, codes);
  }
  if (!real) return;
  uint32_t words[code_bits(C) / 4];
  pack<C>(codes, words);
  uint32_t* out = reinterpret_cast<uint32_t*>(codes_at) + lane * (code_bits(C) / 4);
  KVQ_UNROLL for (int w = 0; w < code_bits(C) / 4; ++w) out[w] = words[w];
}

template <class L, int kFormatRow>
KVQ_HD void store_block(const StoreParams& p) {
  constexpr Format kFormat = kFormats[kFormatRow];
  constexpr Stream kKey = kFormat.key, kValue = kFormat.value;
  const int lanes = lanes_of_row(p.cache.head_size);
  const int64_t blocks = store_blocks(p);
  const bool values = L::block() >= blocks;
  // 32 bits: divisions of 64 cost more than encoding the row does.
  const uint32_t heads = p.cache.num_kv_heads, size = p.cache.block_size;
  const uint32_t item = static_cast<uint32_t>(
      (L::block() - (values ? blocks : 0)) * (kThreads / lanes) + L::thread() / lanes);
  const int64_t token = item / heads;
  const int head = static_cast<int>(item % heads);
  const int64_t slot = token < p.num_tokens ? p.slots[token] : -1;
  const bool stored = slot >= 0;
  const uint32_t at_slot = stored ? static_cast<uint32_t>(slot) : 0;
  const int64_t block = at_slot / size, position = at_slot % size;
  uint8_t* page = p.cache.data + block * p.cache.block_stride + head * p.cache.head_stride;
  const PageLayout at = page_layout(kFormat, p.cache.head_size, p.cache.block_size);
  if (values) {
    const int64_t row = p.cache.head_size * code_bits(kValue.code) / 8;
    store_row<L, kValue.code, kValue.per_token, kValue.rotated>(
        p, p.value, p.value_scale, token, head, stored, page + at.value_codes + position * row,
        page + at.value_metadata + 4 * position);
  } else {
    const int64_t row = p.cache.head_size * code_bits(kKey.code) / 8;
    store_row<L, kKey.code, kKey.per_token, kKey.rotated>(
        p, p.key, p.key_scale, token, head, stored, page + at.key_codes + position * row,
        page + at.key_metadata + 4 * position);
  }
}

}  // namespace
}  // namespace gpu
}  // namespace kvq
