// What the .cu files share.
#pragma once

#include <cuda_runtime.h>

#include "api.h"

namespace kvq {
namespace gpu {

// Launches attention of one format; attend.cu is compiled once for each.
template <int kFormatRow>
cudaError_t attend_format(const AttendParams& p, cudaStream_t stream);
template <int kFormatRow>
cudaError_t store_format(const StoreParams& p, cudaStream_t stream);
// Loads the format's kernels onto the current device.
template <int kFormatRow>
cudaError_t load_attend();
template <int kFormatRow>
cudaError_t load_store();

template <class... Params>
cudaError_t load_kernel(void (*kernel)(Params...)) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, kernel);
}

}  // namespace gpu
}  // namespace kvq
