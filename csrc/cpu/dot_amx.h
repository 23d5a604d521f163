// Integer dot products on Intel AMX: the limbs and codes of dot_vnni.h, sixteen query rows by
// sixteen columns by 64 bytes at a time. Sums are exact, so the results are VnniDot's bit for bit;
// items of up to four rows, which wait for memory, are left to it. A line of codes is a row of a
// tile: lines that lie evenly are multiplied where they lie, others are copied first.
#pragma once

#include "amx_tiles.h"
#include "dot_vnni.h"

#if defined(KVQ_AMX)

namespace kvq {
namespace {

// What tiles do for every code.
struct AmxProducts {
  static constexpr int kLimbs = 2 * kTileBytes;  // a tile of high limbs, then one of low limbs

  static constexpr int kSums = 2 * kTileRows * kLanes;  // of one column tile: a limb's, the other's

  // Where sixteen rows' limbs lie: `step` bytes from one 64 numbers to the next, `stride` from row
  // to row.
  struct Limbs {
    const int8_t *high, *low;
    long step, stride;
  };

  // Sixteen rows' limbs, `steps` times 64 bytes of them, times `columns` tiles of sixteen columns,
  // into sums[column][limb][row][16]. column(j, step): where the codes of tile j lie. visit(j) runs
  // beside the products, which leave memory idle: time to prefetch.
  //
  // A product starts every 16 cycles and takes 52, and what stores a sum waits for it and holds up
  // what comes after: sums are stored two products later (at once, it took 2.4 times as long).
  // Nothing else is done meanwhile: while products run, fp32 operations start once a cycle, not
  // twice.
  template <class Column, class Visit>
  static KVQ_HD void multiply(const Limbs& rows, long steps, long columns, long stride,
                              const Column& column, int32_t* sums, const Visit& visit) {
    if (steps == 1) {
      AmxTiles::load<4>(rows.high, rows.stride);
      AmxTiles::load<5>(rows.low, rows.stride);
    }
    const auto one = [&](auto odd, long j, auto first) KVQ_UNROLLED {
      constexpr int kC = odd ? 2 : 0, kB = odd ? 7 : 6, kOther = 2 - kC;
      int32_t* before = sums + (j - 1) * kSums;
      AmxTiles::load<kB>(column(j, 0), stride);
      AmxTiles::zero<kC>();
      if (steps > 1) AmxTiles::load<4>(rows.high, rows.stride);
      AmxTiles::dpbsud<kC, 4, kB>();
      if constexpr (!first) AmxTiles::store<kOther>(before, kTileRowBytes);
      AmxTiles::zero<kC + 1>();
      if (steps > 1) AmxTiles::load<5>(rows.low, rows.stride);
      AmxTiles::dpbsud<kC + 1, 5, kB>();
      if constexpr (!first) AmxTiles::store<kOther + 1>(before + kSums / 2, kTileRowBytes);
      for (long i = 1; i < steps; ++i) {
        AmxTiles::load<kB>(column(j, i), stride);
        AmxTiles::load<4>(rows.high + i * rows.step, rows.stride);
        AmxTiles::dpbsud<kC, 4, kB>();
        AmxTiles::load<5>(rows.low + i * rows.step, rows.stride);
        AmxTiles::dpbsud<kC + 1, 5, kB>();
      }
      visit(j);
    };
    one(Int<0>{}, 0, Int<1>{});
    long j = 1;
    for (; j + 1 < columns; j += 2) {
      one(Int<1>{}, j, Int<0>{});
      one(Int<0>{}, j + 1, Int<0>{});
    }
    int32_t* last = sums + (columns - 1) * kSums;
    if (j < columns) {
      one(Int<1>{}, j, Int<0>{});
      AmxTiles::store<2>(last, kTileRowBytes);
      AmxTiles::store<3>(last + kSums / 2, kTileRowBytes);
    } else {
      AmxTiles::store<0>(last, kTileRowBytes);
      AmxTiles::store<1>(last + kSums / 2, kTileRowBytes);
    }
  }

  // Row r's sums over column tile j; `start` is what they start from.
  static KVQ_HD F16 product(const int32_t* sums, long j, int r, int32_t start) {
    const int32_t* high = sums + j * kSums + r * kLanes;
    const Words low = load<Words>(high + kSums / 2) + static_cast<uint32_t>(start);
    return VnniLimbs::combine(load<Ints>(high), reinterpret_cast<Ints>(low));
  }

