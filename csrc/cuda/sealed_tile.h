// What a warp holds of a sealed group, and the queries as it multiplies them; sealed.h says how.
#pragma once

#include "tile.h"

namespace kvq {
namespace gpu {
namespace {

constexpr float kSubnormal = 0x1p-24f;  // an integer's worth when its bits are read as a half

// Codes of 3 bits: a word of sixteen dims' two low bits, and their high bits in `high`, in the low
// half of its bytes. Pair i: dims 4 (i / 2) + i % 2 and that + 2, times 4^(i / 2).
template <class L>
KVQ_HD void int3_along(uint32_t word, uint32_t high, uint32_t (&out)[8]) {
  KVQ_UNROLL for (int i = 0; i < 8; ++i) {
    const int field = i / 2, odd = i % 2, shift = field + 2 - 8 * odd;
    const uint32_t low = (odd ? word >> 8 : word) & (0x00030003u << 2 * field);
    const uint32_t top = shift >= 0 ? high << (shift & 31) : high >> (-shift & 31);
    out[i] = L::and_or(top, 0x00040004u << 2 * field, low);
  }
}

// Codes of 2 bits, dims 4 `field` .. + 3 of two tokens: exact halves.
template <class L>
KVQ_HD void int2_across(uint32_t a, uint32_t b, int field, uint32_t (&out)[4]) {
  // 0x6400 | c << 2 f is 1024 + 4^f c; the halves are 4^-f and -1024 times that.
  const uint32_t shrink = 0x3C003C00u - 0x08000800u * field;
  const uint32_t center = 0xE400E400u - 0x08000800u * field;
  const uint32_t pairs[2] = {L::permute(a, b, 0x5410u), L::permute(a, b, 0x7632u)};
  KVQ_UNROLL for (int i = 0; i < 4; ++i) {
    const uint32_t bytes = i % 2 ? pairs[i / 2] >> 8 : pairs[i / 2];
    const uint32_t held = L::and_or(bytes, 0x00030003u << 2 * field, 0x64006400u);
    out[i] = L::fma2(held, shrink, center);
  }
}

// Two lite words: scales times `unit` (halves), and mins times `unit` and another. They are exact,
// for scales have 4 bits and the mins' steps 7, as long as the units keep them below 65504.
struct LitePair {
  uint32_t scale, minimum;
};

template <class L>
KVQ_HD LitePair lite_pair(uint32_t words, uint32_t unit, uint32_t unit_of_steps) {
  const uint32_t biased = (words >> 8 & 0x00FF00FFu) ^ 0x64806480u;  // 1024 + 128 + steps
  const uint32_t scale = L::mul2((words & 0x00FF00FFu) << 7, unit);
  return {scale, L::mul2(L::sub2(biased, 0x64806480u), L::mul2(scale, unit_of_steps))};
}
constexpr uint32_t kOnes = 0x3C003C00u, kHalves = 0x38003800u, kQuarters = 0x34003400u;
static_assert(LiteScale::kStep == 0.5f, "steps of mins are half scales");

// Bytes past the largest finite scale, 0xF7: a NaN row's.
KVQ_HD uint32_t no_scales(uint32_t words) {
  return ((words & 0x00FF00FFu) + 0x00080008u) >> 8 & 0x00010001u;
}

// Where lane t's dims of K lie: in kChunks runs of kChunk, kQuads times four dims each. The step of
// a product that multiplies four dims takes the first and the third, then the others.
template <class S>
struct KeyDims {
  static constexpr int kBits = code_bits(S::kKey.code), kLowBits = kBits == 3 ? 2 : kBits;
  static constexpr int kChunk = S::kD / 4 < 32 ? S::kD / 4 : 32;
  static constexpr int kChunks = S::kD / 4 / kChunk, kQuads = kChunk / 4;
  static constexpr int kWords = kChunk * kLowBits / 32;  // of a chunk's low bits
  static constexpr int kSteps = 8 / kLowBits;            // of a word: one for each of its fields

  static KVQ_CONSTEXPR int first(int t, int chunk) { return (4 * chunk + t) * kChunk; }
  // Products see codes of step `quad` times 2^(kLowBits (quad % kSteps)) kSubnormal; two halves of
  // the inverse of the first factor.
  static KVQ_CONSTEXPR uint32_t shrink(int quad) {
    return 0x3C003C00u - 0x04000400u * (quad % kSteps * kLowBits);
  }
};

// q as the B operand. Rows are scaled by a power of two that puts their largest element into [1,
// 2), because scales of K up to 18,432 must not overflow in the product of both; K of less than
// 2^-8 throughout would lose bits to subnormals.
template <class L, class S>
struct SealedQuery {
  using Dims = KeyDims<S>;
  uint32_t fragment[S::kN][S::kD / 16][2];

