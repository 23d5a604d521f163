// Quantize on write: new K and V rows become page bytes. Compiled once per ISA, without
// floating-point contraction (see codec.h).
//
// Tokens are written in runs: neighbours in one group of sixteen slots. A whole group's K lines
// come from one transposition, and V words that a run fills are written without being read.
#include "kernels.h"
#include "quantize.h"
#include "transpose.h"
#include "workspace.h"

namespace kvq {
namespace {

constexpr long kStreamedTokens = 256;

// `count` tokens from `token` on go to consecutive slots of one group.
struct Run {
  int64_t slot;
  int token, count;
};

struct StoreTask {
  const StoreParams* params;
  PageLayout layout;
  const Run* runs;
  long num_runs;
  int parts;
  long share;  // neighbouring slots, whole groups, that one part writes
  bool stream;
};

// Codes of one run, for some heads, before they are laid out.
struct Batch {
  static constexpr long kBytes = 32 << 10;  // stays in L1
  alignas(64) uint8_t codes[kBytes + 64];   // [head, 16 tokens, D]
  uint32_t metadata[kBytes / 256][kGroup];  // [head, token]
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
  const long d, size;

  uint8_t* page(const Run& run, long head) const {
    return p.cache.data + run.slot / size * p.cache.block_stride + head * p.cache.head_stride;
  }
  // Offsets of a run's group of sixteen tokens within its page.
  long key_group(const Run& run) const {
    return task.layout.key_codes + run.slot % size / kGroup * kGroup * d * code_bits(kKey.code) / 8;
  }
  long value_group(const Run& run) const {
    return task.layout.value_codes +
           run.slot % size / kGroup * kGroup * d * code_bits(kValue.code) / 8;
  }

  static void fetch_lines(const uint8_t* at, long lines) {
    for (long i = 0; i < lines; ++i) __builtin_prefetch(at + i * 64, 1, 3);
  }

  // A lone token's K goes to d / 4 lines, one word each: fetched a run ahead, together, they cost
  // one latency.
  void fetch(const Run& run, long begin, long end) const {
    constexpr long kWord = 32 / code_bits(kValue.code);
    const long first = run.slot % kGroup / kWord,
               last = (run.slot % kGroup + run.count - 1) / kWord;
    for (long h = begin; h < end; ++h) {
      const uint8_t* to = page(run, h);
      fetch_lines(to + key_group(run), d * code_bits(kKey.code) / 32);
      fetch_lines(to + value_group(run) + first * d * 4, (last - first + 1) * d / kLanes);
    }
  }

  // Codes of one token's rows, heads [begin, end), at most sixteen; their metadata to lanes.
  template <Code C, bool kPerToken>
  KVQ_HD void encode_token(const Rows& rows, const StaticScale& scale, long at, long begin, long end,
                           uint8_t* codes, long stride, RowScales& s) const {
    if constexpr (kPerToken) {
      long row = at;
      for (long h = 0; h < end - begin; ++h, row += rows.head_stride) {
        const Span span = span_of<A, C>(rows.data, row, d);
        s.peak[h] = span.peak;
        if constexpr (kAffine<C>) s.low[h] = span.low, s.high[h] = span.high;
      }
      find_scales<C>(s);
    }
    for (long h = begin; h < end; ++h, at += rows.head_stride, codes += stride) {
      const int lane = static_cast<int>(h - begin);
      if constexpr (kPerToken) {
        if (__builtin_expect(s.peak[lane] > float_bits(kRowLimit<C>), 0)) {
          s.metadata[lane] = encode_wild_row<A, C>(rows.data, at, d, codes);
          continue;
        }
        encode_values<A, C, true>(rows.data, at, d, s[lane], {}, codes);
      } else {
        encode_values<A, C, false>(rows.data, at, d, {}, of_head(scale, h, d), codes);
      }
    }
  }

  // Activations are read in the order of memory, a token's heads side by side: the same rows head
  // by head, 2 KB apart, came at a sixth of the speed.
  template <Code C, bool kPerToken>
  void encode(Batch& b, const Rows& rows, const StaticScale& scale, const Run& run, long begin,
              long end) const {
    RowScales s{};
    for (int t = 0; t < run.count; ++t) {
      for (long h = begin; h < end; h += kLanes) {
        const long last = end - h < kLanes ? end : h + kLanes;
        const long at = (run.token + t) * rows.token_stride + h * rows.head_stride;
        uint8_t* codes = b.codes + ((h - begin) * kGroup + t) * d;
        encode_token<C, kPerToken>(rows, scale, at, h, last, codes, kGroup * d, s);
        if constexpr (kPerToken) {
          for (long i = h; i < last; ++i) b.metadata[i - begin][t] = s.metadata[i - h];
        }
      }
    }
  }