  // acc of `columns` times sixteen channels += the sums.
  static KVQ_HD void add(const int32_t* sums, int rows, long d, long columns, const float* alpha,
                         const float* gamma, float* acc) {
    for (int r = 0; r < rows; ++r) {
      const F16 shrink = splat(alpha[r]), unit = splat(gamma[r]);
      for (long j = 0; j < columns; ++j) {
        float* a = acc + r * d + j * kLanes;
        save16(a, fma(load16(a), shrink, product(sums, j, r, 0) * unit));
      }
    }
  }

  // Pairs of rows, `pair` bytes apart, whose limbs alternate every four bytes: 64 numbers of each,
  // as tiles: sixteen rows' `apart` from those of the next sixteen.
  static void arrange(const int8_t* limbs, long pair, int rows, int8_t* to, long apart) {
    const __m512i first = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25,
                                            29);  // high limbs of eight times four, then low ones
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(2));
    for (int row = 0; row < rows; row += 2) {
      const int8_t* from = limbs + row / 2 * pair;
      __m512i w[4];
      for (int i = 0; i < 4; ++i) w[i] = _mm512_load_si512(from + i * 64);
      int8_t* at = to + row / kTileRows * apart + row % kTileRows * kTileRowBytes;
      for (int r = 0; r < 2; ++r, at += kTileRowBytes) {
        const __m512i x = _mm512_permutex2var_epi32(w[0], r ? second : first, w[1]);
        const __m512i y = _mm512_permutex2var_epi32(w[2], r ? second : first, w[3]);
        _mm512_store_si512(at, _mm512_shuffle_i64x2(x, y, 0x44));
        _mm512_store_si512(at + kTileBytes, _mm512_shuffle_i64x2(x, y, 0xEE));
      }
    }
  }
};

template <Code C>
struct AmxDot : VnniDot<C>, AmxProducts {
  using Base = VnniDot<C>;
  static constexpr int kWord = Base::kWord, kOperands = Base::kOperands;
  static constexpr int kSteps = kMaxHead / kTileRowBytes;

  struct Query : Base::Query {
    alignas(64) int8_t tiles[kMaxRows / kTileRows * kSteps * kLimbs];  // [row/16][dim/64] limbs
  };
  static constexpr int kTileSteps = kTile / kTileRowBytes;  // of weights
  static constexpr int kPiece = kTileRowBytes / kLanes;     // groups of tokens multiplied at once
  static constexpr long kColumns = kPiece;                  // of V multiplied at once
  struct Tiles : Base::Tiles {
    alignas(64) uint8_t codes[kMaxHead * kTile];  // lines that had to be copied
    alignas(64) int8_t weights[kMaxRows / kTileRows * kTileSteps * kLimbs];  // [row/16][step] limbs
    alignas(64) int32_t sums[kPiece * kSums];  // [column tile][limb][row][16]
  };
  using Weights = typename Base::Weights;

  static void set_query(Query& s, int row, long d, const float* q, float uniform) {
    Base::set_query(s, row, d, q, uniform);
    const int8_t* from = s.limbs + Base::query_at(row, 0);
    int8_t* to = s.tiles + row / kTileRows * (kSteps * kLimbs) + row % kTileRows * kTileRowBytes;
    for (long i = 0; i < d; i += 4) {
      int8_t* at = to + i / 64 * kLimbs + i % 64;
      memcpy(at, from + i * kPassRows * 2, 4);
      memcpy(at + kTileBytes, from + i * kPassRows * 2 + 4, 4);
    }
    // Past the last dim: zeros here, so that any codes do.
    for (long i = d; i % 64 != 0; i += 4) {
      int8_t* at = to + i / 64 * kLimbs + i % 64;
      memset(at, 0, 4);
      memset(at + kTileBytes, 0, 4);
    }
  }

  // A line of codes as the one or two rows of a tile that it makes.
  static KVQ_HD void spread(const uint8_t* line, uint8_t* to) {
    const Ints codes = load<Ints>(line);
    unroll<kOperands>([&](auto i) KVQ_UNROLLED {
      save(to + i * kTileRowBytes, Base::template operand<i>(codes));
    });
  }

