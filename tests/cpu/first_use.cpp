// csrc/cpu/dispatch.cpp asked by eight threads at once, under the thread sanitizer.
#include <cstdio>
#include <thread>
#include <vector>

#include "../../csrc/cpu/kernels.h"

namespace kvq {
namespace {
void store(const StoreParams&, const Runtime&) {}
void attend(const AttendParams&, const Runtime&) {}
uint32_t read(const uint8_t*, long, const Runtime&) { return 0; }
}  // namespace
const KernelTable kGenericKernels = {"generic", store, attend, read};
const KernelTable kAvx2Kernels = {"avx2", store, attend, read};
const KernelTable kAvx2VnniKernels = {"avx2_vnni", store, attend, read};
const KernelTable kAvx512Kernels = {"avx512", store, attend, read};
const KernelTable kAvx512Bf16Kernels = {"avx512_bf16", store, attend, read};
const KernelTable kAmxKernels = {"amx", store, attend, read};
const KernelTable kAmxEmulatedKernels = {"amx_emulated", store, attend, read};
}  // namespace kvq

int main() {
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([i] {
      if (i % 2) kvq::use_kernels("generic");
      kvq::current_kernels();
    });
  }
  for (std::thread& t : threads) t.join();
  std::printf("%s\n", kvq::current_kernels().name);
  return 0;
}
