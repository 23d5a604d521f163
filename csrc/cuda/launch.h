// What the .cu files share.
#pragma once

#include <cuda_runtime.h>

#include "api.h"

namespace kvq {
namespace gpu {

// Launches, and loading kernels onto the current device; of attention by format, because attend.cu
// is compiled once for each.
template <int kFormatRow>
cudaError_t attend_format(const AttendParams& p, cudaStream_t stream);
template <int kFormatRow>
cudaError_t load_attend();
cudaError_t store(const StoreParams& p, cudaStream_t stream);
cudaError_t load_stores();

template <class... Params>
cudaError_t load_kernel(void (*kernel)(Params...)) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, kernel);
}

}  // namespace gpu
}  // namespace kvq
