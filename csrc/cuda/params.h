// What a GPU kernel needs to know, in plain pointers and fixed-size integers: no torch, no CUDA
// types. kvq_plugin/kernels/structs.py mirrors these structs with ctypes; a test compares the two,
// declaration by declaration.
#pragma once

#include <cstdint>

namespace kvq {
namespace gpu {

enum class Activation : int32_t { kBFloat16 = 0, kHalf = 1, kFloat = 2 };

// One strided activation tensor [tokens, heads, D]; strides in elements, the last dim contiguous.
struct Rows {
  void* data;
  int64_t token_stride, head_stride;
};

// The paged cache in layout gpu-v1: page(block, head) = data + block * block_stride + head *
// head_stride (bytes, all multiples of 16).
struct Cache {
  uint8_t* data;
  int64_t block_stride, head_stride;
  int32_t block_size, num_kv_heads, head_size, format;  // format: row of kFormats
};

// Static scale of one stream, each [H, D] fp32 or null (dynamic formats; no zero points).
struct StaticScale {
  const float* factor;  // store: 1 / scale; attend: scale
  const float* zero_point;
};

struct StoreParams {
  Rows key, value;
  Cache cache;
  StaticScale key_scale, value_scale;
  const int64_t* slots;  // [tokens]; negative ones are skipped
  int64_t num_tokens;
  // Of formats with recent rows: where rows go; `cache` takes what is sealed.
  Cache recent;
  const int64_t* recent_slots;
  Activation activation;
  int32_t aligned;  // rows start at multiples of 16 bytes: loaded 16 bytes at a time
};

struct AttendParams {
  Rows query, out;
  Cache cache;
  StaticScale key_scale, value_scale;
  const int32_t* block_table;  // [seqs, blocks]
  const int32_t* seq_lens;     // [seqs] tokens in the cache, this step's included
  const int32_t* query_start;  // [seqs + 1] prefix sums of query lengths
  const float* alibi_slopes;   // [heads] or null
  const float* sinks;          // [heads] or null
  // plan.h's partial results, and a counter a block of those that are in: zeros before the first
  // launch, and again after each. Null if plan() wants none.
  float* workspace;
  uint32_t* counters;
  int64_t block_table_stride, num_tokens;  // num_tokens: rows of query
  // Of formats with recent rows, else null.
  Cache recent;
  const int32_t* recent_table;
  int64_t recent_table_stride;
  int32_t num_seqs, num_heads, max_query_len, window;
  float scale, softcap;  // softcap 0: none. window 0: none
  int32_t causal;
  Activation activation;
  // Filled by plan(): query heads per kv head, the tokens and rows of one tile, tiles of rows
  // abreast, and the grid's blocks.
  int32_t group, tile_tokens, tile_rows, abreast, blocks;
};

}  // namespace gpu
}  // namespace kvq
