// The kernels' Lane on a CPU: each thread of a block is a fiber, and an operation of a warp waits
// until its 32 lanes are there. What the GPU's instructions do is written from PTX's definition of
// their fragments, so that the kernels' own indexing is what gets tested.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#include "lane.h"

namespace kvq {
namespace gpu {

// Runs one block's fibers in turn. A fiber that waits gives way; a round in which none moved means
// that threads wait for each other in different places, which on a GPU would hang.
class Block {
 public:
  static constexpr size_t kStack = 256 << 10;

  Block() : stacks_(new char[kThreads * kStack]) {}

  void run(int index, const std::function<void()>& body) {
    index_ = index, body_ = &body;
    current_block = this;
    arrived_ = 0, phase_ = 0, moved_ = true;
    for (auto& warp : warps_) warp.arrived = 0, warp.phase = 0;
    for (int i = 0; i < kThreads; ++i) {
      getcontext(&fibers_[i]);
      fibers_[i].uc_stack = {stack(i), 0, kStack};
      fibers_[i].uc_link = &main_;
      makecontext(&fibers_[i], &Block::enter, 0);
      done_[i] = false;
    }
    for (int left = kThreads; left > 0;) {
      if (!moved_) fail("threads wait for each other in different places");
      moved_ = false;
      for (thread_ = 0; thread_ < kThreads; ++thread_) {
        if (done_[thread_]) continue;
        into_fiber();
        left -= done_[thread_];
      }
    }
    if (arrived_ != 0) fail("threads left a block that others waited in");
  }

  // Every lane of a warp gives a value and gets everyone's.
  template <class T>
  const T* exchange(const T& value) {
    static_assert(sizeof(T) <= sizeof(Slot), "a slot is too small");
    Warp& warp = warps_[thread_ / kWarp];
    const int lane = thread_ % kWarp, phase = warp.phase;
    T* slots = reinterpret_cast<T*>(warp.slots[phase % 2]);
    slots[lane] = value;
    moved_ = true;
    if (++warp.arrived == kWarp) {
      warp.arrived = 0;
      ++warp.phase;
    } else {
      while (warp.phase == phase) give_way();
    }
    return slots;
  }

  void sync() {
    const int phase = phase_;
    moved_ = true;
    if (++arrived_ == kThreads) {
      arrived_ = 0;
      ++phase_;
    } else {
      while (phase_ == phase) give_way();
    }
  }

  int thread_ = 0, index_ = 0;
  static inline Block* current_block = nullptr;

 private:
  using Slot = uint32_t[8];
  struct Warp {
    alignas(16) Slot slots[2][kWarp];
    int arrived, phase;
  };

  [[noreturn]] static void fail(const char* what) {
    fprintf(stderr, "host_lane: %s\n", what);
    abort();
  }
  char* stack(int i) { return stacks_.get() + i * kStack; }

  // Switching stacks, as the address sanitizer wants it announced.
  void into_fiber() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&main_fake_, stack(thread_), kStack);
#endif
    swapcontext(&main_, &fibers_[thread_]);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(main_fake_, nullptr, nullptr);
#endif
  }
  void give_way() {
    const int me = thread_;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&fakes_[me], main_stack_, main_size_);
#endif
    swapcontext(&fibers_[me], &main_);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fakes_[me], &main_stack_, &main_size_);
#endif
  }
  static void enter() {
    Block& b = *current_block;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &b.main_stack_, &b.main_size_);
#endif
    (*b.body_)();
    b.done_[b.thread_] = true;
    b.moved_ = true;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(nullptr, b.main_stack_, b.main_size_);
#endif
  }

  std::unique_ptr<char[]> stacks_;
  ucontext_t main_, fibers_[kThreads];
  bool done_[kThreads];
  Warp warps_[kWarps];
  int arrived_ = 0, phase_ = 0;
  bool moved_ = true;
  const std::function<void()>* body_ = nullptr;
  void *main_fake_ = nullptr, *fakes_[kThreads] = {};
  const void* main_stack_ = nullptr;
  size_t main_size_ = 0;
};

struct HostLane {
  static constexpr bool kNativeFp8 = false;  // the path of GPUs before sm_89; the other is one cvt

  static Block& here() { return *Block::current_block; }
  static int thread() { return here().thread_; }
  static int id() { return thread() % kWarp; }
  static int warp() { return thread() / kWarp; }
  static int block() { return here().index_; }
  static void sync() { here().sync(); }
  static void sync_warp() { here().exchange(0); }

  template <class T>
  static T shuffle_xor(T x, int mask) {
    return here().exchange(x)[id() ^ mask];
  }

