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

template <class S>
static cudaError_t launch(const AttendParams& p, cudaStream_t stream) {
  attend_kernel<S><<<p.blocks, kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

template <>
cudaError_t attend_format<KVQ_FORMAT>(const AttendParams& p, cudaStream_t stream) {
  if (p.cache.head_size > 128) return launch<Shape<KVQ_FORMAT, 256, 1>>(p, stream);
  const bool wide = p.tile_rows > 8;
  if (p.cache.head_size > 64) {
    return wide ? launch<Shape<KVQ_FORMAT, 128, 2>>(p, stream)
                : launch<Shape<KVQ_FORMAT, 128, 1>>(p, stream);
  }
  return wide ? launch<Shape<KVQ_FORMAT, 64, 2>>(p, stream)
              : launch<Shape<KVQ_FORMAT, 64, 1>>(p, stream);
}

template <>
cudaError_t load_attend<KVQ_FORMAT>() {
  const cudaError_t errors[] = {load_kernel(attend_kernel<Shape<KVQ_FORMAT, 64, 1>>),
                                load_kernel(attend_kernel<Shape<KVQ_FORMAT, 64, 2>>),
                                load_kernel(attend_kernel<Shape<KVQ_FORMAT, 128, 1>>),
                                load_kernel(attend_kernel<Shape<KVQ_FORMAT, 128, 2>>),
                                load_kernel(attend_kernel<Shape<KVQ_FORMAT, 256, 1>>)};
  for (const cudaError_t error : errors) {
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

#endif

}  // namespace gpu
}  // namespace kvq
