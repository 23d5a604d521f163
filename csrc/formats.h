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

enum class Code : int {
  kInt8 = 0,
  kInt4 = 1,
  kFp8E4M3 = 2,
  kFp8E5M2 = 3,
  kFp8E4M3Fnuz = 4,
  kInt3 = 5,
  kInt2 = 6
};

KVQ_CONSTEXPR int code_bits(Code c) {
  return c == Code::kInt4 ? 4 : c == Code::kInt3 ? 3 : c == Code::kInt2 ? 2 : 8;
}

// Whether some code stands for no finite number.
KVQ_CONSTEXPR bool has_nan(Code c) {
  return c == Code::kFp8E4M3 || c == Code::kFp8E5M2 || c == Code::kFp8E4M3Fnuz;
}

// Tokens that are sealed together, and channels of kTokenLite that share a scale.
constexpr int kSealed = 32;

// What a scale of sealed codes is shared by: a channel of kSealed tokens (32-bit words of fp16
// scale and min, or lite), or kSealed channels of a token (lite). kvq_plugin/codes.py says what
// lite is.
enum class Grouping : int { kNone = 0, kChannel = 1, kChannelLite = 2, kTokenLite = 3 };

// How one of K and V is stored. `per_token`: the kernel computes one scale per token and kv
// head while writing; otherwise, without a grouping, scales come from the checkpoint, expanded to
// [H, D]. `rotated`: rows are encoded after rotation.h's transform.
struct Stream {
  Code code;
  bool per_token;
  bool rotated = false;
  Grouping grouping = Grouping::kNone;

  KVQ_CONSTEXPR bool is_static() const { return !per_token && grouping == Grouping::kNone; }
  // Beside the codes, per token.
  KVQ_CONSTEXPR long metadata_bytes(long head_size) const {
    if (grouping == Grouping::kNone) return per_token ? 4 : 0;
    return head_size * (grouping == Grouping::kChannel ? 4 : 2) / kSealed;
  }
};

// `recent`: new rows go to a cache of their own, as kRecentFormat, and are sealed from there; a
// query at position p reads sealed rows before sealed_before(p), recent ones from there on.
struct Format {
  const char* name;
  Stream key;
  Stream value;
  bool recent = false;

  // Head sizes and block sizes are multiples of these.
  KVQ_CONSTEXPR int head_step() const {
    return key.code == Code::kInt3 || value.grouping == Grouping::kTokenLite ? 32 : 16;
  }
  KVQ_CONSTEXPR int block_step() const { return recent ? kSealed : 16; }
};

constexpr Format kFormats[] = {
    {"fp8_e4m3", {Code::kFp8E4M3, false}, {Code::kFp8E4M3, false}},
    {"fp8_e5m2", {Code::kFp8E5M2, false}, {Code::kFp8E5M2, false}},
    {"int8", {Code::kInt8, false}, {Code::kInt8, false}},
    {"int8_per_token_head", {Code::kInt8, true}, {Code::kInt8, true}},
    {"fp8_per_token_head", {Code::kFp8E4M3, true}, {Code::kFp8E4M3, true}},
    {"int4_per_token_head", {Code::kInt4, true, true}, {Code::kInt4, true, true}},
    {"int8_rotated", {Code::kInt8, true, true}, {Code::kInt8, true, true}},
    {"k8v4", {Code::kInt8, true, true}, {Code::kInt4, true, true}},
    {"int4",
     {Code::kInt4, false, true, Grouping::kChannel},
     {Code::kInt4, true, true},
     /*recent=*/true},
    {"k3v2",
     {Code::kInt3, false, true, Grouping::kChannelLite},
     {Code::kInt2, false, true, Grouping::kTokenLite},
     /*recent=*/true},
};
constexpr int kNumFormats = sizeof(kFormats) / sizeof(kFormats[0]);
constexpr int kNumPlainFormats = 8;  // the rows without recent rows come first
constexpr int kRecentFormat = 6;
constexpr int kWindow = 32;  // a query reads at least this many recent rows

KVQ_CONSTEXPR long sealed_before(long position) {
  const long end = position + 1 - kWindow;
  return end > 0 ? end / kSealed * kSealed : 0;
}

// Byte offsets inside one page, as kvq_plugin/layout.py defines them (both cpu-v1 and gpu-v1).
constexpr int kLanes = 16;

struct PageLayout {
  long key_codes, value_codes, key_metadata, value_metadata, first, size;
};

// The int8 copy of a page's first row: codes of K and of V, then their fp32 scales.
KVQ_CONSTEXPR long first_row_bytes(long head_size) { return 2 * head_size + 8; }

KVQ_CONSTEXPR PageLayout page_layout(Format f, long head_size, long block_size) {
  const long k = block_size * head_size * code_bits(f.key.code) / 8;
  const long v = block_size * head_size * code_bits(f.value.code) / 8;
  const long km = block_size * f.key.metadata_bytes(head_size);
  const long vm = block_size * f.value.metadata_bytes(head_size);
  const long first = k + v + km + vm;
  if (!f.recent) return {0, k, k + v, k + v + km, first, first};
  // Whole bytes per token, and whole cache lines.
  long per_token = (first + first_row_bytes(head_size) + block_size - 1) / block_size;
  while (per_token * block_size % 64 != 0) ++per_token;
  return {0, k, k + v, k + v + km, first, per_token * block_size};
}

}  // namespace
}  // namespace kvq
