// Activations in, activations out: the conversions at a kernel's edges, and small helpers that
// every ISA compiles for itself (internal linkage, see codec.h).
#pragma once

#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "../codec.h"
#include "kernels.h"

namespace kvq {
namespace {

template <int... I>
struct IndexList {};
template <int N, int... I>
struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <int... I>
struct MakeIndices<0, I...> {
  using type = IndexList<I...>;
};
using FormatIndices = MakeIndices<kNumPlainFormats>::type;

// n is a multiple of 16 in all of these.
inline void load_half(const uint16_t* src, long n, float* dst) {
#if defined(__F16C__)
  for (long i = 0; i < n; i += 8) {
    _mm256_storeu_ps(dst + i,
                     _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i))));
  }
#elif defined(__aarch64__)
  for (long i = 0; i < n; i += 4) {
    vst1q_f32(dst + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(src + i))));
  }
#else
  for (long i = 0; i < n; ++i) dst[i] = half_to_float(src[i]);
#endif
}

inline void load_row(const Rows& rows, long token, long head, long n, float* dst) {
  const long at = token * rows.token_stride + head * rows.head_stride;
  switch (rows.type) {
    case Activation::kBFloat16: {
      const uint16_t* src = static_cast<const uint16_t*>(rows.data) + at;
      for (long i = 0; i < n; ++i) dst[i] = bf16_to_float(src[i]);
      return;
    }
    case Activation::kHalf:
      return load_half(static_cast<const uint16_t*>(rows.data) + at, n, dst);
    case Activation::kFloat: {
      const float* src = static_cast<const float*>(rows.data) + at;
      for (long i = 0; i < n; ++i) dst[i] = src[i];
      return;
    }
  }
}

inline void save_row(void* out, Activation type, long at, long n, const float* src) {
  switch (type) {
    case Activation::kBFloat16: {
      uint16_t* dst = static_cast<uint16_t*>(out) + at;
      for (long i = 0; i < n; ++i) dst[i] = float_to_bf16(src[i]);
      return;
    }
    case Activation::kHalf: {
      uint16_t* dst = static_cast<uint16_t*>(out) + at;
      for (long i = 0; i < n; ++i) dst[i] = float_to_half(src[i]);
      return;
    }
    case Activation::kFloat: {
      float* dst = static_cast<float*>(out) + at;
      for (long i = 0; i < n; ++i) dst[i] = src[i];
      return;
    }
  }
}

}  // namespace
}  // namespace kvq
