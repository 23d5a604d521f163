// The library's entry points, called from kvq_plugin/kernels/cuda.py with ctypes. Each returns a
// cudaError_t (0: good), launches on the stream it is given, and neither waits nor allocates, so
// that calls can be captured in a CUDA graph.
#pragma once

#include "params.h"

#define KVQ_EXPORT extern "C" __attribute__((visibility("default")))

using kvq_stream = void*;  // a cudaStream_t

// Blocks, tiles and workspace of a call whose shapes are filled in, on `multiprocessors` of them;
// `max_seq_len` bounds seq_lens. Returns the bytes that p->workspace must hold; 0: neither it nor
// p->counters, of which there is one a block otherwise, is looked at.
KVQ_EXPORT int64_t kvq_cuda_plan(kvq::gpu::AttendParams* p, int64_t max_seq_len,
                                 int32_t multiprocessors);
// Loads all kernels onto the current device, which the first launch of each would do otherwise, and
// must not do while a graph is captured.
KVQ_EXPORT int32_t kvq_cuda_load();
KVQ_EXPORT int32_t kvq_cuda_store(const kvq::gpu::StoreParams* p, kvq_stream stream);
KVQ_EXPORT int32_t kvq_cuda_attend(const kvq::gpu::AttendParams* p, kvq_stream stream);
KVQ_EXPORT const char* kvq_cuda_error(int32_t error);
