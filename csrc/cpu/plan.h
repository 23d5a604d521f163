// How one call's work is cut up, and how what it leaves is merged.
//
// Items are (sequence, kv heads, up to 64 query rows). Their context lies in chunks of 512 tokens
// at fixed positions, which merge along a binary tree over these positions: node i of level l is
// what chunks [i << l, (i + 1) << l) give, its left half first. Halves outside the context are left
// out. So however the work is cut, the same results meet in the same order, and a thread that
// attends a node's chunks leaves one result, however many they are.
#pragma once

#include "kernels.h"
#include "state.h"
#include "tile.h"

namespace kvq {
namespace {

constexpr long kChunk = 512;

// Rows of the (token, query head of a kv head) plane of one sequence, for kv heads side by side
// whose rows are kMaxRows at most together. A block's pages of neighbouring heads are neighbours
// in memory: read head by head, DRAM gave 15 % less.
struct Item {
  int seq, head, heads;  // kv heads [head, head + heads)
  int first, rows;       // of each
  int begin, end;        // context that any of the rows sees
  int first_chunk,
      last_chunk;            // at least one, so that rows which see nothing are written: as zeros
  int level;                 // of the nodes that its units are
  long first_unit, partial;  // where its units, and its partial results in floats, start

  long chunks() const { return last_chunk - first_chunk + 1L; }
  long units() const { return (last_chunk >> level) - (first_chunk >> level) + 1; }
};

// One thread's share: those of an item's chunks that lie in one node.
struct Unit {
  int item, begin, end;  // chunks
  int arrived;           // halves that are done of the tree node whose right half starts here
};

// Context visible to the query token at `position` of a sequence of `length` tokens.
struct Span {
  int begin, end;
};

Span visible(const AttendParams& p, int position, int length) {
  Span s{0, p.causal ? position + 1 : length};
  if (p.window > 0) {
    const long first = position - (p.window - 1), last = position + p.window;
    s.begin = first > 0 ? static_cast<int>(first) : 0;
    if (last < s.end) s.end = static_cast<int>(last);
  }
  return s;
}

template <class Visit>
void for_each_item(const AttendParams& p, int heads_per_kv, int most_heads, const Visit& visit) {
  const int kv_heads = static_cast<int>(p.cache.num_kv_heads);
  for (int seq = 0; seq < p.num_seqs; ++seq) {
    const int length = p.seq_lens[seq];
    const int count = p.query_start[seq + 1] - p.query_start[seq];
    const int rows = count * heads_per_kv;
    for (int first = 0; first < rows; first += kMaxRows) {
      const int n = rows - first < kMaxRows ? rows - first : kMaxRows;
      const Span low = visible(p, length - count + first / heads_per_kv, length);
      const Span high = visible(p, length - count + (first + n - 1) / heads_per_kv, length);
      const int first_chunk = static_cast<int>(low.begin / kChunk);
      const int last_chunk = high.end > low.begin ? static_cast<int>((high.end - 1) / kChunk) : 0;
      const int heads = kMaxRows / n < most_heads ? kMaxRows / n : most_heads;
      for (int head = 0; head < kv_heads; head += heads) {
        const int side = heads < kv_heads - head ? heads : kv_heads - head;
        visit(Item{seq, head, side, first, n, low.begin, high.end, first_chunk,
                   last_chunk > first_chunk ? last_chunk : first_chunk, 0, 0, 0});
      }
    }
  }
}

// Codes of K and V that a call reads, times the passes of four rows over them.
long work_of(const AttendParams& p, int heads_per_kv) {
  long work = 0;
  for (int seq = 0; seq < p.num_seqs; ++seq) {
    const int length = p.seq_lens[seq];
    const int count = p.query_start[seq + 1] - p.query_start[seq];
    const long rows = static_cast<long>(count) * heads_per_kv;
    const int begin = visible(p, length - count, length).begin;
    work += (rows + kPassRows - 1) / kPassRows * (length - begin);
  }
  return work * p.cache.num_kv_heads * p.cache.head_size * 2;
}

// Below it a call stays on its thread: waking the others takes as long as half of it (~5 us).
#if defined(__AVX512F__)
constexpr long kAlone = 64 << 10;  // int8 5 us, fp8 12 us
#elif defined(__AVX2__)
constexpr long kAlone = 32 << 10;
#else
constexpr long kAlone = 8 << 10;
#endif

constexpr long kChunksPerThread = 12;  // where there are fewer, kv heads are items of their own

// How large units are, that threads take in order as they get free: what is left after an item is
// shared out before its last unit has to end, so units may be a thread's share of that; but an item
// alone makes two units a thread, and no unit needs to be less than a sixth of a thread's work.
// Every unit begins with a tile and queries that nothing has fetched (int4 at 9/3 heads: 3.6 us,
// where four chunks take 36), so fewer are better: 6 sequences of 7,000 tokens at 9/3 heads, two
// threads, 13 units in place of 24 of one size.
class Cut {
 public:
  Cut(long threads, long work) : threads_(threads), left_(work), least_(work / (6 * threads)) {}

  static long work_of(const Item& i) {
    return i.chunks() * i.heads * ((i.rows + kPassRows - 1) / kPassRows);
  }

  // The level of the next item's units.
  int next(const Item& i) {
    const long work = work_of(i), chunk = work / i.chunks();
    left_ -= work;
    const long most = max(max(left_ / threads_, work / (2 * threads_)), least_);
    int level = 0;
    while ((2L << level) * chunk <= most && (1L << level) < i.last_chunk + 1L) ++level;
    return threads_ > 1 ? level : kNoSplit;
  }

