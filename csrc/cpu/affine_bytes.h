// Affine codes of AVX-512's lanes, on their way to bytes.
#pragma once

#include "simd.h"

#if defined(__AVX512BW__)

namespace kvq {
namespace {

// (x - base) * inverse to the nearest integer, which int32 holds: of values within fp16, a scale is
// at least two thirds of its range over the largest code, and a base within 16 of its minimum, so
// this is below 2^29.
KVQ_HD __m512i nearest_codes(F16 x, F16 base, F16 inverse) {
  return _mm512_cvtps_epi32(cast<__m512>((x - base) * inverse));
}

// Four vectors as bytes clamped to [0, kMax]: of every four lanes, a's, b's, c's, d's.
template <int kMax>
KVQ_HD __m512i packed_bytes(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i packed = _mm512_packus_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
  return _mm512_min_epu8(packed, _mm512_set1_epi8(kMax));
}

// The same as the bytes of each lane's word.
template <int kMax>
KVQ_HD U16 clamped_bytes(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i turn = _mm512_set4_epi32(0x0F0B0703, 0x0E0A0602, 0x0D090501, 0x0C080400);
  return cast<U16>(_mm512_shuffle_epi8(packed_bytes<kMax>(a, b, c, d), turn));
}

}  // namespace
}  // namespace kvq

#endif
