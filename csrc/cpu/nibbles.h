// 4-bit codes two to a byte, multiplied as they lie. A byte b holds code c of one number and c' of
// another: with signed bytes x, y and z, x * b + y * c' + z * 16c is (x + 16z) * c + (16x + y) *
// c', and any two integers of 12 bits are such an x + 16z and 16x + y. So three products serve two
// numbers where limbs of their own (limbs.h) take four, and their sums are one: 0.88 to 0.91 of the
// time of int4 from L2 on Zen 4. fp16 operands, as on GPUs, have 11 bits of each number; a single
// limb has 8.
#pragma once

#include "vnni.h"

// The bytes take all eight bits, so codes have to be unsigned.
#if defined(KVQ_VNNI) && !defined(__aarch64__)
#define KVQ_NIBBLES 1

namespace kvq {
namespace {

// Words of the integers in the low halves of two vectors of eights, or of two halves of eights, as
// dot products of nibbles take them: lanes of those for low nibbles, as many lanes for high ones;
// in a lane two eights take turns.
KVQ_HD Ints take_turns(Ints a, Ints b) {
#if defined(__AVX512VNNI__)
  struct Order {
    alignas(64) int16_t at[32];
    constexpr Order() : at() {
      for (int i = 0; i < 32; ++i) {
        const int lane = i / 8, eight = lane % 2 * 2 + i % 2;
        at[i] = static_cast<int16_t>(2 * (eight * 8 + lane / 2 * 4 + i % 8 / 2));
      }
    }
  };
  static constexpr Order kOrder;
  return reinterpret_cast<Ints>(_mm512_permutex2var_epi16(
      reinterpret_cast<Native>(a), _mm512_load_si512(kOrder.at), reinterpret_cast<Native>(b)));
#else
  return low_halves(a, b);
#endif
}
// The lanes for low nibbles, or for high ones, of a, then of b.
template <bool kHigh>
KVQ_HD Halves lanes_of(Ints a, Ints b) {
  const Native x = reinterpret_cast<Native>(a), y = reinterpret_cast<Native>(b);
#if defined(__AVX512VNNI__)
  return reinterpret_cast<Halves>(_mm512_shuffle_i64x2(x, y, kHigh ? 0xEE : 0x44));
#else
  return reinterpret_cast<Halves>(_mm256_permute2x128_si256(x, y, kHigh ? 0x31 : 0x20));
#endif
}

// sum += the words, neighbours together.
KVQ_HD void add_words(Ints& sum, Halves x) {
#if defined(__AVX512VNNI__)
  asm("vpdpwssd %2, %1, %0"
      : "+v"(sum)
      : "v"(x), "v"(reinterpret_cast<Ints>(_mm512_set1_epi16(1))));
#else
  sum +=
      reinterpret_cast<Ints>(_mm256_madd_epi16(reinterpret_cast<Native>(x), _mm256_set1_epi16(1)));
#endif
}

struct Nibbles {
  static constexpr float kMost = 1919.0f;  // of an integer: x, y and z stay within a byte then
  static constexpr float kMiddle = 7.5f;   // of the codes
  static constexpr int kWord = 8;          // codes of a channel or token in one word
  static constexpr int kOperands = 3;      // of a line, each against four bytes of a row's
  static constexpr int kOffset = 0;

  // A row's numbers for a line: four x and four z, and four y. Of q [row/4][dim/8][row%4] sixteen
  // bytes. Of weights, of two rows: [row%2][token/8] x and z, then [token/8][row%2] y.
  static constexpr int kBeside = 2;  // the operand of y
  static constexpr int kQueryRow = 16, kQueryOperand = 4, kQueryLine = kPassRows * kQueryRow;
  static constexpr int kWeightOperand = 4, kWeightLine = 8;
  static constexpr int kWeights = kTile;  // bytes of x and z of a row, or of y of two
  template <bool kY>
  static KVQ_HD long weight_row(int row) {
    return row / 2 * (3 * kWeights) + (kY ? 2 * kWeights + row % 2 * 4 : row % 2 * kWeights);
  }

  // Rows' sums over a pass: one, or where that is too few to keep multipliers busy, one an operand.
  template <int R>
  struct Sums {
    static constexpr int kChains = R < 3 ? kOperands : 1;
    Ints sum[R][vectors(R)][kChains];

    KVQ_HD void start(int r, int v, int32_t at) {
      for (int i = 0; i < kChains; ++i) sum[r][v][i] = Ints{} + (i == 0 ? at : 0);
    }
    KVQ_HD Floats total(int r, int v) const {
      Ints all = sum[r][v][0];
      for (int i = 1; i < kChains; ++i) all += sum[r][v][i];
      return convert<Floats>(all);
    }
    KVQ_HD Ints& first(int r) { return sum[r][0][0]; }
  };

