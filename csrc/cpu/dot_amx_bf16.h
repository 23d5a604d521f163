// bf16 dot products on Intel AMX, for 8-bit floats: sixteen query rows by sixteen columns by 32
// channels (or tokens) at a time. Codes are decoded as dot_bf16.h does it, to where tiles are
// loaded from: for up to sixteen rows piece by piece, beside the products of the piece before, so
// that the caches hold little else than codes (whole, they took 1.2x the time); for more rows,
// which read them again, K of 64 tokens or V of 64 channels at once.
//
// TDPBF16PS adds in another order than VDPBF16PS, and a row's bits must not depend on how many rows
// are processed with it. Up to four rows, whose tiles would be mostly empty, take FMA in the order
// of the tiles (dot_amx_few.h), which here is faster than VDPBF16PS too.
#pragma once

#include "amx_tiles.h"
#include "dot_amx_few.h"

#if defined(KVQ_AMX)

namespace kvq {
namespace {

// Operands of products, as tiles: [row/16][step of 32][limb].
constexpr int kBf16Step = kTileRowBytes / 2;
constexpr int kLimbTiles = 2 * kTileBytes;

struct AmxBf16Weights {
  static constexpr int kSteps = kTile / kBf16Step;
  alignas(64) uint8_t tiles[kMaxRows / kTileRows * kSteps * kLimbTiles];
  FewRows<kTile> few;
  bool single;  // low limbs are not looked at
};

KVQ_HD void fit_output(AmxBf16Weights& s, Activation type, bool scaled) {
  Bf16Weights same;
  fit_output(same, type, scaled);
  s.single = same.single;
}

template <Code C>
struct AmxBf16Dot {
  static constexpr bool kPairs = false;
  static constexpr int kWord = 4, kLineBytes = 2 * 64;  // a decoded line of codes
  static constexpr int kStepLines = kBf16Step / kWord, kSteps = kMaxHead / kBf16Step;

  struct Query {
    alignas(64) uint8_t tiles[kMaxRows / kTileRows * kSteps * kLimbTiles];
    FewRows<kMaxHead> few;
    float step[kMaxRows];
    float sum[kMaxRows];  // affine codes only; no 8-bit float is
    bool exact[kMaxRows];
  };
  using Weights = AmxBf16Weights;
  struct Tiles {
    // K of 64 tokens, or V of 64 channels.
    alignas(64) uint8_t decoded[kMaxHead * 64 * 2 + kTileBytes];
    alignas(64) float sums[4 * kTileRows * kLanes];  // [row][columns]
  };

  // High limbs of sixteen values, then low ones, each in the order of decoded codes.
  static KVQ_HD void save_limbs(__m512i limbs, uint8_t* high) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(high), _mm512_castsi512_si256(limbs));
    _mm256_store_si256(reinterpret_cast<__m256i*>(high + kTileBytes),
                       _mm512_extracti64x4_epi64(limbs, 1));
  }

  // Where a row's sixteen values from `at` on belong.
  static KVQ_HD uint8_t* place(uint8_t* tiles, int steps, int row, long at) {
    return tiles + (row / kTileRows * steps + at / kBf16Step) * kLimbTiles +
           row % kTileRows * kTileRowBytes + at % kBf16Step * 2;
  }

  static void set_query(Query& s, int row, long d, const float* q, float uniform) {
    const int steps = static_cast<int>((d + kBf16Step - 1) / kBf16Step);
    __mmask16 inexact = 0;
    for (long i = 0; i < d; i += kLanes) {
      const __m512i limbs = apart(bf16_limbs(without_traces(load16(q + i)), inexact));
      save_limbs(limbs, place(s.tiles, steps, row, i));
      s.few.set(row, i, limbs);
    }
    if (d % kBf16Step != 0) save_limbs(_mm512_setzero_si512(), place(s.tiles, steps, row, d));
    s.exact[row] = inexact == 0;
    s.step[row] = uniform;
    s.sum[row] = 0.0f;
  }

  static KVQ_HD void zero_sums() {
    AmxTiles::zero<0>();
    AmxTiles::zero<1>();
    AmxTiles::zero<2>();
    AmxTiles::zero<3>();
  }

