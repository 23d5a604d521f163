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

template <Code C>
struct AmxDot : VnniDot<C> {
  using Base = VnniDot<C>;
  static constexpr int kWord = Base::kWord, kOperands = Base::kOperands;
  static constexpr int kLimbs = 2 * kTileBytes;  // a tile of high limbs, then one of low limbs
  static constexpr int kSteps = kMaxHead / kTileRowBytes;

  struct Query : Base::Query {
    alignas(64) int8_t tiles[kMaxRows / kTileRows * kSteps * kLimbs];  // [row/16][dim/64] limbs
  };
  struct Tiles : Base::Tiles {
    alignas(64) uint8_t codes[kMaxHead * kTile];                // lines that had to be copied
    alignas(64) int8_t weights[kMaxRows / kTileRows * kLimbs];  // [row/16] limbs
    alignas(64) int32_t sums[4 * kTileRows * kLanes];           // [column tile][limb][row][16]
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

  // Sixteen rows' limbs, `steps` times 64 bytes of them, times two tiles of sixteen columns.
  // column(j, step): where the codes of tile j lie. visit(step) runs beside the products,
  // which leave memory idle: time to prefetch.
  template <class Column, class Visit>
  static KVQ_HD void multiply(const int8_t* limbs, long steps, long stride, const Column& column,
                              int32_t* sums, const Visit& visit) {
    AmxTiles::zero<0>();
    AmxTiles::zero<1>();
    AmxTiles::zero<2>();
    AmxTiles::zero<3>();
    for (long i = 0; i < steps; ++i) {
      AmxTiles::load<4>(limbs + i * kLimbs, kTileRowBytes);
      AmxTiles::load<6>(column(0, i), stride);
      AmxTiles::dpbsud<0, 4, 6>();
      AmxTiles::load<5>(limbs + i * kLimbs + kTileBytes, kTileRowBytes);
      AmxTiles::dpbsud<1, 5, 6>();
      AmxTiles::load<7>(column(1, i), stride);
      AmxTiles::dpbsud<2, 4, 7>();
      AmxTiles::dpbsud<3, 5, 7>();
      visit(i);
    }
    AmxTiles::store<0>(sums, kTileRowBytes);
    AmxTiles::store<1>(sums + 1 * kTileRows * kLanes, kTileRowBytes);
    AmxTiles::store<2>(sums + 2 * kTileRows * kLanes, kTileRowBytes);
    AmxTiles::store<3>(sums + 3 * kTileRows * kLanes, kTileRowBytes);
  }

  // Row r's sums over column tile j; `start` is what they start from.
  static KVQ_HD F16 product(const int32_t* sums, int j, int r, int32_t start) {
    const int32_t* high = sums + (2 * j * kTileRows + r) * kLanes;
    const Words low = load<Words>(high + kTileRows * kLanes) + static_cast<uint32_t>(start);
    return Base::combine(load<Ints>(high), reinterpret_cast<Ints>(low));
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
    for (int row = 0; row < rows; row += kTileRows) {
      for (int g = 0; g < kGroups; g += 2) {
        const auto column = [&](int j, long i) KVQ_UNROLLED {
          return i < whole ? tile.now.key[g + j] + i * kTileBytes
                           : tiles.codes + ((g + j) * steps + i) * kTileBytes;
        };
        const auto fetch = [&](long i) KVQ_UNROLLED {
          if (row > 0) return;
          const long end = (i + 1) * kTileRows / kOperands;
          for (long at = i * kTileRows / kOperands; at < (end < lines ? end : lines); ++at) {
            prefetch(tile.next.key[g] + at * 64);
            prefetch(tile.next.key[g + 1] + at * 64);
          }
        };
        multiply(s.tiles + row / kTileRows * (kSteps * kLimbs), steps, kTileRowBytes, column,
                 tiles.sums, fetch);
        for (int r = 0; r < kTileRows && row + r < rows; ++r) {
          const int32_t start = Base::offset(s, row + r);
          float* out = scores + (row + r) * kTile + g * kLanes;
          save16(out, product(tiles.sums, 0, r, start) * s.step[row + r]);
          save16(out + kLanes, product(tiles.sums, 1, r, start) * s.step[row + r]);
        }
      }
    }
  }

