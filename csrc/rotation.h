// The randomized Hadamard transform of rotated streams; kvq_plugin/rotation.py defines it, and a
// test compares the two. Host and device, integers and powers of two only.
#pragma once

#include <cstdint>

#include "formats.h"

namespace kvq {
namespace {

// Elements beyond count as this before a row is rotated, so that no sum of 512 overflows.
constexpr float kRotationLimit = 0x1p118f;

// Channels that are mixed with each other: the largest power of two dividing the head size.
KVQ_CONSTEXPR int rotation_width(int head_size) { return head_size & -head_size; }

// A row is multiplied by 2^-m: the least m with 4^m >= width.
KVQ_CONSTEXPR int rotation_exponent(int head_size) {
  int m = 0;
  while (1 << 2 * m < rotation_width(head_size)) ++m;
  return m;
}

// 1 or 2: the product of two rotated rows is that of the rows divided by this.
KVQ_CONSTEXPR float rotation_gain(int head_size) {
  return 1 << 2 * rotation_exponent(head_size) > rotation_width(head_size) ? 2.0f : 1.0f;
}

KVQ_CONSTEXPR bool rotation_negates(uint32_t channel) {
  uint32_t x = (channel + 1) * 0x61C88647u;
  x = (x ^ x >> 16) * 0x2C1B3C6Du;
  x = (x ^ x >> 12) * 0x297A2D39u;
  return x >> 31 != 0;
}

// What channels are multiplied by before they are mixed; after mixing them back, by this and the
// gain.
KVQ_CONSTEXPR float rotation_factor(int channel, int head_size) {
  const float size = 1.0f / static_cast<float>(1 << rotation_exponent(head_size));
  return rotation_negates(static_cast<uint32_t>(channel)) ? -size : size;
}

}  // namespace
}  // namespace kvq