 private:
  static constexpr int kNoSplit = 30;  // a node that holds any context
  static long max(long a, long b) { return a > b ? a : b; }
  long threads_, left_, least_;
};

struct Plan {
  const AttendParams* params;
  PageLayout layout, recent_layout;
  int heads_per_kv;  // query heads that share a kv head
  long num_units;
  Item* items;
  Unit* units;
  float* partials;
  char* workers;  // each one's scratch
  long worker_bytes;

  long state_floats(const Item& i) const { return State::floats(i.rows, params->cache.head_size); }

  // What unit n of an item leaves, of one of its kv heads.
  float* partial(const Item& i, long n, int head) const {
    return partials + i.partial + (n * i.heads + head) * state_floats(i);
  }
};

// States that a thread holds while it attends chunks [begin, end) of one node, for each head: one
// of every level, and the chunk's own.
constexpr int stack_depth(long begin, long end) {
  int depth = 1;
  for (long apart = begin ^ (end - 1); apart > 0; apart >>= 1) ++depth;
  return depth;
}

// What a worker needs beside the states: fixed, and for each kv head of an item.
struct ScratchSize {
  long fixed, head;
};

// Fills the plan for `num_threads`. How work is cut changes nothing in the results, and what is
// reserved depends on the batch and the threads, not on the length of the context.
void make_plan(Plan& plan, int num_threads, ScratchSize scratch, Workspace& memory) {
  const AttendParams& p = *plan.params;
  const long wanted = num_threads > 1 ? kChunksPerThread * num_threads : 1;
  long items, chunks, work;
  int most_heads = kMaxRows;
  for (;; most_heads /= 2) {
    items = chunks = work = 0;
    for_each_item(p, plan.heads_per_kv, most_heads, [&](const Item& i) {
      ++items;
      chunks += i.chunks();
      work += Cut::work_of(i);
    });
    if (chunks >= wanted || most_heads == 1) break;
  }

  long units = 0, floats = 0, worker = 0;
  const auto for_each_cut = [&](const auto& visit) {
    Cut cut(num_threads, work);
    for_each_item(p, plan.heads_per_kv, most_heads, [&](Item i) {
      i.level = cut.next(i);
      visit(i);
    });
  };
  for_each_cut([&](const Item& i) {
    const long n = i.units(), state = plan.state_floats(i);
    units += n;
    if (n > 1) floats += n * i.heads * state;
    const int depth =
        n > 1 ? stack_depth(0, 1L << i.level) : stack_depth(i.first_chunk, i.last_chunk + 1L);
    const long bytes = i.heads * (scratch.head + depth * state * 4);
    worker = bytes > worker ? bytes : worker;
  });
  plan.num_units = units;
  const auto aligned = [](long bytes) { return (bytes + 63) / 64 * 64; };
  const long item_bytes = aligned(items * static_cast<long>(sizeof(Item)));
  const long unit_bytes = aligned(units * static_cast<long>(sizeof(Unit)));
  plan.worker_bytes = aligned(scratch.fixed + worker);
  const long workers = units < num_threads ? units : num_threads;
  char* at = static_cast<char*>(
      memory.reserve(item_bytes + unit_bytes + floats * 4 + workers * plan.worker_bytes));
  plan.items = reinterpret_cast<Item*>(at);
  plan.units = reinterpret_cast<Unit*>(at + item_bytes);
  plan.partials = reinterpret_cast<float*>(at + item_bytes + unit_bytes);
  plan.workers = at + item_bytes + unit_bytes + floats * 4;

  long unit = 0, partial = 0;
  int item = 0;
  for_each_cut([&](Item i) {
    i.first_unit = unit;
    i.partial = partial;
    long begin = i.first_chunk;
    for (long node = begin >> i.level; begin <= i.last_chunk; ++node) {
      const long next = (node + 1) << i.level;
      const long end = next <= i.last_chunk ? next : i.last_chunk + 1L;
      plan.units[unit++] = {item, static_cast<int>(begin), static_cast<int>(end), 0};
      begin = end;
    }
    if (i.units() > 1) partial += i.units() * i.heads * plan.state_floats(i);
    plan.items[item++] = i;
  });
}

// One of an item's units is done. Where its sibling in the tree is done too, merges the two and
// goes on to their parent; else leaves that to the sibling. merge(left, right): units of the item
// where the two nodes' results are, the merged one's to be the left. Returns whether the item is
// done: its result is its first unit's then.
template <class Merge>
bool join(const Plan& plan, const Item& item, long unit, const Merge& merge) {
  const long origin = item.first_chunk >> item.level;
  long first = origin, last = item.last_chunk >> item.level;  // nodes of a level
  long node = first + unit - item.first_unit;
  for (int up = 0; first < last; ++up, first >>= 1, last >>= 1, node >>= 1) {
    const long left = node & ~1L, right = node | 1L;
    if (left < first || right > last) continue;  // no sibling
    const long at = (right << up) - origin, start = left << up;
    int& arrived = plan.units[item.first_unit + at].arrived;
    if (__atomic_fetch_add(&arrived, 1, __ATOMIC_ACQ_REL) == 0) return false;
    merge(start > origin ? start - origin : 0, at);
  }
  return true;
}

}  // namespace
}  // namespace kvq
