// One thread of a warp: the operations that kernels are written in. `Lane` does them with the GPU's
// instructions; tests/cuda/host_lane.h does the same on a CPU, so that the kernels, fragment
// layouts included, run under g++ and its sanitizers.
#pragma once

#include "../codec.h"
#include "params.h"

#if defined(__CUDACC__)
#define KVQ_UNROLL _Pragma("unroll")
#define KVQ_UNROLL_BY(n) _Pragma(KVQ_STRING(unroll n))
#define KVQ_STRING(x) #x
#else
#define KVQ_UNROLL
#define KVQ_UNROLL_BY(n)
#endif

namespace kvq {
namespace gpu {
namespace {

constexpr int kWarp = 32, kWarps = 4, kThreads = kWarp * kWarps;

#if defined(__CUDACC__)

struct Lane {
  static constexpr bool kNativeFp8 =
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
      true;
#else
      false;
#endif

  static __device__ int id() { return threadIdx.x % kWarp; }
  static __device__ int warp() { return threadIdx.x / kWarp; }
  static __device__ int thread() { return threadIdx.x; }
  static __device__ int block() { return blockIdx.x; }
  static __device__ void sync() { __syncthreads(); }
  static __device__ void sync_warp() { __syncwarp(); }

  template <class T>
  static __device__ T shuffle_xor(T x, int mask) {
    return __shfl_xor_sync(0xFFFFFFFFu, x, mask);
  }

  // c += a b, a [16, 16], b [16, 8] fp16, c fp32, in the fragments of PTX's mma.m16n8k16.
  static __device__ void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                             uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }

  // An 8 x 8 matrix of halves, a row in four lanes, transposed.
  static __device__ uint32_t transpose(uint32_t x) {
    uint32_t y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
  }

  // Bytes of the cache, each read once: they would only push the block table out of L1.
  // Volatile, so that loads stay where the loop issues them: a tile ahead of their use.
  static __device__ void load(const uint8_t* from, uint32_t (&to)[4]) {
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "l"(from));
  }
  static __device__ void load(const uint8_t* from, uint32_t (&to)[2]) {
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "l"(from));
  }
  static __device__ void load(const uint8_t* from, uint32_t (&to)[1]) {
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.u32 %0, [%1];" : "=r"(to[0]) : "l"(from));
  }
  static __device__ int load_index(const int32_t* from) { return __ldg(from); }

  // Counts this block in, after what all its threads wrote before a sync(). Returns how many were
  // before it; what they wrote is there for all threads after the next sync(), by load_new().
  static __device__ uint32_t arrive(uint32_t* counter) {
    uint32_t before;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;"
                 : "=r"(before)
                 : "l"(counter)
                 : "memory");
    return before;
  }
  // Written by another block of this launch: past L1.
  static __device__ float load_new(const float* from) { return __ldcg(from); }
  static __device__ void load_new(const float* from, float (&to)[4]) {
    const float4 x = __ldcg(reinterpret_cast<const float4*>(from));
    to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
  }

  static __device__ uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
    return __byte_perm(a, b, selector);
  }

  // (a & b) | c, in one instruction although two of them are constants.
  static __device__ uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
  }

  // Two halves at a time.
  static __device__ uint32_t sub2(uint32_t a, uint32_t b) {
    uint32_t c;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
  }
  static __device__ uint32_t mul2(uint32_t a, uint32_t b) {
    uint32_t c;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
  }
  static __device__ uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
  }
  static __device__ uint32_t pack_halves(float low, float high) {
    uint32_t c;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(c) : "f"(high), "f"(low));
    return c;
  }
  static __device__ float widen(uint32_t half) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(static_cast<uint16_t>(half)));
    return x;
  }
  // The two e4m3 bytes in the low half of `bytes`.
  static __device__ uint32_t e4m3_to_halves(uint32_t bytes) {
    uint32_t c = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    const uint16_t pair = static_cast<uint16_t>(bytes);
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(c) : "h"(pair));
#endif
    return c;
  }

  static __device__ float exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
  static __device__ float log2(float x) {
    float y;
    asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
  static __device__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
  static __device__ float max(float a, float b) { return fmaxf(a, b); }
  static __device__ float min(float a, float b) { return fminf(a, b); }
  static __device__ float divide(float a, float b) { return __fdiv_rn(a, b); }
  static __device__ float multiply(float a, float b) { return __fmul_rn(a, b); }
};

#endif

// `low op high` over the lanes whose ids differ in the bits of [from, to).
template <class L, class T, class F>
KVQ_HD T reduce(T x, int from, int to, F combine) {
  for (int mask = from; mask < to; mask *= 2) x = combine(x, L::shuffle_xor(x, mask));
  return x;
}

KVQ_HD float load_activation(const void* data, Activation type, int64_t at) {
  switch (type) {
    case Activation::kBFloat16:
      return bf16_to_float(static_cast<const uint16_t*>(data)[at]);
    case Activation::kHalf:
      return half_to_float(static_cast<const uint16_t*>(data)[at]);
    default:
      return static_cast<const float*>(data)[at];
  }
}

// Elements index(i) of a row that starts at `at`, zeros from `limit` on. Their type is asked for
// once, so that all loads are under way before the first is waited for.
template <int kCount, class Index>
KVQ_HD void load_activations(const void* data, Activation type, int64_t at, int limit,
                             const Index& index, float (&x)[kCount]) {
  const auto all = [&](auto* row, const auto& convert) {
    row += at;
    KVQ_UNROLL for (int i = 0; i < kCount; ++i) {
      x[i] = convert(index(i) < limit ? row[index(i)] : decltype(row[0] + 0)(0));
    }
  };
  switch (type) {
    case Activation::kBFloat16:
      return all(static_cast<const uint16_t*>(data), [](int u) { return bf16_to_float(u); });
    case Activation::kHalf:
      return all(static_cast<const uint16_t*>(data), [](int u) { return half_to_float(u); });
    default:
      return all(static_cast<const float*>(data), [](float f) { return f; });
  }
}

KVQ_HD void save_activation(void* data, Activation type, int64_t at, float x) {
  switch (type) {
    case Activation::kBFloat16:
      static_cast<uint16_t*>(data)[at] = float_to_bf16(x);
      break;
    case Activation::kHalf:
      static_cast<uint16_t*>(data)[at] = float_to_half(x);
      break;
    default:
      static_cast<float*>(data)[at] = x;
  }
}

// By value: device code may not name a static member of a class by reference.
KVQ_HD long bytes_of(Stream s, long head_size) { return s.metadata_bytes(head_size); }

KVQ_HD int min_of(int a, int b) { return a < b ? a : b; }
KVQ_HD int max_of(int a, int b) { return a > b ? a : b; }

}  // namespace
}  // namespace gpu
}  // namespace kvq