  // One tile of rows, one step, times four tiles of columns. Four sums at a time, because each
  // product of a sum waits 52 cycles for the last one.
  template <bool kSingle>
  static KVQ_HD void multiply_four(const uint8_t* rows, const uint8_t* columns) {
    AmxTiles::load<4>(rows, kTileRowBytes);
    if constexpr (!kSingle) AmxTiles::load<5>(rows + kTileBytes, kTileRowBytes);
    AmxTiles::load<6>(columns, kTileRowBytes);
    AmxTiles::dpbf16ps<0, 4, 6>();
    AmxTiles::load<7>(columns + kTileBytes, kTileRowBytes);
    AmxTiles::dpbf16ps<1, 4, 7>();
    if constexpr (!kSingle) {
      AmxTiles::dpbf16ps<0, 5, 6>();
      AmxTiles::dpbf16ps<1, 5, 7>();
    }
    AmxTiles::load<6>(columns + 2 * kTileBytes, kTileRowBytes);
    AmxTiles::dpbf16ps<2, 4, 6>();
    AmxTiles::load<7>(columns + 3 * kTileBytes, kTileRowBytes);
    AmxTiles::dpbf16ps<3, 4, 7>();
    if constexpr (!kSingle) {
      AmxTiles::dpbf16ps<2, 5, 6>();
      AmxTiles::dpbf16ps<3, 5, 7>();
    }
  }

  // Up to sixteen rows: `rounds` times four columns, each of `steps` pieces, which decode(round,
  // step, to) decodes; save(round) stores the sums.
  template <bool kSingle, class Decode, class Save>
  static KVQ_HD void multiply_pieces(const uint8_t* rows, long rounds, long steps, uint8_t* decoded,
                                     const Decode& decode, const Save& save) {
    constexpr long kPiece = 4 * kTileBytes;
    const long pieces = rounds * steps;
    decode(0, 0, decoded);
    for (long n = 0, round = 0, step = 0; n < pieces; ++n) {
      const long at = step++;
      const bool last = step == steps;
      if (n + 1 < pieces) {
        decode(last ? round + 1 : round, last ? 0 : step, decoded + (n + 1) % 2 * kPiece);
      }
      if (at == 0) zero_sums();
      multiply_four<kSingle>(rows + at * kLimbTiles, decoded + n % 2 * kPiece);
      if (!last) continue;
      save(round++);
      step = 0;
    }
  }

  // Two tiles of rows, the second `apart` further on, times two of columns.
  template <bool kSingle>
  static KVQ_HD void multiply_pairs(const uint8_t* rows, long apart, long steps,
                                    const uint8_t* left, const uint8_t* right) {
    zero_sums();
    for (long i = 0; i < steps; ++i) {
      AmxTiles::load<6>(left + i * kTileBytes, kTileRowBytes);
      AmxTiles::load<7>(right + i * kTileBytes, kTileRowBytes);
      unroll<kSingle ? 1 : 2>([&](auto limb) KVQ_UNROLLED {
        const uint8_t* at = rows + i * kLimbTiles + limb * kTileBytes;
        AmxTiles::load<4>(at, kTileRowBytes);
        AmxTiles::dpbf16ps<0, 4, 6>();
        AmxTiles::dpbf16ps<1, 4, 7>();
        AmxTiles::load<5>(at + apart, kTileRowBytes);
        AmxTiles::dpbf16ps<2, 5, 6>();
        AmxTiles::dpbf16ps<3, 5, 7>();
      });
    }
  }

  // The sums: rows of `row_floats`, columns of tiles side by side.
  template <bool kBoth>
  static KVQ_HD void save_sums(float* to, long row_floats) {
    const long row_bytes = row_floats * 4;
    float* third = kBoth ? to + kTileRows * row_floats : to + 2 * kLanes;
    AmxTiles::store<0>(to, row_bytes);
    AmxTiles::store<1>(to + kLanes, row_bytes);
    AmxTiles::store<2>(third, row_bytes);
    AmxTiles::store<3>(third + kLanes, row_bytes);
  }

  static KVQ_HD void decode_line(const Bf16Decoder<C>& decode, __m512i codes, uint8_t* to) {
    __m512bh even, odd;
    decode(codes, even, odd);
    save_pair(to, even, odd);
  }

