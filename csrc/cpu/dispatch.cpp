// Chooses among the compiled ISAs by what the processor reports.
#include <atomic>
#include <cstring>

#if defined(KVQ_X86)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(KVQ_ARM) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "kernels.h"

namespace kvq {

// Null where a build leaves one out, as those of other processors do.
extern const KernelTable kAvx2Kernels __attribute__((weak));
extern const KernelTable kAvx2VnniKernels __attribute__((weak));
extern const KernelTable kAvx512Kernels __attribute__((weak));
extern const KernelTable kAvx512Bf16Kernels __attribute__((weak));
extern const KernelTable kAmxKernels __attribute__((weak));
extern const KernelTable kAmxEmulatedKernels __attribute__((weak));
extern const KernelTable kNeonDotprodKernels __attribute__((weak));
extern const KernelTable kGenericKernels __attribute__((weak));

namespace {

#if defined(KVQ_X86)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
// gcc 12 has no name for AVX-VNNI in __builtin_cpu_supports.
bool has_avx2_vnni() {
  unsigned a, b, c, d;
  return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & bit_AVXVNNI);
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
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // asm/prctl.h of Linux 5.16
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
// gcc's answer includes that the system saves the tiles (XCR0 bits 17 and 18).
bool has_amx() {
  return has_avx512_bf16() && __builtin_cpu_supports("amx-tile") &&
         __builtin_cpu_supports("amx-int8") && __builtin_cpu_supports("amx-bf16") &&
         may_use_tiles();
}
#elif defined(KVQ_ARM)
bool has_dotprod() {
#if defined(__linux__)
  return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
  return false;
#endif
}
#endif

// Best first; null past the last.
struct Supported {
  const KernelTable* tables[7] = {};
  Supported() {
    int n = 0;
    [[maybe_unused]] const auto add = [&](const KernelTable* table, bool runs) {
      if (table != nullptr && runs) tables[n++] = table;
    };
#if defined(KVQ_X86)
    __builtin_cpu_init();
    add(&kAmxKernels, has_amx());
    add(&kAvx512Bf16Kernels, has_avx512_bf16());
    add(&kAvx512Kernels, has_avx512());
    add(&kAvx2VnniKernels, has_avx2_vnni());
    add(&kAvx2Kernels, has_avx2());
#elif defined(KVQ_ARM)
    add(&kNeonDotprodKernels, has_dotprod());
#endif
    tables[n] = &kGenericKernels;
  }
};

// What use_kernels() chose; null: the best one.
std::atomic<const KernelTable*> g_chosen{nullptr};

}  // namespace

const KernelTable* const* supported_kernels() {
  static const Supported supported;  // by the first thread that asks; others wait for it
  return supported.tables;
}

const KernelTable* compiled_kernels(int i) {
#if defined(KVQ_X86)
  const KernelTable* all[] = {&kAmxKernels,      &kAvx512Bf16Kernels, &kAvx512Kernels,
                              &kAvx2VnniKernels, &kAvx2Kernels,       &kGenericKernels};
#elif defined(KVQ_ARM)
  const KernelTable* all[] = {&kNeonDotprodKernels, &kGenericKernels};
#else
  const KernelTable* all[] = {&kGenericKernels};
#endif
  for (const KernelTable* table : all) {
    if (table != nullptr && i-- == 0) return table;
  }
  return nullptr;
}

bool use_kernels(const char* name) {
  for (const KernelTable* const* t = supported_kernels(); *t; ++t) {
    if (std::strcmp((*t)->name, name) == 0) {
      g_chosen = *t;
      return true;
    }
  }
#if defined(KVQ_X86)
  const KernelTable* emulated = &kAmxEmulatedKernels;
  if (emulated && std::strcmp(emulated->name, name) == 0 && has_avx512_bf16()) {
    g_chosen = emulated;
    return true;
  }
#endif
  return false;
}

const KernelTable& current_kernels() {
  const KernelTable* chosen = g_chosen;
  return chosen ? *chosen : *supported_kernels()[0];
}

}  // namespace kvq
