// Sixteen fp32 lanes in GCC's vector extension: one source for every ISA (one zmm, two ymm or
// four xmm registers), and the base-2 exponential the softmax needs.
#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "../codec.h"

namespace kvq {
namespace {

typedef float F16 __attribute__((vector_size(64)));
typedef int32_t I16 __attribute__((vector_size(64)));
typedef uint32_t U16 __attribute__((vector_size(64)));

KVQ_HD F16 load16(const void* p) {
  F16 v;
  memcpy(&v, p, 64);
  return v;
}

KVQ_HD void save16(void* p, F16 v) { memcpy(p, &v, 64); }

KVQ_HD F16 splat(float x) { return F16{} + x; }

#if defined(__AVX512F__)
KVQ_HD float reduce_max(F16 v) { return _mm512_reduce_max_ps(reinterpret_cast<__m512>(v)); }
KVQ_HD float reduce_add(F16 v) { return _mm512_reduce_add_ps(reinterpret_cast<__m512>(v)); }
#else
KVQ_HD float reduce_max(F16 v) {
  float m = v[0];
  for (int i = 1; i < 16; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

KVQ_HD float reduce_add(F16 v) {
  float s[8];
  for (int i = 0; i < 8; ++i) s[i] = v[i] + v[i + 8];
  for (int i = 0; i < 4; ++i) s[i] += s[i + 4];
  return (s[0] + s[2]) + (s[1] + s[3]);
}
#endif

// 2^x for x <= 0 with a relative error below 3e-7; -inf gives 0, NaN stays NaN.
KVQ_HD F16 exp2_16(F16 x) {
  const I16 tiny = x < -126.0f;
  const F16 bounded = tiny ? F16{} : x;
  const F16 shifted = bounded + 12582912.0f;  // 1.5 * 2^23: rounds to the nearest integer
  const I16 exponent = reinterpret_cast<I16>(shifted) - 0x4B400000;
  const F16 f = bounded - (shifted - 12582912.0f);
  // Minimax on [-0.5, 0.5].
  F16 p = f * 1.3398874e-3f + 9.6184373e-3f;
  p = p * f + 5.5503324e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  const F16 power = reinterpret_cast<F16>((exponent + 127) << 23);
  const F16 result = p * power;
  return tiny ? F16{} : result;
}

KVQ_HD float exp2_1(float x) { return exp2_16(splat(x))[0]; }

// Cephes-style tanh through exp2 of a non-positive argument.
KVQ_HD F16 tanh16(F16 x) {
  const F16 magnitude = x < 0.0f ? -x : x;
  const F16 e = exp2_16(magnitude * -2.885390082f);  // exp(-2|x|)
  const F16 t = (1.0f - e) / (1.0f + e);
  return x < 0.0f ? -t : t;
}

}  // namespace
}  // namespace kvq
