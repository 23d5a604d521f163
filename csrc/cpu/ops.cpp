// Tensors to plain pointers: the CPU side of the torch operators. Shapes, dtypes and strides were
// checked by kvq_plugin/ops.py, which also words the errors; what only the data tells is checked
// here, where it costs nothing. No kernel logic lives here.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <optional>

#include "kernels.h"

namespace kvq {
namespace {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

Activation activation(const Tensor& t) {
  switch (t.scalar_type()) {
    case torch::headeronly::ScalarType::BFloat16:
      return Activation::kBFloat16;
    case torch::headeronly::ScalarType::Half:
      return Activation::kHalf;
    case torch::headeronly::ScalarType::Float:
      return Activation::kFloat;
    default:
      STD_TORCH_CHECK(false, "kvq: activations must be bfloat16, float16 or float32");
  }
}

Rows rows(const Tensor& t) { return {t.data_ptr(), activation(t), t.stride(0), t.stride(1)}; }

const float* floats(const OptionalTensor& t) {
  return t ? static_cast<const float*>(t->data_ptr()) : nullptr;
}

Cache cache_of(const Tensor& cache, long head_size) {
  return {static_cast<uint8_t*>(cache.data_ptr()),
          cache.stride(0),
          cache.stride(1),
          cache.size(2),
          cache.size(1),
          head_size};
}

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
           const OptionalTensor& value_inverse, const OptionalTensor& value_zero) {
  StoreParams p{};
  p.key = rows(key);
  p.value = rows(value);
  p.cache = cache_of(cache, key.size(2));
  p.slots = static_cast<const int64_t*>(slots.data_ptr());
  p.num_tokens = slots.size(0);
  p.format = static_cast<int>(format);
  for (long t = 0; t < p.num_tokens; ++t) {
    STD_TORCH_CHECK(p.slots[t] < cache.size(0) * cache.size(2), "kvq: slot outside the cache");
  }
  p.key_scale = {floats(key_inverse), floats(key_zero)};
  p.value_scale = {floats(value_inverse), floats(value_zero)};
  current_kernels().store(p, runtime());
}

void attend(const Tensor& out, const Tensor& query, const Tensor& cache, const Tensor& block_table,
            const Tensor& seq_lens, const Tensor& query_start, int64_t format, double scale,
            const OptionalTensor& key_scale, const OptionalTensor& key_zero,
            const OptionalTensor& value_scale, const OptionalTensor& value_zero, bool causal,
            int64_t window, double softcap, const OptionalTensor& alibi_slopes,
            const OptionalTensor& sinks) {
  AttendParams p{};
  p.query = rows(query);
  p.out = out.data_ptr();
  p.out_token_stride = out.stride(0);
  p.out_head_stride = out.stride(1);
  p.cache = cache_of(cache, query.size(2));
  p.block_table = static_cast<const int32_t*>(block_table.data_ptr());
  p.block_table_stride = block_table.stride(0);
  p.seq_lens = static_cast<const int32_t*>(seq_lens.data_ptr());
  p.query_start = static_cast<const int32_t*>(query_start.data_ptr());
  p.num_seqs = seq_lens.size(0);
  for (long i = 0; i < p.num_seqs; ++i) {
    STD_TORCH_CHECK(p.seq_lens[i] <= block_table.size(1) * cache.size(2),
                    "kvq: sequence longer than its row of the block table");
    STD_TORCH_CHECK(0 <= p.query_start[i] && p.query_start[i] <= p.query_start[i + 1] &&
                        p.query_start[i + 1] <= query.size(0),
                    "kvq: query_start_loc does not describe rows of query");
  }
  p.num_heads = query.size(1);
  p.format = static_cast<int>(format);
  p.scale = static_cast<float>(scale);
  p.softcap = static_cast<float>(softcap);
  p.window = window;
  p.causal = causal;
  p.alibi_slopes = floats(alibi_slopes);
  p.sinks = floats(sinks);
  p.key_scale = {floats(key_scale), floats(key_zero)};
  p.value_scale = {floats(value_scale), floats(value_zero)};
  current_kernels().attend(p, runtime());
}

int64_t read_probe(const Tensor& data) {
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
