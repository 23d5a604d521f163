// Sealing: 32 tokens of the recent cache, int8 rows, become few bits of the sealed one, in the
// bytes of kvq_plugin/sealed.py. Compile with -fmad=false, as store.h.
//
// Which groups are complete, the slots on the device tell. A block looks at 32 tokens of a kv head;
// of the groups that end there each pair of warps takes its share, one K and one V. K's channels
// lie in the lanes, V's tokens do, so that each lane finds its extremes alone.
#pragma once

#include "store.h"

namespace kvq {
namespace gpu {
namespace {

constexpr uint32_t kHalfNans = 0x7E007E00u;

struct GroupScale {
  float inverse, base;
  uint32_t word;  // the page's; lite ones in the low half
};

// The extremes of a group, whose NaNs count as 0 and are noted.
struct Extremes {
  float low = kHalfMax, high = -kHalfMax;
  bool poison = false;

  KVQ_HD void hear(float x) {
    poison |= x != x;
    x = x == x ? x : 0.0f;
    low = x < low ? x : low;
    high = x > high ? x : high;
  }
};

// A value of an int8 row; what is beyond fp16 counts as fp16's largest, but a NaN stays.
KVQ_HD float int8_value(uint32_t code, float scale) {
  float x = static_cast<float>(static_cast<int32_t>(code & 0xFFu) - 128) * scale;
  x = x < -kHalfMax ? -kHalfMax : x;
  return x > kHalfMax ? kHalfMax : x;
}

template <class L, Code C, bool kLite>
KVQ_HD GroupScale group_scale(const Extremes& x) {
  const float low = x.low + 0.0f;  // whether a -0 is found would depend on the order of looking
  const float step = (x.high + 0.0f - low) * (1.0f / Codec<C>::kMax);
  if constexpr (kLite) {
    const float least = (low < 0.0f ? -low : low) * (1.0f / LiteScale::kRange);
    const uint32_t byte = LiteScale::encode<float, uint32_t>(least > step ? least : step);
    const float scale = half_to_float(static_cast<uint16_t>(byte << 7));
    const float inverse = scale > 0.0f ? L::divide(1.0f, scale) : 0.0f;
    const float wanted = low * inverse * (1.0f / LiteScale::kStep);
    const uint32_t steps = round_clamped<float, uint32_t, true>(wanted, -128.0f, 127.0f);
    const float base = static_cast<float>(static_cast<int32_t>(steps)) * (scale * LiteScale::kStep);
    return {inverse, base, x.poison ? LiteScale::kNan : byte | (steps & 0xFFu) << 8};
  } else {
    const uint32_t scale = float_to_half(step), minimum = float_to_half(low);
    const float wide = half_to_float(static_cast<uint16_t>(scale));
    return {wide > 0.0f ? L::divide(1.0f, wide) : 0.0f,
            half_to_float(static_cast<uint16_t>(minimum)),
            x.poison ? kHalfNans : scale | minimum << 16};
  }
}

template <Code C>
KVQ_HD uint32_t group_code(float x, const GroupScale& s) {
  return Codec<C>::template encode<float, uint32_t, true>(((x == x ? x : 0.0f) - s.base) *
                                                          s.inverse);
}

template <class L>
KVQ_HD uint32_t load_word(const uint8_t* from) {
  uint32_t word[1];
  L::load(from, word);
  return word[0];
}
KVQ_HD void save_word(uint8_t* to, uint32_t word) { *reinterpret_cast<uint32_t*>(to) = word; }

// Where one group of one kv head is and where it goes.
struct SealJob {
  const uint8_t *codes, *scales;  // of the group's int8 rows, of K or of V
  uint8_t* page;                  // of the sealed cache
  PageLayout at;
  int within, d;  // the group's first token in the page; the head size
};

template <class L, int kFormatRow>
struct Sealer {
  static constexpr Stream kKey = kFormats[kFormatRow].key, kValue = kFormats[kFormatRow].value;
  static constexpr bool kKeyLite = kKey.grouping == Grouping::kChannelLite;
  static constexpr bool kValueLite = kValue.grouping == Grouping::kTokenLite;

