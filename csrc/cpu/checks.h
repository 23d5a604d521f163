// What kernels rely on, so that no call of torch.ops.kvq, which is public, leaves its tensors. For
// users of kvq_plugin.ops it is ops.py that words the errors.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "../formats.h"
#include "kernels.h"

#define KVQ_CHECK(condition, what) STD_TORCH_CHECK(condition, "kvq: " what)

namespace kvq {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kMaxInt = 0x7FFFFFFF;

// fp32 holds softcap * tanh(score / softcap) to 4e-4 at the largest one; at 10^8 it was noise, and
// at 10^300 or 10^-40 no number.
constexpr double kLeastSoftcap = 1e-4, kMostSoftcap = 1e4;

const Format& format_of(int64_t format) {
  KVQ_CHECK(0 <= format && format < kNumFormats, "unknown format");
  return kFormats[format];
}

// [tokens, heads, D]; D contiguous.
Rows rows_of(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  KVQ_CHECK(t.dim() == 3 && t.stride(2) == 1,
            "rows must be [tokens, heads, head size] with contiguous head size");
  KVQ_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half || type == ScalarType::Float,
            "activations must be bfloat16, float16 or float32");
  return {t.data_ptr(),
          type == ScalarType::BFloat16 ? Activation::kBFloat16
          : type == ScalarType::Half   ? Activation::kHalf
                                       : Activation::kFloat,
          t.stride(0), t.stride(1)};
}

void check_same(const Tensor& a, const Tensor& b) {
  KVQ_CHECK(b.dim() == 3 && a.scalar_type() == b.scalar_type() && a.size(0) == b.size(0) &&
                a.size(1) == b.size(1) && a.size(2) == b.size(2),
            "shapes and dtypes of a pair of activations must agree");
}

// Of what is written: threads, and rows of one thread, would write the same places in any order.
void check_apart(const Tensor& written) {
  for (int64_t i = 0; i < written.dim(); ++i) {
    KVQ_CHECK(written.size(i) < 2 || written.stride(i) != 0,
              "what is written must not repeat memory (expand)");
  }
}

// Outputs may take the place of their own queries, which nothing else reads, but not of others'.
// As torch's own operators, this asks tensors without gaps only.
void check_in_place(const Tensor& out, const Tensor& query) {
  if (out.data_ptr() == query.data_ptr() || !out.is_contiguous() || !query.is_contiguous()) return;
  const char* const a = static_cast<const char*>(out.data_ptr());
  const char* const b = static_cast<const char*>(query.data_ptr());
  const int64_t bytes = out.numel() * (out.scalar_type() == ScalarType::Float ? 4 : 2);
  KVQ_CHECK(a + bytes <= b || b + bytes <= a, "out may be query, but not overlap other rows of it");
}

// [blocks, kv heads, block size, bytes per token]; pages contiguous, their tokens a multiple of
// `step`.
Cache cache_of(const Tensor& t, const Format& format, int64_t head_size, int step = kLanes) {
  KVQ_CHECK(head_size % format.head_step() == 0 && 0 < head_size && head_size <= kMaxHead,
            "head size must be a multiple of 16, or of what the format asks, up to 512");
  KVQ_CHECK(t.dim() == 4 && t.scalar_type() == ScalarType::Byte, "cache must be uint8, rank 4");
  const int64_t block_size = t.size(2), bytes = t.size(3), heads = t.size(1);
  KVQ_CHECK(block_size % format.block_step() == 0 && block_size % step == 0 && 0 < block_size &&
                block_size <= kMaxInt,
            "block size must be a multiple of 16, of 32 with recent rows");
  const int64_t page = page_layout(format, head_size, block_size).size;
  KVQ_CHECK(bytes * block_size == page && t.stride(3) == 1 && t.stride(2) == bytes,
            "cache has pages of another format or head size, or not contiguous ones");
  KVQ_CHECK(0 < heads && heads <= kMaxInt, "cache must have kv heads");
  return {
      static_cast<uint8_t*>(t.data_ptr()), t.stride(0), t.stride(1), block_size, heads, head_size};
}

