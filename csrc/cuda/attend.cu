// Attention kernels of one format: -DKVQ_FORMAT=<row of kFormats>. -DKVQ_HEAD=<class> compiles
// those of one class of head sizes only, for tests that look at the machine code.
#include "choose.h"
#include "launch.h"
#include "sealed.h"

namespace kvq {
namespace gpu {

template <class S>
__global__ void __launch_bounds__(kThreads, S::kBlocks)
    attend_kernel(const __grid_constant__ AttendParams p) {
  __shared__ Shared<S> shared;
  attend_block<Lane, S>(p, shared);
}

#if defined(KVQ_HEAD)

template __global__ void attend_kernel<Shape<KVQ_FORMAT, KVQ_HEAD, 1>>(
    const __grid_constant__ AttendParams);
#if KVQ_HEAD <= 128
template __global__ void attend_kernel<Shape<KVQ_FORMAT, KVQ_HEAD, 2>>(
    const __grid_constant__ AttendParams);
#endif

#else

template <>
cudaError_t attend_format<KVQ_FORMAT>(const AttendParams& p, cudaStream_t stream) {
  return with_shape<KVQ_FORMAT>(p.cache.head_size, p.tile_rows > 8, [&](auto shape) {
    attend_kernel<decltype(shape)><<<p.blocks, kThreads, 0, stream>>>(p);
    return cudaGetLastError();
  });
}

template <>
cudaError_t load_attend<KVQ_FORMAT>() {
  cudaError_t error = cudaSuccess;
  for (const int head_size : {64, 128, 256}) {
    for (const bool wide : {false, true}) {
      if (error != cudaSuccess) return error;
      error = with_shape<KVQ_FORMAT>(
          head_size, wide, [](auto shape) { return load_kernel(attend_kernel<decltype(shape)>); });
    }
  }
  return error;
}

#endif

}  // namespace gpu
}  // namespace kvq
