// A block finds its share of the rounds (plan.h): it sums up those of all sequences, each thread of
// a few neighbours. A microsecond's work, and no launch before this one.
#pragma once

#include "plan.h"

namespace kvq {
namespace gpu {
namespace {

struct Dealing : Share {
  int64_t rounds[kWarps], items[kWarps];  // of a warp's sequences
};

// This block's share of the rounds: nothing if there are fewer.
template <class L>
KVQ_HD void take_share(const AttendParams& p, Dealing& out) {
  const int each = (p.num_seqs + kThreads - 1) / kThreads;
  const int from = min_of(L::thread() * each, p.num_seqs), to = min_of(from + each, p.num_seqs);
  int64_t own = 0, items = 0;
  for (int s = from; s < to; ++s) {
    const Work work = work_of(p, s);
    own += static_cast<int64_t>(work.items) * work.rounds;
    items += work.items;
  }
  int64_t before = 0, rounds = own;  // of the warp's lower lanes; of lanes whose sums have met
  for (int mask = 1; mask < kWarp; mask *= 2) {
    const int64_t other = L::shuffle_xor(rounds, mask);
    if (L::id() & mask) before += other;
    rounds += other;
    items += L::shuffle_xor(items, mask);
  }
  if (L::id() == 0) {
    out.rounds[L::warp()] = rounds;
    out.items[L::warp()] = items;
  }
  L::sync();
  int64_t all_rounds = 0, all_items = 0;
  KVQ_UNROLL for (int w = 0; w < kWarps; ++w) {
    if (w < L::warp()) before += out.rounds[w];
    all_rounds += out.rounds[w];
    all_items += out.items[w];
  }
  const Deal deal = deal_out(p, all_rounds, all_items);
  const int share = L::block() / p.abreast;
  const bool any = share < deal.shares;
  const int64_t begin = any ? deal.begin(share) : 0;
  if (L::thread() == 0) {
    out.deal = deal;
    out.member = L::block() % p.abreast;
    out.at = begin;
    out.end = any ? deal.begin(share + 1) : 0;
  }
  if (any && before <= begin && begin < before + own) {
    int64_t skipped = begin - before;
    int s = from;
    Work work = work_of(p, s);
    while (skipped >= static_cast<int64_t>(work.items) * work.rounds) {
      skipped -= static_cast<int64_t>(work.items) * work.rounds;
      work = work_of(p, ++s);
    }
    out.start(work, s, skipped);
  }
  L::sync();
}

}  // namespace
}  // namespace gpu
}  // namespace kvq
