// How the tokens of a store are dealt out to threads: runs of neighbours, in parts of equal work.
#pragma once

#include <cstdint>
#include <cstring>

#include "../formats.h"

namespace kvq {
namespace {

constexpr int kGroup = kLanes;  // slots whose K shares cache lines, and whose V shares words

// `count` tokens from `token` on go to consecutive slots of one group: positions of `block`.
// `alone`: no other run goes to its group.
struct Run {
  int64_t slot, block;
  int token, count, position;
  bool alone;
};

// Runs in the order of their parts, and where each part's begin (one more than there are parts).
// Threads take parts as they get free.
struct Split {
  const Run* runs;
  const int* begin;
};

// Slots that share a group and appear in one call: one thread's, because they share words.
struct SlotGroup {
  int64_t id;
  long work;
  int part, runs;
};

inline long find_runs(const int64_t* slots, long tokens, long block_size, int group, Run* runs) {
  long n = 0;
  for (long t = 0; t < tokens; ++t) {
    const int64_t slot = slots[t];
    if (slot < 0) continue;
    const bool joins = n > 0 && (slot & (group - 1)) != 0 &&
                       runs[n - 1].slot + runs[n - 1].count == slot &&
                       runs[n - 1].token + runs[n - 1].count == t;
    if (joins) {
      ++runs[n - 1].count;
      continue;
    }
    const int64_t block = slot / block_size;
    const int position = static_cast<int>(slot - block * block_size);
    runs[n++] = {slot, block, static_cast<int>(t), 1, position, false};
  }
  return n;
}

// A token alone takes twice the time of one of a whole group (0.9 and 0.5 us, 8 heads of 128).
inline long work_of(const Run& run) { return run.count + 1; }

// Bytes of memory that split() needs; its table has two to four places a token, but never fewer
// than two.
inline long split_bytes(long tokens, int parts) {
  return tokens * static_cast<long>(2 * sizeof(Run) + sizeof(SlotGroup) + 5 * sizeof(int)) +
         (parts + 4) * static_cast<long>(sizeof(int));
}

// Deals `tokens` slots, negative ones left out, to `parts` parts. Runs of one group of slots come
// into one part, in the order of their tokens, so that of two tokens for a slot the later one
// stays, and groups follow each other in the order of their first tokens. Parts differ by one
// group's work at most, wherever the slots are: by slots modulo something, sequences that stand at
// the same offset of their blocks fell into one part. Groups are of `group` slots, a power of two.
// Runs in groups of kGroup do not learn whether they are alone where there is only one part.
inline Split split(const int64_t* slots, long tokens, long block_size, int parts, void* memory,
                   int group = kGroup) {
  Run* const ordered = static_cast<Run*>(memory);
  Run* const runs = ordered + tokens;
  SlotGroup* const groups = reinterpret_cast<SlotGroup*>(runs + tokens);
  int* const group_of = reinterpret_cast<int*>(groups + tokens);
  int* const begin = group_of + tokens;
  int* const table = begin + parts + 2;
  if (parts == 1 && group == kGroup) {
    begin[0] = 0;
    begin[1] = static_cast<int>(find_runs(slots, tokens, block_size, group, ordered));
    return {ordered, begin};
  }
  const long n = find_runs(slots, tokens, block_size, group, runs);

  // Groups by a table of twice their number at least, open addresses.
  int bits = 1;
  while (1L << bits < 2 * n) ++bits;
  const long mask = (1L << bits) - 1;
  for (long i = 0; i <= mask; ++i) table[i] = -1;
  int num_groups = 0;
  long total = 0;
  for (long i = 0; i < n; ++i) {
    const int64_t id = runs[i].slot / group;
    long at = static_cast<long>(static_cast<uint64_t>(id) * 0x9E3779B97F4A7C15u >> (64 - bits));
    while (table[at] >= 0 && groups[table[at]].id != id) at = (at + 1) & mask;
    if (table[at] < 0) {
      table[at] = num_groups;
      groups[num_groups++] = {id, 0, 0, 0};
    }
    group_of[i] = table[at];
    groups[table[at]].work += work_of(runs[i]);
    ++groups[table[at]].runs;
    total += work_of(runs[i]);
  }

  // A group belongs to the part in which the middle of its work lies.
  long before = 0;
  for (int g = 0; g < num_groups; ++g) {
    groups[g].part = static_cast<int>((2 * before + groups[g].work) * parts / (2 * total));
    before += groups[g].work;
  }
  // begin[part + 2] counts a part's runs; summed up, begin[part + 1] is where the next one goes.
  memset(begin, 0, (static_cast<size_t>(parts) + 2) * sizeof(int));
  for (long i = 0; i < n; ++i) ++begin[groups[group_of[i]].part + 2];
  for (int part = 0; part < parts; ++part) begin[part + 2] += begin[part + 1];
  for (long i = 0; i < n; ++i) {
    const SlotGroup& of = groups[group_of[i]];
    runs[i].alone = of.runs == 1;
    ordered[begin[of.part + 1]++] = runs[i];
  }
  return {ordered, begin};
}

}  // namespace
}  // namespace kvq
