// Sealing: 32 tokens of the recent cache, int8 rows, become few bits of the sealed one. The bytes
// are those of kvq_plugin/sealed.py on every ISA.
//
// Channels lie in the lanes. V's words of four tokens are so already; K's words of four channels
// are turned round on the way in and out.
#pragma once

#include "group_scales.h"
#include "quantize.h"
#include "seal_lines.h"
#include "transpose.h"

namespace kvq {
namespace {

// Scales up to this, and no NaN: values need neither clamping nor a look for NaNs.
constexpr float kPlainScale = 511.0f;
static_assert(128.0f * kPlainScale < kHalfMax, "int8 values must be within fp16");

template <Code C>
KVQ_HD U16 group_code(F16 x, F16 inverse, F16 base) {
  return Codec<C>::template encode<F16, U16, true>((x - base) * inverse);
}

// A value of an int8 row. kCareful: it may be beyond fp16, which counts as fp16's largest, or NaN,
// which counts as 0 and is kept in `poison`.
template <bool kCareful>
KVQ_HD F16 int8_value(U16 code, float scale, F16& poison) {
  F16 x = convert<F16>(cast<I16>(code) - 128) * scale;
  if constexpr (kCareful) {
    poison = select(x == x, poison, splat(__builtin_nanf("")));
    x = select(x == x, x, F16{});
    x = Order<F16>::lesser(Order<F16>::greater(x, F16{} - kHalfMax), F16{} + kHalfMax);
  }
  return x;
}

// One group of one kv head on its way: the int8 rows' scales, and K's codes, a token's 64 channels
// side by side: [token / 16][channel / 64][token % 16][channel % 64].
struct SealBatch {
  alignas(64) uint8_t key[kSealed * kMaxHead];
  alignas(64) U16 lines[2 * kMaxHead / 4];  // of sixteen tokens each: words of four channels' codes
  alignas(64) float key_scale[kSealed], value_scale[kSealed];

  static KVQ_HD long at(long token, long channel, long d) {
    const long blocks = (d + 63) / 64;
    return ((token / kLanes * blocks + channel / 64) * kLanes + token % kLanes) * 64 + channel % 64;
  }
};

template <int kFormat>
struct Sealer {
  static constexpr Stream kKey = kFormats[kFormat].key, kValue = kFormats[kFormat].value;
  static constexpr bool kKeyLite = kKey.grouping == Grouping::kChannelLite;
  static constexpr bool kValueLite = kValue.grouping == Grouping::kTokenLite;

  const PageLayout layout, recent;  // of the two pages
  const long d;
  SealBatch& b;

  // The group that starts at token `within` of `page`, from token `from` on of the recent page.
  // kStream: past the caches, where the page's lines are the memory's.
  template <bool kStream>
  void seal(const uint8_t* rows, long from, uint8_t* page, long within) const {
    memcpy(b.key_scale, rows + recent.key_metadata + from * 4, sizeof b.key_scale);
    memcpy(b.value_scale, rows + recent.value_metadata + from * 4, sizeof b.value_scale);
    bool plain = true;
    for (int t = 0; t < kSealed; ++t) {
      plain &= b.key_scale[t] <= kPlainScale && b.key_scale[t] >= -kPlainScale;
      plain &= b.value_scale[t] <= kPlainScale && b.value_scale[t] >= -kPlainScale;
    }
    const uint8_t* values = rows + recent.value_codes + from * d;
    const uint8_t* keys = rows + recent.key_codes + from * d;
    if (within == 0) keep_first(keys, values, page + layout.first);
    if (!plain) {
      seal_key<true>(keys, page, within);
      seal_value<true>(values, page, within);
      return;
    }
#if defined(__AVX512BW__)
    seal_key_lines<kKey.code, kKeyLite, kStream>(keys, d, b.key_scale, within == 0,
                                                 key_words(page, within), b.lines);
    write_key<kStream>(page, within);
    seal_value_lines<kValue.code, kValueLite, kStream>(
        values, d, b.value_scale, value_words(page, within), value_lines(page, within));
#else
    seal_key<false>(keys, page, within);
    seal_value<false>(values, page, within);
#endif
  }

 private:
  // Where a group's go in a page.
  uint8_t* key_words(uint8_t* page, long within) const {
    return page + layout.key_metadata + within * kKey.metadata_bytes(d);
  }
  uint8_t* value_words(uint8_t* page, long within) const {
    return page + layout.value_metadata + within * kValue.metadata_bytes(d);
  }
  uint8_t* value_lines(uint8_t* page, long within) const {
    return page + layout.value_codes + within * d * code_bits(kValue.code) / 8;
  }

  // K's lines of sixteen tokens, [channel / 4][token], become rows. Head sizes that are no multiple
  // of 64 read lines of what follows K in the page, to no use.
  void load_key(const uint8_t* lines) const {
    for (long t = 0; t < kSealed; t += kLanes, lines += kLanes * d) {
      for (long c = 0; c < d; c += 64) {
        transpose<false>(reinterpret_cast<const uint32_t*>(lines + c * 16), kLanes, kLanes,
                         b.key + b.at(t, c, d));
      }
    }
  }

  void keep_first(const uint8_t* keys, const uint8_t* values, uint8_t* first) const {
    for (long c = 0; c < d; c += 4) memcpy(first + c, keys + c * kLanes, 4);
    for (long c = 0; c < d; c += kLanes) {
      save_bytes(first + d + c, load<U16>(values + c * 4) & 0xFFu);
    }
    memcpy(first + 2 * d, b.key_scale, 4);
    memcpy(first + 2 * d + 4, b.value_scale, 4);
  }