  // One step of K of four groups from `group` on, each `apart` from the last; one that is half full
  // is filled up with zeros.
  static KVQ_HD void decode_key(const Bf16Decoder<C>& decode, const Tile& tile, long d, int group,
                                long step, uint8_t* to, long apart) {
    const long first = step * kStepLines, lines = d / kWord - first;
    for (long w = 0; w < kStepLines; ++w) {
      unroll<4>([&](auto g) KVQ_UNROLLED {
        uint8_t* at = to + g * apart + w * kLineBytes;
        if (w >= lines) {
          memset(at, 0, kLineBytes);
          return;
        }
        prefetch(tile.next.key[group + g] + (first + w) * 64);
        decode_line(decode, _mm512_loadu_si512(tile.now.key[group + g] + (first + w) * 64), at);
      });
    }
  }

  template <bool kExact>
  static void score_rows(const Query& s, Tiles& tiles, const Tile& tile, int rows, long d,
                         float* scores) {
    const long steps = (d + kBf16Step - 1) / kBf16Step;
    const Bf16Decoder<C> decode;
    if (rows <= kTileRows) {
      const auto piece = [&](long round, long step, uint8_t* to) KVQ_UNROLLED {
        decode_key(decode, tile, d, static_cast<int>(4 * round), step, to, kTileBytes);
      };
      const auto save = [&](long round)
                            KVQ_UNROLLED { save_sums<false>(scores + 4 * kLanes * round, kTile); };
      return multiply_pieces<kExact>(s.tiles, kGroups / 4, steps, tiles.decoded, piece, save);
    }
    const long apart = steps * kTileBytes;
    for (int group = 0; group < kGroups; group += 4) {
      for (long i = 0; i < steps; ++i) {
        decode_key(decode, tile, d, group, i, tiles.decoded + i * kTileBytes, apart);
      }
      for (int row = 0; row < rows; row += 2 * kTileRows) {
        const uint8_t* from = s.tiles + row / kTileRows * steps * kLimbTiles;
        for (int g = 0; g < 4; g += 2) {
          const uint8_t* left = tiles.decoded + g * apart;
          multiply_pairs<kExact>(from, steps * kLimbTiles, steps, left, left + apart);
          save_sums<true>(scores + row * kTile + (group + g) * kLanes, kTile);
        }
      }
    }
  }

  static void score(const Query& s, Tiles& tiles, const Tile& tile, int rows, long d,
                    float* scores) {
    // A zero low limb adds exact zeros, so a row's result does not depend on its neighbours.
    bool exact = true;
    for (int r = 0; r < rows; ++r) exact &= s.exact[r];
    if (rows <= kPassRows) {
      return for_each_pass(rows, [&](auto n, int) KVQ_UNROLLED {
        exact ? score_few<C, n, true>(s.few, tile, d, s.step, scores)
              : score_few<C, n, false>(s.few, tile, d, s.step, scores);
      });
    }
    exact ? score_rows<true>(s, tiles, tile, rows, d, scores)
          : score_rows<false>(s, tiles, tile, rows, d, scores);
    for (int r = 0; r < rows; ++r) {
      for (int g = 0; g < kGroups; ++g) {
        float* at = scores + r * kTile + g * kLanes;
        save16(at, load16(at) * s.step[r]);
      }
    }
  }

  template <int N, bool kScaled>
  static KVQ_HD void set_weights(Weights& s, int row, const F16 (&w)[N][kGroups], F16 (&unit)[N],
                                 F16* /*bias*/) {
    __mmask16 unused = 0;
    unroll<N>([&](auto r) KVQ_UNROLLED {
      unit[r] = splat(1.0f);
      unroll<kGroups>([&](auto g) KVQ_UNROLLED {
        const __m512 x = without_traces(w[r][g]);
        const __m512i limbs = apart(s.single ? bf16_single(x) : bf16_limbs(x, unused));
        save_limbs(limbs, place(s.tiles, Weights::kSteps, row + r, g * kLanes));
        s.few.set(row + r, g * kLanes, limbs);
      });
    });
  }

  // One step of V of `columns` times sixteen channels from `dim` on, each `apart` from the last.
  // Stale codes may be NaN, and 0 * NaN is not 0: cleared.
  static KVQ_HD void decode_value(const Bf16Decoder<C>& decode, const Tile& tile, long d, long dim,
                                  long columns, long step, uint8_t* to, long apart) {
    for (int w = 0; w < kStepLines; ++w) {
      const int word = static_cast<int>(step) * kStepLines + w;
      const __m512i live = Bf16Dot<C>::live_bytes(tile, word * kWord);
      const long at = (word % kWord * d + dim) * 4;
      const uint8_t *now = tile.now.value[word / kWord] + at,
                    *next = tile.next.value[word / kWord] + at;
      for (long j = 0; j < columns; ++j) {
        prefetch(next + j * 64);
        decode_line(decode, _mm512_and_si512(_mm512_loadu_si512(now + j * 64), live),
                    to + j * apart + w * kLineBytes);
      }
    }
  }

