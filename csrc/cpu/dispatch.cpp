// Chooses among the compiled ISAs by what the processor reports.
#include <cstdlib>
#include <cstring>

#if defined(KVQ_X86)
#include <cpuid.h>
#endif
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"

namespace kvq {
namespace {

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
// gcc 12 has no name for AVX-VNNI in __builtin_cpu_supports.
bool has_avx2_vnni() {
#if defined(KVQ_X86)
  unsigned a, b, c, d;
  return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & bit_AVXVNNI);
#else
  return false;
#endif
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}
bool has_avx512_bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("avx512vbmi");
}

// Linux gives a process the 8 KB of tile registers when it asks; where that is refused, by a
// sandbox for one, the first use of a tile would be an illegal instruction.
bool may_use_tiles() {
#if defined(__linux__) && defined(__x86_64__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // asm/prctl.h of Linux 5.16
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
// gcc's answer includes that the system saves the tiles (XCR0 bits 17 and 18).
bool has_amx() {
  return has_avx512_bf16() && __builtin_cpu_supports("amx-tile") &&
         __builtin_cpu_supports("amx-int8") && may_use_tiles();
}

const KernelTable* g_supported[7];
const KernelTable* g_current = nullptr;

}  // namespace

const KernelTable* const* supported_kernels() {
  if (!g_supported[0]) {
    __builtin_cpu_init();
    int n = 0;
#if defined(KVQ_X86)
    if (has_amx()) g_supported[n++] = &kAmxKernels;
    if (has_avx512_bf16()) g_supported[n++] = &kAvx512Bf16Kernels;
    if (has_avx512()) g_supported[n++] = &kAvx512Kernels;
    if (has_avx2_vnni()) g_supported[n++] = &kAvx2VnniKernels;
    if (has_avx2()) g_supported[n++] = &kAvx2Kernels;
#endif
    g_supported[n] = &kGenericKernels;
  }
  return g_supported;
}

bool use_kernels(const char* name) {
  for (const KernelTable* const* t = supported_kernels(); *t; ++t) {
    if (std::strcmp((*t)->name, name) == 0) {
      g_current = *t;
      return true;
    }
  }
#if defined(KVQ_X86)
  if (std::strcmp(kAmxEmulatedKernels.name, name) == 0 && has_avx512_bf16()) {
    g_current = &kAmxEmulatedKernels;
    return true;
  }
#endif
  return false;
}

const KernelTable& current_kernels() {
  if (!g_current) g_current = supported_kernels()[0];
  return *g_current;
}

}  // namespace kvq