template <class T>
const T* vector_of(const Tensor& t, ScalarType type) {
  KVQ_CHECK(t.dim() == 1 && t.scalar_type() == type && (t.size(0) < 2 || t.stride(0) == 1),
            "slots, lengths, starts, slopes and sinks are contiguous vectors of their dtypes");
  return static_cast<const T*>(t.data_ptr());
}

// [sequences, blocks] int32.
const int32_t* table_of(const Tensor& t) {
  KVQ_CHECK(t.dim() == 2 && t.scalar_type() == ScalarType::Int && t.stride(1) == 1,
            "block tables must be int32 [sequences, blocks]");
  return static_cast<const int32_t*>(t.data_ptr());
}

void check_recent(const Format& format, const OptionalTensor& cache, const OptionalTensor& where) {
  KVQ_CHECK(cache.has_value() == format.recent && where.has_value() == format.recent,
            "formats with recent rows need a recent cache, others take none");
}

const float* per_head(const OptionalTensor& t, int64_t heads) {
  if (!t) return nullptr;
  const float* data = vector_of<float>(*t, ScalarType::Float);
  KVQ_CHECK(t->size(0) == heads, "slopes and sinks must have one entry per query head");
  return data;
}

const float* per_channel(const OptionalTensor& t, const Cache& cache) {
  if (!t) return nullptr;
  KVQ_CHECK(t->is_cpu() && t->scalar_type() == ScalarType::Float && t->dim() == 2 &&
                t->size(0) == cache.num_kv_heads && t->size(1) == cache.head_size &&
                t->is_contiguous(),
            "scales and zero points must be contiguous float32 [kv heads, head size]");
  return static_cast<const float*>(t->data_ptr());
}

StaticScale static_scale(const Stream& stream, const OptionalTensor& factor,
                         const OptionalTensor& zero_point, const Cache& cache) {
  KVQ_CHECK(factor.has_value() == stream.is_static() && (factor.has_value() || !zero_point),
            "static formats need scales, others take none");
  return {per_channel(factor, cache), per_channel(zero_point, cache)};
}

// Blocks of one row of a block table that hold tokens [begin, end).
// The kernels' groups of sixteen tokens lie in one block: none of another is touched.
void check_entries(const int32_t* table, long begin, long end, long block_size,
                   int64_t num_blocks) {
  const uint32_t last = static_cast<uint32_t>(num_blocks <= kMaxInt ? num_blocks - 1 : kMaxInt);
  uint32_t wrong = 0;  // its sign bit; without branches, so that gcc takes four at a time
  for (long b = begin / block_size; b * block_size < end; ++b) {
    const uint32_t entry = static_cast<uint32_t>(table[b]);
    wrong |= entry | (last - entry);
  }
  KVQ_CHECK(wrong >> 31 == 0, "block table entry outside the cache");
}

// The blocks of one sequence that hold context its queries see.
void check_blocks(const AttendParams& p, long seq, int64_t num_blocks, int64_t recent_blocks) {
  const long length = p.seq_lens[seq], count = p.query_start[seq + 1] - p.query_start[seq];
  if (count == 0) return;
  const long first = length - count;  // position of the first query
  const long begin = p.window > 0 && first >= p.window ? first - p.window + 1 : 0;
  const bool recent = kFormats[p.format].recent;
  check_entries(p.block_table + seq * p.block_table_stride, begin,
                recent ? sealed_before(length - 1) : length, p.cache.block_size, num_blocks);
  if (!recent) return;
  const long from = sealed_before(first);
  check_entries(p.recent_table + seq * p.recent_table_stride, from > begin ? from : begin, length,
                p.recent.block_size, recent_blocks);
}

}  // namespace
}  // namespace kvq
