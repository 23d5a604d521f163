// The base-2 exponential that the softmax needs.
#pragma once

#include "simd.h"

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace kvq {
namespace {

// 2^x for x <= 0, 1 at 0, with a relative error below 3e-6, a fifth of what limbs round; NaN stays
// NaN.
#if defined(__AVX512F__)
// x less the integer below it in one operation; another scales by that integer, given x. However
// small the result: see FlushSubnormals.
KVQ_HD F16 above_integer(F16 x) {
  return reinterpret_cast<F16>(
      _mm512_reduce_ps(reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEG_INF));
}
KVQ_HD F4 above_integer(F4 x) {
  return reinterpret_cast<F4>(_mm_reduce_ps(reinterpret_cast<__m128>(x), _MM_FROUND_TO_NEG_INF));
}
KVQ_HD F16 times_integer_power(F16 p, F16 x) {
  return reinterpret_cast<F16>(
      _mm512_scalef_ps(reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(x)));
}
KVQ_HD F4 times_integer_power(F4 p, F4 x) {
  return reinterpret_cast<F4>(
      _mm_scalef_ps(reinterpret_cast<__m128>(p), reinterpret_cast<__m128>(x)));
}

template <class F>
KVQ_HD F exp2(F x) {
  const F f = above_integer(x);
  // Minimax on [0, 1], 1 at 0. The fifth power took 0.7 to 1.4 % of int4's time.
  F p = fma(F{} + 1.3426688e-2f, f, F{} + 5.224247e-2f);
  p = fma(p, f, F{} + 2.4128021e-1f);
  p = fma(p, f, F{} + 6.9304484e-1f);
  p = fma(p, f, F{} + 1.0f);
  return times_integer_power(p, x);
}
#else
// p * 2^n for integers n of [-125, 0] and p near 1, exact; NaN where p is. (Adding n to p's
// exponent made numbers of NaNs: n is garbage then.)
template <class F, class U>
KVQ_HD F times_power(F p, F n) {
  const U bits = cast<U>(n + 12582912.0f);  // 1.5 * 2^23: the integer sits in the low bits
  return p * cast<F>((bits << 23) + 0x3F800000u);
}

template <class F, class U>
KVQ_HD F exp2_bounded(F bounded) {
  const F nearest = (bounded + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23 rounds to an integer
  const F f = bounded - nearest;
  // Minimax on [-0.5, 0.5].
  F p = fma(f, F{} + 1.3398874e-3f, F{} + 9.6184373e-3f);
  p = fma(p, f, F{} + 5.5503324e-2f);
  p = fma(p, f, F{} + 2.4022651e-1f);
  p = fma(p, f, F{} + 6.9314718e-1f);
  p = fma(p, f, F{} + 1.0f);
  return times_power<F, U>(p, nearest);
}

// Below -125 it stays at 2^-125.
KVQ_HD F16 exp2(F16 x) { return exp2_bounded<F16, U16>(max16(splat(-125.0f), x)); }
KVQ_HD F4 exp2(F4 x) { return exp2_bounded<F4, U4>(x < -125.0f ? F4{} - 125.0f : x); }
#endif

// While it lives, this thread's results below 2^-126 are 0: processors take their time for them.
struct FlushSubnormals {
#if defined(__SSE__)
  const uint32_t before = _mm_getcsr();
  FlushSubnormals() { _mm_setcsr(before | 0x8000u); }
  ~FlushSubnormals() { _mm_setcsr(before); }
  FlushSubnormals(const FlushSubnormals&) = delete;
#endif
};

// Cephes-style tanh through exp2 of a non-positive argument.
KVQ_HD F16 tanh16(F16 x) {
  const F16 magnitude = abs16(x);
  const F16 e = exp2(magnitude * -2.885390082f);  // exp(-2|x|)
  const F16 t = (1.0f - e) / (1.0f + e);
  return select(x < 0.0f, -t, t);
}

}  // namespace
}  // namespace kvq
