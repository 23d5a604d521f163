// Tensors to plain pointers: the CPU side of the torch operators. checks.h looks at shapes, dtypes
// and strides; what only the data tells is checked here, where it costs nothing. No kernel logic
// lives here.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>

#include "checks.h"
#include "kernels.h"

namespace kvq {
namespace {

// torch's pool, with indices handed out one at a time: units differ in cost.
void parallel_for(long n, int num_threads, Runtime::Body body, void* context) {
  if (num_threads <= 1 || n <= 1) {
    for (long i = 0; i < n; ++i) body(context, 0, i);
    return;
  }
  std::atomic<long> next{0};
  torch::stable::parallel_for(0, num_threads < n ? num_threads : n, 1, [&](int64_t w, int64_t) {
    for (long i = next.fetch_add(1); i < n; i = next.fetch_add(1)) {
      body(context, static_cast<int>(w), i);
    }
  });
}

Runtime runtime() {
  thread_local Workspace memory;
  return {parallel_for, static_cast<int>(torch::stable::get_num_threads()), memory};
}

void store(const Tensor& key, const Tensor& value, const Tensor& cache, const Tensor& slots,
           int64_t format, const OptionalTensor& key_inverse, const OptionalTensor& key_zero,
           const OptionalTensor& value_inverse, const OptionalTensor& value_zero,
           const OptionalTensor& recent_cache, const OptionalTensor& recent_slots) {
  const Format& f = format_of(format);
  StoreParams p{};
  p.format = static_cast<int>(format);
  p.key = rows_of(key);
  p.value = rows_of(value);
  check_same(key, value);
  p.cache = cache_of(cache, f, key.size(2));
  check_apart(cache);
  KVQ_CHECK(key.size(1) == p.cache.num_kv_heads, "rows and cache differ in kv heads");
  p.slots = vector_of<int64_t>(slots, ScalarType::Long);
  p.num_tokens = slots.size(0);
  KVQ_CHECK(p.num_tokens <= key.size(0) && p.num_tokens <= kMaxInt, "more slots than rows");
  p.key_scale = static_scale(f.key, key_inverse, key_zero, p.cache);
  p.value_scale = static_scale(f.value, value_inverse, value_zero, p.cache);
  const int64_t num_slots = cache.size(0) * p.cache.block_size;
  for (long t = 0; t < p.num_tokens; ++t) {
    KVQ_CHECK(p.slots[t] < num_slots, "slot outside the cache");
  }
  check_recent(f, recent_cache, recent_slots);
  if (f.recent) {
    p.recent = cache_of(*recent_cache, kFormats[kRecentFormat], key.size(2), kSealed);
    check_apart(*recent_cache);
    KVQ_CHECK(p.recent.num_kv_heads == p.cache.num_kv_heads, "the caches differ in kv heads");
    p.recent_slots = vector_of<int64_t>(*recent_slots, ScalarType::Long);
    KVQ_CHECK(recent_slots->size(0) == p.num_tokens, "slots and recent slots differ in number");
    const int64_t num_recent = recent_cache->size(0) * p.recent.block_size;
    for (long t = 0; t < p.num_tokens; ++t) {
      const int64_t slot = p.slots[t], recent = p.recent_slots[t];
      KVQ_CHECK(recent < num_recent, "recent slot outside the cache");
      KVQ_CHECK(slot < 0 || recent < 0 || (slot - recent) % kSealed == 0,
                "slots and recent slots must agree modulo 32");
    }
  }
  current_kernels().store(p, runtime());
}

void attend(const Tensor& out, const Tensor& query, const Tensor& cache, const Tensor& block_table,
            const Tensor& seq_lens, const Tensor& query_start, int64_t format, double scale,
            const OptionalTensor& key_scale, const OptionalTensor& key_zero,
            const OptionalTensor& value_scale, const OptionalTensor& value_zero, bool causal,
            int64_t window, double softcap, const OptionalTensor& alibi_slopes,
            const OptionalTensor& sinks, const OptionalTensor& recent_cache,
            const OptionalTensor& recent_table) {
  const Format& f = format_of(format);
  AttendParams p{};
  p.format = static_cast<int>(format);
  p.query = rows_of(query);
  const Rows to = rows_of(out);
  check_same(query, out);
  check_apart(out);
  check_in_place(out, query);
  p.out = out.data_ptr();
  p.out_token_stride = to.token_stride;
  p.out_head_stride = to.head_stride;
  p.cache = cache_of(cache, f, query.size(2));
  p.num_heads = query.size(1);
  KVQ_CHECK(p.num_heads % p.cache.num_kv_heads == 0, "query heads must divide into kv heads");
  KVQ_CHECK(query.size(0) <= kMaxInt && p.num_heads <= kMaxInt &&
                query.size(0) * (p.num_heads / p.cache.num_kv_heads) <= kMaxInt,
            "too many rows of query");
  p.block_table = table_of(block_table);
  p.block_table_stride = block_table.stride(0);
  p.seq_lens = vector_of<int32_t>(seq_lens, ScalarType::Int);
  p.query_start = vector_of<int32_t>(query_start, ScalarType::Int);
  p.num_seqs = seq_lens.size(0);
  KVQ_CHECK(p.num_seqs < query_start.size(0) && p.num_seqs <= block_table.size(0),
            "fewer query starts or rows of the block table than sequences need");
  p.key_scale = static_scale(f.key, key_scale, key_zero, p.cache);
  p.value_scale = static_scale(f.value, value_scale, value_zero, p.cache);
  p.alibi_slopes = per_head(alibi_slopes, p.num_heads);
  p.sinks = per_head(sinks, p.num_heads);
  KVQ_CHECK(softcap == 0.0 || (softcap >= kLeastSoftcap && softcap <= kMostSoftcap),
            "softcap must be 0 (none) or between 0.0001 and 10,000");
  p.scale = static_cast<float>(scale);
  p.softcap = static_cast<float>(softcap);
  p.window = window < kMaxInt ? window : kMaxInt;  // longer than any sequence
  p.causal = causal;
  check_recent(f, recent_cache, recent_table);
  int64_t recent_room = kMaxInt;
  if (f.recent) {
    KVQ_CHECK(causal, "formats with recent rows serve causal attention only");
    p.recent = cache_of(*recent_cache, kFormats[kRecentFormat], query.size(2), kSealed);
    KVQ_CHECK(p.recent.num_kv_heads == p.cache.num_kv_heads, "the caches differ in kv heads");
    p.recent_table = table_of(*recent_table);
    p.recent_table_stride = recent_table->stride(0);
    KVQ_CHECK(p.num_seqs <= recent_table->size(0), "fewer rows of the block table than sequences");
    recent_room = recent_table->size(1) * p.recent.block_size;
  }
  for (long i = 0; i < p.num_seqs; ++i) {
    KVQ_CHECK(p.seq_lens[i] <= recent_room, "sequence longer than its row of the recent table");
    KVQ_CHECK(0 <= p.seq_lens[i] && p.seq_lens[i] <= block_table.size(1) * p.cache.block_size,
              "sequence longer than its row of the block table");
    KVQ_CHECK(0 <= p.query_start[i] && p.query_start[i] <= p.query_start[i + 1] &&
                  p.query_start[i + 1] <= query.size(0),
              "query_start_loc does not describe rows of query");
    check_blocks(p, i, cache.size(0), f.recent ? recent_cache->size(0) : 0);
  }
  current_kernels().attend(p, runtime());
}

int64_t read_probe(const Tensor& data) {
  KVQ_CHECK(data.is_contiguous() && data.scalar_type() == ScalarType::Byte,
            "read_probe reads contiguous uint8");
  return current_kernels().read(static_cast<const uint8_t*>(data.data_ptr()), data.numel(),
                                runtime());
}

}  // namespace
}  // namespace kvq

STABLE_TORCH_LIBRARY_IMPL(kvq, CPU, m) {
  m.impl("store", TORCH_BOX(&kvq::store));
  m.impl("attend", TORCH_BOX(&kvq::attend));
  m.impl("read_probe", TORCH_BOX(&kvq::read_probe));
}
