// Quantize on write: new K and V rows become page bytes. Compiled once per ISA, without
// floating-point contraction (see codec.h).
#include "../codec.h"
#include "kernels.h"
#include "load.h"

namespace kvq {
namespace {

constexpr uint32_t kInfBits = 0x7F800000u;
constexpr float kAmaxFloor = 0x1p-100f;
constexpr float kHalfMax = 65504.0f;
constexpr float kFloatMax = 0x1.fffffep127f;

// Replace NaN by 0 and infinities by the largest finite value. Returns whether a NaN was seen.
bool sanitize(float* x, long n, float limit) {
  uint32_t worst = 0;
  for (long i = 0; i < n; ++i) {
    const uint32_t a = float_bits(x[i]) & 0x7FFFFFFFu;
    worst = a > worst ? a : worst;
  }
  if (worst <= float_bits(limit)) return false;
  for (long i = 0; i < n; ++i) {
    float v = x[i] == x[i] ? x[i] : 0.0f;
    v = v < -limit ? -limit : v;
    x[i] = v > limit ? limit : v;
  }
  return worst > kInfBits;
}

template <Code C>
void encode_row(const float* y, long n, uint8_t* codes) {
  for (long i = 0; i < n; ++i) codes[i] = Codec<C>::encode(y[i]);
}

// One row of D values -> D codes and, for per-token streams, its metadata word.
template <Code C, bool kPerToken>
uint32_t quantize_row(float* x, long n, const float* inverse, const float* zero, uint8_t* codes) {
  if constexpr (!kPerToken) {
    if (zero == nullptr) {
      for (long i = 0; i < n; ++i) x[i] *= inverse[i];
    } else {
      // Round before adding the zero point, so that it does not move ties.
      constexpr float kLimit = 4 * Codec<C>::kMax;
      for (long i = 0; i < n; ++i) {
        x[i] = static_cast<float>(round_clamped(x[i] * inverse[i], -kLimit, kLimit)) + zero[i];
      }
    }
    encode_row<C>(x, n, codes);
    return 0;
  } else if constexpr (C == Code::kInt4) {
    const bool poison = sanitize(x, n, kHalfMax);
    float low = x[0], high = x[0];
    for (long i = 1; i < n; ++i) {
      low = x[i] < low ? x[i] : low;
      high = x[i] > high ? x[i] : high;
    }
    low += 0.0f;  // -0 would depend on the order of the reduction
    high += 0.0f;
    const uint16_t scale = float_to_half((high - low) * (1.0f / Codec<C>::kMax));
    const uint16_t minimum = float_to_half(low);
    const float wide = half_to_float(scale), base = half_to_float(minimum);
    const float inverse_scale = wide > 0.0f ? 1.0f / wide : 0.0f;
    for (long i = 0; i < n; ++i) x[i] = (x[i] - base) * inverse_scale;
    encode_row<C>(x, n, codes);
    return poison ? 0x7E007E00u : scale | static_cast<uint32_t>(minimum) << 16;
  } else {
    const bool poison = sanitize(x, n, kFloatMax);
    uint32_t amax_bits = 0;
    for (long i = 0; i < n; ++i) {
      const uint32_t a = float_bits(x[i]) & 0x7FFFFFFFu;
      amax_bits = a > amax_bits ? a : amax_bits;
    }
    float amax = bits_float(amax_bits);
    amax = amax < kAmaxFloor ? kAmaxFloor : amax;
    const float inverse_scale = Codec<C>::kMax / amax;
    for (long i = 0; i < n; ++i) x[i] *= inverse_scale;
    encode_row<C>(x, n, codes);
    return poison ? 0x7FC00000u : float_bits(amax * (1.0f / Codec<C>::kMax));
  }
}

// K words run over dims: 16 tokens of a group share each 64-byte line.
template <int kBits>
void write_key(uint8_t* region, long position, long head_size, const uint8_t* codes) {
  constexpr long kWord = 32 / kBits;
  const long words = head_size / kWord;
  uint8_t* out = region + (position / kLanes) * words * 64 + (position % kLanes) * 4;
  for (long w = 0; w < words; ++w) {
    uint32_t word;
    memcpy(&word, codes + w * kWord, 4);
    if constexpr (kBits == 4) {
      uint32_t high;
      memcpy(&high, codes + w * kWord + 4, 4);
      word |= high << 4;
    }
    memcpy(out + w * 64, &word, 4);
  }
}

// V words run over tokens: this token's field of 16 dims is blended into each line. Tokens of one
// word must be written by one thread.
template <int kBits>
void write_value(uint8_t* region, long position, long head_size, const uint8_t* codes) {
  constexpr long kWord = 32 / kBits;
  const long field = position % kWord;
  const int shift = static_cast<int>(8 * (field % 4) + kBits * (field / 4));
  const uint32_t keep = ~(((1u << kBits) - 1u) << shift);
  uint8_t* out = region + (position / kWord) * head_size * 4;
  for (long d = 0; d < head_size; ++d) {
    uint32_t word;
    memcpy(&word, out + d * 4, 4);
    word = (word & keep) | static_cast<uint32_t>(codes[d]) << shift;
    memcpy(out + d * 4, &word, 4);
  }
}

struct StoreTask {
  const StoreParams* params;
  PageLayout layout;
  int parts;
};

template <Code C, bool kPerToken>
uint32_t quantize_head(const Rows& rows, const StaticScale& scale, long token, long head, long d,
                       uint8_t* codes) {
  alignas(64) float x[512];
  load_row(rows, token, head, d, x);
  return quantize_row<C, kPerToken>(x, d, scale.factor + (kPerToken ? 0 : head * d),
                                    scale.zero_point ? scale.zero_point + head * d : nullptr,
                                    codes);
}

template <Code K, bool kKeyDynamic, Code V, bool kValueDynamic>
void store_part(void* context, long part) {
  const StoreTask& task = *static_cast<const StoreTask*>(context);
  const StoreParams& p = *task.params;
  const Cache& c = p.cache;
  const long d = c.head_size;
  alignas(64) uint8_t codes[512];
  for (long t = 0; t < p.num_tokens; ++t) {
    const int64_t slot = p.slots[t];
    if (slot < 0) continue;
    const long position = slot % c.block_size;
    for (long h = 0; h < c.num_kv_heads; ++h) {
      // Eight neighbours go to one part: tokens that share a word of V must not race.
      if ((slot / 8 + h) % task.parts != part) continue;
      uint8_t* page = c.data + (slot / c.block_size) * c.block_stride + h * c.head_stride;
      const uint32_t km = quantize_head<K, kKeyDynamic>(p.key, p.key_scale, t, h, d, codes);
      write_key<code_bits(K)>(page + task.layout.key_codes, position, d, codes);
      if constexpr (kKeyDynamic) memcpy(page + task.layout.key_metadata + position * 4, &km, 4);
      const uint32_t vm = quantize_head<V, kValueDynamic>(p.value, p.value_scale, t, h, d, codes);
      write_value<code_bits(V)>(page + task.layout.value_codes, position, d, codes);
      if constexpr (kValueDynamic) memcpy(page + task.layout.value_metadata + position * 4, &vm, 4);
    }
  }
}

template <int kFormat>
void store_format(StoreTask& task, const Runtime& runtime) {
  constexpr Format f = kFormats[kFormat];
  runtime.parallel_for(
      task.parts, store_part<f.key.code, f.key.per_token, f.value.code, f.value.per_token>, &task);
}

using StoreFunction = void (*)(StoreTask&, const Runtime&);

template <int... I>
StoreFunction pick(int format, IndexList<I...>) {
  static constexpr StoreFunction kTable[] = {store_format<I>...};
  return kTable[format];
}

}  // namespace

namespace KVQ_ISA {

void store(const StoreParams& p, const Runtime& runtime) {
  StoreTask task{&p, page_layout(kFormats[p.format], p.cache.head_size, p.cache.block_size), 1};
  // A decode step of a few rows costs less than waking the other threads does (~5 us).
  task.parts =
      p.num_tokens * p.cache.num_kv_heads * p.cache.head_size < 4096 ? 1 : runtime.num_threads;
  pick(p.format, FormatIndices{})(task, runtime);
}

}  // namespace KVQ_ISA
}  // namespace kvq
