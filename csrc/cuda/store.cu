// The kernels that write pages, of every format. Compile with -fmad=false (store.h says why).
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
cudaError_t store_format(const StoreParams& p, cudaStream_t stream) {
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
cudaError_t load_store() {
  if constexpr (kFormats[kFormatRow].recent) {
    return load_kernel(seal_kernel<kFormatRow>);
  } else {
    return load_kernel(store_kernel<kFormatRow>);
  }
}

#define KVQ_STORE(row)                                                      \
  template cudaError_t store_format<row>(const StoreParams&, cudaStream_t); \
  template cudaError_t load_store<row>();
KVQ_STORE(0)
KVQ_STORE(1)
KVQ_STORE(2)
KVQ_STORE(3)
KVQ_STORE(4)
KVQ_STORE(5)
KVQ_STORE(6)
KVQ_STORE(7)
KVQ_STORE(8)
KVQ_STORE(9)
static_assert(kNumFormats == 10, "name the new formats' rows above");

}  // namespace gpu
}  // namespace kvq
