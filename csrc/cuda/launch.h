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

inline dim3 attend_grid(const AttendParams& p, int y) {
  const int rows = p.max_query_len * (p.num_heads / p.cache.num_kv_heads);
  const int row_tiles = (rows + p.tile_rows - 1) / p.tile_rows;
  return dim3(row_tiles * p.cache.num_kv_heads, y, p.num_seqs);
}

}  // namespace gpu
}  // namespace kvq
