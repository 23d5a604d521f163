// The GPU kernels under g++: as a library with the entry points of csrc/cuda/api.h, which
// kvq_plugin/kernels/cuda.py can be pointed at, and with a sanitizer as a program that runs one
// recorded call (main below), where every buffer is an allocation of its own.
#include "attend.h"
#include "choose.h"
#include "host.cpp"
#include "host_lane.h"
#include "store.h"

namespace kvq {
namespace gpu {
namespace {

template <class Body>
void run_grid(int x, int y, int z, const Body& body) {
  static Block block;
  const std::function<void()> call = body;
  for (int k = 0; k < z; ++k) {
    for (int j = 0; j < y; ++j) {
      for (int i = 0; i < x; ++i) block.run(i, j, k, x, call);
    }
  }
}

template <int kFormatRow, int kHead, int kRowTiles>
void attend_shape(const AttendParams& p, int x, int y) {
  using S = Shape<kFormatRow, kHead, kRowTiles>;
  const auto shared = std::make_unique<Shared<S>>();
  run_grid(x, y, p.num_seqs, [&] { attend_block<HostLane, S>(p, *shared); });
}

template <int kFormatRow = 0>
void attend_host(const AttendParams& p, int x, int y) {
  if constexpr (kFormatRow + 1 < kNumFormats) {
    if (p.cache.format != kFormatRow) return attend_host<kFormatRow + 1>(p, x, y);
  }
  const int head = p.cache.head_size;
  const bool wide = p.tile_rows > 8;
  if (head > 128) return attend_shape<kFormatRow, 256, 1>(p, x, y);
  if (head > 64) {
    return wide ? attend_shape<kFormatRow, 128, 2>(p, x, y)
                : attend_shape<kFormatRow, 128, 1>(p, x, y);
  }
  return wide ? attend_shape<kFormatRow, 64, 2>(p, x, y) : attend_shape<kFormatRow, 64, 1>(p, x, y);
}

template <int kFormatRow = 0>
void store_host(const StoreParams& p, int blocks) {
  if constexpr (kFormatRow + 1 < kNumFormats) {
    if (p.cache.format != kFormatRow) return store_host<kFormatRow + 1>(p, blocks);
  }
  run_grid(blocks, 1, 1, [&] { store_block<HostLane, kFormatRow>(p); });
}

}  // namespace
}  // namespace gpu
}  // namespace kvq

int32_t kvq_cuda_store(const StoreParams* p, kvq_stream) {
  const int64_t items = p->num_tokens * p->cache.num_kv_heads;
  kvq::gpu::store_host(*p, static_cast<int>((items + kvq::gpu::kWarps - 1) / kvq::gpu::kWarps));
  return 0;
}

int32_t kvq_cuda_attend(const AttendParams* p, kvq_stream) {
  using namespace kvq::gpu;
  if (p->num_seqs == 0 || p->num_tokens == 0 || p->max_query_len == 0) return 0;
  const int rows = p->max_query_len * (p->num_heads / p->cache.num_kv_heads);
  const int y = (rows + p->tile_rows - 1) / p->tile_rows * p->cache.num_kv_heads;
  attend_host(*p, p->splits, y);
  if (p->splits > 1) {
    run_grid(2, y, p->num_seqs, [&] { merge_block<HostLane>(*p); });
  }
  return 0;
}

const char* kvq_cuda_error(int32_t) { return "no error: this library runs on the CPU"; }

// 0: one token's pairs; 1: two tokens' codes. Words in, fp16 pairs out, of `code`'s Decoder.
KVQ_EXPORT void kvq_decode(int code, int across, const uint32_t* a, const uint32_t* b,
                           uint32_t* out) {
  using namespace kvq;
  using namespace kvq::gpu;
  const auto run = [&](auto decoder) {
    using D = decltype(decoder);
    uint32_t along[D::kCodes / 2], pairs[D::kCodes];
    D::template along<HostLane>(*a, along);
    D::template across<HostLane>(*a, *b, pairs);
    for (int i = 0; i < D::kCodes / (across ? 1 : 2); ++i) out[i] = across ? pairs[i] : along[i];
  };
  switch (static_cast<Code>(code)) {
    case Code::kInt8:
      return run(Decoder<Code::kInt8>{});
    case Code::kInt4:
      return run(Decoder<Code::kInt4>{});
    case Code::kFp8E5M2:
      return run(Decoder<Code::kFp8E5M2>{});
    default:
      return run(Decoder<Code::kFp8E4M3>{});
  }
}

#if defined(KVQ_EMULATE_MAIN)

// A call on file: int64 which (0 store, 1 attend), bytes of the struct, number of regions; the
// struct; per region its address in the recording process, its bytes (both int64) and its data.
// Pointers of the struct are moved to copies of the regions; all regions are written back.

int main(int argc, char** argv) {
  if (argc != 2) return fprintf(stderr, "usage: emulate CALL\n"), 2;
  FILE* file = fopen(argv[1], "r+b");
  if (file == nullptr) return perror(argv[1]), 2;
  const auto read = [&](void* to, size_t n) {
    if (fread(to, 1, n, file) != n) fprintf(stderr, "%s is too short\n", argv[1]), exit(2);
  };
  int64_t head[3];
  read(head, sizeof(head));
  std::vector<char> params(head[1]);
  read(params.data(), params.size());
  struct Region {
    int64_t address, size;
    long at;
    std::unique_ptr<char[]> copy;
  };
  std::vector<Region> regions(head[2]);
  for (auto& r : regions) {
    read(&r.address, 8);
    read(&r.size, 8);
    r.at = ftell(file);
    r.copy = std::make_unique<char[]>(r.size);  // aligned to 16 bytes
    read(r.copy.get(), r.size);
  }
  // Every 8 bytes that hold a region's address are a pointer to it.
  for (size_t i = 0; i + 8 <= params.size(); i += 8) {
    int64_t word;
    memcpy(&word, &params[i], 8);
    for (const auto& r : regions) {
      if (word < r.address || word >= r.address + r.size) continue;
      const char* moved = r.copy.get() + (word - r.address);
      memcpy(&params[i], &moved, 8);
      break;
    }
  }
  if (head[0] == 0) {
    StoreParams p;
    memcpy(&p, params.data(), sizeof(p));
    kvq_cuda_store(&p, nullptr);
  } else {
    AttendParams p;
    memcpy(&p, params.data(), sizeof(p));
    kvq_cuda_attend(&p, nullptr);
  }
  for (const auto& r : regions) {
    fseek(file, r.at, SEEK_SET);
    fwrite(r.copy.get(), 1, r.size, file);
  }
  return fclose(file);
}

#endif
