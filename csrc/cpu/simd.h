// Sixteen fp32 lanes in GCC's vector extension: one source for every ISA (one zmm, two ymm or
// four xmm registers), and the base-2 exponential the softmax needs.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../codec.h"

namespace kvq {
namespace {

typedef float F16 __attribute__((vector_size(64)));
typedef int32_t I16 __attribute__((vector_size(64)));
typedef uint32_t U16 __attribute__((vector_size(64)));

// a * b + c. Sums of products are fused by name, never by the compiler (-ffp-contract=off): it
// would choose differently in each instantiation, and a row's bits depend on its neighbours.
#if defined(__AVX512F__)
KVQ_HD F16 fma(F16 a, F16 b, F16 c) {
  return reinterpret_cast<F16>(_mm512_fmadd_ps(
      reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
}
#elif defined(__FMA__)
KVQ_HD F16 fma(F16 a, F16 b, F16 c) {
  __m256 x[2], y[2], z[2];
  memcpy(x, &a, 64);
  memcpy(y, &b, 64);
  memcpy(z, &c, 64);
  for (int i = 0; i < 2; ++i) z[i] = _mm256_fmadd_ps(x[i], y[i], z[i]);
  memcpy(&c, z, 64);
  return c;
}
#else
KVQ_HD F16 fma(F16 a, F16 b, F16 c) { return a * b + c; }
#endif

// Four rows' numbers, one a lane.
typedef float F4 __attribute__((vector_size(16)));
typedef int32_t I4 __attribute__((vector_size(16)));

KVQ_HD F4 load4(const void* p) {
  F4 v;
  memcpy(&v, p, 16);
  return v;
}

KVQ_HD void save4(void* p, F4 v) { memcpy(p, &v, 16); }

KVQ_HD F4 fma(F4 a, F4 b, F4 c) {
#if defined(__FMA__)
  return reinterpret_cast<F4>(_mm_fmadd_ps(reinterpret_cast<__m128>(a), reinterpret_cast<__m128>(b),
                                           reinterpret_cast<__m128>(c)));
#else
  return a * b + c;
#endif
}

KVQ_HD F16 load16(const void* p) {
  F16 v;
  memcpy(&v, p, 64);
  return v;
}

KVQ_HD void save16(void* p, F16 v) { memcpy(p, &v, 64); }

KVQ_HD F16 splat(float x) { return F16{} + x; }

// The larger of two, lane by lane; where either is NaN, b.
KVQ_HD F16 max16(F16 a, F16 b) {
#if defined(__AVX512F__)
  return reinterpret_cast<F16>(
      _mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#else
  return b < a ? a : b;
#endif
}

KVQ_HD F16 min16(F16 a, F16 b) {
#if defined(__AVX512F__)
  return reinterpret_cast<F16>(
      _mm512_min_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#else
  return a < b ? a : b;
#endif
}

// The largest of sixteen integers.
KVQ_HD int32_t largest(I16 v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epi32(reinterpret_cast<__m512i>(v));
#else
  int32_t m = v[0];
  for (int i = 1; i < 16; ++i) m = v[i] > m ? v[i] : m;
  return m;
#endif
}

#if defined(__AVX512F__)
// The largest lane, in all lanes: a trip through a scalar register costs ten cycles more.
KVQ_HD F16 peak16(F16 x) {
  __m512 v = reinterpret_cast<__m512>(x);
  v = _mm512_max_ps(v, _mm512_shuffle_f32x4(v, v, 0x4E));
  v = _mm512_max_ps(v, _mm512_shuffle_f32x4(v, v, 0xB1));
  v = _mm512_max_ps(v, _mm512_permute_ps(v, 0x4E));
  v = _mm512_max_ps(v, _mm512_permute_ps(v, 0xB1));
  return reinterpret_cast<F16>(v);
}

KVQ_HD float reduce_add(F16 v) { return _mm512_reduce_add_ps(reinterpret_cast<__m512>(v)); }
#else
KVQ_HD F16 peak16(F16 v) {
  float m = v[0];
  for (int i = 1; i < 16; ++i) m = v[i] > m ? v[i] : m;
  return splat(m);
}

KVQ_HD float reduce_add(F16 v) {
  float s[8];
  for (int i = 0; i < 8; ++i) s[i] = v[i] + v[i + 8];
  for (int i = 0; i < 4; ++i) s[i] += s[i + 4];
  return (s[0] + s[2]) + (s[1] + s[3]);
}
#endif

// The low halves of sixteen words, fp16, as fp32.
KVQ_HD F16 halves(U16 words) {
#if defined(__AVX512F__)
  const __m256i h = _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(words));
  return reinterpret_cast<F16>(_mm512_cvtph_ps(h));
#elif defined(__F16C__)
  uint16_t h[16];
  __m256 x[2];
  for (int i = 0; i < 16; ++i) h[i] = static_cast<uint16_t>(words[i]);
  for (int i = 0; i < 2; ++i) {
    x[i] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(h + i * 8)));
  }
  return load16(x);
#else
  F16 x;
  for (int i = 0; i < 16; ++i) x[i] = half_to_float(static_cast<uint16_t>(words[i]));
  return x;
#endif
}

// 2^x for x <= 0 with a relative error below 3e-7. Below -125 it stays at 2^-125; NaN stays NaN.
template <class F, class I>
KVQ_HD F exp2_bounded(F bounded) {
  const F shifted = bounded + 12582912.0f;  // 1.5 * 2^23: rounds to the nearest integer
  const F f = bounded - (shifted - 12582912.0f);
  // Minimax on [-0.5, 0.5].
  F p = fma(f, F{} + 1.3398874e-3f, F{} + 9.6184373e-3f);
  p = fma(p, f, F{} + 5.5503324e-2f);
  p = fma(p, f, F{} + 2.4022651e-1f);
  p = fma(p, f, F{} + 6.9314718e-1f);
  p = fma(p, f, F{} + 1.0f);
  // The integer sits in the low bits of `shifted`: add it to the exponent.
  return reinterpret_cast<F>(reinterpret_cast<I>(p) + (reinterpret_cast<I>(shifted) << 23));
}

KVQ_HD F16 exp2(F16 x) { return exp2_bounded<F16, I16>(max16(splat(-125.0f), x)); }
KVQ_HD F4 exp2(F4 x) { return exp2_bounded<F4, I4>(x < -125.0f ? F4{} - 125.0f : x); }

// Cephes-style tanh through exp2 of a non-positive argument.
KVQ_HD F16 tanh16(F16 x) {
  const F16 magnitude = x < 0.0f ? -x : x;
  const F16 e = exp2(magnitude * -2.885390082f);  // exp(-2|x|)
  const F16 t = (1.0f - e) / (1.0f + e);
  return x < 0.0f ? -t : t;
}

}  // namespace
}  // namespace kvq
