// Intel AMX's tile registers as dot_amx.h and dot_amx_bf16.h use them, and the same in plain C++:
// what a processor without AMX tests (KVQ_AMX_EMULATED).
#pragma once

#if defined(__AMX_INT8__) || defined(KVQ_AMX_EMULATED)
#define KVQ_AMX 1

#include "simd.h"

namespace kvq {
namespace {

constexpr int kTileRows = 16, kTileRowBytes = 64, kTileBytes = kTileRows * kTileRowBytes;
constexpr int kTileRegisters = 8;

// What LDTILECFG reads: each register's shape.
struct TileShapes {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileShapes) == 64, "LDTILECFG reads 64 bytes");

#if defined(KVQ_AMX_EMULATED)
// Stricter than the processor where it can be: what would fault there, or read what no
// instruction wrote, traps here.
struct AmxTiles {
  struct Register {
    int rows, row_bytes;
    bool written;
    uint8_t data[kTileRows][kTileRowBytes];
  };
  static inline thread_local Register* registers;  // the session's, on the stack

  static void require(bool holds) {
    if (!holds) __builtin_trap();
  }

  static void configure(const TileShapes& shapes) {
    require(shapes.palette == 1 && shapes.start_row == 0);
    for (int t = 0; t < kTileRegisters; ++t) {
      registers[t] = {shapes.rows[t], shapes.row_bytes[t], false, {}};
      require(registers[t].rows <= kTileRows && registers[t].row_bytes <= kTileRowBytes);
    }
  }

  static void release() { registers = nullptr; }

  template <int T>
  static Register& at() {
    require(registers != nullptr && registers[T].rows > 0);
    return registers[T];
  }

  template <int T>
  static void zero() {
    Register& r = at<T>();
    memset(r.data, 0, sizeof(r.data));
    r.written = true;
  }

  template <int T>
  static void load(const void* from, long stride) {
    Register& r = at<T>();
    memset(r.data, 0, sizeof(r.data));
    for (int i = 0; i < r.rows; ++i) {
      memcpy(r.data[i], static_cast<const uint8_t*>(from) + i * stride,
             static_cast<size_t>(r.row_bytes));
    }
    r.written = true;
  }

  template <int T>
  static void store(void* to, long stride) {
    Register& r = at<T>();
    require(r.written);
    for (int i = 0; i < r.rows; ++i) {
      memcpy(static_cast<uint8_t*>(to) + i * stride, r.data[i], static_cast<size_t>(r.row_bytes));
    }
  }

  template <int C, int A, int B>
  static void dpbsud() {
    Register &c = at<C>(), &a = at<A>(), &b = at<B>();
    require(c.written && a.written && b.written);
    require(c.rows == a.rows && c.row_bytes == b.row_bytes && a.row_bytes == 4 * b.rows);
    for (int m = 0; m < c.rows; ++m) {
      uint32_t sum[kTileRowBytes / 4];  // wraps, as the processor's sums do
      memcpy(sum, c.data[m], sizeof(sum));
      for (int k = 0; k < b.rows; ++k) {
        for (int n = 0; n < c.row_bytes / 4; ++n) {
          for (int i = 0; i < 4; ++i) {
            const int x = static_cast<int8_t>(a.data[m][4 * k + i]), y = b.data[k][4 * n + i];
            sum[n] += static_cast<uint32_t>(x * y);
          }
        }
      }
      memcpy(c.data[m], sum, sizeof(sum));
    }
  }

  // A product's elements of even and odd places are summed apart, from zero, then added.
  template <int C, int A, int B>
  static void dpbf16ps() {
    Register &c = at<C>(), &a = at<A>(), &b = at<B>();
    require(c.written && a.written && b.written);
    require(c.rows == a.rows && c.row_bytes == b.row_bytes && a.row_bytes == 4 * b.rows);
    for (int m = 0; m < c.rows; ++m) {
      F16 sum[2] = {};
      for (int k = 0; k < b.rows; ++k) {
        uint32_t pair;
        memcpy(&pair, a.data[m] + 4 * k, 4);
        const U16 column = kvq::load<U16>(b.data[k]);
        sum[0] = fma(normal(U16{} + (pair << 16)), normal(column << 16), sum[0]);
        sum[1] = fma(normal(U16{} + (pair & 0xFFFF0000u)), normal(column & 0xFFFF0000u), sum[1]);
      }
      float* to = reinterpret_cast<float*>(c.data[m]);
      save16(to, load16(to) + (sum[0] + sum[1]));
    }
  }

 private:
  // Subnormal operands are zeros there.
  static F16 normal(U16 bits) {
    return select((bits & 0x7F800000u) == 0u, F16{}, bits_as<F16>(bits));
  }
};
#else
// Asm because gcc's intrinsics paste the register's number from the source, so that it cannot be a
// template's, and let stores to what a tile is loaded from move past the load.
struct AmxTiles {
  static KVQ_HD void configure(const TileShapes& shapes) {
    asm volatile("ldtilecfg %0" ::"m"(shapes));
  }
  static KVQ_HD void release() { asm volatile("tilerelease"); }
  template <int T>
  static KVQ_HD void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
  }
  template <int T>
  static KVQ_HD void load(const void* from, long stride) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(T), "r"(from), "r"(stride) : "memory");
  }
  template <int T>
  static KVQ_HD void store(void* to, long stride) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(T), "r"(to), "r"(stride) : "memory");
  }
  // C += A . B: signed bytes of A, unsigned ones of B.
  template <int C, int A, int B>
  static KVQ_HD void dpbsud() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
  // The same of pairs of bf16, in fp32.
  template <int C, int A, int B>
  static KVQ_HD void dpbf16ps() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
};
#endif

// Rows of an item from which a dot product uses tiles.
template <class Dot>
constexpr int kFewestTileRows = 1 << 30;

// The shapes both dot products work with, for as long as a thread works on `rows` query rows: sums
// in registers 0 to 3, query rows or weights in 4 and 5, codes in 6 and 7. Fewer rows take less
// time.
class TileSession {
 public:
  TileSession(bool wanted, int rows) : wanted_(wanted) {
    if (!wanted) return;
#if defined(KVQ_AMX_EMULATED)
    AmxTiles::registers = registers_;
#endif
    TileShapes shapes{};
    shapes.palette = 1;
    for (int t = 0; t < kTileRegisters; ++t) {
      shapes.rows[t] = static_cast<uint8_t>(t < 6 && rows < kTileRows ? rows : kTileRows);
      shapes.row_bytes[t] = kTileRowBytes;
    }
    AmxTiles::configure(shapes);
  }
  ~TileSession() {
    if (wanted_) AmxTiles::release();
  }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;

 private:
#if defined(KVQ_AMX_EMULATED)
  AmxTiles::Register registers_[kTileRegisters];
#endif
  const bool wanted_;
};

}  // namespace
}  // namespace kvq
#endif