  template <int P>
  static KVQ_HD Ints operand(Ints line) {
    if constexpr (P == 0) return line;
    if constexpr (P == 1) return (line << 4) & static_cast<int>(0xF0F0F0F0u);
    return (line >> 4) & 0x0F0F0F0F;
  }

  // One operand of a pass's lines against R rows. `at`: the first row's numbers for it; `next(r)`
  // bytes further on are row r's.
  template <int P, int R, class Next>
  static KVQ_HD void multiply(Sums<R>& sums, const Ints (&line)[vectors(R)], const int8_t* at,
                              const Next& next) {
    Ints codes[vectors(R)];
    unroll<vectors(R)>([&](auto v) KVQ_UNROLLED { codes[v] = operand<P>(line[v]); });
    unroll<R>([&](auto r) KVQ_UNROLLED {
      const Ints numbers = broadcast(at + next(r));
      unroll<vectors(R)>([&](auto v) KVQ_UNROLLED {
        add_dots(sums.sum[r][v][P % Sums<R>::kChains], codes[v], numbers);
      });
    });
  }

  // Numbers `low` of low nibbles and `high` of high ones: their x and z as bytes of words, and y as
  // the low ones.
  struct Bytes {
    Ints xz;
    Halves y;
  };
  static KVQ_HD Bytes bytes_of(Halves low, Halves sixteen_low, Halves high) {
    const Halves y = high - sixteen_low;  // 16x + y less 16 times x + 16z: y - 256z
    const Halves z = 127 - y;             // in the high bytes
    const Halves x = low - ((z >> 4) & 0xFFF0);
    return {zip_bytes(x, z), y};
  }

  // Bytes by fours: x of an eight, its z, those of the next; or y of two rows.
  static KVQ_HD Ints by_fours(Ints x) {
    return shuffle_bytes(x, quads(0x0C080400, 0x0D090501, 0x0E0A0602, 0x0F0B0703));
  }
  static KVQ_HD Ints by_fours(Halves y, Halves second) {
    return by_fours(zip_bytes(y, second << 8));
  }

  // Four vectors of numbers in order, as integers in their low halves; adds them to `total`.
  static KVQ_HD Bytes bytes_of(const Ints (&v)[4], Ints& total) {
    const Ints a = take_turns(v[0], v[1]), b = take_turns(v[2], v[3]);
    const Halves low = lanes_of<false>(a, b), high = lanes_of<true>(a, b);
    add_words(total, low + high);
    return bytes_of(low, low << 4, high);
  }

  static KVQ_HD Ints rounded(Floats x, Floats factor) {
    return reinterpret_cast<Ints>(fma(x, factor, Floats{} + kRounds));
  }

  // As of TwoLimbs.
  static KVQ_HD uint32_t save_query(int8_t* out, long d, const float* q, float factor) {
    Ints total{};
    for (long first = 0; first < d; first += kVector) {
      alignas(64) int8_t xz[kVector], y[kVector];
      Ints v[4];
      unroll<4>([&](auto i) KVQ_UNROLLED {
        const long at = first + i * kVectorLanes;
        v[i] = rounded(at < d ? load<Floats>(q + at) : Floats{}, Floats{} + factor);
      });
      const Bytes bytes = bytes_of(v, total);
      save(xz, by_fours(bytes.xz));
      save(y, by_fours(bytes.y, Halves{}));
      for (long i = 0; i < kVector && first + i < d; i += kWord) {
        int8_t* to = out + (first + i) / kWord * kQueryLine;
        memcpy(to, xz + i, 8);
        memcpy(to + 8, y + i, 4);
      }
    }
    return total_of(reinterpret_cast<Words>(total));
  }

  template <int N>
  static KVQ_HD void save_weights(int8_t* all, int row, const F16 (&w)[N][kGroups],
                                  const Floats (&factor)[2], Words (&total)[2]) {
    unroll<kTile / kVector>([&](auto part) KVQ_UNROLLED {
      Halves y[2] = {};
      unroll<N>([&](auto r) KVQ_UNROLLED {
        Ints v[4];
        unroll<4>([&](auto i) KVQ_UNROLLED {
          constexpr int at = part * 4 + i;
          v[i] = rounded(vector_of(w[r][at / kPerLine], at % kPerLine), factor[r]);
        });
        Ints sum = reinterpret_cast<Ints>(total[r]);
        const Bytes bytes = bytes_of(v, sum);
        total[r] = reinterpret_cast<Words>(sum);
        save(all + weight_row<false>(row + r) + part * kVector, by_fours(bytes.xz));
        y[r] = bytes.y;
      });
      save(all + weight_row<true>(row) + part * kVector, by_fours(y[0], y[1]));
    });
  }
};

}  // namespace
}  // namespace kvq
#endif