  // Bits [kLow, kLow + kBits) of the codes of one token, a lane's four in the bytes of `quad`, as
  // words of 32 / kBits channels, lanes' quads in the fields.
  template <int kBits, int kLow>
  static KVQ_HD void write_plane(uint8_t* row, uint32_t quad, int c, bool real) {
    constexpr int kLanesOfWord = 8 / kBits;
    const int field = c / 4 % kLanesOfWord;
    uint32_t word = (quad >> kLow & ((1u << kBits) - 1u) * 0x01010101u) << kBits * field;
    word = reduce<L>(word, 1, kLanesOfWord, [](uint32_t a, uint32_t b) { return a | b; });
    if (real && field == 0) save_word(row + c * kBits / 8, word);
  }

  // Four channels a lane. A page's first row has no say in its group's scales.
  static KVQ_HD void seal_key(const SealJob& job) {
    constexpr int kBits = code_bits(kKey.code), kLowBits = kBits == 3 ? 2 : kBits;
    const int heard = job.within == 0 ? 1 : 0;
    uint8_t* words = job.page + job.at.key_metadata + job.within * bytes_of(kKey, job.d);
    uint8_t* rows = job.page + job.at.key_codes + job.within * job.d * kBits / 8;
    for (int begin = 0; begin < job.d; begin += 4 * kWarp) {
      const int c = begin + 4 * L::id();
      const bool real = c < job.d;
      uint32_t raw[kSealed];
      float scale[kSealed];
      Extremes x[4];
      KVQ_UNROLL for (int t = 0; t < kSealed; ++t) {
        raw[t] = real ? load_word<L>(job.codes + t * job.d + c) : 0;
        scale[t] = bits_float(load_word<L>(job.scales + 4 * t));
        if (t < heard) continue;
        KVQ_UNROLL for (int j = 0; j < 4; ++j) x[j].hear(int8_value(raw[t] >> 8 * j, scale[t]));
      }
      GroupScale s[4];
      KVQ_UNROLL for (int j = 0; j < 4; ++j) s[j] = group_scale<L, kKey.code, kKeyLite>(x[j]);
      if (real) {
        if constexpr (kKeyLite) {
          save_word(words + 2 * c, s[0].word | s[1].word << 16);
          save_word(words + 2 * c + 4, s[2].word | s[3].word << 16);
        } else {
          KVQ_UNROLL for (int j = 0; j < 4; ++j) save_word(words + 4 * (c + j), s[j].word);
        }
        if (heard) save_word(job.page + job.at.first + c, raw[0]);
      }
      KVQ_UNROLL for (int t = 0; t < kSealed; ++t) {
        uint32_t quad = 0;
        KVQ_UNROLL for (int j = 0; j < 4; ++j) {
          quad |= group_code<kKey.code>(int8_value(raw[t] >> 8 * j, scale[t]), s[j]) << 8 * j;
        }
        uint8_t* row = rows + t * job.d * kBits / 8;
        write_plane<kLowBits, 0>(row, quad, c, real);
        if constexpr (kBits == 3) write_plane<1, 2>(row + job.d * 2 / 8, quad, c, real);
      }
    }
    if (heard && L::id() == 0) {
      save_word(job.page + job.at.first + 2 * job.d, load_word<L>(job.scales));
    }
  }