  // Pairs of rows, limbs alternating every four bytes, as tiles.
  static void arrange(const Weights& s, int rows, int8_t* to) {
    const __m512i first = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25,
                                            29);  // high limbs of eight times four, then low ones
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(2));
    for (int row = 0; row < rows; row += 2) {
      const int8_t* from = Base::weights_at(s, row, 0);
      __m512i w[4];
      for (int i = 0; i < 4; ++i) w[i] = _mm512_load_si512(from + i * 64);
      int8_t* at = to + row / kTileRows * kLimbs + row % kTileRows * kTileRowBytes;
      for (int r = 0; r < 2; ++r, at += kTileRowBytes) {
        const __m512i x = _mm512_permutex2var_epi32(w[0], r ? second : first, w[1]);
        const __m512i y = _mm512_permutex2var_epi32(w[2], r ? second : first, w[3]);
        _mm512_store_si512(at, _mm512_shuffle_i64x2(x, y, 0x44));
        _mm512_store_si512(at + kTileBytes, _mm512_shuffle_i64x2(x, y, 0xEE));
      }
    }
  }

  static void accumulate(const Weights& s, Tiles& tiles, const Tile& tile, int rows, long d,
                         const float* alpha, const float* gamma, float* acc) {
    if (rows <= kPassRows) return Base::accumulate(s, tiles, tile, rows, d, alpha, gamma, acc);
    arrange(s, rows, tiles.weights);
    // Byte codes of 64 tokens in a row lie d * 4 bytes from line to line.
    bool even = kOperands == 1;
    for (int g = 1; g < kGroups; ++g) {
      even &= tile.now.value[g] == tile.now.value[0] + g * (kLanes / kWord) * d * 4;
    }
    if (!even) {
      for (int i = 0; i < kTile / kWord; ++i) {
        const int g = i / (kLanes / kWord), w = i % (kLanes / kWord);
        for (long j = 0; j < d / kLanes; ++j) {
          spread(tile.now.value[g] + (w * d + j * kLanes) * 4,
                 tiles.codes + j * kTileBytes + i * kOperands * kTileRowBytes);
        }
      }
    }
    for (int row = 0; row < rows; row += kTileRows) {
      // The last 16 channels twice where d is an odd number of them.
      for (long dim = 0; dim < d; dim += 32) {
        const bool both = dim + kLanes < d;
        const auto column = [&](int j, long) KVQ_UNROLLED {
          const long at = dim + (both ? j * kLanes : 0);
          return even ? tile.now.value[0] + at * 4 : tiles.codes + at * kTileRowBytes;
        };
        const auto fetch = [&](long) KVQ_UNROLLED {
          if (row > 0) return;
          for (int i = 0; i < kTile / kWord; ++i) {
            const uint8_t* next = tile.next.value[i / (kLanes / kWord)];
            const long at = (i % (kLanes / kWord) * d + dim) * 4;
            prefetch(next + at);
            prefetch(next + at + (both ? 64 : 0));
          }
        };
        multiply(tiles.weights + row / kTileRows * kLimbs, 1, even ? d * 4 : kTileRowBytes, column,
                 tiles.sums, fetch);
        for (int r = 0; r < kTileRows && row + r < rows; ++r) {
          float* a = acc + (row + r) * d + dim;
          const F16 shrink = splat(alpha[row + r]), unit = splat(gamma[row + r]);
          save16(a, fma(load16(a), shrink, product(tiles.sums, 0, r, 0) * unit));
          if (!both) continue;
          a += kLanes;
          save16(a, fma(load16(a), shrink, product(tiles.sums, 1, r, 0) * unit));
        }
      }
    }
  }
};

template <Code C>
constexpr int kFewestTileRows<AmxDot<C>> = kPassRows + 1;

}  // namespace
}  // namespace kvq
#endif  // KVQ_AMX
