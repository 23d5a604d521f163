// The library's part that needs no GPU: plans and struct layouts. Plain C++, so that it is tested
// where there is no nvcc.
#include <cstddef>

#include "api.h"
#include "choose.h"

using namespace kvq::gpu;

namespace {

template <int kCount>
int32_t copy(const int64_t (&values)[kCount], int64_t* out, int32_t room) {
  for (int i = 0; i < kCount && i < room; ++i) out[i] = values[i];
  return kCount;
}

}  // namespace

int64_t kvq_cuda_plan(AttendParams* p, int64_t max_seq_len, int32_t multiprocessors) {
  const int group = p->num_heads / p->cache.num_kv_heads;
  const int rows = group * (p->max_query_len > 0 ? p->max_query_len : 1);
  const Choice choice = choose(p->cache.format, p->cache.head_size, rows);
  p->tile_tokens = choice.tile_tokens;
  p->tile_rows = choice.tile_rows;
  const int64_t row_tiles = (rows + choice.tile_rows - 1) / choice.tile_rows;
  const int64_t blocks = p->num_seqs * row_tiles * p->cache.num_kv_heads;
  p->splits = splits_for(blocks, max_seq_len, int64_t{multiprocessors} * choice.blocks);
  if (p->splits == 1) return 0;
  return p->num_tokens * p->num_heads * p->splits * (p->cache.head_size + 2) * 4;
}

int32_t kvq_cuda_layout(int32_t which, int64_t* offsets, int32_t room) {
#define AT(field) static_cast<int64_t>(offsetof(StoreParams, field))
  static const int64_t store[] = {sizeof(StoreParams), AT(key),        AT(value),
                                  AT(cache),           AT(key_scale),  AT(value_scale),
                                  AT(slots),           AT(num_tokens), AT(recent),
                                  AT(recent_slots),    AT(activation), AT(aligned)};
#undef AT
#define AT(field) static_cast<int64_t>(offsetof(AttendParams, field))
  static const int64_t attend[] = {sizeof(AttendParams),
                                   AT(query),
                                   AT(out),
                                   AT(cache),
                                   AT(key_scale),
                                   AT(value_scale),
                                   AT(block_table),
                                   AT(seq_lens),
                                   AT(query_start),
                                   AT(alibi_slopes),
                                   AT(sinks),
                                   AT(workspace),
                                   AT(block_table_stride),
                                   AT(num_tokens),
                                   AT(recent),
                                   AT(recent_table),
                                   AT(recent_table_stride),
                                   AT(num_seqs),
                                   AT(num_heads),
                                   AT(max_query_len),
                                   AT(window),
                                   AT(scale),
                                   AT(softcap),
                                   AT(causal),
                                   AT(activation),
                                   AT(splits),
                                   AT(tile_tokens),
                                   AT(tile_rows)};
#undef AT
  return which == 0 ? copy(store, offsets, room) : copy(attend, offsets, room);
}
