// How one call's work is cut up: items of (sequence, kv heads, up to 32 query rows), and each
// item's context into chunks of 512 tokens at fixed positions.
#pragma once

#include "kernels.h"
#include "state.h"
#include "tile.h"
#include "workspace.h"

namespace kvq {
namespace {

constexpr long kChunk = 512;

// Rows of the (token, query head of the group) plane of one sequence, for kv heads side by side
// whose rows are kMaxRows at most together. A block's pages of neighbouring heads are neighbours
// in memory: read head by head, DRAM gave 15 % less.
struct Item {
  int seq, head, heads;  // kv heads [head, head + heads)
  int first, rows;       // of each
  int begin, end;        // context that any of the rows sees
  int first_chunk, num_chunks;
  long partial;  // where its chunks' partial results start, in floats
  int pending;   // units not yet done
};

// One thread's share: some chunks of an item. If not all, each leaves a partial result.
struct Unit {
  int item, begin, end;
};

thread_local Workspace plan_memory, partial_memory, scratch_memory;

struct Plan {
  const AttendParams* params;
  PageLayout layout;
  int group;  // query heads per kv head
  Item* items;
  Unit* units;
  float* partials;

  // Floats of one partial result, of one kv head and chunk.
  long partial_size(const Item& i) const { return State::floats(i.rows, params->cache.head_size); }
  float* partial(const Item& i, int chunk, int head) const {
    return partials + i.partial + (static_cast<long>(chunk) * i.heads + head) * partial_size(i);
  }
};

// Context visible to the query token at `position` of a sequence of `length` tokens.
struct Span {
  int begin, end;
};

Span visible(const AttendParams& p, int position, int length) {
  Span s{0, p.causal ? position + 1 : length};
  if (p.window > 0) {
    const long first = position - p.window + 1, last = position + p.window;
    s.begin = first > 0 ? static_cast<int>(first) : 0;
    if (last < s.end) s.end = static_cast<int>(last);
  }
  return s;
}

template <class Visit>
void for_each_item(const AttendParams& p, int group, int most_heads, const Visit& visit) {
  const int kv_heads = static_cast<int>(p.cache.num_kv_heads);
  for (int seq = 0; seq < p.num_seqs; ++seq) {
    const int length = p.seq_lens[seq];
    const int count = p.query_start[seq + 1] - p.query_start[seq];
    const int rows = count * group;
    for (int first = 0; first < rows; first += kMaxRows) {
      const int n = rows - first < kMaxRows ? rows - first : kMaxRows;
      const Span low = visible(p, length - count + first / group, length);
      const Span high = visible(p, length - count + (first + n - 1) / group, length);
      const int heads = kMaxRows / n < most_heads ? kMaxRows / n : most_heads;
      for (int head = 0; head < kv_heads; head += heads) {
        const int side = heads < kv_heads - head ? heads : kv_heads - head;
        Item i{seq, head, side, first, n, low.begin, high.end, 0, 0, 0, 0};
        i.first_chunk = static_cast<int>(i.begin / kChunk);
        // At least one, so that rows which see nothing are written too: as zeros.
        const int chunks = static_cast<int>((i.end + kChunk - 1) / kChunk) - i.first_chunk;
        i.num_chunks = chunks > 1 ? chunks : 1;
        visit(i);
      }
    }
  }
}

constexpr long kUnitsPerThread = 12;  // evens out ragged lengths to a few percent

// Fills the plan's items and units; returns the number of units. How work is cut changes nothing
// in the results.
long make_plan(Plan& plan, int num_threads) {
  const AttendParams& p = *plan.params;
  const long wanted = num_threads > 1 ? kUnitsPerThread * num_threads : 1;
  long items, chunks, floats;
  int most_heads = kMaxRows;
  for (;; most_heads /= 2) {
    items = chunks = floats = 0;
    for_each_item(p, plan.group, most_heads, [&](const Item& i) {
      ++items;
      chunks += i.num_chunks;
      floats += static_cast<long>(i.num_chunks) * i.heads * plan.partial_size(i);
    });
    if (chunks >= wanted || most_heads == 1) break;
  }
  // Many items need no merging; few are cut into runs of chunks.
  const int run = static_cast<int>(items >= wanted ? 1 << 30 : (chunks + wanted - 1) / wanted);
  char* memory = static_cast<char*>(plan_memory.reserve(items * static_cast<long>(sizeof(Item)) +
                                                        chunks * static_cast<long>(sizeof(Unit))));
  plan.items = reinterpret_cast<Item*>(memory);
  plan.units = reinterpret_cast<Unit*>(memory + items * sizeof(Item));
  plan.partials =
      items < wanted ? static_cast<float*>(partial_memory.reserve(floats * 4)) : nullptr;
  long unit = 0, partial = 0;
  int item = 0;
  for_each_item(p, plan.group, most_heads, [&](Item i) {
    i.partial = partial;
    for (int c = 0; c < i.num_chunks; c += run) {
      const int end = run < i.num_chunks - c ? c + run : i.num_chunks;
      plan.units[unit++] = {item, c, end};
      ++i.pending;
      if (end == i.num_chunks) break;
    }
    partial += static_cast<long>(i.num_chunks) * i.heads * plan.partial_size(i);
    plan.items[item++] = i;
  });
  return unit;
}

}  // namespace
}  // namespace kvq