  template <bool kCareful>
  KVQ_HD F16 key_value(int t, long c, F16& poison) const {
    return int8_value<kCareful>(words_of(b.key + b.at(t, c, d)), b.key_scale[t], poison);
  }

  // A channel's scale is that of its 32 tokens; a page's first row has no say in it.
  template <bool kCareful>
  void seal_key(const uint8_t* keys, uint8_t* page, long within) const {
    load_key(keys);
    const int heard = within == 0 ? 1 : 0;
    uint8_t* words = key_words(page, within);
    for (long c = 0; c < d; c += kLanes) {
      F16 poison{}, unheard{};
      F16 low = key_value<kCareful>(heard, c, poison), high = low;
      for (int t = heard + 1; t < kSealed; ++t) {
        const F16 x = key_value<kCareful>(t, c, poison);
        low = min16(low, x);
        high = max16(high, x);
      }
      const GroupScales s = group_scales<kKey.code, kKeyLite>(low, high, poison);
      if constexpr (kKeyLite) {
        save_shorts(words + c * 2, s.word);
      } else {
        save(words + c * 4, s.word);
      }
      for (int t = 0; t < kSealed; ++t) {
        const F16 x = key_value<kCareful>(t, c, unheard);
        save_bytes(b.key + b.at(t, c, d), group_code<kKey.code>(x, s.inverse, s.base));
      }
    }
    for (long t = 0; t < kSealed; t += kLanes) {
      for (long c = 0; c < d; c += 64) {
        transpose<false>(reinterpret_cast<const uint32_t*>(b.key + b.at(t, c, d)), kLanes, kLanes,
                         reinterpret_cast<uint8_t*>(b.lines + (t / kLanes * d + c) / 4));
      }
    }
    write_key<false>(page, within);
  }

  template <bool kStream>
  void write_key(uint8_t* page, long within) const {
    constexpr int kBits = code_bits(kKey.code), kLowBits = kBits == 3 ? 2 : kBits;
    uint8_t* out = page + layout.key_codes + within * d * kBits / 8;
    for (const U16* from = b.lines; from < b.lines + d / 2; from += d / 4) {
      write_plane<kLowBits, 0, kStream>(from, out);
      if constexpr (kBits == 3) write_plane<1, 2, kStream>(from, out + kLanes * d * 2 / 8);
      out += kLanes * d * kBits / 8;
    }
  }

  // Bits [kLow, kLow + kBits) of sixteen tokens' codes.
  template <int kBits, int kLow, bool kStream>
  void write_plane(const U16* from, uint8_t* out) const {
    constexpr int kOperands = 8 / kBits;
    constexpr uint32_t kMask = ((1u << kBits) - 1u) * 0x01010101u;
    for (long i = 0; i < d * kBits / 32; ++i, from += kOperands, out += 64) {
      U16 word{};
      for (int j = 0; j < kOperands; ++j) word |= ((from[j] >> kLow) & kMask) << (kBits * j);
      put16<kStream>(out, word);
    }
  }

  template <bool kCareful>
  KVQ_HD F16 value_value(const uint8_t* values, int t, long c, F16& poison) const {
    const U16 line = load<U16>(values + t / 4 * d * 4 + c * 4);
    return int8_value<kCareful>((line >> (t % 4 * 8)) & 0xFFu, b.value_scale[t], poison);
  }

  // A token's scale is that of the row, or of 32 channels of it.
  template <bool kCareful>
  void seal_value(const uint8_t* values, uint8_t* page, long within) const {
    const long unit = kValueLite ? kSealed : d;
    uint8_t* const words = value_words(page, within);
    uint8_t* const lines = value_lines(page, within);
    constexpr int kWord = 32 / code_bits(kValue.code);
    for (long begin = 0; begin < d; begin += unit) {
      alignas(64) float inverse[kSealed], base[kSealed];
      for (int t = 0; t < kSealed; t += kLanes) {
        alignas(64) float low[kLanes], high[kLanes], poison[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          F16 bad{}, least = value_value<kCareful>(values, t + i, begin, bad), most = least;
          for (long c = begin + kLanes; c < begin + unit; c += kLanes) {
            const F16 x = value_value<kCareful>(values, t + i, c, bad);
            least = min16(least, x);
            most = max16(most, x);
          }
          low[i] = -peak16(F16{} - least)[0];
          high[i] = peak16(most)[0];
          poison[i] = kCareful ? reduce_add(bad) : 0.0f;
        }
        const GroupScales s =
            group_scales<kValue.code, kValueLite>(load16(low), load16(high), load16(poison));
        save16(inverse + t, s.inverse);
        save16(base + t, s.base);
        if constexpr (kValueLite) {
          save_shorts(words + (begin + t) * 2, s.word);
        } else {
          save(words + t * 4, s.word);
        }
      }
      F16 unheard{};
      for (int first = 0; first < kSealed; first += kWord) {
        for (long c = begin; c < begin + unit; c += kLanes) {
          U16 word{};
          for (int t = 0; t < kWord; ++t) {
            const F16 x = value_value<kCareful>(values, first + t, c, unheard);
            const U16 code =
                group_code<kValue.code>(x, F16{} + inverse[first + t], splat(base[first + t]));
            word |= code << field_shift<kValue.code>(t);
          }
          save(lines + (first / kWord * d + c) * 4, word);
        }
      }
    }
  }
};

}  // namespace
}  // namespace kvq