  // One token a lane, sixteen channels at a time.
  static KVQ_HD void seal_value(const SealJob& job) {
    constexpr int kBits = code_bits(kValue.code);
    const int t = L::id(), d = job.d, unit = kValueLite ? kSealed : d;
    const uint8_t* row = job.codes + t * d;
    const float scale = bits_float(load_word<L>(job.scales + 4 * t));
    uint8_t* words = job.page + job.at.value_metadata + job.within * bytes_of(kValue, d);
    uint8_t* out = job.page + job.at.value_codes + (job.within + t) * d * kBits / 8;
    if (job.within == 0) {
      uint8_t* first = job.page + job.at.first + d;
      for (int c = 4 * t; c < d; c += 4 * kWarp) save_word(first + c, load_word<L>(job.codes + c));
      if (t == 0) save_word(first + d + 4, float_bits(scale));
    }
    for (int begin = 0; begin < d; begin += unit) {
      Extremes x;
      for (int c = begin; c < begin + unit; c += 16) {
        uint32_t raw[4];
        L::load(row + c, raw);
        KVQ_UNROLL for (int i = 0; i < 16; ++i) x.hear(int8_value(raw[i / 4] >> i % 4 * 8, scale));
      }
      const GroupScale s = group_scale<L, kValue.code, kValueLite>(x);
      if constexpr (kValueLite) {
        *reinterpret_cast<uint16_t*>(words + (begin + t) * 2) = static_cast<uint16_t>(s.word);
      } else {
        save_word(words + t * 4, s.word);
      }
      for (int c = begin; c < begin + unit; c += 16) {
        uint32_t raw[4], codes[kBits / 2] = {};
        L::load(row + c, raw);
        KVQ_UNROLL for (int i = 0; i < 16; ++i) {
          constexpr int kPer = 32 / kBits;
          const uint32_t code =
              group_code<kValue.code>(int8_value(raw[i / 4] >> i % 4 * 8, scale), s);
          codes[i / kPer] |= code << (i % 4 * 8 + i % kPer / 4 * kBits);
        }
        KVQ_UNROLL for (int w = 0; w < kBits / 2; ++w)
            save_word(out + c * kBits / 8 + 4 * w, codes[w]);
      }
    }
  }
};

// The call that writes the new rows of `p` to the recent cache.
inline StoreParams recent_rows(const StoreParams& p) {
  StoreParams rows = p;
  rows.cache = p.recent;
  rows.slots = p.recent_slots;
  return rows;
}

// Blocks that share the groups ending in 32 tokens of a kv head. Many sequences may complete one in
// the same step, so there is a pair of warps for each; prompts complete one in 32 tokens.
KVQ_HD int seal_width(const StoreParams& p) { return p.num_tokens <= 32 * kWarp ? 16 : 1; }
inline unsigned seal_blocks(const StoreParams& p) {
  const int64_t chunks = (p.num_tokens + kWarp - 1) / kWarp;
  return static_cast<unsigned>(chunks * p.cache.num_kv_heads * seal_width(p));
}

template <class L, int kFormatRow>
KVQ_HD void seal_block(const StoreParams& p) {
  const int width = seal_width(p), heads = p.cache.num_kv_heads, item = L::block() / width;
  const int64_t first = static_cast<int64_t>(item / heads) * kWarp, mine = first + L::id();
  uint32_t ends = 0;
  if (mine < p.num_tokens) {
    const int64_t slot = p.slots[mine];
    const bool last = slot >= 0 && slot % kSealed == kSealed - 1 && p.recent_slots[mine] >= 0;
    ends = static_cast<uint32_t>(last) << L::id();
  }
  ends = reduce<L>(ends, 1, kWarp, [](uint32_t a, uint32_t b) { return a | b; });
  const int head = item % heads, d = p.cache.head_size;
  const bool is_value = L::warp() % 2 != 0;
  const int stride = width * kWarps / 2;
  const int turn = L::block() % width * (kWarps / 2) + L::warp() / 2;
  const PageLayout recent = page_layout(kFormats[kRecentFormat], d, p.recent.block_size);
  int nth = 0;
  for (int i = 0; i < kWarp; ++i) {
    if ((ends >> i & 1u) == 0 || nth++ % stride != turn) continue;
    const int64_t to = p.slots[first + i] - (kSealed - 1);
    const int64_t from = p.recent_slots[first + i] - (kSealed - 1);
    const uint8_t* rows = p.recent.data + from / p.recent.block_size * p.recent.block_stride +
                          head * p.recent.head_stride;
    const int64_t position = from % p.recent.block_size;
    SealJob job;
    job.codes = rows + (is_value ? recent.value_codes : recent.key_codes) + position * d;
    job.scales = rows + (is_value ? recent.value_metadata : recent.key_metadata) + 4 * position;
    job.page =
        p.cache.data + to / p.cache.block_size * p.cache.block_stride + head * p.cache.head_stride;
    job.at = page_layout(kFormats[kFormatRow], d, p.cache.block_size);
    job.within = static_cast<int>(to % p.cache.block_size);
    job.d = d;
    if (is_value) {
      Sealer<L, kFormatRow>::seal_value(job);
    } else {
      Sealer<L, kFormatRow>::seal_key(job);
    }
  }
}

}  // namespace
}  // namespace gpu
}  // namespace kvq