  // From the rotated rows in shared.out[0]; warp 0 also notes what the softmax needs of each.
  KVQ_HD void load(const AttendParams& p, const RowTile& r, Shared<S>& shared) {
    const int g = L::id() / 4, t = L::id() % 4;
    KVQ_UNROLL for (int n = 0; n < S::kN; ++n) {
      const int row = 8 * n + g;
      const bool real = row < r.count;
      float x[S::kD / 16][4], peak = 0.0f;
      KVQ_UNROLL for (int f = 0; f < S::kD / 16; ++f) {
        const int d = Dims::first(t, f / Dims::kQuads) + f % Dims::kQuads * 4;
        KVQ_UNROLL for (int j = 0; j < 4; ++j) {
          x[f][j] = real && d < p.cache.head_size ? shared.out[0][row][d + j] : 0.0f;
          peak = L::max(peak, x[f][j] < 0.0f ? -x[f][j] : x[f][j]);
        }
      }
      peak = reduce<L>(peak, 1, 4, [](float a, float b) { return L::max(a, b); });
      uint32_t exponent = (float_bits(peak) >> 23) & 0xFFu;
      exponent = exponent < 27u ? 27u : exponent > 227u ? 227u : exponent;
      const float shrink = bits_float((254u - exponent) << 23);
      float sum = 0.0f;
      KVQ_UNROLL for (int f = 0; f < S::kD / 16; ++f) {
        KVQ_UNROLL for (int j = 0; j < 2; ++j) {
          const uint32_t pair = L::pack_halves(x[f][j] * shrink, x[f][j + 2] * shrink);
          fragment[n][f][j] = pair;
          sum += L::widen(pair & 0xFFFFu) + L::widen(pair >> 16);
        }
      }
      sum = reduce<L>(sum, 1, 4, [](float a, float b) { return a + b; });
      if (L::warp() == 0 && t == 0) note(p, r, row, exponent, sum, shared);
    }
  }

 private:
  static KVQ_HD void note(const AttendParams& p, const RowTile& r, int row, uint32_t exponent,
                          float sum, Shared<S>& shared) {
    const bool real = row < r.count;
    const int query = real ? r.query(row) : r.query(0), position = r.length - r.queries + query;
    const Span seen = visible(p, r.length, r.queries, query);
    const int sealed = static_cast<int>(sealed_before(position));
    const float unit = bits_float(exponent << 23) / kSubnormal;
    shared.factor[row] = p.scale * rotation_gain(p.cache.head_size) * kLog2e * unit;
    shared.bias[row] = -128.0f * kSubnormal * sum;
    shared.slope[row] =
        real && p.alibi_slopes != nullptr ? p.alibi_slopes[r.head(row)] * kLog2e : 0.0f;
    shared.position[row] = position;
    shared.span[row] = {max_of(seen.begin, sealed), seen.end};
    shared.sealed.seals[row] = {max_of(seen.begin, 1), min_of(seen.end, sealed)};
    shared.sealed.firsts[row] = {seen.begin, min_of(min_of(seen.end, sealed), 1)};
  }
};

// Where a page's regions begin, in half the registers of PageLayout.
struct Places {
  int value_codes, key_metadata, value_metadata, first;

  explicit KVQ_HD Places(const PageLayout& at)
      : value_codes(static_cast<int>(at.value_codes)),
        key_metadata(static_cast<int>(at.key_metadata)),
        value_metadata(static_cast<int>(at.value_metadata)),
        first(static_cast<int>(at.first)) {}
};

// A group's bytes, in registers.
template <class L, class S>
struct SealedTile {
  using Dims = KeyDims<S>;
  static constexpr bool kLite = S::kKey.grouping == Grouping::kChannelLite;
  static constexpr bool kGrouped = S::kValue.grouping == Grouping::kTokenLite;
  static constexpr int kValueBits = code_bits(S::kValue.code);
  // Of one token; of codes of 2 bits and heads up to 64, half a word is another lane's.
  static constexpr int kShare = S::kD / 8 * kValueBits / 8, kValueWords = (kShare + 3) / 4;
  // Scales of K: four channels at a time, and how many such quads are a lane's to read.
  static constexpr int kQuads = S::kD / 4, kMine = (kQuads + kWarp - 1) / kWarp;

  uint32_t key[4][Dims::kChunks][Dims::kWords], high[4][Dims::kChunks];
  uint32_t value[8][kValueWords];
  uint32_t scales[kMine][kLite ? 2 : 4];
  uint32_t token_words[kGrouped ? 2 : 4];  // of V, of the tokens whose scores this lane holds
  uint32_t group_words[4];                 // of V, lite, of the tokens whose values it holds
  int block;                               // of the tile to be loaded next

