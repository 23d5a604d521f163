// dot_folded.h on Intel AMX: the same limbs, so the same sums. Items of up to four rows are left to
// it, as in dot_amx.h.
#pragma once

#include "dot_amx.h"
#include "dot_folded.h"

#if defined(KVQ_AMX)

namespace kvq {
namespace {

template <Code C, Grouping G>
struct AmxFoldedKey : FoldedKey<C, G> {
  using Base = FoldedKey<C, G>;
  using Step = typename Base::Step;
  using Query = typename Base::Query;
  static constexpr int kSteps = kMaxHead / kTileRowBytes;
  static_assert(Base::kFoldRows == kTileRows, "folded rows are a tile");

  struct Tiles : Base::Tiles {
    alignas(64) uint8_t codes[kGroups * kSteps * kTileBytes];  // [token/16][channel/64]
    // [part][token/16][limb][row][16]
    alignas(64) int32_t sums[Base::kFoldParts][kSealedGroups * AmxProducts::kSums];
  };

  // Codes of sixteen tokens as tiles: a row per operand.
  static KVQ_HD void spread(const uint8_t* from, const uint8_t* next, long d, uint8_t* to) {
    for (long step = 0; step < d / Step::kChannels; ++step) {
      Ints line[Step::kLines];
      unroll<Step::kLines>([&](auto i) KVQ_UNROLLED {
        const long at = Step::line(i, step, d);
        prefetch(next + at);
        line[i] = load<Ints>(from + at);
      });
      unroll<Step::kChannels / 4>([&](auto i) KVQ_UNROLLED {
        save(to, Step::template operand<decltype(i)::value>(line));
        to += kTileRowBytes;
      });
    }
  }

  static void score(const Query& s, Tiles& tiles, const Tile& tile, int rows, long d,
                    float* scores) {
    if (rows <= kPassRows) return Base::score(s, tiles, tile, rows, d, scores);
    const long n = Base::whole(d), steps = n / kTileRowBytes;
    Base::load_scales(tiles, tile, d);
    for (int g = 0; g < kGroups; ++g) {
      spread(tile.now.key[g], tile.next.key[g], d, tiles.codes + g * steps * kTileBytes);
    }
    for (int first = 0; first < Base::kParts; first += Base::kFoldParts) {
      auto* parts = tiles.part + first;
      const uint8_t* codes = tiles.codes + first * kSealedGroups * steps * kTileBytes;
      for (int row = 0; row < rows; row += kTileRows) {
        const int count = rows - row < kTileRows ? rows - row : kTileRows;
        for_each_pass(count, [&](auto n, int r) {
          Base::template fold<decltype(n)::value>(s, parts, row + r, r, d);
        });
        for (int part = 0; part < Base::kFoldParts; ++part) {
          const int8_t* limbs = parts[part].limbs;
          const auto column = [&](long j, long i) KVQ_UNROLLED {
            return codes + ((part * kSealedGroups + j) * steps + i) * kTileBytes;
          };
          AmxProducts::multiply({limbs, limbs + n, kTileRowBytes, 2 * n}, steps, kSealedGroups,
                                kTileRowBytes, column, tiles.sums[part], [](long) {});
        }
        for (int part = 0; part < Base::kFoldParts; ++part) {
          const auto& fold = parts[part];
          for (int r = 0; r < count; ++r) {
            float* out = scores + (row + r) * kTile + (first + part) * kSealed;
            const F16 unit = splat(fold.unit[r]), bias = splat(fold.bias[r]);
            unroll<kSealedGroups>([&](auto j) KVQ_UNROLLED {
              const F16 sum = AmxProducts::product(tiles.sums[part], j, r, 0);
              save16(out + j * kLanes, fma(sum, unit, bias));
            });
          }
        }
      }
    }
  }
};

template <Code C>
struct AmxFoldedValue : FoldedValue<C> {
  using Base = FoldedValue<C>;
  using Weights = typename Base::Weights;
  using Codes = TwoLimbs<C>;
  static constexpr int kSteps = kTile / kTileRowBytes;

  struct Tiles : Base::Tiles {
    alignas(64) uint8_t codes[2 * kSteps * kTileBytes];      // [channel/16][token/64]
    alignas(64) int8_t limbs[kSteps * AmxProducts::kLimbs];  // [token/64], of 16 rows
    alignas(64) int32_t sums[2 * AmxProducts::kSums];
  };

  // Codes of sixteen channels as tiles.
  static KVQ_HD void spread(const Tile& tile, long d, long dim, uint8_t* to) {
    for (int n = 0; n < kTile; n += Codes::kWord) {
      const long at = (n % kLanes / Codes::kWord * d + dim) * 4;
      prefetch(tile.next.value[n / kLanes] + at);
      const Ints line = load<Ints>(tile.now.value[n / kLanes] + at);
      unroll<Codes::kOperands>([&](auto i) KVQ_UNROLLED {
        save(to, Codes::template operand<decltype(i)::value>(line));
        to += kTileRowBytes;
      });
    }
  }

  static void accumulate(const Weights& s, Tiles& tiles, const Tile& tile, int rows, long d,
                         const float* alpha, const float* gamma, float* acc) {
    if (rows <= kPassRows) return Base::accumulate(s, tiles, tile, rows, d, alpha, gamma, acc);
    auto& fold = tiles.fold;
    for (long dim = 0; dim < d; dim += kSealed) {
      Base::load_scales(tiles, tile, dim);
      for (int j = 0; j < 2; ++j) {
        spread(tile, d, dim + j * kLanes, tiles.codes + j * kSteps * kTileBytes);
      }
      for_each_pass(rows, [&](auto n, int row) {
        fold.template fold<decltype(n)::value>(row, s.p + row * kTile, kTile, tiles.scales, kTile);
      });
      for (int row = 0; row < rows; row += kTileRows) {
        const int count = rows - row < kTileRows ? rows - row : kTileRows;
        for (int i = 0; i < kSteps; ++i) {
          AmxProducts::arrange(fold.at(row) + i * 256, fold.kPair, count,
                               tiles.limbs + i * AmxProducts::kLimbs, 0);
        }
        const auto column = [&](long j, long i) KVQ_UNROLLED {
          return tiles.codes + (j * kSteps + i) * kTileBytes;
        };
        AmxProducts::multiply(
            {tiles.limbs, tiles.limbs + kTileBytes, AmxProducts::kLimbs, kTileRowBytes}, kSteps, 2,
            kTileRowBytes, column, tiles.sums, [](long) {});
        for (int r = 0; r < count; ++r) {
          float* a = acc + (row + r) * d + dim;
          const F16 unit = splat(fold.step[row + r]), bias = splat(fold.bias[row + r]);
          const F16 shrink = splat(alpha[row + r]), worth = splat(gamma[row + r]);
          unroll<2>([&](auto j) KVQ_UNROLLED {
            const F16 sum = fma(AmxProducts::product(tiles.sums, j, r, 0), unit, bias);
            save16(a + j * kLanes, fma(load16(a + j * kLanes), shrink, sum * worth));
          });
        }
      }
    }
  }
};

template <Code C, Grouping G>
constexpr int kFewestTileRows<AmxFoldedKey<C, G>> = kPassRows + 1;
template <Code C>
constexpr int kFewestTileRows<AmxFoldedValue<C>> = kPassRows + 1;

}  // namespace
}  // namespace kvq
#endif  // KVQ_AMX
