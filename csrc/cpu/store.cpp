// Quantize on write: new K and V rows become page bytes. Compiled once per ISA, without
// floating-point contraction (see codec.h).
//
// Tokens are written in runs: neighbours in one group of sixteen slots. A whole group's K lines
// come from one transposition, and V words that a run fills are written without being read.
#include "kernels.h"
#include "quantize.h"
#include "split.h"
#include "transpose.h"

namespace kvq {
namespace {

constexpr long kStreamedTokens = 256;

struct StoreTask {
  const StoreParams* params;
  PageLayout layout;
  Split split;
  bool stream;
};

// Codes of one run, for some heads, before they are laid out. Lives on the stack of the thread that
// encodes.
struct Batch {
  static constexpr long kBytes = 32 << 10;       // stays in L1
  alignas(64) uint8_t codes[kBytes + 64];        // [head, 16 tokens, D]
  uint32_t metadata[kBytes / 256][kGroup];       // [head, token]
  alignas(64) float rotated[kLanes * kMaxHead];  // rows on their way to their codes
  static int heads(long d) {
    const long fit = kBytes / (kGroup * d);
    return static_cast<int>(fit > kBytes / 256 ? kBytes / 256 : fit);
  }
};

// K words run over channels: the sixteen tokens of a group share each line.
template <Code C, bool kStream>
KVQ_HD void write_key(uint8_t* codes, const Run& run, long d, uint8_t* out) {
  constexpr int kWord = 32 / code_bits(C);
  const long words = d / kWord;
  uint32_t* rows = reinterpret_cast<uint32_t*>(codes);
  if constexpr (kWord == 8) pack_nibbles(codes, run.count * d, rows);
  if (run.count == kGroup) {
    for (long w = 0; w < words; w += kGroup) {
      const long lines = words - w < kGroup ? words - w : kGroup;
      transpose<kStream>(rows + w, words, lines, out + w * 64);
    }
    return;
  }
  out += run.slot % kGroup * 4;
  for (int t = 0; t < run.count; ++t, out += 4, rows += words) {
    for (long w = 0; w < words; ++w) memcpy(out + w * 64, rows + w, 4);
  }
}

// V words run over tokens: what the run does not fill of them stays.
template <Code C, bool kStream>
KVQ_HD void write_value(const uint8_t* codes, const Run& run, long d, uint8_t* out) {
  constexpr int kBits = code_bits(C), kWord = 32 / kBits;
  const int first = static_cast<int>(run.slot % kGroup), last = first + run.count;
  for (int word = first / kWord; word * kWord < last; ++word) {
    const int from = first > word * kWord ? first - word * kWord : 0;
    const int to = last < (word + 1) * kWord ? last - word * kWord : kWord;
    const uint8_t* rows = codes + (word * kWord - first) * d;
    uint8_t* line = out + word * d * 4;
    if (to - from == kWord) {
      for (long i = 0; i < d; i += kLanes, line += 64) {
        const U16 filled = fields<C>(rows + i, d, 0, kWord);
        kStream ? stream16(line, filled) : save(line, filled);
      }
      continue;
    }
    uint32_t keep = ~0u;
    for (int f = from; f < to; ++f) keep &= ~(((1u << kBits) - 1u) << field_shift<C>(f));
    for (long i = 0; i < d; i += kLanes, line += 64) {
      save(line, (load<U16>(line) & keep) | fields<C>(rows + i, d, from, to));
    }
  }
}

StaticScale of_head(const StaticScale& s, long head, long d) {
  return {s.factor ? s.factor + head * d : nullptr,
          s.zero_point ? s.zero_point + head * d : nullptr};
}

template <Activation A, int kFormat>
struct Writer {
  static constexpr Stream kKey = kFormats[kFormat].key, kValue = kFormats[kFormat].value;

  const StoreTask& task;
  const StoreParams& p;
  const long d;

  uint8_t* page(const Run& run, long head) const {
    return p.cache.data + run.block * p.cache.block_stride + head * p.cache.head_stride;
  }
  // Offsets of a run's group of sixteen tokens within its page.
  long key_group(const Run& run) const {
    return task.layout.key_codes + run.position / kGroup * kGroup * d * code_bits(kKey.code) / 8;
  }
  long value_group(const Run& run) const {
    return task.layout.value_codes +
           run.position / kGroup * kGroup * d * code_bits(kValue.code) / 8;
  }

