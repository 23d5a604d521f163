// The kernels that write pages, of every format. Compile with -fmad=false (store.h says why).
#include "choose.h"
#include "launch.h"
#include "seal.h"

namespace kvq {
namespace gpu {

template <int kFormatRow>
__global__ void __launch_bounds__(kThreads) store_kernel(const __grid_constant__ StoreParams p) {
  store_block<Lane, kFormatRow>(p);
}

template <int kFormatRow>
__global__ void __launch_bounds__(kThreads) seal_kernel(const __grid_constant__ StoreParams p) {
  seal_block<Lane, kFormatRow>(p);
}

template <int kFormatRow>
static cudaError_t store_rows(const StoreParams& p, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(2 * store_blocks(p));
  store_kernel<kFormatRow><<<blocks, kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

// Rows first, then the groups that they complete: in that order on the stream.
template <int kFormatRow>
static cudaError_t store_format(const StoreParams& p, cudaStream_t stream) {
  if constexpr (!kFormats[kFormatRow].recent) {
    return store_rows<kFormatRow>(p, stream);
  } else {
    const cudaError_t error = store_rows<kRecentFormat>(recent_rows(p), stream);
    if (error != cudaSuccess) return error;
    seal_kernel<kFormatRow><<<seal_blocks(p), kThreads, 0, stream>>>(p);
    return cudaGetLastError();
  }
}

template <int kFormatRow>
static cudaError_t load_store() {
  if constexpr (kFormats[kFormatRow].recent) {
    return load_kernel(seal_kernel<kFormatRow>);
  } else {
    return load_kernel(store_kernel<kFormatRow>);
  }
}

cudaError_t store(const StoreParams& p, cudaStream_t stream) {
  return with_format(p.cache.format, [&](auto row) { return store_format<row.value>(p, stream); });
}

cudaError_t load_stores() {
  cudaError_t error = cudaSuccess;
  for (int format = 0; format < kNumFormats && error == cudaSuccess; ++format) {
    error = with_format(format, [](auto row) { return load_store<row.value>(); });
  }
  return error;
}

}  // namespace gpu
}  // namespace kvq