  // acc of `columns` times sixteen channels += the sums, whose rows hold kColumns times sixteen.
  template <int kColumns>
  static KVQ_HD void add(const float* sums, int rows, long d, long columns, const float* alpha,
                         const float* gamma, float* acc) {
    for (int r = 0; r < rows; ++r) {
      const F16 shrink = splat(alpha[r]), unit = splat(gamma[r]);
      for (long j = 0; j < columns; ++j) {
        float* a = acc + r * d + j * kLanes;
        save16(a, fma(load16(a), shrink, load16(sums + (kColumns * r + j) * kLanes) * unit));
      }
    }
  }

  template <bool kSingle>
  static void accumulate_rows(const Weights& s, Tiles& tiles, const Tile& tile, int rows, long d,
                              const float* alpha, const float* gamma, float* acc) {
    constexpr long kSteps = Weights::kSteps, kColumn = kSteps * kTileBytes;
    const Bf16Decoder<C> decode;
    if (rows <= kTileRows) {
      const auto columns = [&](long round) KVQ_UNROLLED {
        const long left = d / kLanes - 4 * round;
        return left < 4 ? left : 4;
      };
      const auto piece = [&](long round, long step, uint8_t* to) KVQ_UNROLLED {
        decode_value(decode, tile, d, 4 * kLanes * round, columns(round), step, to, kTileBytes);
      };
      const auto save = [&](long round) KVQ_UNROLLED {
        save_sums<false>(tiles.sums, 4 * kLanes);
        add<4>(tiles.sums, rows, d, columns(round), alpha, gamma, acc + 4 * kLanes * round);
      };
      const long rounds = (d / kLanes + 3) / 4;
      return multiply_pieces<kSingle>(s.tiles, rounds, kSteps, tiles.decoded, piece, save);
    }
    for (long dim = 0; dim < d; dim += 4 * kLanes) {
      const long left = (d - dim) / kLanes, columns = left < 4 ? left : 4;
      for (long i = 0; i < kSteps; ++i) {
        decode_value(decode, tile, d, dim, columns, i, tiles.decoded + i * kTileBytes, kColumn);
      }
      for (int row = 0; row < rows; row += 2 * kTileRows) {
        const int count = rows - row < 2 * kTileRows ? rows - row : 2 * kTileRows;
        const uint8_t* from = s.tiles + row / kTileRows * (kSteps * kLimbTiles);
        for (long j = 0; j < columns; j += 2) {
          // The last sixteen channels twice where d is an odd number of them.
          const long pair = j + 1 < columns ? 2 : 1;
          const uint8_t* codes = tiles.decoded + j * kColumn;
          multiply_pairs<kSingle>(from, kSteps * kLimbTiles, kSteps, codes,
                                  codes + (pair - 1) * kColumn);
          save_sums<true>(tiles.sums, 2 * kLanes);
          add<2>(tiles.sums, count, d, pair, alpha + row, gamma + row,
                 acc + row * d + dim + j * kLanes);
        }
      }
    }
  }

  static void accumulate(const Weights& s, Tiles& tiles, const Tile& tile, int rows, long d,
                         const float* alpha, const float* gamma, float* acc) {
    if (rows <= kPassRows) {
      return for_each_pass(rows, [&](auto n, int) KVQ_UNROLLED {
        s.single ? accumulate_few<C, n, true>(s.few, tile, d, alpha, gamma, acc)
                 : accumulate_few<C, n, false>(s.few, tile, d, alpha, gamma, acc);
      });
    }
    s.single ? accumulate_rows<true>(s, tiles, tile, rows, d, alpha, gamma, acc)
             : accumulate_rows<false>(s, tiles, tile, rows, d, alpha, gamma, acc);
  }
};

template <Code C>
constexpr int kFewestTileRows<AmxBf16Dot<C>> = kPassRows + 1;

}  // namespace
}  // namespace kvq
#endif  // KVQ_AMX