  static void fetch_lines(const uint8_t* at, long lines) {
    for (long i = 0; i < lines; ++i) __builtin_prefetch(at + i * 64, 1, 3);
  }

  // A lone token's K goes to d / 4 lines, one word each: fetched a run ahead, while this one's
  // heads are written.
  void fetch_key(const Run& run, long head) const {
    fetch_lines(page(run, head) + key_group(run), d * code_bits(kKey.code) / 32);
  }
  void fetch_value(const Run& run, long head) const {
    constexpr int kWord = 32 / code_bits(kValue.code);
    const int begin = run.position % kGroup / kWord,
              end = (run.position % kGroup + run.count - 1) / kWord + 1;
    fetch_lines(page(run, head) + value_group(run) + begin * d * 4, (end - begin) * d / kLanes);
  }

  // Rows some 8 KB ahead of those being encoded; the hardware does not follow K and V in turns
  // (4,096 tokens of 8 heads: 1.5 ms without, 1.0 with).
  void fetch_rows(const Rows& rows, long at, long heads) const {
    constexpr long kSize = A == Activation::kFloat ? 4 : 2, kAhead = 8 << 10;
    const long ahead = 1 + kAhead / (p.cache.num_kv_heads * d * kSize);
    const char* from =
        static_cast<const char*>(rows.data) + (at + ahead * rows.token_stride) * kSize;
    for (long h = 0; h < heads; ++h, from += rows.head_stride * kSize) {
      for (long i = 0; i < d * kSize; i += 64) __builtin_prefetch(from + i, 0, 3);
    }
  }

  // Codes of `tokens` tokens of the run from `first` on, heads [begin, end), at most sixteen rows
  // together.
  template <Code C, bool kPerToken, bool kRotated>
  KVQ_HD void encode_rows(Batch& b, const Rows& rows, const StaticScale& scale, const Run& run,
                          int first, int tokens, long begin, long end, long lowest) const {
    static_assert(kPerToken || !kRotated, "rotated channels have no scales in any checkpoint");
    const long start = (run.token + first) * rows.token_stride + begin * rows.head_stride;
    RowScales s;
    if constexpr (kPerToken) {
      int lane = 0;
      for (int t = 0; t < tokens; ++t) {
        long at = start + t * rows.token_stride;
        for (long h = begin; h < end; ++h, ++lane, at += rows.head_stride) {
          Extremes extremes;
          if constexpr (kRotated) {
            extremes = rotate_row<A, C>(rows.data, at, d, b.rotated + lane * d);
          } else {
            extremes = extremes_of<A, C>(rows.data, at, d);
          }
          s.peak[lane] = extremes.peak;
          if constexpr (kAffine<C>) s.low[lane] = extremes.low, s.high[lane] = extremes.high;
        }
      }
      find_scales<C>(s);
    }
    int lane = 0;
    for (int t = 0; t < tokens; ++t) {
      long at = start + t * rows.token_stride;
      if (run.count == kGroup) fetch_rows(rows, at, end - begin);
      for (long h = begin; h < end; ++h, ++lane, at += rows.head_stride) {
        uint8_t* codes = b.codes + ((h - lowest) * kGroup + first + t) * d;
        if constexpr (!kPerToken) {
          encode_values<A, C, false>(rows.data, at, d, {}, of_head(scale, h, d), codes);
          continue;
        }
        if (__builtin_expect(s.peak[lane] > float_bits(kInRangeLimit<C, kRotated>), 0)) {
          s.metadata[lane] = encode_out_of_range_row<A, C, kRotated>(rows.data, at, d, codes);
        } else if constexpr (kRotated) {
          encode_rotated<A, C>(b.rotated + lane * d, d, s[lane], codes);
        } else {
          encode_values<A, C, true>(rows.data, at, d, s[lane], {}, codes);
        }
        b.metadata[h - lowest][first + t] = s.metadata[lane];
      }
    }
  }

  // Activations are read in the order of memory, a token's heads side by side: the same rows head
  // by head, 2 KB apart, came at a sixth of the speed.
  template <Code C, bool kPerToken, bool kRotated>
  void encode(Batch& b, const Rows& rows, const StaticScale& scale, const Run& run, long begin,
              long end) const {
    const int together = end - begin < kLanes ? static_cast<int>(kLanes / (end - begin)) : 1;
    for (int t = 0; t < run.count; t += together) {
      const int tokens = run.count - t < together ? run.count - t : together;
      for (long h = begin; h < end; h += kLanes) {
        const long last = end - h < kLanes ? end : h + kLanes;
        encode_rows<C, kPerToken, kRotated>(b, rows, scale, run, t, tokens, h, last, begin);
      }
    }
  }

