// The format table, mirror of kvq_plugin/formats.py; tests/test_contract.py compares the two.
// Everything has internal linkage, as in codec.h and for its reason.
#pragma once

#include <cstddef>

#if defined(__CUDACC__)
#define KVQ_CONSTEXPR constexpr __host__ __device__
#else
#define KVQ_CONSTEXPR constexpr
#endif

namespace kvq {
namespace {

enum class Code : int { kInt8 = 0, kInt4 = 1, kFp8E4M3 = 2, kFp8E5M2 = 3, kFp8E4M3Fnuz = 4 };

KVQ_CONSTEXPR int code_bits(Code c) { return c == Code::kInt4 ? 4 : 8; }

// How one of K and V is stored. `per_token`: the kernel computes one scale per token and kv
// head while writing; otherwise scales come from the checkpoint, expanded to [H, D]. `rotated`:
// rows are encoded after rotation.h's transform.
struct Stream {
  Code code;
  bool per_token;
  bool rotated = false;
  KVQ_CONSTEXPR int metadata_bytes() const { return per_token ? 4 : 0; }
};

struct Format {
  const char* name;
  Stream key;
  Stream value;
};

constexpr Format kFormats[] = {
    {"fp8_e4m3", {Code::kFp8E4M3, false}, {Code::kFp8E4M3, false}},
    {"fp8_e5m2", {Code::kFp8E5M2, false}, {Code::kFp8E5M2, false}},
    {"int8", {Code::kInt8, false}, {Code::kInt8, false}},
    {"int8_per_token_head", {Code::kInt8, true}, {Code::kInt8, true}},
    {"fp8_per_token_head", {Code::kFp8E4M3, true}, {Code::kFp8E4M3, true}},
    {"int4_per_token_head", {Code::kInt4, true, true}, {Code::kInt4, true, true}},
};
constexpr int kNumFormats = sizeof(kFormats) / sizeof(kFormats[0]);

// Byte offsets inside one page, as kvq_plugin/layout.py defines them (both cpu-v1 and gpu-v1).
constexpr int kLanes = 16;

struct PageLayout {
  long key_codes, value_codes, key_metadata, value_metadata, size;
};

KVQ_CONSTEXPR PageLayout page_layout(Format f, long head_size, long block_size) {
  const long k = block_size * head_size * code_bits(f.key.code) / 8;
  const long v = block_size * head_size * code_bits(f.value.code) / 8;
  const long km = block_size * f.key.metadata_bytes();
  const long vm = block_size * f.value.metadata_bytes();
  return {0, k, k + v, k + v + km, k + v + km + vm};
}

}  // namespace
}  // namespace kvq
