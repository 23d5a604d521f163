// What vnni.h's vectors need beside operators, with AVX-512 and with AVX2.
#pragma once

namespace kvq {
namespace {

KVQ_HD Ints broadcast(const int8_t* p) {
  int32_t w;
  memcpy(&w, p, 4);
  return Ints{} + w;
}

// Word I of those at p, in every lane.
template <int I>
KVQ_HD Ints word(const int8_t* p) {
  return broadcast(p + 4 * I);
}

// acc += u8 . s8. Written as asm because gcc 12 shuffles sixteen accumulators through register
// copies when the intrinsic builds them (a quarter of the loop; seen in its disassembly).
KVQ_HD void add_dots(Ints& acc, Ints u8, Ints s8) {
#if defined(__AVX512VNNI__)
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(u8), "v"(s8));
#else
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(u8), "x"(s8));
#endif
}

// The same four words in every 16 bytes.
KVQ_HD Ints quads(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  const __m128i q = reinterpret_cast<__m128i>(U4{a, b, c, d});
#if defined(__AVX512VNNI__)
  return reinterpret_cast<Ints>(_mm512_broadcast_i32x4(q));
#else
  return reinterpret_cast<Ints>(_mm256_broadcastsi128_si256(q));
#endif
}

// The low halves of x's words, with those of y above them.
KVQ_HD Ints low_halves(Ints x, Ints y) {
  const Native a = reinterpret_cast<Native>(x);
  const Native b = reinterpret_cast<Native>(reinterpret_cast<Words>(y) << 16);
#if defined(__AVX512VNNI__)
  return reinterpret_cast<Ints>(_mm512_mask_blend_epi16(0xAAAAAAAAu, a, b));
#else
  return reinterpret_cast<Ints>(_mm256_blend_epi16(a, b, 0xAA));
#endif
}

KVQ_HD Ints shuffle_bytes(Ints x, Ints order) {
  const Native a = reinterpret_cast<Native>(x), b = reinterpret_cast<Native>(order);
#if defined(__AVX512VNNI__)
  return reinterpret_cast<Ints>(_mm512_shuffle_epi8(a, b));
#else
  return reinterpret_cast<Ints>(_mm256_shuffle_epi8(a, b));
#endif
}

// Words times fractions of 2^15, rounded.
KVQ_HD Shorts multiply_rounded(Shorts x, Shorts y) {
  const Native a = reinterpret_cast<Native>(x), b = reinterpret_cast<Native>(y);
#if defined(__AVX512VNNI__)
  return reinterpret_cast<Shorts>(_mm512_mulhrs_epi16(a, b));
#else
  return reinterpret_cast<Shorts>(_mm256_mulhrs_epi16(a, b));
#endif
}

// Bytes at even places of x, at odd ones of y.
KVQ_HD Ints zip_bytes(Halves x, Halves y) {
  const Native a = reinterpret_cast<Native>(x), b = reinterpret_cast<Native>(y);
#if defined(__AVX512VNNI__)
  return reinterpret_cast<Ints>(_mm512_mask_blend_epi8(0xAAAAAAAAAAAAAAAAu, a, b));
#else
  return reinterpret_cast<Ints>(_mm256_blendv_epi8(a, b, _mm256_set1_epi16(-256)));
#endif
}

// Modulo 2^32.
KVQ_HD uint32_t total_of(Words x) {
#if defined(__AVX512VNNI__)
  // gcc's own reduction adds signed integers, whose overflow is undefined.
  const Native v = reinterpret_cast<Native>(x);
  const U8 half = reinterpret_cast<U8>(_mm512_castsi512_si256(v)) +
                  reinterpret_cast<U8>(_mm512_extracti64x4_epi64(v, 1));
  const U4 sum = reinterpret_cast<U4>(_mm256_castsi256_si128(reinterpret_cast<__m256i>(half))) +
                 reinterpret_cast<U4>(_mm256_extracti128_si256(reinterpret_cast<__m256i>(half), 1));
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
#else
  uint32_t sum = 0;
  for (int i = 0; i < kVectorLanes; ++i) sum += x[i];
  return sum;
#endif
}

}  // namespace
}  // namespace kvq
