// Encoders and decoders, shared by every CPU ISA and by nvcc: integer and IEEE round-to-nearest
// operations only, so that the bytes in the cache are the same everywhere. Encoders are written
// for F floats and U words of the same number of lanes: one (float, uint32_t), or a vector of
// GCC's extension (cpu/simd.h).
//
// Compile with -ffp-contract=off (or use _rn intrinsics): a fused multiply-add would round once
// where the specification rounds twice. Everything has internal linkage: the header is compiled
// once per ISA, and the linker must never merge an AVX-512 body into the generic table.
#pragma once

#include <cstdint>
#include <cstring>

#include "formats.h"

#if defined(__CUDACC__)
#define KVQ_HD __host__ __device__ __forceinline__
#else
#define KVQ_HD __attribute__((always_inline)) inline
#endif

namespace kvq {
namespace {

KVQ_HD uint32_t float_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}

KVQ_HD float bits_float(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

template <class To, class From>
KVQ_HD To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "lanes differ");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// mask ? a : b, lane by lane.
template <class M, class T>
KVQ_HD T select(M mask, T a, T b) {
  return mask ? a : b;
}

// The smaller and the larger number, lane by lane, NaN not being one. A class, so that simd.h can
// name instructions.
template <class T>
struct Order {
  static KVQ_HD T lesser(T a, T b) { return select(a < b, a, b); }
  static KVQ_HD T greater(T a, T b) { return select(a > b, a, b); }
};

// 16-bit floats ---------------------------------------------------------------------------

KVQ_HD float bf16_to_float(uint16_t h) { return bits_float(static_cast<uint32_t>(h) << 16); }

// Round to nearest even; NaN stays NaN (quiet).
KVQ_HD uint16_t float_to_bf16(float x) {
  const uint32_t u = float_bits(x);
  const uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  const uint32_t nan = (u >> 16) | 0x40u;
  return static_cast<uint16_t>((u & 0x7FFFFFFFu) > 0x7F800000u ? nan : rounded);
}

KVQ_HD float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t mag = h & 0x7FFFu;
  const uint32_t normal = (mag << 13) + 0x38000000u;                           // rebias 15 -> 127
  const uint32_t special = (mag << 13) + 0x70000000u;                          // inf and NaN
  const float sub = static_cast<float>(static_cast<int32_t>(mag)) * 0x1p-24f;  // exact
  uint32_t u = mag < 0x0400u ? float_bits(sub) : normal;
  u = mag >= 0x7C00u ? special : u;
  return bits_float(u | sign);
}

