// Operator schemas, and the plain C queries that kvq_plugin/_native.py asks through ctypes.
#include <torch/csrc/stable/library.h>

#include "codec.h"
#include "cpu/kernels.h"
#include "formats.h"
#include "rotation.h"

STABLE_TORCH_LIBRARY(kvq, m) {
  m.def(
      "store(Tensor key, Tensor value, Tensor(a!) cache, Tensor slot_mapping, int format, "
      "Tensor? key_inverse, Tensor? key_zero, Tensor? value_inverse, Tensor? value_zero, "
      "Tensor(b!)? recent_cache=None, Tensor? recent_slot_mapping=None) -> ()");
  m.def(
      "attend(Tensor(a!) out, Tensor query, Tensor cache, Tensor block_table, Tensor seq_lens, "
      "Tensor query_start_loc, int format, float scale, Tensor? key_scale, Tensor? key_zero, "
      "Tensor? value_scale, Tensor? value_zero, bool causal, int window, float softcap, "
      "Tensor? alibi_slopes, Tensor? sinks, Tensor? recent_cache=None, "
      "Tensor? recent_block_table=None) -> ()");
  m.def("read_probe(Tensor data) -> int");
}

#define KVQ_EXPORT extern "C" __attribute__((visibility("default")))

KVQ_EXPORT const char* kvq_current_isa() { return kvq::current_kernels().name; }
KVQ_EXPORT int kvq_use_isa(const char* name) { return kvq::use_kernels(name); }

// The i-th supported ISA, best first; null past the end.
KVQ_EXPORT const char* kvq_supported_isa(int i) {
  const kvq::KernelTable* const* t = kvq::supported_kernels();
  for (int n = 0; t[n]; ++n) {
    if (n == i) return t[n]->name;
  }
  return nullptr;
}

// The i-th ISA of this build, whether or not the processor has it, best first; null past the end.
KVQ_EXPORT const char* kvq_compiled_isa(int i) {
  const kvq::KernelTable* table = kvq::compiled_kernels(i);
  return table ? table->name : nullptr;
}

// Row i of the format table: its name (null past the end), and code, per-token flag, rotated flag
// and grouping of key and value, and whether it has recent rows, in out.
KVQ_EXPORT const char* kvq_format_row(int i, int* out) {
  if (i < 0 || i >= kvq::kNumFormats) return nullptr;
  const kvq::Format& f = kvq::kFormats[i];
  for (const kvq::Stream& s : {f.key, f.value}) {
    *out++ = static_cast<int>(s.code);
    *out++ = s.per_token;
    *out++ = s.rotated;
    *out++ = static_cast<int>(s.grouping);
  }
  *out = f.recent;
  return f.name;
}

// What rotate() multiplies the channels of a row by before it mixes them, and the gain of products.
KVQ_EXPORT float kvq_rotation(int head_size, float* factors) {
  for (int i = 0; i < head_size; ++i) factors[i] = kvq::rotation_factor(i, head_size);
  return kvq::rotation_gain(head_size);
}

// Of a row of the format table; false when there is none.
KVQ_EXPORT int kvq_page_layout(int format, long head_size, long block_size, long* out) {
  if (format < 0 || format >= kvq::kNumFormats) return false;
  const kvq::PageLayout l = kvq::page_layout(kvq::kFormats[format], head_size, block_size);
  out[0] = l.key_codes;
  out[1] = l.value_codes;
  out[2] = l.key_metadata;
  out[3] = l.value_metadata;
  out[4] = l.first;
  out[5] = l.size;
  return true;
}

KVQ_EXPORT long kvq_max_head_size() { return kvq::kMaxHead; }

// The codec header itself, code by code: values -> the unsigned codes a page holds, and back.
// fp8_e4m3fnuz has no CPU format, so this is where it is compiled and tested.
namespace {
template <kvq::Code C>
void convert(float* values, uint8_t* codes, long n, bool encode) {
  for (long i = 0; i < n; ++i) {
    if (encode) {
      codes[i] = kvq::encode<C>(values[i]);
    } else {
      values[i] = kvq::Codec<C>::decode(codes[i]);
    }
  }
}
}  // namespace

KVQ_EXPORT void kvq_convert(int code, float* values, uint8_t* codes, long n, int encode) {
  switch (static_cast<kvq::Code>(code)) {
    case kvq::Code::kInt8:
      return convert<kvq::Code::kInt8>(values, codes, n, encode);
    case kvq::Code::kInt4:
      return convert<kvq::Code::kInt4>(values, codes, n, encode);
    case kvq::Code::kFp8E4M3:
      return convert<kvq::Code::kFp8E4M3>(values, codes, n, encode);
    case kvq::Code::kFp8E5M2:
      return convert<kvq::Code::kFp8E5M2>(values, codes, n, encode);
    case kvq::Code::kFp8E4M3Fnuz:
      return convert<kvq::Code::kFp8E4M3Fnuz>(values, codes, n, encode);
    case kvq::Code::kInt3:
      return convert<kvq::Code::kInt3>(values, codes, n, encode);
    case kvq::Code::kInt2:
      return convert<kvq::Code::kInt2>(values, codes, n, encode);
  }
}

// The same of lite scales: values of 0 and more -> bytes, and back.
KVQ_EXPORT void kvq_convert_scales(float* values, uint8_t* bytes, long n, int encode) {
  for (long i = 0; i < n; ++i) {
    if (encode) {
      bytes[i] = static_cast<uint8_t>(kvq::LiteScale::encode<float, uint32_t>(values[i]));
    } else {
      values[i] = kvq::LiteScale::decode(bytes[i]);
    }
  }
}
