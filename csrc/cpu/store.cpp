// Quantize on write: new K and V rows become page bytes. Compiled once per ISA, without
// floating-point contraction (see codec.h).
//
// Tokens are written in runs: neighbours in one group of sixteen slots. A whole group's K lines
// come from one transposition, and V words that a run fills are written without being read.
#include "kernels.h"
#include "quantize.h"
#include "rotated_tile.h"
#include "seal_task.h"
#include "split.h"
#include "write_lines.h"

namespace kvq {
namespace {

constexpr long kStreamedTokens = 256;

struct StoreTask {
  const StoreParams* params;
  PageLayout layout;
  Split split;
  bool stream;
  const SealTask* sealing;  // or null
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

StaticScale of_head(const StaticScale& s, long head, long d) {
  return {s.factor ? s.factor + head * d : nullptr,
          s.zero_point ? s.zero_point + head * d : nullptr};
}

template <Activation A, int kFormat>
struct Writer {
  static constexpr Stream kKey = kFormats[kFormat].key, kValue = kFormats[kFormat].value;
  static constexpr bool kTiled = kKey.rotated && kValue.rotated;

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

  // Whether groups of sixteen tokens are encoded a head at a time (rotated_tile.h).
  bool has_tiles() const { return kTiled && has_tile<A>(d); }

  // Sixteen tokens from `token` on of one head, as those of `position` of a page. Rows of
  // `next_token` and the next ones, of `next_head`, come after it. False, and what it wrote is to
  // be written again, where a row must be encoded with care.
  template <bool kStream>
  bool write_tiles(long token, long head, long next_token, long next_head, uint8_t* page,
                   const PageLayout& at, long position) const {
    if constexpr (kTiled && A != Activation::kFloat) {
      const auto row = [](const Rows& rows, long token, long head) {
        return static_cast<const uint16_t*>(rows.data) + token * rows.token_stride +
               head * rows.head_stride;
      };
      const uint16_t* const value = row(p.value, token, head);
      constexpr int kKeyBits = code_bits(kKey.code), kValueBits = code_bits(kValue.code);
      return encode_tile<A, kKey.code, false, kStream>(
                 row(p.key, token, head), p.key.token_stride, value, d,
                 page + at.key_codes + position * d * kKeyBits / 8,
                 page + at.key_metadata + position * 4) &&
             encode_tile<A, kValue.code, true, kStream>(
                 value, p.value.token_stride, row(p.key, next_token, next_head), d,
                 page + at.value_codes + position * d * kValueBits / 8,
                 page + at.value_metadata + position * 4);
    }
    return false;
  }

  template <bool kStream>
  void write(Batch& b, const Run& run, const Run* next, long begin, long end) const {
    if (run.count < kGroup || !has_tiles()) return write_rows<kStream>(b, run, next, begin, end);
    for (long h = begin; h < end; ++h) {
      const bool more = h + 1 < end;
      if (!write_tiles<kStream>(run.token, h, more ? run.token : run.token + kGroup,
                                more ? h + 1 : begin, page(run, h), task.layout, run.position)) {
        write_rows<kStream>(b, run, nullptr, h, h + 1);
      }
    }
  }

  // A whole group of recent rows, and its codes in the sealed cache while the rows are in the
  // nearest caches. False if it is none, or not the only one in its places in this call.
  bool write_sealed(Batch& b, const Run& run) const {
    const SealTask& sealing = *task.sealing;
    const long last = run.token + kSealed - 1, heads = p.cache.num_kv_heads;
    if (run.count < kSealed || !run.alone || !seals(*sealing.params, last)) return false;
    const Run first = part_of(run, 0), second = part_of(run, kGroup);
    const auto by_rows = [&](long begin, long end) {
      write_rows<false>(b, first, nullptr, begin, end);
      write_rows<false>(b, second, nullptr, begin, end);
      sealing.seal(sealing, last, begin, end, nullptr);
    };
    if (has_tiles()) {
      alignas(64) uint8_t rows[kSealed * (2 * kWidestTile + 2 * sizeof(float))];
      const PageLayout at = page_layout(kFormats[kRecentFormat], d, kSealed);
      for (long h = 0; h < heads; ++h) {
        const bool more = h + 1 < heads;
        if (!write_tiles<false>(run.token, h, second.token, h, rows, at, 0) ||
            !write_tiles<false>(second.token, h, more ? run.token : run.token + kSealed,
                                more ? h + 1 : 0, rows, at, kGroup)) {
          by_rows(h, h + 1);
          continue;
        }
        sealing.seal(sealing, last, h, h + 1, rows);
        task.stream ? copy_rows<true>(rows, at, run, h) : copy_rows<false>(rows, at, run, h);
      }
    } else {
      const long step = Batch::heads(d);
      for (long h = 0; h < heads; h += step) by_rows(h, h + step < heads ? h + step : heads);
    }
    sealing.done[last] = 1;
    return true;
  }

  // From a page of a group's rows alone.
  template <bool kStream>
  void copy_rows(const uint8_t* rows, const PageLayout& at, const Run& run, long head) const {
    uint8_t* const to = page(run, head);
    const auto copy = [&](long to_codes, long from_codes, long to_scales, long from_scales) {
      const long codes = run.position * d, scales = run.position * 4L;
      for (long i = 0; i < kSealed * d; i += 64) {
        put16<kStream>(to + to_codes + codes + i, load<U16>(rows + from_codes + i));
      }
      for (long i = 0; i < kSealed * 4; i += 64) {
        put16<kStream>(to + to_scales + scales + i, load<U16>(rows + from_scales + i));
      }
    };
    copy(task.layout.key_codes, at.key_codes, task.layout.key_metadata, at.key_metadata);
    copy(task.layout.value_codes, at.value_codes, task.layout.value_metadata, at.value_metadata);
  }

