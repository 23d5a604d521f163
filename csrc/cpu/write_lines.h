// Codes of a run of tokens become words of a page's lines.
#pragma once

#include "quantize.h"
#include "split.h"
#include "transpose.h"

namespace kvq {
namespace {

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

}  // namespace
}  // namespace kvq
