// Paged attention that dequantizes on read. Compiled once per ISA.
//
// Work is cut into items of (sequence, kv head, up to 32 query rows), and each item's context
// into chunks of 512 tokens at fixed positions. A chunk is attended on its own and merged into
// the running result in order; whether one thread does all chunks of an item or many threads do
// one each changes nothing. So a row's output depends on its own sequence alone, bit for bit:
// not on the batch, the number of threads, or how a prompt was cut into prefill chunks.
#include <stdlib.h>

#include "dot_bf16.h"
#include "dot_fp32.h"
#include "dot_vnni.h"
#include "kernels.h"
#include "load.h"
#include "tile.h"

namespace kvq {
namespace {

constexpr long kChunk = 512;
constexpr float kLog2e = 1.44269504f;
constexpr float kMinusInf = -__builtin_inff();

// Which dot product serves a code on this ISA.
template <Code C>
struct DotOf {
  using type = Fp32Dot<C>;
};
#if defined(__AVX512VNNI__)
template <>
struct DotOf<Code::kInt8> {
  using type = VnniDot<Code::kInt8>;
};
template <>
struct DotOf<Code::kInt4> {
  using type = VnniDot<Code::kInt4>;
};
#endif
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
template <>
struct DotOf<Code::kFp8E4M3> {
  using type = Bf16Dot<Code::kFp8E4M3>;
};
template <>
struct DotOf<Code::kFp8E5M2> {
  using type = Bf16Dot<Code::kFp8E5M2>;
};
#endif

constexpr bool is_affine(Code c) { return c == Code::kInt4; }

// Up to kMaxRows rows of the (token, query head of the group) plane of one sequence and kv head.
struct Item {
  int seq, head;  // head: kv head
  int first, rows;
  int begin, end;  // context that any of the rows sees
  int first_chunk, num_chunks;
  long partial;  // where its chunks' partial results start, in floats
  int pending;   // chunks not yet attended
};

// One thread's share: all chunks of an item, or one (split mode).
struct Unit {
  int item, chunk;
};

// Memory that only grows: a decode step must not pay page faults.
class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  ~Workspace() { __builtin_free(data_); }
  void* reserve(long bytes) {
    if (bytes > size_) {
      __builtin_free(data_);
      data_ = nullptr;
      size_ = 0;
      if (posix_memalign(&data_, 64, static_cast<size_t>(bytes)) != 0) __builtin_trap();
      size_ = bytes;
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  long size_ = 0;
};

thread_local Workspace plan_memory, partial_memory, scratch_memory;

// The result of some context for the rows of an item: softmax(context) before division.
// Scores are in log2 units. Sums are kept in sixteen lanes, added up once at the end.
struct State {
  static constexpr long kPerRow = 1 + 2 * kLanes;
  float* sum;   // [rows, 16]
  float* bias;  // [rows, 16] what every channel gets: weight * min, and offsets of the codes
  float* acc;   // [rows, D]
  float* max;   // [rows]

  static State at(float* memory, int rows, long d) {
    float* acc = memory + 2 * rows * kLanes;
    return {memory, memory + rows * kLanes, acc, acc + rows * d};
  }
};

struct Plan {
  const AttendParams* params;
  PageLayout layout;
  int group;  // query heads per kv head
  bool split;
  Item* items;
  Unit* units;
  float* partials;

  long partial_size(const Item& i) const {
    return i.rows * (params->cache.head_size + State::kPerRow);
  }
};

// Context visible to the query token at `position` of a sequence of `length` tokens.
struct Span {
  int begin, end;
};
Span visible(const AttendParams& p, int position, int length) {
  Span s{0, p.causal ? position + 1 : length};
  if (p.window > 0) {
    const long first = position - p.window + 1, last = position + p.window;
    s.begin = first > 0 ? static_cast<int>(first) : 0;
    if (last < s.end) s.end = static_cast<int>(last);
  }
  return s;
}

template <class Visit>
void for_each_item(const AttendParams& p, int group, const Visit& visit) {
  for (int seq = 0; seq < p.num_seqs; ++seq) {
    const int length = p.seq_lens[seq];
    const int count = p.query_start[seq + 1] - p.query_start[seq];
    const int rows = count * group;
    for (int first = 0; first < rows; first += kMaxRows) {
      const int n = rows - first < kMaxRows ? rows - first : kMaxRows;
      const Span low = visible(p, length - count + first / group, length);
      const Span high = visible(p, length - count + (first + n - 1) / group, length);
      for (int head = 0; head < p.cache.num_kv_heads; ++head) {
        Item i{seq, head, first, n, low.begin, high.end, 0, 0, 0, 0};
        i.first_chunk = static_cast<int>(i.begin / kChunk);
        // At least one, so that rows which see nothing are written too: as zeros.
        const int chunks = static_cast<int>((i.end + kChunk - 1) / kChunk) - i.first_chunk;
        i.num_chunks = chunks > 1 ? chunks : 1;
        visit(i);
      }
    }
  }
}

long make_plan(Plan& plan, int num_threads) {
  const AttendParams& p = *plan.params;
  long items = 0, chunks = 0, floats = 0;
  for_each_item(p, plan.group, [&](const Item& i) {
    ++items;
    chunks += i.num_chunks;
    floats += i.num_chunks * plan.partial_size(i);
  });
  // Few items leave threads idle; many need no merging. 32 per thread evens out ragged lengths.
  plan.split = num_threads > 1 && items < 32L * num_threads && chunks > items;
  const long units = plan.split ? chunks : items;
  char* memory = static_cast<char*>(plan_memory.reserve(items * static_cast<long>(sizeof(Item)) +
                                                        units * static_cast<long>(sizeof(Unit))));
  plan.items = reinterpret_cast<Item*>(memory);
  plan.units = reinterpret_cast<Unit*>(memory + items * sizeof(Item));
  plan.partials = plan.split ? static_cast<float*>(partial_memory.reserve(floats * 4)) : nullptr;
  long item = 0, unit = 0, partial = 0;
  for_each_item(p, plan.group, [&](Item i) {
    i.partial = partial;
    i.pending = i.num_chunks;
    const int n = plan.split ? i.num_chunks : 1;
    for (int c = 0; c < n; ++c) plan.units[unit++] = {static_cast<int>(item), c};
    partial += i.num_chunks * plan.partial_size(i);
    plan.items[item++] = i;
  });
  return units;
}

void clear(State s, int rows, long d) {
  for (int r = 0; r < rows; ++r) s.max[r] = kMinusInf;
  memset(s.sum, 0, static_cast<size_t>(rows * (d + 2 * kLanes)) * sizeof(float));
}

float or_zero(float max) { return max == kMinusInf ? 0.0f : max; }

void merge_rows(float* into, const float* from, long n, float a, float b) {
  for (long i = 0; i < n; i += kLanes) {
    save16(into + i, load16(into + i) * a + load16(from + i) * b);
  }
}

void merge(State into, State from, int rows, long d) {
  for (int r = 0; r < rows; ++r) {
    const float max = from.max[r] > into.max[r] ? from.max[r] : into.max[r];
    const float a = exp2_1(into.max[r] - or_zero(max)), b = exp2_1(from.max[r] - or_zero(max));
    into.max[r] = max;
    merge_rows(into.sum + r * kLanes, from.sum + r * kLanes, kLanes, a, b);
    merge_rows(into.bias + r * kLanes, from.bias + r * kLanes, kLanes, a, b);
    merge_rows(into.acc + r * d, from.acc + r * d, d, a, b);
  }
}

// Scale and min of sixteen tokens, from their metadata words.
template <Code C>
void load_metadata(const uint8_t* words, F16& scale, F16& minimum) {
  if constexpr (is_affine(C)) {
    U16 w;
    memcpy(&w, words, 64);
    for (int i = 0; i < 16; ++i) {
      scale[i] = half_to_float(static_cast<uint16_t>(w[i]));
      minimum[i] = half_to_float(static_cast<uint16_t>(w[i] >> 16));
    }
  } else {
    scale = load16(words);
  }
}

template <int kFormat>
struct Kernel {
  static constexpr Format kF = kFormats[kFormat];
  static constexpr bool kKeyAffine = kF.key.per_token && is_affine(kF.key.code);
  static constexpr bool kValueAffine = kF.value.per_token && is_affine(kF.value.code);
  using KeyDot = typename DotOf<kF.key.code>::type;
  using ValueDot = typename DotOf<kF.value.code>::type;

  struct Scratch {
    typename KeyDot::Query query;
    typename ValueDot::Weights weights;
    alignas(64) float scores[kMaxRows * kTile];
    alignas(64) float chunk[kMaxRows * (kMaxHead + State::kPerRow)];
    alignas(64) float running[kMaxRows * (kMaxHead + State::kPerRow)];
    alignas(64) float tile_sum[kMaxRows * kLanes], tile_bias[kMaxRows * kLanes];
    float tile_max[kMaxRows], factor[kMaxRows], alpha[kMaxRows], gamma[kMaxRows];
    float key_bias[kMaxRows];  // score of a zero code: -q . (scale * zero point)
    float slope[kMaxRows];
    Span span[kMaxRows];
    int position[kMaxRows];
  };

  const Plan& plan;
  const AttendParams& p;
  const Item& item;
  Scratch& s;
  const long d;

  long token(int r) const { return p.query_start[item.seq] + (item.first + r) / plan.group; }
  long head(int r) const {
    return static_cast<long>(item.head) * plan.group + (item.first + r) % plan.group;
  }

  void prepare() {
    const int length = p.seq_lens[item.seq];
    const int count = p.query_start[item.seq + 1] - p.query_start[item.seq];
    const float* scale = kF.key.per_token ? nullptr : p.key_scale.factor + item.head * d;
    const float* zero = p.key_scale.zero_point ? p.key_scale.zero_point + item.head * d : nullptr;
    bool uniform = true;
    if (scale) {
      for (long i = 1; i < d; ++i) uniform &= scale[i] == scale[0];
    }
    // Scores come out in log2 units, or in units of the softcap.
    const float unit = p.scale * (p.softcap > 0.0f ? 1.0f / p.softcap : kLog2e);
    const float factor = scale && uniform ? scale[0] * unit : unit;
    alignas(64) float q[kMaxHead];
    for (int r = 0; r < item.rows; ++r) {
      load_row(p.query, token(r), head(r), d, q);
      float bias = 0.0f;
      if (zero) {
        for (long i = 0; i < d; ++i) bias -= q[i] * scale[i] * zero[i];
      }
      if (!uniform) {
        for (long i = 0; i < d; ++i) q[i] *= scale[i];
      }
      KeyDot::set_query(s.query, r, d, q, factor);
      s.key_bias[r] = bias * unit;
      s.position[r] = length - count + (item.first + r) / plan.group;
      s.span[r] = visible(p, s.position[r], length);
      s.slope[r] = p.alibi_slopes ? p.alibi_slopes[head(r)] * kLog2e : 0.0f;
    }
  }

  // The pages of the four groups from token t0 on, and the groups' tokens within them. Groups
  // outside the item's context repeat the nearest one inside it: block tables hold nothing there.
  struct Places {
    const uint8_t* page[kGroups];
    long within[kGroups];
  };

  Places find(long t0) const {
    Places places;
    const long size = p.cache.block_size;
    const long first = item.begin / kLanes * kLanes, last = (item.end - 1) / kLanes * kLanes;
    const int32_t* blocks = p.block_table + item.seq * p.block_table_stride;
    for (int g = 0; g < kGroups; ++g) {
      long t = t0 + g * kLanes;
      t = t < first ? first : t > last ? last : t;
      if (g > 0 && t == t0 + g * kLanes && places.within[g - 1] + kLanes < size &&
          t - kLanes >= first) {
        places.page[g] = places.page[g - 1];  // a division less
        places.within[g] = places.within[g - 1] + kLanes;
        continue;
      }
      const uint32_t block = static_cast<uint32_t>(t) / static_cast<uint32_t>(size);
      places.page[g] =
          p.cache.data + blocks[block] * p.cache.block_stride + item.head * p.cache.head_stride;
      places.within[g] = t - block * size;
    }
    return places;
  }

  Tile locate(long t0, const Places& here, const Places& next) const {
    Tile tile;
    tile.begin = item.begin > t0 ? static_cast<int>(item.begin - t0) : 0;
    tile.end = item.end - t0 < kTile ? static_cast<int>(item.end - t0) : kTile;
    const auto key = [&](const Places& at, int g) {
      return at.page[g] + plan.layout.key_codes + at.within[g] * d * code_bits(kF.key.code) / 8;
    };
    const auto value = [&](const Places& at, int g) {
      return at.page[g] + plan.layout.value_codes + at.within[g] * d * code_bits(kF.value.code) / 8;
    };
    for (int g = 0; g < kGroups; ++g) {
      tile.key[g] = key(here, g);
      tile.value[g] = value(here, g);
      tile.next_key[g] = key(next, g);
      tile.next_value[g] = value(next, g);
      tile.key_metadata[g] = here.page[g] + plan.layout.key_metadata + here.within[g] * 4;
      tile.value_metadata[g] = here.page[g] + plan.layout.value_metadata + here.within[g] * 4;
    }
    return tile;
  }

  void softmax_row(int r, long t0, const F16* key_scale, const F16* key_min, const F16* value_scale,
                   const F16* value_min) {
    const I16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const bool masked = s.span[r].begin > t0 || s.span[r].end < t0 + kTile;
    F16 x[kGroups], peak = splat(kMinusInf);
    for (int g = 0; g < kGroups; ++g) {
      x[g] = load16(s.scores + r * kTile + g * 16);
      if constexpr (kF.key.per_token) x[g] *= key_scale[g];
      if constexpr (kKeyAffine) x[g] += key_min[g] * s.query.sum[r];
      x[g] += s.key_bias[r];
      if (p.softcap > 0.0f) x[g] = tanh16(x[g]) * (p.softcap * kLog2e);
      const I16 t = lane + static_cast<int>(t0 + g * 16);
      if (p.alibi_slopes) x[g] -= __builtin_convertvector(s.position[r] - t, F16) * s.slope[r];
      if (masked) {
        const I16 visible = (t >= s.span[r].begin) & (t < s.span[r].end);
        x[g] = visible ? x[g] : splat(kMinusInf);
      }
      peak = x[g] > peak ? x[g] : peak;
    }
    const float max = reduce_max(peak);
    F16 sum{}, bias{};
    for (int g = 0; g < kGroups; ++g) {
      F16 w = exp2_16(x[g] - or_zero(max));
      sum += w;
      // Tokens without weight may hold stale metadata, NaN even.
      if constexpr (kValueAffine) bias += w == 0.0f ? F16{} : w * value_min[g];
      if constexpr (kF.value.per_token) w = w == 0.0f ? F16{} : w * value_scale[g];
      x[g] = w;
    }
    s.tile_max[r] = max;
    s.factor[r] = ValueDot::set_weights(s.weights, r, x, kF.value.per_token, bias);
    save16(s.tile_sum + r * kLanes, sum);
    save16(s.tile_bias + r * kLanes, bias);
  }

  void attend_tile(State state, long t0, const Tile& tile) {
    KeyDot::score(s.query, tile, item.rows, d, s.scores);
    F16 ks[kGroups], km[kGroups], vs[kGroups], vm[kGroups];
    for (int g = 0; g < kGroups; ++g) {
      if constexpr (kF.key.per_token)
        load_metadata<kF.key.code>(tile.key_metadata[g], ks[g], km[g]);
      if constexpr (kF.value.per_token) {
        load_metadata<kF.value.code>(tile.value_metadata[g], vs[g], vm[g]);
      }
    }
    for (int r = 0; r < item.rows; ++r) softmax_row(r, t0, ks, km, vs, vm);
    for (int r = 0; r < item.rows; r += 16) update_rows(state, r, item.rows - r);
    ValueDot::accumulate(s.weights, tile, item.rows, d, s.alpha, s.gamma, state.acc);
  }

  // Sixteen rows' running maxima and sums at once.
  void update_rows(State state, int first, int rows) {
    const int n = rows < 16 ? rows : 16;
    alignas(64) float old_max[16] = {}, new_max[16] = {}, tile_max[16] = {};
    for (int i = 0; i < n; ++i) {
      old_max[i] = state.max[first + i];
      tile_max[i] = s.tile_max[first + i];
      state.max[first + i] = tile_max[i] > old_max[i] ? tile_max[i] : old_max[i];
      new_max[i] = or_zero(state.max[first + i]);
    }
    alignas(64) float a[16], b[16];
    save16(a, exp2_16(load16(old_max) - load16(new_max)));
    save16(b, exp2_16(load16(tile_max) - load16(new_max)));
    for (int i = 0; i < n; ++i) {
      const int r = first + i;
      merge_rows(state.sum + r * kLanes, s.tile_sum + r * kLanes, kLanes, a[i], b[i]);
      merge_rows(state.bias + r * kLanes, s.tile_bias + r * kLanes, kLanes, a[i], b[i]);
      s.alpha[r] = a[i];
      s.gamma[r] = b[i] * s.factor[r];
    }
  }

  void attend_chunk(State state, int chunk) {
    clear(state, item.rows, d);
    const long start = (item.first_chunk + chunk) * kChunk;
    const long stop = start + kChunk < item.end ? start + kChunk : item.end;
    const long skipped = item.begin > start ? (item.begin - start) / kTile * kTile : 0;
    if (stop <= start + skipped) return;
    Places here = find(start + skipped);
    for (long t = start + skipped; t < stop; t += kTile) {
      const Places next = find(t + kTile);
      attend_tile(state, t, locate(t, here, next));
      here = next;
    }
  }

  void finish(State state) {
    alignas(64) float row[kMaxHead];
    const float* scale = kF.value.per_token ? nullptr : p.value_scale.factor + item.head * d;
    const float* zero =
        p.value_scale.zero_point ? p.value_scale.zero_point + item.head * d : nullptr;
    for (int r = 0; r < item.rows; ++r) {
      const float seen = reduce_add(load16(state.sum + r * kLanes));
      const float bias = reduce_add(load16(state.bias + r * kLanes));
      float share = 1.0f, sum = seen;
      if (p.sinks) {
        const float sink = p.sinks[head(r)] * kLog2e;
        const float max = state.max[r] > sink ? state.max[r] : sink;
        share = exp2_1(state.max[r] - or_zero(max));
        sum = sum * share + exp2_1(sink - or_zero(max));
      }
      const float factor = sum == 0.0f ? 0.0f : share / sum;
      const float total = seen * factor;  // the weights' sum: below 1 with a sink
      for (long i = 0; i < d; ++i) row[i] = (state.acc[r * d + i] + bias) * factor;
      if (zero) {
        for (long i = 0; i < d; ++i) row[i] -= zero[i] * total;
      }
      if (scale) {
        for (long i = 0; i < d; ++i) row[i] *= scale[i];
      }
      save_row(p.out, p.query.type, token(r) * p.out_token_stride + head(r) * p.out_head_stride, d,
               row);
    }
  }

  static void run(void* context, long index) {
    const Plan& plan = *static_cast<const Plan*>(context);
    const Unit unit = plan.units[index];
    Item& item = plan.items[unit.item];
    Scratch& s = *static_cast<Scratch*>(scratch_memory.reserve(sizeof(Scratch)));
    Kernel k{plan, *plan.params, item, s, plan.params->cache.head_size};
    k.prepare();
    const int rows = item.rows;
    const State running = State::at(s.running, rows, k.d);
    if (!plan.split) {
      k.attend_chunk(running, 0);
      for (int c = 1; c < item.num_chunks; ++c) {
        const State chunk = State::at(s.chunk, rows, k.d);
        k.attend_chunk(chunk, c);
        merge(running, chunk, rows, k.d);
      }
      return k.finish(running);
    }
    float* partials = plan.partials + item.partial;
    const long size = plan.partial_size(item);
    k.attend_chunk(State::at(partials + unit.chunk * size, rows, k.d), unit.chunk);
    if (__atomic_sub_fetch(&item.pending, 1, __ATOMIC_ACQ_REL) != 0) return;
    const State first = State::at(partials, rows, k.d);
    for (int c = 1; c < item.num_chunks; ++c) {
      merge(first, State::at(partials + c * size, rows, k.d), rows, k.d);
    }
    k.finish(first);
  }
};

using Body = void (*)(void*, long);

template <int... I>
Body pick(int format, IndexList<I...>) {
  static constexpr Body kTable[] = {Kernel<I>::run...};
  return kTable[format];
}

}  // namespace

namespace KVQ_ISA {

void attend(const AttendParams& p, const Runtime& runtime) {
  Plan plan{};
  plan.params = &p;
  plan.layout = page_layout(kFormats[p.format], p.cache.head_size, p.cache.block_size);
  plan.group = static_cast<int>(p.num_heads / p.cache.num_kv_heads);
  const long units = make_plan(plan, runtime.num_threads);
  runtime.parallel_for(units, pick(p.format, FormatIndices{}), &plan);
}

}  // namespace KVQ_ISA
}  // namespace kvq
