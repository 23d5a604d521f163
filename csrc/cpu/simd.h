// Sixteen fp32 lanes: one zmm, two ymm or four xmm registers.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include <type_traits>

#include "../codec.h"

namespace kvq {
namespace {

// Two vectors, or two pairs, as one twice as wide. GCC's own vectors wider than a register compare
// and select lane by lane in scalar code (gcc 12: 17,753 instructions for AVX2's softmax of four
// masked rows, 1,574 in pairs).
template <class T>
struct Pair {
  T low, high;

  KVQ_HD auto operator[](int i) const {
    constexpr int kHalf = static_cast<int>(sizeof(T) / 4);
    return i < kHalf ? low[i] : high[i - kHalf];
  }
  KVQ_HD Pair operator-() const { return {-low, -high}; }
  template <class S>
  KVQ_HD Pair& operator+=(S x) {
    return *this = *this + x;
  }
  template <class S>
  KVQ_HD Pair& operator*=(S x) {
    return *this = *this * x;
  }
  template <class S>
  KVQ_HD Pair& operator-=(S x) {
    return *this = *this - x;
  }
  template <class S>
  KVQ_HD Pair& operator^=(S x) {
    return *this = *this ^ x;
  }
  template <class S>
  KVQ_HD Pair& operator|=(S x) {
    return *this = *this | x;
  }
};

template <class T>
KVQ_HD Pair<T> pair(T low, T high) {
  return {low, high};
}

template <class S>
using IfScalar = std::enable_if_t<std::is_arithmetic<S>::value, int>;

#define KVQ_LANEWISE(op)                           \
  template <class T>                               \
  KVQ_HD auto operator op(Pair<T> a, Pair<T> b) {  \
    return pair(a.low op b.low, a.high op b.high); \
  }                                                \
  template <class T, class S, IfScalar<S> = 0>     \
  KVQ_HD auto operator op(Pair<T> a, S b) {        \
    return pair(a.low op b, a.high op b);          \
  }                                                \
  template <class T, class S, IfScalar<S> = 0>     \
  KVQ_HD auto operator op(S a, Pair<T> b) {        \
    return pair(a op b.low, a op b.high);          \
  }
KVQ_LANEWISE(+)
KVQ_LANEWISE(-)
KVQ_LANEWISE(*)
KVQ_LANEWISE(/)
KVQ_LANEWISE(&)
KVQ_LANEWISE(|)
KVQ_LANEWISE(^)
KVQ_LANEWISE(<<)
KVQ_LANEWISE(>>)
KVQ_LANEWISE(<)
KVQ_LANEWISE(>)
KVQ_LANEWISE(>=)
KVQ_LANEWISE(==)
#undef KVQ_LANEWISE

// Four rows' numbers, one a lane.
typedef float F4 __attribute__((vector_size(16)));
typedef int32_t I4 __attribute__((vector_size(16)));
typedef uint32_t U4 __attribute__((vector_size(16)));
#if defined(__AVX2__)
typedef float F8 __attribute__((vector_size(32)));
typedef int32_t I8 __attribute__((vector_size(32)));
typedef uint32_t U8 __attribute__((vector_size(32)));
#endif
#if defined(__AVX512F__)
typedef float F16 __attribute__((vector_size(64)));
typedef int32_t I16 __attribute__((vector_size(64)));
typedef uint32_t U16 __attribute__((vector_size(64)));
#elif defined(__AVX2__)
using F16 = Pair<F8>;
using I16 = Pair<I8>;
using U16 = Pair<U8>;
#else
using F16 = Pair<Pair<F4>>;
using I16 = Pair<Pair<I4>>;
using U16 = Pair<Pair<U4>>;
#endif

// What vectors and pairs have no operators for. The pairs' versions copy no memory: a pair that is
// copied byte by byte stays on the stack.
template <class V>
struct Lanes {
  static KVQ_HD V load(const char* p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  static KVQ_HD void save(char* p, V v) { memcpy(p, &v, sizeof v); }
  template <class W>
  static KVQ_HD V cast(W w) {
    return reinterpret_cast<V>(w);
  }
  template <class W>
  static KVQ_HD V convert(W w) {
    return __builtin_convertvector(w, V);
  }
};

template <class T>
struct Lanes<Pair<T>> {
  using V = Pair<T>;
  static KVQ_HD V load(const char* p) { return {Lanes<T>::load(p), Lanes<T>::load(p + sizeof(T))}; }
  static KVQ_HD void save(char* p, V v) {
    Lanes<T>::save(p, v.low);
    Lanes<T>::save(p + sizeof(T), v.high);
  }
  template <class W>
  static KVQ_HD V cast(Pair<W> w) {
    return {Lanes<T>::cast(w.low), Lanes<T>::cast(w.high)};
  }
  template <class W>
  static KVQ_HD V convert(Pair<W> w) {
    return {Lanes<T>::convert(w.low), Lanes<T>::convert(w.high)};
  }
};

template <class V>
KVQ_HD V load(const void* p) {
  return Lanes<V>::load(static_cast<const char*>(p));
}
template <class V>
KVQ_HD void save(void* p, V v) {
  Lanes<V>::save(static_cast<char*>(p), v);
}
// The same bits.
template <class V, class W>
KVQ_HD V cast(W w) {
  return Lanes<V>::cast(w);
}
// The same numbers.
template <class V, class W>
KVQ_HD V convert(W w) {
  return Lanes<V>::convert(w);
}
// codec.h's, for pairs.
template <class M, class T>
KVQ_HD Pair<T> select(Pair<M> mask, Pair<T> a, Pair<T> b) {
  return {select(mask.low, a.low, b.low), select(mask.high, a.high, b.high)};
}
template <class V, class T>
KVQ_HD V bits_as(Pair<T> w) {
  return Lanes<V>::cast(w);
}

KVQ_HD F4 load4(const void* p) { return load<F4>(p); }
KVQ_HD void save4(void* p, F4 v) { save(p, v); }
KVQ_HD F16 load16(const void* p) { return load<F16>(p); }
KVQ_HD void save16(void* p, F16 v) { save(p, v); }

// Past the caches, to an address on a cache line; fence() before others may read.
KVQ_HD void stream16(void* p, U16 v) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(p), reinterpret_cast<__m512i>(v));
#else
  save(p, v);
#endif
}
KVQ_HD void fence() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

template <bool kStream>
KVQ_HD void put16(void* p, U16 v) {
  kStream ? stream16(p, v) : save(p, v);
}

// Not F16{} + x, which is an addition: x may be -0.
KVQ_HD F16 splat(float x) { return x - F16{}; }

// a * b + c. Sums of products are fused by name, never by the compiler (-ffp-contract=off): it
// would choose differently in each instantiation, and a row's bits depend on its neighbours.
#if defined(__FMA__)
KVQ_HD F4 fma(F4 a, F4 b, F4 c) {
  return reinterpret_cast<F4>(_mm_fmadd_ps(reinterpret_cast<__m128>(a), reinterpret_cast<__m128>(b),
                                           reinterpret_cast<__m128>(c)));
}
KVQ_HD F8 fma(F8 a, F8 b, F8 c) {
  return reinterpret_cast<F8>(_mm256_fmadd_ps(
      reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
}
#elif defined(__aarch64__)
KVQ_HD F4 fma(F4 a, F4 b, F4 c) { return vfmaq_f32(c, a, b); }
#else
KVQ_HD F4 fma(F4 a, F4 b, F4 c) { return a * b + c; }
#endif
#if defined(__AVX512F__)
KVQ_HD F16 fma(F16 a, F16 b, F16 c) {
  return reinterpret_cast<F16>(_mm512_fmadd_ps(
      reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
}
#endif
template <class T>
KVQ_HD Pair<T> fma(Pair<T> a, Pair<T> b, Pair<T> c) {
  return {fma(a.low, b.low, c.low), fma(a.high, b.high, c.high)};
}

// The larger of two, lane by lane; where either is NaN, b.
KVQ_HD F16 max16(F16 a, F16 b) {
#if defined(__AVX512F__)
  return reinterpret_cast<F16>(
      _mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#else
  return select(b < a, a, b);
#endif
}

KVQ_HD F16 min16(F16 a, F16 b) {
#if defined(__AVX512F__)
  return reinterpret_cast<F16>(
      _mm512_min_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#else
  return select(a < b, a, b);
#endif
}

#if defined(__AVX512F__)
// gcc 12 compares and blends.
template <>
struct Order<F16> {
  static KVQ_HD F16 lesser(F16 a, F16 b) { return min16(a, b); }
  static KVQ_HD F16 greater(F16 a, F16 b) { return max16(a, b); }
};
template <>
struct Order<U16> {
  static KVQ_HD U16 lesser(U16 a, U16 b) {
    return reinterpret_cast<U16>(
        _mm512_min_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
  }
};
#endif

KVQ_HD F16 abs16(F16 x) { return select(x < 0.0f, -x, x); }

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
#if defined(__AVX2__)
KVQ_HD F4 halve_max(F8 v) {
  const F4 a = reinterpret_cast<F4>(_mm256_castps256_ps128(reinterpret_cast<__m256>(v)));
  const F4 b = reinterpret_cast<F4>(_mm256_extractf128_ps(reinterpret_cast<__m256>(v), 1));
  return select(b < a, a, b);
}
#else
KVQ_HD F4 halve_max(Pair<F4> v) { return select(v.high < v.low, v.low, v.high); }
#endif

// The largest lane, in all lanes.
KVQ_HD F16 peak16(F16 x) {
  F4 v = halve_max(select(x.high < x.low, x.low, x.high));
  F4 w = __builtin_shuffle(v, I4{2, 3, 0, 1});
  v = select(w < v, v, w);
  w = __builtin_shuffle(v, I4{1, 0, 3, 2});
  v = select(w < v, v, w);
  return splat(v[0]);
}

KVQ_HD float reduce_add(F16 v) {
  const auto half = v.low + v.high;
  float s[4];
  for (int i = 0; i < 4; ++i) s[i] = half[i] + half[i + 4];
  return (s[0] + s[2]) + (s[1] + s[3]);
}
#endif

// The largest lane of each of two, in all its lanes.
KVQ_HD void peak_two(F16 (&x)[2]) {
#if defined(__AVX512F__)
  const __m512 a = reinterpret_cast<__m512>(x[0]), b = reinterpret_cast<__m512>(x[1]);
  __m512 v = _mm512_max_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  v = _mm512_max_ps(v, _mm512_shuffle_f32x4(v, v, 0x4E));
  v = _mm512_max_ps(v, _mm512_shuffle_f32x4(v, v, 0xB1));
  v = _mm512_max_ps(v, _mm512_permute_ps(v, 0x4E));
  x[0] = reinterpret_cast<F16>(_mm512_moveldup_ps(v));
  x[1] = reinterpret_cast<F16>(_mm512_movehdup_ps(v));
#else
  x[0] = peak16(x[0]);
  x[1] = peak16(x[1]);
#endif
}

// The largest lane of each of four.
KVQ_HD F4 peak_rows(const F16 (&x)[4]) {
#if defined(__AVX512F__)
  const auto pairs = [](F16 low, F16 high) {
    const __m512 a = reinterpret_cast<__m512>(low), b = reinterpret_cast<__m512>(high);
    return _mm512_castps_pd(_mm512_max_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
  };
  const __m512d ab = pairs(x[0], x[1]), cd = pairs(x[2], x[3]);
  const __m512 v = _mm512_max_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)),
                                 _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
  const __m256 half = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  return reinterpret_cast<F4>(
      _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#else
  return F4{peak16(x[0])[0], peak16(x[1])[0], peak16(x[2])[0], peak16(x[3])[0]};
#endif
}

// Whether a lane is NaN; the others are finite.
KVQ_HD bool any_nan(F16 x) {
#if defined(__AVX512F__)
  const __m512 v = reinterpret_cast<__m512>(x);
  return _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q) != 0;
#else
  return reduce_add(x) != reduce_add(x);
#endif
}

}  // namespace
}  // namespace kvq
