// Entry points that launch.
#include <utility>

#include "../formats.h"
#include "launch.h"

namespace kvq {
namespace gpu {

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
  cudaError_t error = cudaSuccess;
  const auto note = [&](cudaError_t e) { error = error == cudaSuccess ? e : error; };
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
  const auto launch = attend_of(p->cache.format, FormatRows{});
  return launch(*p, static_cast<cudaStream_t>(stream));
}

int32_t kvq_cuda_load() { return load_all(FormatRows{}); }

const char* kvq_cuda_error(int32_t error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}