  template <bool kStream>
  void write(Batch& b, const Run& run, long begin, long end) const {
    const size_t metadata = static_cast<size_t>(run.count) * 4;
    const long position = run.slot % size * 4;
    encode<kKey.code, kKey.per_token>(b, p.key, p.key_scale, run, begin, end);
    for (long h = begin; h < end; ++h) {
      uint8_t* to = page(run, h);
      write_key<kKey.code, kStream>(b.codes + (h - begin) * kGroup * d, run, d,
                                    to + key_group(run));
      if constexpr (kKey.per_token) {
        memcpy(to + task.layout.key_metadata + position, b.metadata[h - begin], metadata);
      }
    }
    encode<kValue.code, kValue.per_token>(b, p.value, p.value_scale, run, begin, end);
    for (long h = begin; h < end; ++h) {
      uint8_t* to = page(run, h);
      write_value<kValue.code, kStream>(b.codes + (h - begin) * kGroup * d, run, d,
                                        to + value_group(run));
      if constexpr (kValue.per_token) {
        memcpy(to + task.layout.value_metadata + position, b.metadata[h - begin], metadata);
      }
    }
  }

  // A group's slots go to one part: tokens that share a word of V must not race.
  static void part(void* context, long part) {
    const StoreTask& task = *static_cast<const StoreTask*>(context);
    const StoreParams& p = *task.params;
    const Writer w{task, p, p.cache.head_size, p.cache.block_size};
    thread_local Batch batch;
    const long step = Batch::heads(w.d);
    const Run *run = nullptr, *last = task.runs + task.num_runs;
    for (const Run* next = task.runs;; ++next) {
      while (next < last && next->slot / task.share % task.parts != part) ++next;
      const bool whole = next < last && task.stream && next->count == kGroup;
      if (next < last && !whole) w.fetch(*next, 0, p.cache.num_kv_heads);
      for (long h = 0; run && h < p.cache.num_kv_heads; h += step) {
        const long end = h + step < p.cache.num_kv_heads ? h + step : p.cache.num_kv_heads;
        if (task.stream && run->count == kGroup) {
          w.template write<true>(batch, *run, h, end);
        } else {
          w.template write<false>(batch, *run, h, end);
        }
      }
      if (next >= last) break;
      run = next;
    }
    if (task.stream) fence();
  }
};

using Part = void (*)(void*, long);

template <Activation A, int... I>
Part pick(int format, IndexList<I...>) {
  static constexpr Part kTable[] = {Writer<A, I>::part...};
  return kTable[format];
}

Part pick(Activation type, int format) {
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

thread_local Workspace run_memory;

}  // namespace

namespace KVQ_ISA {

void store(const StoreParams& p, const Runtime& runtime) {
  Run* runs = static_cast<Run*>(run_memory.reserve(p.num_tokens * static_cast<long>(sizeof(Run))));
  long n = 0;
  for (long t = 0; t < p.num_tokens; ++t) {
    const int64_t slot = p.slots[t];
    if (slot < 0) continue;
    const bool joins = n > 0 && slot % kGroup != 0 &&
                       runs[n - 1].slot + runs[n - 1].count == slot &&
                       runs[n - 1].token + runs[n - 1].count == t;
    if (joins) {
      ++runs[n - 1].count;
    } else {
      runs[n++] = {slot, static_cast<int>(t), 1};
    }
  }
  const PageLayout layout = page_layout(kFormats[p.format], p.cache.head_size, p.cache.block_size);
  // A long prompt's pages do not fit the caches anyway; lines written whole need not be read.
  const long place = static_cast<long>(reinterpret_cast<uintptr_t>(p.cache.data)) |
                     p.cache.block_stride | p.cache.head_stride;
  StoreTask task{
      &p, layout, runs, n, 1, kGroup, p.num_tokens >= kStreamedTokens && place % 64 == 0};
  // A decode step of a few rows costs less than waking the other threads does (~5 us). Threads
  // take parts as they get free; four each even them out.
  const bool alone = p.num_tokens * p.cache.num_kv_heads * p.cache.head_size < 4096;
  task.parts = alone || runtime.num_threads == 1 ? 1 : runtime.num_threads * 4;
  while (task.share < 256 && task.share * task.parts * 2 <= p.num_tokens) task.share *= 2;
  runtime.parallel_for(task.parts, pick(p.key.type, p.format), &task);
}

}  // namespace KVQ_ISA
}  // namespace kvq