  static float half_of(uint32_t pair, int which) {
    return half_to_float(static_cast<uint16_t>(pair >> (16 * which)));
  }
  static uint32_t pair_of(uint16_t low, uint16_t high) {
    return low | static_cast<uint32_t>(high) << 16;
  }

  // PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type": with lane = 4 g + t,
  // A's registers are rows g, g + 8 of columns 2 t, 2 t + 1 and then of those + 8; B's are rows
  // 2 t, 2 t + 1 and those + 8 of column g; C's are columns 2 t, 2 t + 1 of rows g and g + 8.
  static void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                  uint32_t b1) {
    struct Operands {
      uint32_t a[4], b[2];
    };
    const Operands* all = here().exchange(Operands{{a0, a1, a2, a3}, {b0, b1}});
    const int g = id() / 4, t = id() % 4;
    for (int i = 0; i < 4; ++i) {
      const int column = 2 * t + i % 2, lower = i / 2;  // row g + 8 lower
      float sum = c[i];
      for (int k = 0; k < 16; ++k) {
        const int lane = k % 8 / 2, upper = k / 8;
        const float a = half_of(all[4 * g + lane].a[2 * upper + lower], k % 2);
        const float b = half_of(all[4 * column + lane].b[upper], k % 2);
        sum += a * b;
      }
      c[i] = sum;
    }
  }

  static uint32_t transpose(uint32_t x) {
    const uint32_t* all = here().exchange(x);
    const int g = id() / 4, t = id() % 4;
    uint32_t out = 0;
    for (int i = 0; i < 2; ++i) {  // element (2 t + i, g)
      const uint32_t word = all[4 * (2 * t + i) + g / 2];
      out |= (word >> (16 * (g % 2)) & 0xFFFFu) << (16 * i);
    }
    return out;
  }

  template <int kWords>
  static void load(const uint8_t* from, uint32_t (&to)[kWords]) {
    if (reinterpret_cast<uintptr_t>(from) % (4 * kWords) != 0) {
      fprintf(stderr, "host_lane: a load of %d bytes is not aligned\n", 4 * kWords);
      abort();
    }
    memcpy(to, from, 4 * kWords);
  }
  static int load_index(const int32_t* from) { return *from; }
  static uint32_t arrive(uint32_t* counter) { return (*counter)++; }
  static float load_new(const float* from) { return *from; }
  static void load_new(const float* from, float (&to)[4]) { memcpy(to, from, sizeof(to)); }

  static uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = a | static_cast<uint64_t>(b) << 32;
    uint32_t out = 0;
    for (int i = 0; i < 4; ++i) {
      out |= static_cast<uint32_t>(bytes >> (8 * (selector >> (4 * i) & 7u)) & 0xFFu) << (8 * i);
    }
    return out;
  }

  static uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) { return (a & b) | c; }

  // fp16 from fp32: exact here, since a product of two halves and its sum with a third of the
  // magnitudes that decode.h uses fit fp32.
  static uint32_t sub2(uint32_t a, uint32_t b) { return fma2(b, 0xBC00BC00u /* -1 */, a); }
  static uint32_t mul2(uint32_t a, uint32_t b) { return fma2(a, b, 0x80008000u /* -0 */); }
  static uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
    uint16_t out[2];
    for (int i = 0; i < 2; ++i) {
      out[i] = float_to_half(half_of(a, i) * half_of(b, i) + half_of(c, i));
    }
    return pair_of(out[0], out[1]);
  }
  static uint32_t pack_halves(float low, float high) {
    return pair_of(float_to_half(low), float_to_half(high));
  }
  static float widen(uint32_t half) { return half_to_float(static_cast<uint16_t>(half)); }
  static uint32_t e4m3_to_halves(uint32_t bytes) {
    const auto one = [](uint32_t b) {
      return float_to_half(Codec<Code::kFp8E4M3>::decode(static_cast<uint8_t>(b)));
    };
    return pair_of(one(bytes & 0xFFu), one(bytes >> 8 & 0xFFu));
  }

  static float exp2(float x) { return std::exp2(x); }
  static float log2(float x) { return std::log2(x); }
  static float reciprocal(float x) { return 1.0f / x; }
  static float max(float a, float b) { return std::fmax(a, b); }
  static float min(float a, float b) { return std::fmin(a, b); }
  static float divide(float a, float b) { return a / b; }
  // A GPU's NaN is one NaN: seen on an H100, where the sign of an argument's was gone.
  static float multiply(float a, float b) {
    const float x = a * b;
    return x == x ? x : bits_float(0x7FFFFFFFu);
  }
};

}  // namespace gpu
}  // namespace kvq