  static void score(const Query& s, Tiles& tiles, const Tile& tile, int rows, long d,
                    float* scores) {
    if (rows <= kPassRows) return Base::score(s, tiles, tile, rows, d, scores);
    const long lines = d / kWord, steps = (d + 63) / 64;
    // Byte codes of 64 dims lie as tiles do.
    const long whole = kOperands == 1 ? d / 64 : 0;
    for (int g = 0; g < kGroups; ++g) {
      for (long i = whole * kTileRows; i < lines; ++i) {
        spread(tile.now.key[g] + i * 64,
               tiles.codes + g * steps * kTileBytes + i * kOperands * kTileRowBytes);
      }
    }
    for (int first = 0; first < kGroups; first += kPiece) {
      for (int row = 0; row < rows; row += kTileRows) {
        const auto column = [&](long j, long i) KVQ_UNROLLED {
          return i < whole ? tile.now.key[first + j] + i * kTileBytes
                           : tiles.codes + ((first + j) * steps + i) * kTileBytes;
        };
        const auto fetch = [&](long j) KVQ_UNROLLED {
          if (row > 0) return;
          for (long i = 0; i < lines; ++i) prefetch(tile.next.key[first + j] + i * 64);
        };
        const int8_t* from = s.tiles + row / kTileRows * (kSteps * kLimbs);
        AmxProducts::multiply({from, from + kTileBytes, kLimbs, kTileRowBytes}, steps, kPiece,
                              kTileRowBytes, column, tiles.sums, fetch);
        const int count = rows - row < kTileRows ? rows - row : kTileRows;
        for (int r = 0; r < count; ++r) {
          const int32_t start = Base::offset(s, row + r);
          float* out = scores + (row + r) * kTile + first * kLanes;
          unroll<kPiece>([&](auto j) KVQ_UNROLLED {
            save16(out + j * kLanes, product(tiles.sums, j, r, start) * s.step[row + r]);
          });
        }
      }
    }
  }

  static void accumulate(const Weights& s, Tiles& tiles, const Tile& tile, int rows, long d,
                         const float* alpha, const float* gamma, float* acc) {
    if (rows <= kPassRows) return Base::accumulate(s, tiles, tile, rows, d, alpha, gamma, acc);
    for (int i = 0; i < kTileSteps; ++i) {
      arrange(s.limbs + i * 256, kTile * 4, rows, tiles.weights + i * kLimbs, kTileSteps * kLimbs);
    }
    // Byte codes of 64 tokens in a row lie d * 4 bytes from line to line.
    bool even = kOperands == 1;
    for (int g = 0; g < kGroups; ++g) {
      even &= tile.now.value[g] ==
              tile.now.value[g / kPiece * kPiece] + g % kPiece * (kLanes / kWord) * d * 4;
    }
    if (!even) {
      for (int i = 0; i < kTile / kWord; ++i) {
        const int g = i / (kLanes / kWord), w = i % (kLanes / kWord);
        for (long j = 0; j < d / kLanes; ++j) {
          spread(tile.now.value[g] + (w * d + j * kLanes) * 4,
                 tiles.codes + j * kTileSteps * kTileBytes + i * kOperands * kTileRowBytes);
        }
      }
    }
    for (int row = 0; row < rows; row += kTileRows) {
      const int8_t* from = tiles.weights + row / kTileRows * (kTileSteps * kLimbs);
      for (long dim = 0; dim < d; dim += kColumns * kLanes) {
        const long left = (d - dim) / kLanes, columns = left < kColumns ? left : kColumns;
        const auto column = [&](long j, long i) KVQ_UNROLLED {
          const long at = dim + j * kLanes;
          return even ? tile.now.value[i * kPiece] + at * 4
                      : tiles.codes + (at / kLanes * kTileSteps + i) * kTileBytes;
        };
        const auto fetch = [&](long j) KVQ_UNROLLED {
          if (row > 0) return;
          for (int i = 0; i < kTile / kWord; ++i) {
            const uint8_t* next = tile.next.value[i / (kLanes / kWord)];
            prefetch(next + (i % (kLanes / kWord) * d + dim + j * kLanes) * 4);
          }
        };
        AmxProducts::multiply({from, from + kTileBytes, kLimbs, kTileRowBytes}, kTileSteps, columns,
                              even ? d * 4 : kTileRowBytes, column, tiles.sums, fetch);
        const int count = rows - row < kTileRows ? rows - row : kTileRows;
        AmxProducts::add(tiles.sums, count, d, columns, alpha + row, gamma + row,
                         acc + row * d + dim);
      }
    }
  }
};

template <Code C>
constexpr int kFewestTileRows<AmxDot<C>> = kPassRows + 1;

}  // namespace
}  // namespace kvq
#endif  // KVQ_AMX