  KVQ_HD void look_up(const AttendParams& p, const int32_t* table, int token, bool any) {
    block = any ? L::load_index(table + static_cast<uint32_t>(token) / p.cache.block_size) : 0;
  }
  KVQ_HD const uint8_t* page(const AttendParams& p, int kv_head) const {
    return p.cache.data + block * p.cache.block_stride + kv_head * p.cache.head_stride;
  }

  KVQ_HD void load_key(const AttendParams& p, const Places& at, int kv_head, int token) {
    const int d = p.cache.head_size, g = L::id() / 4, t = L::id() % 4;
    const int position = static_cast<uint32_t>(token) % p.cache.block_size;
    const uint8_t* from = page(p, kv_head);
    const int row = d * Dims::kBits / 8;
    const uint8_t* codes = from + (position + 4 * g) * row;
    KVQ_UNROLL for (int i = 0; i < 4; ++i, codes += row) {
      KVQ_UNROLL for (int c = 0; c < Dims::kChunks; ++c) {
        const int first = Dims::first(t, c);
        KVQ_UNROLL for (int w = 0; w < Dims::kWords; ++w) key[i][c][w] = 0;
        high[i][c] = 0;
        if (first >= d) continue;
        L::load(codes + first * Dims::kLowBits / 8, key[i][c]);
        if constexpr (Dims::kBits == 3) {
          uint32_t word[1];
          L::load(codes + d * Dims::kLowBits / 8 + first / 32 * 4, word);
          high[i][c] = word[0] >> (first % 32 / 4);  // of half a word, where a lane has 16 dims
        }
      }
    }
    const uint8_t* words = from + at.key_metadata + position * bytes_of(S::kKey, d);
    KVQ_UNROLL for (int i = 0; i < kMine; ++i) {
      const int quad = i * kWarp + L::id();
      KVQ_UNROLL for (uint32_t& word : scales[i]) word = 0;
      if (4 * quad < d) L::load(words + quad * sizeof(scales[i]), scales[i]);
    }
    // V's words of the first group of channels tell whether a token is NaN.
    words = from + at.value_metadata + position * bytes_of(S::kValue, d);
    L::load(words + g * sizeof(token_words), token_words);
  }

  KVQ_HD void load_value(const AttendParams& p, const Places& at, int kv_head, int token) {
    const int d = p.cache.head_size, g = L::id() / 4, t = L::id() % 4;
    const int position = static_cast<uint32_t>(token) % p.cache.block_size;
    const uint8_t* from = page(p, kv_head);
    const int row = d * kValueBits / 8, first = g * (S::kD / 8);
    const uint8_t* codes = from + at.value_codes + (position + 8 * t) * row;
    KVQ_UNROLL for (int i = 0; i < 8; ++i, codes += row) {
      KVQ_UNROLL for (int w = 0; w < kValueWords; ++w) value[i][w] = 0;
      if (first >= d) continue;
      L::load(codes + first * kValueBits / 8 / 4 * 4, value[i]);
      if constexpr (kShare < 4) value[i][0] >>= g % 2 * 4;
    }
    if constexpr (kGrouped) {
      KVQ_UNROLL for (uint32_t& word : group_words) word = 0;
      const uint8_t* words = from + at.value_metadata + position * bytes_of(S::kValue, d);
      if (first < d) L::load(words + first / 32 * 64 + t * 16, group_words);
    }
  }

  // The group's scales to all lanes of the warp: of a quad, two pairs of halves in the order of a
  // step's dims, then their mins.
  KVQ_HD void publish(Shared<S>& shared) const {
    L::sync_warp();  // the last tile's were read
    KVQ_UNROLL for (int i = 0; i < kMine; ++i) {
      const int quad = i * kWarp + L::id();
      if (quad >= kQuads) continue;
      KeyScales s;
      KVQ_UNROLL for (int j = 0; j < 2; ++j) {
        const uint32_t select = j ? 0x7632u : 0x5410u;
        if constexpr (kLite) {
          const LitePair pair =
              lite_pair<L>(L::permute(scales[i][0], scales[i][1], select), kOnes, kQuarters);
          s.scale[j] = pair.scale;
          s.minimum[j] = pair.minimum;
        } else {
          s.scale[j] = L::permute(scales[i][j], scales[i][j + 2], 0x5410u);
          s.minimum[j] = L::permute(scales[i][j], scales[i][j + 2], 0x7632u);
        }
        s.scale[j] = L::mul2(s.scale[j], Dims::shrink(quad));
      }
      shared.sealed.scales[L::warp()][quad] = s;
    }
    L::sync_warp();
  }
};

}  // namespace
}  // namespace gpu
}  // namespace kvq
