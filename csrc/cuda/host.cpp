// The library's part that needs no GPU: plans. Plain C++, so that it is tested where there is no
// nvcc.
#include <algorithm>

#include "api.h"
#include "choose.h"

using namespace kvq::gpu;

int64_t kvq_cuda_plan(AttendParams* p, int64_t max_seq_len, int32_t multiprocessors) {
  p->group = p->num_heads / p->cache.num_kv_heads;
  const int rows = p->group * (p->max_query_len > 0 ? p->max_query_len : 1);
  const Choice choice = choose(p->cache.format, p->cache.head_size, rows);
  p->tile_tokens = choice.tile_tokens;
  p->tile_rows = choice.tile_rows;
  const int row_tiles = (rows + choice.tile_rows - 1) / choice.tile_rows;
  p->abreast = rows <= kAbreastRows ? row_tiles : 1;
  // As many blocks as run at a time, or as the longest sequences can use.
  const int most = std::max(1, multiprocessors * choice.blocks / p->abreast);
  const int64_t tiles = (max_seq_len + choice.tile_tokens - 1) / choice.tile_tokens +
                        tiles_besides(*p, p->max_query_len, max_seq_len > kvq::kWindow);
  const int64_t rounds = std::max<int64_t>(1, (tiles + kWarps - 1) / kWarps);
  const int64_t items =
      int64_t{p->num_seqs} * p->cache.num_kv_heads * ((row_tiles + p->abreast - 1) / p->abreast);
  const int64_t shares = std::min<int64_t>(most, shares_for(*p, items * rounds, items));
  p->blocks = static_cast<int32_t>(std::max<int64_t>(1, shares)) * p->abreast;
  if (rounds == 1) return 0;
  return p->blocks * 2 * partial_size(*p) * static_cast<int64_t>(sizeof(float));
}
