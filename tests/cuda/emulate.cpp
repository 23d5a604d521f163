// The GPU kernels under g++ and its sanitizers: a program that runs recorded calls, with every
// buffer an allocation of its own. tests/emulator.py records the calls that
// kvq_plugin/kernels/cuda.py would launch. (-shared makes a library of it with the entry points of
// csrc/cuda/api.h.)
#include <algorithm>
#include <numeric>
#include <random>
#include <string>

#include "choose.h"
#include "host.cpp"
#include "host_lane.h"
#include "seal.h"
#include "sealed.h"

namespace kvq {
namespace gpu {
namespace {

// Blocks one after the other; KVQ_EMULATED_ORDER: "backwards", or the seed of a shuffle.
template <class Body>
void run_grid(int blocks, const Body& body) {
  static Block block;
  const std::function<void()> call = body;
  std::vector<int> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  const char* asked = getenv("KVQ_EMULATED_ORDER");
  const std::string name = asked == nullptr ? "" : asked;
  if (name == "backwards") {
    std::reverse(order.begin(), order.end());
  } else if (!name.empty()) {
    std::shuffle(order.begin(), order.end(), std::mt19937(std::stoi(name)));
  }
  for (const int i : order) block.run(i, call);
}

template <class S>
void attend_shape(const AttendParams& p) {
  const auto shared = std::make_unique<Shared<S>>();
  run_grid(p.blocks, [&] { attend_block<HostLane, S>(p, *shared); });
}

// Compiling all kernels takes a minute: every format at head sizes up to 64, and of the larger
// classes what differs (loads and tiles of other widths). KVQ_ALL_SHAPES compiles the rest too.
constexpr bool emulated(int format, int head, int row_tiles) {
#if defined(KVQ_ALL_SHAPES)
  return format >= 0 && head > 0 && row_tiles > 0;
#else
  const int shape = head * 10 + row_tiles;
  return shape == 641 || (shape == 642 && (format == 2 || format == 3 || format >= 8)) ||
         (shape == 1281 && format >= 3) || (shape == 1282 && (format == 5 || format >= 8)) ||
         (shape == 2561 && (format == 4 || format >= 8));
#endif
}

void attend_host(const AttendParams& p) {
  with_format(p.cache.format, [&](auto row) {
    with_shape<row.value>(p.cache.head_size, p.tile_rows > 8, [&](auto shape) {
      using S = decltype(shape);
      if constexpr (emulated(row.value, S::kD, S::kN)) {
        attend_shape<S>(p);
      } else {
        fprintf(stderr, "not emulated: format %d, head size %d, %d rows; see emulated()\n",
                row.value, S::kD, S::kRows);
        exit(3);
      }
    });
  });
}

template <int kFormatRow>
void store_host(const StoreParams& p) {
  const int blocks = static_cast<int>(2 * store_blocks(p));
  if constexpr (kFormats[kFormatRow].recent) {
    const StoreParams rows = recent_rows(p);
    run_grid(blocks, [&] { store_block<HostLane, kRecentFormat>(rows); });
    run_grid(seal_blocks(p), [&] { seal_block<HostLane, kFormatRow>(p); });
  } else {
    run_grid(blocks, [&] { store_block<HostLane, kFormatRow>(p); });
  }
}

}  // namespace
}  // namespace gpu
}  // namespace kvq

int32_t kvq_cuda_store(const StoreParams* p, kvq_stream) {
  using namespace kvq::gpu;
  with_format(p->cache.format, [&](auto row) { store_host<row.value>(*p); });
  return 0;
}

int32_t kvq_cuda_attend(const AttendParams* p, kvq_stream) {
  using namespace kvq::gpu;
  if (p->num_seqs == 0 || p->num_tokens == 0 || p->max_query_len == 0) return 0;
  attend_host(*p);
  return 0;
}

const char* kvq_cuda_error(int32_t) { return "no error: this library runs on the CPU"; }

// What a word of each of two tokens decodes to, for every code.
struct DecodeParams {
  const uint32_t *a, *b;  // [count]
  uint32_t* along;        // [count, codes of a word / 2]: of a
  uint32_t* across;       // [count, codes of a word]
  int64_t count, code;
};

template <kvq::Code C>
static void decode(const DecodeParams& p) {
  using D = kvq::gpu::Decoder<C>;
  using Lane = kvq::gpu::HostLane;
  for (int64_t i = 0; i < p.count; ++i) {
    uint32_t along[D::kCodes / 2], across[D::kCodes];
    D::template along<Lane>(p.a[i], along);
    D::template across<Lane>(p.a[i], p.b[i], across);
    memcpy(p.along + i * D::kCodes / 2, along, sizeof(along));
    memcpy(p.across + i * D::kCodes, across, sizeof(across));
  }
}

static void decode_words(const DecodeParams& p) {
  using kvq::Code;
  switch (static_cast<Code>(p.code)) {
    case Code::kInt8:
      return decode<Code::kInt8>(p);
    case Code::kInt4:
      return decode<Code::kInt4>(p);
    case Code::kFp8E5M2:
      return decode<Code::kFp8E5M2>(p);
    default:
      return decode<Code::kFp8E4M3>(p);
  }
}

// A call on file: int64 which (0 store, 1 attend, 2 decode), bytes of the struct, number of
// regions; the struct; per region its address in the recording process, its bytes (both int64) and
// its data. Pointers of the struct are moved to copies of the regions; all regions are written
// back.
struct Region {
  int64_t address, size;
  long at;
  std::unique_ptr<char[]> copy;
};

static void read(FILE* file, void* to, size_t n) {
  if (fread(to, 1, n, file) != n) fprintf(stderr, "the recorded call is too short\n"), exit(2);
}

// Every 8 bytes that lie in a region are a pointer into it.
static void move_pointers(std::vector<char>& params, const std::vector<Region>& regions) {
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
}

template <class Params, class Call>
static void run(const std::vector<char>& bytes, const Call& call) {
  Params p;
  if (bytes.size() != sizeof(p)) fprintf(stderr, "a struct of another size\n"), exit(2);
  memcpy(&p, bytes.data(), sizeof(p));
  call(p);
}

static void replay(const char* name) {
  FILE* file = fopen(name, "r+b");
  if (file == nullptr) perror(name), exit(2);
  int64_t head[3];
  read(file, head, sizeof(head));
  std::vector<char> params(head[1]);
  read(file, params.data(), params.size());
  std::vector<Region> regions(head[2]);
  for (auto& r : regions) {
    read(file, &r.address, 8);
    read(file, &r.size, 8);
    r.at = ftell(file);
    r.copy = std::make_unique<char[]>(r.size);
    read(file, r.copy.get(), r.size);
  }
  move_pointers(params, regions);
  switch (head[0]) {
    case 0:
      run<StoreParams>(params, [](const auto& p) { kvq_cuda_store(&p, nullptr); });
      break;
    case 1:
      run<AttendParams>(params, [](const auto& p) { kvq_cuda_attend(&p, nullptr); });
      break;
    default:
      run<DecodeParams>(params, decode_words);
  }
  for (const auto& r : regions) {
    fseek(file, r.at, SEEK_SET);
    fwrite(r.copy.get(), 1, r.size, file);
  }
  fclose(file);
}

int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) replay(argv[i]);
}
