// How plan.h deals a batch out, for tests of the schedule: plain C++, no kernel.
#include "choose.h"

using namespace kvq::gpu;

// Pieces of all blocks, 9 numbers each: block, sequence, kv head, first row, its tiles of tokens
// (first and one past the last), rounds dealt out for them, rounds of the item, all tiles the rows
// see. Returns how many there are; writes at most `room`.
extern "C" int64_t kvq_schedule(const AttendParams* p, int32_t* out, int64_t room) {
  int64_t rounds = 0, items = 0, count = 0;
  for (int s = 0; s < p->num_seqs; ++s) {
    const Work work = work_of(*p, s);
    rounds += int64_t{work.items} * work.rounds;
    items += work.items;
  }
  Share share;
  share.deal = deal_out(*p, rounds, items);
  for (int block = 0; block < p->blocks; ++block) {
    const int index = block / p->abreast;
    if (index >= share.deal.shares) break;
    share.at = share.deal.begin(index);
    share.end = share.deal.begin(index + 1);
    int64_t skipped = share.at;
    int s = 0;
    Work work = work_of(*p, s);
    while (skipped >= int64_t{work.items} * work.rounds) {
      skipped -= int64_t{work.items} * work.rounds;
      work = work_of(*p, ++s);
    }
    share.start(work, s, skipped);
    while (share.next(*p)) {
      const RowTile r = share.piece.rows(*p, block % p->abreast);
      if (r.count <= 0) continue;
      const Span all = tiles_of(*p, r, tokens_of(*p, r));
      const int first = all.begin + share.piece.first * kWarps;
      const int last = min_of(all.end, first + share.piece.count * kWarps);
      const int32_t row[] = {block,
                             r.sequence,
                             r.kv_head,
                             r.first,
                             first,
                             max_of(first, last),
                             share.piece.count,
                             share.piece.rounds,
                             all.end - all.begin};
      for (int i = 0; i < 9 && count < room; ++i) out[9 * count + i] = row[i];
      ++count;
    }
  }
  return count;
}
