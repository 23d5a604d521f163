// Entry points that launch.
#include "choose.h"
#include "launch.h"

using namespace kvq::gpu;

int32_t kvq_cuda_store(const StoreParams* p, kvq_stream stream) {
  if (p->num_tokens == 0) return cudaSuccess;
  return store(*p, static_cast<cudaStream_t>(stream));
}

int32_t kvq_cuda_attend(const AttendParams* p, kvq_stream stream) {
  if (p->num_seqs == 0 || p->num_tokens == 0 || p->max_query_len == 0) return cudaSuccess;
  return with_format(p->cache.format, [&](auto row) {
    return attend_format<row.value>(*p, static_cast<cudaStream_t>(stream));
  });
}

int32_t kvq_cuda_load() {
  cudaError_t error = load_stores();
  for (int format = 0; format < kvq::kNumFormats && error == cudaSuccess; ++format) {
    error = with_format(format, [](auto row) { return load_attend<row.value>(); });
  }
  return error;
}

const char* kvq_cuda_error(int32_t error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}
