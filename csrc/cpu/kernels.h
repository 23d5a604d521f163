// What a CPU kernel needs to know, in plain pointers, and the table one ISA fills.
#pragma once

#include <cstdint>

#include "workspace.h"

namespace kvq {

constexpr int kMaxHead = 512;  // channels

enum class Activation : int { kBFloat16 = 0, kHalf = 1, kFloat = 2 };

// One strided activation tensor [tokens, heads, D]; the last dim is contiguous.
struct Rows {
  const void* data;
  Activation type;
  long token_stride, head_stride;  // in elements
};

// The paged cache: page(block, head) = data + block * block_stride + head * head_stride (bytes).
struct Cache {
  uint8_t* data;
  long block_stride, head_stride;
  long block_size, num_kv_heads, head_size;
};

// Static scale of one stream, each [H, D] fp32 or null (dynamic formats; no zero points).
struct StaticScale {
  const float* factor;  // store: 1 / scale; attend: scale
  const float* zero_point;
};

struct StoreParams {
  Rows key, value;
  Cache cache;
  const int64_t* slots;  // [tokens]; negative ones are skipped
  long num_tokens;
  int format;  // row of kFormats
  StaticScale key_scale, value_scale;
  // Formats with recent rows: where all rows go first, and where in it. `cache` gets sealed groups.
  Cache recent;
  const int64_t* recent_slots;  // [tokens]
};

struct AttendParams {
  Rows query;
  void* out;
  long out_token_stride, out_head_stride;  // in elements, same type as query
  Cache cache;
  const int32_t* block_table;  // [seqs, blocks]
  long block_table_stride;
  const int32_t* seq_lens;     // [seqs] tokens in the cache, this step's included
  const int32_t* query_start;  // [seqs + 1] prefix sums of query lengths
  long num_seqs, num_heads;
  int format;
  float scale, softcap;  // softcap 0: none
  long window;           // 0: none; else a token sees itself and the window - 1 before it
  bool causal;
  const float* alibi_slopes;  // [heads] or null
  const float* sinks;         // [heads] or null
  StaticScale key_scale, value_scale;
  Cache recent;  // formats with recent rows: positions from sealed_before() of a query's on
  const int32_t* recent_table;  // [seqs, blocks]
  long recent_table_stride;
};

// What the binding lends to a call, so that kernels need no thread pool of their own. The memory is
// the calling thread's: callers do not meet in it, and the pool's threads own none.
struct Runtime {
  // body(context, worker, index) for each index of [0, n). Those of one worker, of
  // [0, num_threads), run one after the other. Bodies must not throw.
  using Body = void (*)(void* context, int worker, long index);
  void (*parallel_for)(long n, int num_threads, Body body, void* context);
  int num_threads;
  Workspace& memory;
};

// One compiled ISA.
struct KernelTable {
  const char* name;
  void (*store)(const StoreParams&, const Runtime&);
  void (*attend)(const AttendParams&, const Runtime&);
  uint32_t (*read)(const uint8_t* data, long size, const Runtime&);  // for measuring bandwidth
};

extern const KernelTable kGenericKernels;
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx2VnniKernels;
extern const KernelTable kAvx512Kernels;
extern const KernelTable kAvx512Bf16Kernels;
extern const KernelTable kAmxKernels;
extern const KernelTable kNeonDotprodKernels;
extern const KernelTable kAmxEmulatedKernels;  // kAmxKernels with the tiles in plain C++

// The i-th table of this build, best first, for any processor; null past the end.
const KernelTable* compiled_kernels(int i);
// Tables this processor can run, best first, ended by null.
const KernelTable* const* supported_kernels();
// The table in use: the best one, or what KVQ_ISA or use_kernels() asked for.
const KernelTable& current_kernels();
// By name: a supported table, or "amx_emulated", which is for tests and listed nowhere.
bool use_kernels(const char* name);

}  // namespace kvq