  // What of a run from its token `from` on is in one group of sixteen.
  static Run part_of(const Run& run, int from) {
    const int room = kGroup - static_cast<int>((run.slot + from) % kGroup);
    const int count = run.count - from < room ? run.count - from : room;
    return {run.slot + from, run.block, run.token + from, count, run.position + from, run.alone};
  }

  template <bool kStream>
  void write_rows(Batch& b, const Run& run, const Run* next, long begin, long end) const {
    const size_t metadata = static_cast<size_t>(run.count) * 4;
    const long position = run.position * 4L;
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
      if constexpr (kFormat == kRecentFormat) {
        if (task.sealing != nullptr && w.write_sealed(batch, *run)) continue;
      }
      for (int from = 0; from < run->count;) {
        const Run now = part_of(*run, from);
        from += now.count;
        const bool fetches = from == run->count && run + 1 < last && !streamed(run[1]);
        const Run next = fetches ? part_of(run[1], 0) : now;
        for (long h = 0; h < heads; h += step) {
          const long end = h + step < heads ? h + step : heads;
          if (streamed(now)) {
            w.template write<true>(batch, now, fetches ? &next : nullptr, h, end);
          } else {
            w.template write<false>(batch, now, fetches ? &next : nullptr, h, end);
          }
        }
      }
    }
    if (task.stream || task.sealing != nullptr) fence();
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

// Whether lines of the layout are lines of memory.
bool on_lines(const Cache& c) {
  const long place = static_cast<long>(reinterpret_cast<uintptr_t>(c.data));
  return ((place | c.block_stride | c.head_stride) & 63) == 0;
}

// Threads take parts as they get free; four each even them out.
int parts_of(bool alone, const Runtime& runtime) {
  return alone || runtime.num_threads == 1 ? 1 : runtime.num_threads * 4;
}

void store_rows(const StoreParams& p, const Runtime& runtime, int parts, void* memory,
                const SealTask* sealing) {
  const PageLayout layout = page_layout(kFormats[p.format], p.cache.head_size, p.cache.block_size);
  // A long prompt's pages do not fit the caches anyway; lines written whole need not be read.
  StoreTask task{&p, layout,
                 split(p.slots, p.num_tokens, p.cache.block_size, parts, memory,
                       sealing != nullptr ? kSealed : kGroup),
                 p.num_tokens >= kStreamedTokens && on_lines(p.cache), sealing};
  runtime.parallel_for(parts, runtime.num_threads, pick(p.key.type, p.format), &task);
}

// New rows go to the recent cache, and groups that they fill are sealed: at once where the call
// has all of a group's rows, in the order of their tokens, and else after all rows are written.
void store_recent(const StoreParams& p, const Runtime& runtime, int parts) {
  StoreParams rows = p;
  rows.cache = p.recent;
  rows.slots = p.recent_slots;
  rows.format = kRecentFormat;
  long groups = 0;
  for (long t = 0; t < p.num_tokens; ++t) groups += seals(p, t);
  const int seal_parts = parts_of(groups * p.cache.num_kv_heads < 4, runtime);
  const long size = groups * static_cast<long>(sizeof(int64_t));
  const long seal_bytes = (split_bytes(groups, seal_parts) + 7) / 8 * 8;
  const long row_bytes = (split_bytes(p.num_tokens, parts) + 7) / 8 * 8;
  uint8_t* memory = static_cast<uint8_t*>(
      runtime.memory.reserve(2 * size + seal_bytes + row_bytes + p.num_tokens));
  if (groups == 0) return store_rows(rows, runtime, parts, memory, nullptr);

  int64_t* const slots = reinterpret_cast<int64_t*>(memory);
  int64_t* const tokens = slots + groups;
  for (long t = 0, i = 0; t < p.num_tokens; ++t) {
    if (!seals(p, t)) continue;
    slots[i] = p.slots[t];
    tokens[i++] = t;
  }
  uint8_t* const done = memory + 2 * size + seal_bytes + row_bytes;
  memset(done, 0, static_cast<size_t>(p.num_tokens));
  const long d = p.cache.head_size;
  // A group that two tokens seal is one part's, in their order, as slots are.
  SealTask task{&p,
                page_layout(kFormats[p.format], d, p.cache.block_size),
                page_layout(kFormats[kRecentFormat], d, p.recent.block_size),
                split(slots, groups, p.cache.block_size, seal_parts, memory + 2 * size, kSealed),
                tokens,
                done,
                on_lines(p.cache),
                pick_seal(p.format)};
  store_rows(rows, runtime, parts, memory + 2 * size + seal_bytes, &task);
  for (long i = 0; i < groups; ++i) {
    if (is_sealed(task, task.split.runs[i])) continue;
    return runtime.parallel_for(seal_parts, runtime.num_threads, seal_part, &task);
  }
}

}  // namespace

namespace KVQ_ISA {

void store(const StoreParams& p, const Runtime& runtime) {
  // A decode step of a few rows costs less than waking the other threads does (~5 us).
  const long values = p.num_tokens * p.cache.num_kv_heads * p.cache.head_size;
  const int parts = parts_of(values < 4096, runtime);
  if (kFormats[p.format].recent) return store_recent(p, runtime, parts);
  void* memory = runtime.memory.reserve(split_bytes(p.num_tokens, parts));
  store_rows(p, runtime, parts, memory, nullptr);
}

}  // namespace KVQ_ISA
}  // namespace kvq
