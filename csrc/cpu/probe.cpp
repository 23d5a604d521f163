// Reads memory and does nothing with it: the bandwidth a decode kernel can at best have, with the
// same threads and the same loads. Compiled once per ISA.
#include "kernels.h"
#include "simd.h"

namespace kvq {
namespace {

constexpr long kPiece = 1 << 20;

struct ReadTask {
  const uint8_t* data;
  long size;
  uint32_t sum;
};

void read_piece(void* context, int /*worker*/, long index) {
  ReadTask& task = *static_cast<ReadTask*>(context);
  const uint8_t* begin = task.data + index * kPiece;
  const long size = task.size - index * kPiece < kPiece ? task.size - index * kPiece : kPiece;
  U16 sum[8] = {};
  for (long i = 0; i + 512 <= size; i += 512) {
    for (int j = 0; j < 8; ++j) {
      sum[j] ^= load<U16>(begin + i + j * 64);
    }
  }
  uint32_t all = 0;
  for (int j = 0; j < 8; ++j) {
    for (int lane = 0; lane < 16; ++lane) all ^= sum[j][lane];
  }
  __atomic_xor_fetch(&task.sum, all, __ATOMIC_RELAXED);
}

}  // namespace

namespace KVQ_ISA {

uint32_t read(const uint8_t* data, long size, const Runtime& runtime) {
  ReadTask task{data, size, 0};
  runtime.parallel_for((size + kPiece - 1) / kPiece, runtime.num_threads, read_piece, &task);
  return task.sum;
}

}  // namespace KVQ_ISA
}  // namespace kvq
