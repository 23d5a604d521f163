// Codes to halves, where every 8-bit and 4-bit code is exact: a 32-bit word of gpu-v1 holds
// consecutive dims of one token, code i in byte i % 4, field i / 4.
#pragma once

#include "lane.h"

namespace kvq {
namespace gpu {
namespace {

// e4m3 without the instruction (before sm_89): the byte's exponent and mantissa moved into a half
// read as 2^-8 of the value, subnormals included; NaN would read as 480 and is patched.
// `high` holds the two bytes in the high byte of each half.
template <class L>
KVQ_HD uint32_t e4m3_by_shift(uint32_t high) {
  const uint32_t magnitude = (high & 0x7F007F00u) >> 1;
  const uint32_t value = L::mul2((high & 0x80008000u) | magnitude, 0x5C005C00u);  // * 256
  const uint32_t nan = ((magnitude + 0x00800080u) & 0x40004000u) >> 14;           // 0 or 1 each
  return value | nan * 0x7FFFu;
}

// A word's codes as pairs of halves.
//
// along: pair i of one token's codes, for K; dim(i, 0) and dim(i, 1) say which. A pair is
//   (code + kOffset) * kUnit * gain(i): integers are read as fp16's subnormals, which costs a mask
//   and no arithmetic, and the rest is taken back from the score. (Tensor cores multiply subnormals
//   exactly.) Scores are sums over a few hundred dims, so the offset costs no accuracy.
// across: pair i is dim i of token a and of token b, for V: code - kCenter, which keeps sums over
//   100,000 tokens near 0, because tensor cores truncate what they add to a large sum.
template <Code C>
struct Decoder;

template <Code C>
struct ByteDecoder {
  static constexpr int kCodes = 4;
  static constexpr float kCenter = 0.0f, kOffset = 0.0f, kUnit = 1.0f;
  static KVQ_CONSTEXPR int dim(int pair, int which) { return 2 * pair + which; }
  static KVQ_CONSTEXPR float gain(int) { return 1.0f; }
  template <class L>
  static KVQ_HD void across(uint32_t a, uint32_t b, uint32_t (&out)[4]) {
    uint32_t low[2], high[2];
    Decoder<C>::template exact<L>(L::permute(a, b, 0x5140u), low);   // a0 b0 a1 b1
    Decoder<C>::template exact<L>(L::permute(a, b, 0x7362u), high);  // a2 b2 a3 b3
    out[0] = low[0], out[1] = low[1], out[2] = high[0], out[3] = high[1];
  }
  template <class L>
  static KVQ_HD void along(uint32_t word, uint32_t (&out)[2]) {
    Decoder<C>::template exact<L>(word, out);
  }
};

template <>
struct Decoder<Code::kInt8> : ByteDecoder<Code::kInt8> {
  static constexpr float kOffset = 128.0f, kUnit = 0x1p-24f;
  template <class L>
  static KVQ_HD void along(uint32_t word, uint32_t (&out)[2]) {
    out[0] = L::permute(word, 0u, 0x4140u);
    out[1] = L::permute(word, 0u, 0x4342u);
  }
  // 0x6400 | c is 1024 + c; the stored c is the code + 128.
  template <class L>
  static KVQ_HD void exact(uint32_t word, uint32_t (&out)[2]) {
    out[0] = L::sub2(L::permute(word, 0x64646464u, 0x4140u), 0x64806480u);
    out[1] = L::sub2(L::permute(word, 0x64646464u, 0x4342u), 0x64806480u);
  }
};

template <>
struct Decoder<Code::kFp8E5M2> : ByteDecoder<Code::kFp8E5M2> {
  template <class L>
  static KVQ_HD void exact(uint32_t word, uint32_t (&out)[2]) {
    out[0] = L::permute(word, 0u, 0x1404u);
    out[1] = L::permute(word, 0u, 0x3424u);
  }
};

template <>
struct Decoder<Code::kFp8E4M3> : ByteDecoder<Code::kFp8E4M3> {
  template <class L>
  static KVQ_HD void exact(uint32_t word, uint32_t (&out)[2]) {
    if constexpr (L::kNativeFp8) {
      out[0] = L::e4m3_to_halves(word & 0xFFFFu);
      out[1] = L::e4m3_to_halves(word >> 16);
    } else {
      out[0] = e4m3_by_shift<L>(L::permute(word, 0u, 0x1404u));
      out[1] = e4m3_by_shift<L>(L::permute(word, 0u, 0x3424u));
    }
  }
};

template <>
struct Decoder<Code::kInt4> {
  static constexpr int kCodes = 8;
  static constexpr float kCenter = 8.0f, kOffset = 0.0f, kUnit = 0x1p-24f;
  static KVQ_CONSTEXPR int dim(int pair, int which) { return pair % 2 + pair / 2 * 4 + which * 2; }
  static KVQ_CONSTEXPR float gain(int pair) { return pair < 2 ? 1.0f : 16.0f; }
  // The low and the high nibbles of bytes 0 and 2.
  template <class L>
  static KVQ_HD void along(uint32_t word, uint32_t (&out)[4]) {
    out[0] = word & 0x000F000Fu;
    out[1] = word >> 8 & 0x000F000Fu;
    out[2] = word & 0x00F000F0u;
    out[3] = word >> 8 & 0x00F000F0u;
  }
  // 0x6400 | c is 1024 + c, 0x6400 | c << 4 is 16 (64 + c).
  template <class L>
  static KVQ_HD uint32_t low(uint32_t word) {
    return L::sub2(L::and_or(word, 0x000F000Fu, 0x64006400u), 0x64086408u);
  }
  template <class L>
  static KVQ_HD uint32_t high(uint32_t word) {
    return L::fma2(L::and_or(word, 0x00F000F0u, 0x64006400u), 0x2C002C00u, 0xD480D480u);
  }
  template <class L>
  static KVQ_HD void across(uint32_t a, uint32_t b, uint32_t (&out)[8]) {
    const uint32_t first = L::permute(a, b, 0x5410u), second = L::permute(a, b, 0x7632u);
    out[0] = low<L>(first), out[1] = low<L>(first >> 8);
    out[2] = low<L>(second), out[3] = low<L>(second >> 8);
    out[4] = high<L>(first), out[5] = high<L>(first >> 8);
    out[6] = high<L>(second), out[7] = high<L>(second >> 8);
  }
};

}  // namespace
}  // namespace gpu
}  // namespace kvq