// Round to nearest even, overflow to infinity, NaN to 0x7E00 (sign dropped).
KVQ_HD uint16_t float_to_half(float x) {
  const uint32_t u = float_bits(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t a = u & 0x7FFFFFFFu;
  const uint32_t normal = (a + 0xFFFu + ((a >> 13) & 1u) - 0x38000000u) >> 13;
  // Adding 0.5 puts fp16's smallest subnormal, 2^-24, into fp32's last place.
  const uint32_t sub = float_bits(bits_float(a) + 0.5f) - 0x3F000000u;
  uint32_t h = a < 0x38800000u ? sub : normal;
  h = a >= 0x477FF000u ? 0x7C00u : h;  // 65520 and above round to infinity
  return static_cast<uint16_t>(a > 0x7F800000u ? 0x7E00u : (h | sign));
}

// 8-bit floats ----------------------------------------------------------------------------

// IEEE-like small float of `kMantissa` bits whose smallest normal is 2^(1 - kBias).
// kMax is the largest magnitude (inputs saturate to it), kNan the NaN byte without sign;
// kFnuz: no negative zero, and 0x80 is the only NaN.
template <int kMantissa, int kBias, uint32_t kMaxBits, uint32_t kNan, bool kFnuz>
struct Float8 {
  static constexpr int kShift = 23 - kMantissa;
  static constexpr uint32_t kMinNormal = static_cast<uint32_t>(127 + 1 - kBias) << 23;
  static constexpr uint32_t kRebias = static_cast<uint32_t>(127 - kBias) << kMantissa;
  // Adding this float puts the format's smallest subnormal into fp32's last place.
  static constexpr uint32_t kMagic = static_cast<uint32_t>(127 + (1 - kBias - kMantissa) + 23)
                                     << 23;

  template <class F, class U, bool kInRange>
  static KVQ_HD U encode(F x) {
    const U u = bits_as<U>(x), magnitude = u & 0x7FFFFFFFu;
    const U a = kInRange ? magnitude : Order<U>::lesser(magnitude, U{} + kMaxBits);
    // Rounding to even and the other bias in one addition: it carries into the code's exponent.
    constexpr uint32_t kRound = (1u << (kShift - 1)) - 1u - (kRebias << kShift);
    const U normal = (a + ((a >> kShift) & 1u) + kRound) >> kShift;
    const U sub = bits_as<U>(bits_as<F>(a) + bits_float(kMagic)) - kMagic;
    const U code = select(a < kMinNormal, sub, normal);
    const U sign = (u >> 24) & 0x80u;
    if constexpr (kInRange && !kFnuz) {
      return code | sign;
    } else if constexpr (kFnuz) {
      const U finite = select(code == 0u, U{}, code | sign);
      return select(magnitude > 0x7F800000u, U{} + 0x80u, finite);
    } else {
      return select(magnitude > 0x7F800000u, U{} + kNan, code) | sign;
    }
  }

  static KVQ_HD float decode(uint8_t c) {
    const uint32_t mag = c & 0x7Fu;
    const uint32_t sign = static_cast<uint32_t>(c & 0x80u) << 24;
    const uint32_t normal = (mag << kShift) + (static_cast<uint32_t>(127 - kBias) << 23);
    // mag * 2^(1 - kBias - kMantissa), exact: the scale is written as a bit pattern.
    const float sub = static_cast<float>(static_cast<int32_t>(mag)) *
                      bits_float(static_cast<uint32_t>(127 + 1 - kBias - kMantissa) << 23);
    const uint32_t value = mag < (1u << kMantissa) ? float_bits(sub) : normal;
    if (kFnuz) return bits_float(c == 0x80u ? 0x7FC00000u : (value | sign));
    // e4m3: 0x7F is NaN. e5m2: 0x7C is infinity, 0x7D to 0x7F are NaN.
    if (kNan == 0x7Fu && kMantissa == 3) {
      return bits_float((mag == 0x7Fu ? 0x7FC00000u : value) | sign);
    }
    return bits_float((mag > 0x7Cu ? 0x7FC00000u : mag == 0x7Cu ? 0x7F800000u : value) | sign);
  }
};

using E4M3 = Float8<3, 7, 0x43E00000u /* 448 */, 0x7Fu, false>;
using E5M2 = Float8<2, 15, 0x47600000u /* 57344 */, 0x7Fu, false>;
using E4M3Fnuz = Float8<3, 8, 0x43700000u /* 240 */, 0x80u, true>;

// Integers --------------------------------------------------------------------------------

// Round to nearest even after clamping to [low, high], |bounds| < 2^22; NaN becomes 0. The
// integers, negative ones modulo 2^32. 1.5 * 2^23 pushes the fraction out of the mantissa, which
// rounds it as IEEE does.
template <class F, class U, bool kNumber = false>
KVQ_HD U round_clamped(F y, float low, float high) {
  if constexpr (!kNumber) y = select(y == y, y, F{});
  y = Order<F>::lesser(Order<F>::greater(y, F{} + low), F{} + high);
  return bits_as<U>(y + 12582912.0f) - 0x4B400000u;
}

// The codec of a code: `encode` takes values already divided by their scale and returns the
// unsigned bytes (or fields) that the page holds; `decode` is its inverse before scaling.
// kInRange: the caller vouches for a number beyond the largest code by rounding at most, as rows
// are that have a scale of their own.
template <Code C>
struct Codec;

template <>
struct Codec<Code::kInt8> {
  static constexpr float kMax = 127.0f;
  template <class F, class U, bool kInRange = false>
  static KVQ_HD U encode(F y) {
    if constexpr (kInRange) return bits_as<U>(y + 12582912.0f) - (0x4B400000u - 128u);
    return round_clamped<F, U>(y, -127.0f, 127.0f) + 128u;
  }
  static KVQ_HD float decode(uint8_t c) {
    return static_cast<float>(static_cast<int32_t>(c) - 128);
  }
};

template <int kQmax>
struct AffineCodec {
  static constexpr float kMax = static_cast<float>(kQmax);
  template <class F, class U, bool kInRange = false>
  static KVQ_HD U encode(F y) {
    return round_clamped<F, U, kInRange>(y, 0.0f, kMax);
  }
  static KVQ_HD float decode(uint8_t c) { return static_cast<float>(static_cast<int32_t>(c)); }
};
template <>
struct Codec<Code::kInt4> : AffineCodec<15> {};
template <>
struct Codec<Code::kInt3> : AffineCodec<7> {};
template <>
struct Codec<Code::kInt2> : AffineCodec<3> {};

// The scale byte of lite metadata: the top of a positive fp16, 5 bits of exponent and 3 of
// mantissa.
struct LiteScale {
  static constexpr uint32_t kNan = 0xFFu;
  static constexpr float kStep = 0.5f;  // a lite min counts these of its scale
  // Scales are at least |min| over this, so that a byte can say the min (kvq_plugin/codes.py).
  static constexpr float kRange = 112.0f * kStep;
  // The nearest, ties to even, of lanes of 0 and more, below 63488.
  template <class F, class U>
  static KVQ_HD U encode(F x) {
    const U u = bits_as<U>(x);
    // Rebiased (127 to 15) and rounded in one addition; below 2^-14, adding 2^6 puts the smallest
    // subnormal, 2^-17, into fp32's last place.
    const U normal = (u + ((u >> 20) & 1u) + (0x7FFFFu - (112u << 23))) >> 20;
    const U sub = bits_as<U>(x + 64.0f) - 0x42800000u;
    return select(u < 0x38800000u, sub, normal);
  }
  static KVQ_HD float decode(uint8_t c) { return half_to_float(static_cast<uint16_t>(c << 7)); }
};

template <class F>
struct FloatCodec {
  template <class Lanes, class U, bool kInRange = false>
  static KVQ_HD U encode(Lanes y) {
    return F::template encode<Lanes, U, kInRange>(y);
  }
  static KVQ_HD float decode(uint8_t c) { return F::decode(c); }
};
template <>
struct Codec<Code::kFp8E4M3> : FloatCodec<E4M3> {
  static constexpr float kMax = 448.0f;
};
template <>
struct Codec<Code::kFp8E5M2> : FloatCodec<E5M2> {
  static constexpr float kMax = 57344.0f;
};
template <>
struct Codec<Code::kFp8E4M3Fnuz> : FloatCodec<E4M3Fnuz> {
  static constexpr float kMax = 240.0f;
};

// One value, one code.
template <Code C>
KVQ_HD uint8_t encode(float y) {
  return static_cast<uint8_t>(Codec<C>::template encode<float, uint32_t>(y));
}

}  // namespace
}  // namespace kvq
