// Entry points that launch, and the kernel that merges splits.
#include <utility>

#include "finish.h"
#include "launch.h"

namespace kvq {
namespace gpu {

template <bool kRotated>
__global__ void __launch_bounds__(kThreads) merge_kernel(const __grid_constant__ AttendParams p) {
  merge_block<Lane, kRotated>(p);
}

using Attend = cudaError_t (*)(const AttendParams&, cudaStream_t);
using Store = cudaError_t (*)(const StoreParams&, cudaStream_t);

template <int... kRows>
static Attend attend_of(int format, std::integer_sequence<int, kRows...>) {
  static const Attend table[] = {attend_format<kRows>...};
  return table[format];
}
template <int... kRows>
static Store store_of(int format, std::integer_sequence<int, kRows...>) {
  static const Store table[] = {store_format<kRows>...};
  return table[format];
}
template <int... kRows>
static cudaError_t load_all(std::integer_sequence<int, kRows...>) {
  cudaError_t error = load_kernel(merge_kernel<false>);
  const auto note = [&](cudaError_t e) { error = error == cudaSuccess ? e : error; };
  note(load_kernel(merge_kernel<true>));
  (note(load_attend<kRows>()), ...);
  (note(load_store<kRows>()), ...);
  return error;
}
using FormatRows = std::make_integer_sequence<int, kNumFormats>;

}  // namespace gpu
}  // namespace kvq

using namespace kvq::gpu;

int32_t kvq_cuda_store(const StoreParams* p, kvq_stream stream) {
  if (p->num_tokens == 0) return cudaSuccess;
  const auto launch = store_of(p->cache.format, FormatRows{});
  return launch(*p, static_cast<cudaStream_t>(stream));
}

int32_t kvq_cuda_attend(const AttendParams* p, kvq_stream stream) {
  if (p->num_seqs == 0 || p->num_tokens == 0 || p->max_query_len == 0) return cudaSuccess;
  const auto to = static_cast<cudaStream_t>(stream);
  const auto launch = attend_of(p->cache.format, FormatRows{});
  const cudaError_t error = launch(*p, to);
  if (error != cudaSuccess || p->splits == 1) return error;
  // As many blocks as rows have elements, up to a few: they read all splits of one element each.
  // Rows that are rotated back take a warp each.
  if (kvq::kFormats[p->cache.format].value.rotated) {
    const int rows = (p->tile_rows + kWarps - 1) / kWarps;
    merge_kernel<true><<<attend_grid(*p, rows), kThreads, 0, to>>>(*p);
  } else {
    const int elements = p->tile_rows * p->cache.head_size;
    const int blocks = (elements + kThreads - 1) / kThreads;
    merge_kernel<false><<<attend_grid(*p, blocks), kThreads, 0, to>>>(*p);
  }
  return cudaGetLastError();
}

int32_t kvq_cuda_load() { return load_all(FormatRows{}); }

const char* kvq_cuda_error(int32_t error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}