  template <bool kStream>
  void write(Batch& b, const Run& run, const Run* next, long begin, long end) const {
    const size_t metadata = static_cast<size_t>(run.count) * 4;
    const long position = run.position * 4;
    encode<kKey.code, kKey.per_token, kKey.rotated>(b, p.key, p.key_scale, run, begin, end);
    for (long h = begin; h < end; ++h) {
      uint8_t* to = page(run, h);
      if (next != nullptr) fetch_key(*next, h);
      write_key<kKey.code, kStream>(b.codes + (h - begin) * kGroup * d, run, d,
                                    to + key_group(run));
      if constexpr (kKey.per_token) {
        memcpy(to + task.layout.key_metadata + position, b.metadata[h - begin], metadata);
      }
    }
    encode<kValue.code, kValue.per_token, kValue.rotated>(b, p.value, p.value_scale, run, begin,
                                                          end);
    for (long h = begin; h < end; ++h) {
      uint8_t* to = page(run, h);
      if (next != nullptr) fetch_value(*next, h);
      write_value<kValue.code, kStream>(b.codes + (h - begin) * kGroup * d, run, d,
                                        to + value_group(run));
      if constexpr (kValue.per_token) {
        memcpy(to + task.layout.value_metadata + position, b.metadata[h - begin], metadata);
      }
    }
  }

  static void part(void* context, int /*worker*/, long part) {
    const StoreTask& task = *static_cast<const StoreTask*>(context);
    const StoreParams& p = *task.params;
    const Writer w{task, p, p.cache.head_size};
    Batch batch;
    const long heads = p.cache.num_kv_heads, step = Batch::heads(w.d);
    const Run* const last = task.split.runs + task.split.begin[part + 1];
    const auto streamed = [&](const Run& r) { return task.stream && r.count == kGroup; };
    for (const Run* run = task.split.runs + task.split.begin[part]; run < last; ++run) {
      const Run* ahead = run + 1 < last && !streamed(run[1]) ? run + 1 : nullptr;
      for (long h = 0; h < heads; h += step) {
        const long end = h + step < heads ? h + step : heads;
        if (streamed(*run)) {
          w.template write<true>(batch, *run, ahead, h, end);
        } else {
          w.template write<false>(batch, *run, ahead, h, end);
        }
      }
    }
    if (task.stream) fence();
  }
};

template <Activation A, int... I>
Runtime::Body pick(int format, IndexList<I...>) {
  static constexpr Runtime::Body kTable[] = {Writer<A, I>::part...};
  return kTable[format];
}

Runtime::Body pick(Activation type, int format) {
  switch (type) {
    case Activation::kBFloat16:
      return pick<Activation::kBFloat16>(format, FormatIndices{});
    case Activation::kHalf:
      return pick<Activation::kHalf>(format, FormatIndices{});
    case Activation::kFloat:
      return pick<Activation::kFloat>(format, FormatIndices{});
  }
  __builtin_unreachable();
}

}  // namespace

namespace KVQ_ISA {

void store(const StoreParams& p, const Runtime& runtime) {
  // A decode step of a few rows costs less than waking the other threads does (~5 us). Threads
  // take parts as they get free; four each even them out.
  const bool alone = p.num_tokens * p.cache.num_kv_heads * p.cache.head_size < 4096;
  const int parts = alone || runtime.num_threads == 1 ? 1 : runtime.num_threads * 4;
  void* memory = runtime.memory.reserve(split_bytes(p.num_tokens, parts));
  const PageLayout layout = page_layout(kFormats[p.format], p.cache.head_size, p.cache.block_size);
  // A long prompt's pages do not fit the caches anyway; lines written whole need not be read.
  const long place = static_cast<long>(reinterpret_cast<uintptr_t>(p.cache.data)) |
                     p.cache.block_stride | p.cache.head_stride;
  StoreTask task{&p, layout, split(p.slots, p.num_tokens, p.cache.block_size, parts, memory),
                 p.num_tokens >= kStreamedTokens && place % 64 == 0};
  runtime.parallel_for(parts, runtime.num_threads, pick(p.key.type, p.format), &task);
}

}  // namespace KVQ_ISA
}  // namespace kvq
