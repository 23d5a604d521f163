// Rows' numbers as integer dot products take them, whatever the code: two signed limbs of 8 bits.
#pragma once

#include "vnni.h"

#if defined(KVQ_VNNI)

namespace kvq {
namespace {

// What limbs are, whatever the code.
struct VnniLimbs {
  // Two rows' values times their factors, rounded, as limbs: per four lanes 4 high bytes and 4 low
  // ones of the first row, then the second's. Totals gather kRaised + the integers, modulo 2^32.
  static KVQ_HD Ints limbs(Floats a, Floats fa, Floats b, Floats fb, Words& ta, Words& tb) {
    // 1.5 * 2^23 rounds to an integer in the mantissa; 128 more makes the low limb a flipped byte.
    const Floats magic = Floats{} + (12582912.0f + 128.0f);
    const Ints x = reinterpret_cast<Ints>(fma(a, fa, magic));
    const Ints y = reinterpret_cast<Ints>(fma(b, fb, magic));
    ta += reinterpret_cast<Words>(x);
    tb += reinterpret_cast<Words>(y);
    const Ints order = quads(0x0D090501, 0x0C080400, 0x0F0B0703, 0x0E0A0602);
    const Ints flip = quads(0, 0x80808080, 0, 0x80808080);
    return shuffle_bytes(low_halves(x, y), order) ^ flip;
  }
  static constexpr int32_t kRaised = 0x4B400000 + 128;

  // Exact: |limbs| * |codes| * 512 stays below 2^31. On the way, and for NaN rows, modulo 2^32.
  static KVQ_HD Floats combine(Ints high, Ints low) {
    const Words sum = (reinterpret_cast<Words>(high) << 8) + reinterpret_cast<Words>(low);
    return convert<Floats>(reinterpret_cast<Ints>(sum));
  }
};

// Line i of n that a step's operands ask for, evenly: behind operand P's products.
template <int P, int kOperands, int kAsked, int R, class Sums, class Line>
KVQ_HD void ask(Sums& sums, const Line& line) {
  unroll<kAsked>([&](auto i) KVQ_UNROLLED {
    constexpr int kBehind = decltype(i)::value * kOperands / kAsked;
    // The first row's sums; of two lines behind one operand, the second one's are the last row's.
    constexpr int kRow = kAsked > kOperands && decltype(i)::value % 2 ? R - 1 : 0;
    if constexpr (kBehind == P) prefetch_behind(sums.first(kRow), line(i));
  });
}

// Rows' numbers as two limbs, and what they are multiplied with: a line of codes, as one operand
// for every four tokens (or channels) of a word.
template <Code C>
struct TwoLimbs : VnniLimbs {
  static constexpr float kMost = kLimbMax;
  static constexpr int kWord = 32 / code_bits(C);
  static constexpr int kOperands = kWord / 4;  // byte operands in one line
  static constexpr int kOffset = kUnsignedCodes && C == Code::kInt8 ? 128 : 0;
  static constexpr float kMiddle = 0.0f;

  // Numbers of q: [row/4][dim/4][row%4][limb][4 dims]; weights: [row/2][token/4][row%2][limb][4].
  static constexpr int kQueryRow = 8, kQueryOperand = kPassRows * 8;
  static constexpr int kQueryLine = kOperands * kQueryOperand;
  static constexpr int kWeightOperand = 16, kWeightLine = kOperands * kWeightOperand;
  static constexpr int kBeside = -1;
  template <bool>
  static KVQ_HD long weight_row(int row) {
    return row / 2 * (kTile * 4) + row % 2 * 8;
  }

  template <int P>
  static KVQ_HD Ints operand(Ints line) {
    if constexpr (kOperands == 1) {
      return kUnsignedCodes ? line : line ^ static_cast<int>(0x80808080u);
    } else {
      constexpr int kBits = code_bits(C);
      return (line >> (P * kBits)) & (0x01010101 * ((1 << kBits) - 1));
    }
  }

  // Rows' sums over the tokens, or channels, of a pass: a pair per limb.
  template <int R>
  struct Sums {
    Ints high[R][vectors(R)], low[R][vectors(R)];

    KVQ_HD void start(int r, int v, int32_t at) {
      high[r][v] = Ints{};
      low[r][v] = Ints{} + at;
    }
    KVQ_HD Floats total(int r, int v) const { return combine(high[r][v], low[r][v]); }
    KVQ_HD Ints& first(int r) { return high[r][0]; }
  };

  // One operand of a pass's lines against R rows. `at`: the first row's limbs; `next(r)` bytes
  // further on are row r's.
  template <int P, int R, class Next>
  static KVQ_HD void multiply(Sums<R>& sums, const Ints (&line)[vectors(R)], const int8_t* at,
                              const Next& next) {
    Ints codes[vectors(R)];
    unroll<vectors(R)>([&](auto v) KVQ_UNROLLED { codes[v] = operand<P>(line[v]); });
    multiply_codes(
        sums, codes, [&](auto r) KVQ_UNROLLED { return word<0>(at + next(r)); },
        [&](auto r) KVQ_UNROLLED { return word<1>(at + next(r)); });
  }

  // high(r), low(r): row r's limbs.
  template <int R, class High, class Low>
  static KVQ_HD void multiply_codes(Sums<R>& sums, const Ints (&codes)[vectors(R)],
                                    const High& high, const Low& low) {
    unroll<R>([&](auto r) KVQ_UNROLLED {
      const auto h = high(r), l = low(r);
      unroll<vectors(R)>([&](auto v) KVQ_UNROLLED { add_dots(sums.high[r][v], codes[v], h); });
      unroll<vectors(R)>([&](auto v) KVQ_UNROLLED { add_dots(sums.low[r][v], codes[v], l); });
    });
  }

  // A row of q times `factor`, rounded; returns the sum of those integers modulo 2^32.
  static KVQ_HD uint32_t save_query(int8_t* out, long d, const float* q, float factor) {
    const Floats by = Floats{} + factor, zero{};
    Words total{}, unused{};
    for (long i = 0; i < d; i += kVectorLanes) {
      alignas(kVector) int8_t pair[kVector];
      save(pair, limbs(load<Floats>(q + i), by, zero, zero, total, unused));
      for (int j = 0; j < kVectorLanes / 4; ++j) {
        memcpy(out + (i / 4 + j) * kQueryOperand, pair + j * 16, 8);
      }
    }
    return total_of(total) - static_cast<uint32_t>(kRaised) * static_cast<uint32_t>(d);
  }

  // One row's weights or two's times their factors, rounded, and the sums of those integers.
  template <int N>
  static KVQ_HD void save_weights(int8_t* all, int row, const F16 (&w)[N][kGroups],
                                  const Floats (&factor)[2], Words (&total)[2]) {
    int8_t* out = all + weight_row<false>(row);
    each_group([&](auto g) KVQ_UNROLLED {
      unroll<kPerLine>([&](auto i) KVQ_UNROLLED {
        const Floats a = vector_of(w[0][g], i), b = vector_of(w[N - 1][g], i);
        save(out + g * 64 + i * kVector, limbs(a, factor[0], b, factor[1], total[0], total[1]));
      });
    });
    const uint32_t raised = static_cast<uint32_t>(kRaised) * (kTile / kVectorLanes);
    total[0] -= raised;
    total[1] -= raised;
  }
};

}  // namespace
}  // namespace kvq
#endif  // KVQ_VNNI
