// csrc/cpu/plan.h without kernels: random batches are planned, and their units finish in random
// order. Exits with 1 and a message at the first mistake.
#include "../../csrc/cpu/plan.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

using namespace kvq;

namespace {

#define REQUIRE(condition)                                         \
  do {                                                             \
    if (!(condition)) {                                            \
      std::printf("line %d: %s is wrong\n", __LINE__, #condition); \
      std::exit(1);                                                \
    }                                                              \
  } while (false)

struct Batch {
  std::vector<int32_t> lengths, starts{0};
  AttendParams params{};

  Batch(long kv_heads, long head_size, long window) {
    params.cache = {nullptr, 0, 0, 128, kv_heads, head_size};
    params.causal = true;
    params.window = window;
  }
  void add(int length, int count) {
    lengths.push_back(length);
    starts.push_back(starts.back() + count);
  }
  Plan plan(int group, int threads, Workspace& memory) {
    params.seq_lens = lengths.data();
    params.query_start = starts.data();
    params.num_seqs = static_cast<long>(lengths.size());
    params.num_heads = params.cache.num_kv_heads * group;
    Plan plan{};
    plan.params = &params;
    plan.heads_per_kv = group;
    make_plan(plan, threads, {4096, 4096}, memory);
    return plan;
  }
};

// How chunks [begin, end) must be merged: from their positions alone.
std::string tree(long begin, long end, int level, long node) {
  const long low = node << level, high = (node + 1) << level;
  if (high <= begin || low >= end) return "";
  if (level == 0) return std::to_string(node);
  const std::string left = tree(begin, end, level - 1, 2 * node),
                    right = tree(begin, end, level - 1, 2 * node + 1);
  return left.empty() ? right : right.empty() ? left : "(" + left + " " + right + ")";
}

void check(Batch& batch, int group, int threads, std::mt19937& random) {
  Workspace memory;
  const Plan plan = batch.plan(group, threads, memory);
  std::vector<long> order(static_cast<size_t>(plan.num_units));
  std::vector<std::string> results(order.size());
  std::vector<int> done(order.size() + 1, 0);
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<long>(i);
  std::shuffle(order.begin(), order.end(), random);
  for (const long u : order) {
    const Unit& unit = plan.units[u];
    const Item& item = plan.items[unit.item];
    REQUIRE(unit.begin < unit.end);
    REQUIRE(unit.begin >> item.level == (unit.end - 1) >> item.level);
    REQUIRE(stack_depth(unit.begin, unit.end) <= item.level + 1 || item.units() == 1);
    results[static_cast<size_t>(u)] = tree(unit.begin, unit.end, 22, 0);
    int merges = 0;
    const bool last = join(plan, item, u, [&](long left, long right) {
      std::string& into = results[static_cast<size_t>(item.first_unit + left)];
      into = "(" + into + " " + results[static_cast<size_t>(item.first_unit + right)] + ")";
      ++merges;
    });
    // One thread's share of the merging: the height of the tree, not the number of its leaves.
    REQUIRE((1L << merges) < 4 * item.units());
    if (!last) continue;
    REQUIRE(++done[static_cast<size_t>(item.first_unit)] == 1);
    REQUIRE(results[static_cast<size_t>(item.first_unit)] ==
            tree(item.first_chunk, item.last_chunk + 1L, 22, 0));
  }
  for (long i = 0, unit = 0; unit < plan.num_units; ++i) {
    REQUIRE(plan.items[i].first_unit == unit);
    REQUIRE(done[static_cast<size_t>(unit)] == 1);
    unit += plan.items[i].units();
  }
}

// When the last of two threads that take units in order ends, over half of the work; a chunk of
// four rows is worth 1, and what begins a unit a fifth.
double lateness(const std::vector<int>& lengths) {
  Batch batch(1, 64, 0);
  for (const int length : lengths) batch.add(length, 1);
  Workspace memory;
  const Plan plan = batch.plan(4, 2, memory);
  double busy[2] = {}, all = 0;
  for (long u = 0; u < plan.num_units; ++u) {
    const double chunks = plan.units[u].end - plan.units[u].begin;
    *std::min_element(busy, busy + 2) += chunks + 0.2;
    all += chunks;
  }
  return std::max(busy[0], busy[1]) / (all / 2);
}

}  // namespace

int main() {
  std::mt19937 random(0);
  const auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  for (int i = 0; i < 2000; ++i) {
    const long window = below(3) ? 0 : 1 + below(5000);
    Batch batch(1 + below(8), 16 << below(4), window);
    for (int s = 1 + below(5); s > 0; --s) {
      const int length = below(4) ? below(40000) : below(200);
      batch.add(length, below(3) ? 1 : below(length + 1) % 300);
    }
    check(batch, 1 + below(9), 1 + below(70), random);
  }
  REQUIRE(lateness({32768}) < 1.02);
  REQUIRE(lateness(std::vector<int>(6, 7000)) < 1.05);
  REQUIRE(lateness(std::vector<int>(9, 4096)) < 1.05);
  // Uncut, as many sequences as there were to be units: the last one alone.
  std::vector<int> ragged(24, 2048);
  ragged.back() = 20480;
  REQUIRE(lateness(ragged) < 1.08);
  // 100 sequences of 128k tokens on 64 threads: 0.55 GB when every chunk left a result.
  Batch long_batch(8, 128, 0);
  for (int s = 0; s < 100; ++s) long_batch.add(128 << 10, 1);
  Workspace memory;
  const Plan plan = long_batch.plan(4, 64, memory);
  const long scratch = plan.worker_bytes * 64;
  std::printf("units %ld, partial results %ld MB, workers %ld MB\n", plan.num_units,
              (memory.size() - scratch) >> 20, scratch >> 20);
  REQUIRE(memory.size() < 64 << 20);
  // Longer contexts need no more.
  Workspace longer;
  for (int32_t& length : long_batch.lengths) length = 1 << 20;
  long_batch.plan(4, 64, longer);
  REQUIRE(longer.size() < 64 << 20);
  return 0;
}
