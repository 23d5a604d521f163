// What vnni.h's vectors need beside operators, with NEON.
#pragma once

namespace kvq {
namespace {

// Word I of two at p, which the instruction takes from there: in every lane it would cost another.
template <int I>
struct Word {
  int8x8_t pair;
};
template <int I>
KVQ_HD Word<I> word(const int8_t* p) {
  return {vld1_s8(p)};
}

// acc += s8 . s8.
template <int I>
KVQ_HD void add_dots(Ints& acc, Ints codes, Word<I> numbers) {
  acc = Ints(vdotq_lane_s32(int32x4_t(acc), int8x16_t(codes), numbers.pair, I));
}

KVQ_HD Ints quads(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return reinterpret_cast<Ints>(U4{a, b, c, d});
}

// The low halves of x's words, with those of y above them.
KVQ_HD Ints low_halves(Ints x, Ints y) { return Ints(vtrn1q_s16(int16x8_t(x), int16x8_t(y))); }

KVQ_HD Ints shuffle_bytes(Ints x, Ints order) {
  return Ints(vqtbl1q_u8(uint8x16_t(x), uint8x16_t(order)));
}

// Words times fractions of 2^15, rounded.
KVQ_HD Shorts multiply_rounded(Shorts x, Shorts y) {
  return Shorts(vqrdmulhq_s16(int16x8_t(x), int16x8_t(y)));
}

// Bytes at even places of x, at odd ones of y.
KVQ_HD Ints zip_bytes(Halves x, Halves y) {
  return Ints(vbslq_u8(vreinterpretq_u8_u16(vdupq_n_u16(0xFF)), uint8x16_t(x), uint8x16_t(y)));
}

// Modulo 2^32.
KVQ_HD uint32_t total_of(Words x) { return vaddvq_u32(uint32x4_t(x)); }

}  // namespace
}  // namespace kvq
