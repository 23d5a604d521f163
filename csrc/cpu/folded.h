// A row of q as words of 16 bits, and what its products with a group's scales become: the numbers
// that a step of a loop over K's codes multiplies.
#pragma once

#include "limbs.h"
#include "nibbles.h"
#include "sealed.h"

#if defined(KVQ_VNNI)

namespace kvq {
namespace {

// Two limbs for every channel: [row][limb][d]. Of kVector channels the words are those at even
// places, then those at odd ones.
template <Code C>
struct FoldedLimbs {
  using Step = KeyStep<C>;
  template <int R>
  using Sums = typename TwoLimbs<C>::template Sums<R>;
  static constexpr float kOne = 32767.0f;  // the largest scale, as a word
  static constexpr float kMiddle = 0.0f;
  static constexpr int kOperands = Step::kChannels / 4;
  static constexpr int kStepBytes = Step::kChannels;
  static constexpr int place(int i, bool second) { return 2 * i + second; }

  // Words of channels [i, i + kVector) of two parts.
  static KVQ_HD void save_rows(const Shorts (&a)[2], const Shorts (&b)[2], int8_t* const (&row)[2],
                               long i, long n, Ints (& /*total*/)[2]) {
    unroll<2>([&](auto part) KVQ_UNROLLED {
      const Halves x = cast<Halves>(a[part]), y = cast<Halves>(b[part]);
      // The low byte is a signed limb; 128 more carries into the high one.
      save(row[part] + i, zip_bytes((x + 128) >> 8, y + 128));
      save(row[part] + n + i, zip_bytes(x, y << 8));
    });
  }
  // Of a part's first row, whose numbers are at `own`; those of the parts' first one at `first`.
  static KVQ_HD const int8_t* beside(const int8_t* own, const int8_t* /*first*/, int /*part*/,
                                     long n) {
    return own + n;
  }

  template <int P, int R, int kVectors, class Next>
  static KVQ_HD void multiply(Sums<R>& sums, const Ints (&line)[kVectors][Step::kLines],
                              const int8_t* q, const int8_t* beside, const Next& next) {
    Ints codes[kVectors];
    unroll<kVectors>([&](auto v) KVQ_UNROLLED { codes[v] = Step::template operand<P>(line[v]); });
    constexpr int kAt = P / 2 * 8;
    TwoLimbs<C>::multiply_codes(
        sums, codes, [&](auto r) KVQ_UNROLLED { return word<P % 2>(q + kAt + next(r)); },
        [&](auto r) KVQ_UNROLLED { return word<P % 2>(beside + kAt + next(r)); });
  }
};

#if defined(KVQ_NIBBLES)
// nibbles.h's bytes: [row][d/8][x, z] of each part, [row][d/8][part] y of two in the first one's.
struct FoldedNibbles {
  using Step = KeyStep<Code::kInt4>;
  template <int R>
  using Sums = Nibbles::Sums<R>;
  // The largest scale, as a word: products with words of q are Nibbles' integers.
  static constexpr float kOne = 1926.0f;
  static_assert(kLimbMax * kOne / 32768.0f + 0.5f < Nibbles::kMost + 1.0f, "x, y, z are bytes");
  static constexpr float kMiddle = Nibbles::kMiddle;
  static constexpr int kOperands = Nibbles::kOperands;
  static constexpr int kStepBytes = 8;
  // Two eights of channels take turns.
  static constexpr int place(int i, bool second) {
    return (i / 8 * 2 + i % 2) * 8 + (second ? 4 : 0) + i % 8 / 2;
  }

  static KVQ_HD void save_rows(const Shorts (&a)[2], const Shorts (&b)[2], int8_t* const (&row)[2],
                               long i, long n, Ints (&total)[2]) {
    Halves y[2];
    unroll<2>([&](auto part) KVQ_UNROLLED {
      const Halves low = cast<Halves>(a[part]), high = cast<Halves>(b[part]);
      add_words(total[part], low + high);
      const Nibbles::Bytes bytes = Nibbles::bytes_of(low, low << 4, high);
      save(row[part] + i, Nibbles::by_fours(bytes.xz));
      y[part] = bytes.y;
    });
    save(row[0] + n + i, Nibbles::by_fours(y[0], y[1]));
  }
  static KVQ_HD const int8_t* beside(const int8_t* /*own*/, const int8_t* first, int part, long n) {
    return first + n + part * 4;
  }

  template <int P, int R, int kVectors, class Next>
  static KVQ_HD void multiply(Sums<R>& sums, const Ints (&line)[kVectors][1], const int8_t* q,
                              const int8_t* beside, const Next& next) {
    Ints lines[kVectors];
    unroll<kVectors>([&](auto v) KVQ_UNROLLED { lines[v] = line[v][0]; });
    Nibbles::multiply<P>(sums, lines, P == 2 ? beside : q + P * 4, next);
  }
};
#endif

}  // namespace
}  // namespace kvq
#endif  // KVQ_VNNI
