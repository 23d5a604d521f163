// Paged attention that dequantizes on read. Compiled once per ISA.
//
// plan.h cuts the work up. A chunk of 512 tokens is attended on its own, and chunks' results merge
// in an order that their positions fix; whether one thread does all chunks of an item or many
// threads do some each changes nothing. So a row's output depends on its own sequence alone, bit
// for bit: not on the batch, the number of threads, or how a prompt was cut into prefill chunks.
#include "dot_amx.h"
#include "dot_amx_bf16.h"
#include "dot_bf16.h"
#include "dot_fp32.h"
#include "dot_vnni.h"
#include "load.h"
#include "rotate.h"
#include "softmax.h"

namespace kvq {
namespace {

// Which dot product serves a code on this ISA.
template <Code C>
struct DotOf {
  using type = Fp32Dot<C>;
};
#if defined(KVQ_AMX)
template <Code C>
using IntegerDot = AmxDot<C>;
#elif defined(KVQ_VNNI)
template <Code C>
using IntegerDot = VnniDot<C>;
#endif
#if defined(KVQ_VNNI)
template <>
struct DotOf<Code::kInt8> {
  using type = IntegerDot<Code::kInt8>;
};
template <>
struct DotOf<Code::kInt4> {
  using type = IntegerDot<Code::kInt4>;
};
#endif
#if defined(KVQ_AMX)
template <Code C>
using FloatDot = AmxBf16Dot<C>;
#elif defined(__AVX512BF16__) && defined(__AVX512VBMI__)
template <Code C>
using FloatDot = Bf16Dot<C>;
#endif
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
template <>
struct DotOf<Code::kFp8E4M3> {
  using type = FloatDot<Code::kFp8E4M3>;
};
template <>
struct DotOf<Code::kFp8E5M2> {
  using type = FloatDot<Code::kFp8E5M2>;
};
#endif

template <int kFormat>
struct Kernel {
  static constexpr Format kF = kFormats[kFormat];
  using KeyDot = typename DotOf<kF.key.code>::type;
  using ValueDot = typename DotOf<kF.value.code>::type;

  // What one kv head of an item keeps between tiles.
  struct Head {
    typename KeyDot::Query query;
    RowFacts facts;
  };

  // What a worker needs for whatever it works on; heads and their states lie behind it.
  struct Scratch {
    typename KeyDot::Tiles key_tiles;
    typename ValueDot::Tiles value_tiles;
    typename ValueDot::Weights weights;
    alignas(64) float scores[kMaxRows * kTile];
    alignas(64) uint8_t numbers[has_nan(kF.value.code) ? kTile * kMaxHead : 64];  // of a tile's V
    float alpha[kMaxRows], gamma[kMaxRows];
  };

  const Plan& plan;
  const AttendParams& p;
  const Item& item;
  Scratch& s;
  Head* heads;    // [item.heads]
  float* states;  // [stack depth, item.heads]
  const long d;

  long token(int r) const { return p.query_start[item.seq] + (item.first + r) / plan.heads_per_kv; }
  long query_head(int h, int r) const {
    return static_cast<long>(item.head + h) * plan.heads_per_kv +
           (item.first + r) % plan.heads_per_kv;
  }

  void prepare(int h) {
    Head& at = heads[h];
    const int length = p.seq_lens[item.seq];
    const int count = p.query_start[item.seq + 1] - p.query_start[item.seq];
    const long channels = (item.head + h) * d;
    const float* scale = kF.key.per_token ? nullptr : p.key_scale.factor + channels;
    const float* zero = p.key_scale.zero_point ? p.key_scale.zero_point + channels : nullptr;
    bool uniform = true;
    if (scale) {
      for (long i = 1; i < d; ++i) uniform &= scale[i] == scale[0];
    }
    // Scores come out in log2 units, or in units of the softcap.
    const float unit = p.scale * (p.softcap > 0.0f ? 1.0f / p.softcap : kLog2e);
    const float gain = kF.key.rotated ? rotation_gain(static_cast<int>(d)) : 1.0f;
    const float factor = (scale && uniform ? scale[0] * unit : unit) * gain;
    at.facts.softcap = p.softcap;
    at.facts.shaped = p.softcap > 0.0f || p.alibi_slopes;
    at.facts.common = {0, length};
    alignas(64) float q[kMaxHead];
    for (int r = 0; r < item.rows; ++r) {
      load_row(p.query, token(r), query_head(h, r), d, q);
      if constexpr (kF.key.rotated) rotate(q, d);
      float bias = 0.0f;
      if (zero) {
        for (long i = 0; i < d; ++i) bias -= q[i] * scale[i] * zero[i];
      }
      if (!uniform) {
        for (long i = 0; i < d; ++i) q[i] *= scale[i];
      }
      KeyDot::set_query(at.query, r, d, q, factor);
      at.facts.key_bias[r] = bias * unit;
      at.facts.position[r] = length - count + (item.first + r) / plan.heads_per_kv;
      const Span seen = visible(p, at.facts.position[r], length);
      at.facts.span[r] = seen;
      if (seen.begin > at.facts.common.begin) at.facts.common.begin = seen.begin;
      if (seen.end < at.facts.common.end) at.facts.common.end = seen.end;
      at.facts.slope[r] = p.alibi_slopes ? p.alibi_slopes[query_head(h, r)] * kLog2e : 0.0f;
    }
  }

  // Where a tile's four groups lie: pages of the item's first kv head, and tokens within them.
  struct Places {
    const uint8_t* page[kGroups];
    long within[kGroups];
  };

  // Groups outside the item's context repeat the nearest one inside it: block tables hold nothing
  // there.
  Places find(long t0) const {
    Places places;
    const long size = p.cache.block_size;
    const long first = item.begin / kLanes * kLanes, last = (item.end - 1) / kLanes * kLanes;
    const int32_t* blocks = p.block_table + item.seq * p.block_table_stride;
    for (int g = 0; g < kGroups; ++g) {
      long t = t0 + g * kLanes;
      t = t < first ? first : t > last ? last : t;
      const uint32_t block = static_cast<uint32_t>(t) / static_cast<uint32_t>(size);
      places.page[g] =
          p.cache.data + blocks[block] * p.cache.block_stride + item.head * p.cache.head_stride;
      places.within[g] = t - block * size;
    }
    return places;
  }

  struct Step {
    const Places& at;
    int head;
  };

  Tile locate(long t0, Step here, Step next) const {
    Tile tile;
    tile.begin = item.begin > t0 ? static_cast<int>(item.begin - t0) : 0;
    tile.end = item.end - t0 < kTile ? static_cast<int>(item.end - t0) : kTile;
    const auto fill = [&](const Step& step, Lines& lines) {
      for (int g = 0; g < kGroups; ++g) {
        const uint8_t* page = step.at.page[g] + step.head * p.cache.head_stride;
        const long within = step.at.within[g];
        lines.key[g] = page + plan.layout.key_codes + within * d * code_bits(kF.key.code) / 8;
        lines.value[g] = page + plan.layout.value_codes + within * d * code_bits(kF.value.code) / 8;
        lines.key_metadata[g] = page + plan.layout.key_metadata + within * 4;
        lines.value_metadata[g] = page + plan.layout.value_metadata + within * 4;
      }
    };
    fill(here, tile.now);
    fill(next, tile.next);
    return tile;
  }

  void attend_tile(Head& head, State state, long t0, const Tile& tile) {
    KeyDot::score(head.query, s.key_tiles, tile, item.rows, d, s.scores);
    TileSoftmax<kFormat, KeyDot, ValueDot> softmax{head.query, s.weights, head.facts, s.scores,
                                                   s.alpha,    s.gamma,   {},         {}};
    softmax.load(tile);
    softmax.run(state, item.rows, t0);
    if constexpr (has_nan(kF.value.code)) {
      const Span& common = head.facts.common;
      const bool even = common.begin <= t0 + tile.begin && common.end >= t0 + tile.end;
      if (!even && find_nan(tile)) return accumulate_apart(head, state, t0, tile);
    }
    accumulate(state, tile);
  }

  void accumulate(State state, const Tile& tile) {
    ValueDot::accumulate(s.weights, s.value_tiles, tile, item.rows, d, s.alpha, s.gamma, state.acc);
  }

  // Whether a tile's V holds a code that is no finite number.
  bool find_nan(const Tile& tile) const {
    U16 found{};
    for (int g = 0; g < kGroups; ++g) {
      for (long i = 0; i < kLanes * d; i += 64) {
        found |= (load<U16>(tile.now.value[g] + i) & 0x7F7F7F7Fu) + 0x01010101u * kPastFinite;
      }
    }
    return largest(cast<I16>((found & 0x80808080u) >> 7)) != 0;
  }
  // Added to a magnitude of 7 bits, sets the eighth where it is past the finite ones.
  static constexpr uint32_t kPastFinite = kF.value.code == Code::kFp8E5M2 ? 4 : 1;

  // Rows that do not see the same tokens share a tile's V, and 0 * NaN is NaN: such codes are taken
  // out, and added to the rows that see their tokens.
  __attribute__((noinline, cold)) void accumulate_apart(const Head& head, State state, long t0,
                                                        const Tile& tile) {
    Tile finite = tile;
    const auto for_each_nan = [&](const auto& visit) {
      for (int g = 0; g < kGroups; ++g) {
        for (long i = 0; i < kLanes * d; ++i) {
          const uint8_t code = tile.now.value[g][i];
          if (((code & 0x7Fu) + kPastFinite) & 0x80u) visit(g, i, code);
        }
      }
    };
    for (int g = 0; g < kGroups; ++g) {
      uint8_t* to = s.numbers + g * kLanes * d;
      memcpy(to, tile.now.value[g], static_cast<size_t>(kLanes * d));
      finite.now.value[g] = to;
    }
    for_each_nan([&](int g, long i, uint8_t) { s.numbers[g * kLanes * d + i] = 0; });
    accumulate(state, finite);
    for_each_nan([&](int g, long i, uint8_t code) {
      const long token = t0 + g * kLanes + i / (4 * d) * 4 + i % 4, channel = i % (4 * d) / 4;
      for (int r = 0; r < item.rows; ++r) {
        const Span& seen = head.facts.span[r];
        if (token < seen.begin || token >= seen.end) continue;
        state.acc[r * d + channel] += Codec<kF.value.code>::decode(code);
      }
    });
  }

  // One chunk, for every head its state. Blocks outside, heads inside: in the order of memory.
  template <class StateOf>
  void attend_chunk(long chunk, const StateOf& state_of) {
    for (int h = 0; h < item.heads; ++h) state_of(h).clear(item.rows, d);
    long start = chunk * kChunk;
    const long stop = start + kChunk < item.end ? start + kChunk : item.end;
    if (item.begin > start) start += (item.begin - start) / kTile * kTile;
    const long size = p.cache.block_size;
    const int run = size % kTile == 0 && size < kChunk ? static_cast<int>(size / kTile) : 1;
    if (start >= stop) return;
    Places places[kChunk / kTile + 1];
    places[0] = find(start);
    for (long t0 = start; t0 < stop; t0 += run * kTile) {
      int n = 0;
      while (n < run && t0 + n * kTile < stop) {
        ++n;
        places[n] = find(t0 + n * kTile);
      }
      for (int h = 0; h < item.heads; ++h) {
        for (int i = 0; i < n; ++i) {
          const bool last_tile = i + 1 == n, last_head = h + 1 == item.heads;
          const Step next = !last_tile  ? Step{places[i + 1], h}
                            : last_head ? Step{places[n], 0}
                                        : Step{places[0], h + 1};
          const long t = t0 + i * kTile;
          attend_tile(heads[h], state_of(h), t, locate(t, {places[i], h}, next));
        }
      }
      places[0] = places[n];
    }
  }

  void finish(int h, State state) {
    alignas(64) float row[kMaxHead];
    const float* scale = kF.value.per_token ? nullptr : p.value_scale.factor + (item.head + h) * d;
    const float* zero =
        p.value_scale.zero_point ? p.value_scale.zero_point + (item.head + h) * d : nullptr;
    for (int r = 0; r < item.rows; ++r) {
      const float seen = reduce_add(load16(state.sum + r * kLanes));
      const float bias = reduce_add(load16(state.bias + r * kLanes));
      float share = 1.0f, sum = seen;
      if (p.sinks) {
        const float sink = p.sinks[query_head(h, r)] * kLog2e;
        const Shares<F4> both = shares(F4{} + state.max[r], F4{} + sink);
        share = both.a[0];
        sum = sum * share + both.b[0];
      }
      const float gain = kF.value.rotated ? rotation_gain(static_cast<int>(d)) : 1.0f;
      const float factor = sum == 0.0f ? 0.0f : share / sum * gain;
      const float total = seen * factor;  // the weights' sum: below 1 with a sink
      for (long i = 0; i < d; ++i) row[i] = (state.acc[r * d + i] + bias) * factor;
      if (zero) {
        for (long i = 0; i < d; ++i) row[i] -= zero[i] * total;
      }
      if (scale) {
        for (long i = 0; i < d; ++i) row[i] *= scale[i];
      }
      if constexpr (kF.value.rotated) unrotate(row, d);
      save_row(p.out, p.query.type,
               token(r) * p.out_token_stride + query_head(h, r) * p.out_head_stride, d, row);
    }
  }

  // Chunks [begin, end), which lie in one node, for every head: into state_of(0, head). Those at
  // higher places of the stack hold what waits for its right half.
  template <class StateOf>
  void attend_node(long begin, long end, const StateOf& state_of) {
    int depth = 0;
    const auto merge_last = [&] {
      --depth;
      for (int h = 0; h < item.heads; ++h) {
        merge(state_of(depth - 1, h), state_of(depth, h), item.rows, d);
      }
    };
    for (long c = begin; c < end; ++c) {
      attend_chunk(c, [&](int h) { return state_of(depth, h); });
      ++depth;
      for (long node = c; node % 2 == 1 && depth > 1; node /= 2) merge_last();
    }
    while (depth > 1) merge_last();
  }

  static void run(void* context, int worker, long index) {
    const Plan& plan = *static_cast<const Plan*>(context);
    const Unit unit = plan.units[index];
    const Item& item = plan.items[unit.item];
    char* memory = plan.workers + worker * plan.worker_bytes;
    Head* heads = reinterpret_cast<Head*>(memory + sizeof(Scratch));
    Kernel k{plan,
             *plan.params,
             item,
             *reinterpret_cast<Scratch*>(memory),
             heads,
             reinterpret_cast<float*>(heads + item.heads),
             plan.params->cache.head_size};
    fit_output(k.s.weights, plan.params->query.type, kF.value.per_token);
#if defined(KVQ_AMX)
    const bool tiles =
        item.rows >= kFewestTileRows<KeyDot> || item.rows >= kFewestTileRows<ValueDot>;
    const TileSession session(tiles, item.rows);
#endif
    for (int h = 0; h < item.heads; ++h) k.prepare(h);
    const long size = plan.state_floats(item), mine = index - item.first_unit;
    const bool split = plan.is_split(item);
    const auto partial = [&](long unit, int h) {
      return State::at(plan.partial(item, unit, h), item.rows);
    };
    k.attend_node(unit.begin, unit.end, [&](int depth, int h) {
      if (split && depth == 0) return partial(mine, h);
      return State::at(k.states + (static_cast<long>(depth) * item.heads + h) * size, item.rows);
    });
    if (!split) {
      for (int h = 0; h < item.heads; ++h) k.finish(h, State::at(k.states + h * size, item.rows));
      return;
    }
    const bool done = join(plan, item, index, [&](long left, long right) {
      for (int h = 0; h < item.heads; ++h) {
        merge(partial(left, h), partial(right, h), item.rows, k.d);
      }
    });
    if (!done) return;
    for (int h = 0; h < item.heads; ++h) k.finish(h, partial(0, h));
  }
};

// One format's kernel.
struct Entry {
  Runtime::Body run;
  ScratchSize scratch;
};

template <int... I>
Entry pick(int format, IndexList<I...>) {
  static constexpr Entry kTable[] = {
      {Kernel<I>::run, {sizeof(typename Kernel<I>::Scratch), sizeof(typename Kernel<I>::Head)}}...};
  return kTable[format];
}

}  // namespace

namespace KVQ_ISA {

void attend(const AttendParams& p, const Runtime& runtime) {
  Plan plan{};
  plan.params = &p;
  plan.layout = page_layout(kFormats[p.format], p.cache.head_size, p.cache.block_size);
  plan.heads_per_kv = static_cast<int>(p.num_heads / p.cache.num_kv_heads);
  const Entry entry = pick(p.format, FormatIndices{});
  const int threads = work_of(p, plan.heads_per_kv) < kAlone ? 1 : runtime.num_threads;
  make_plan(plan, threads, entry.scratch, runtime.memory);
  runtime.parallel_for(plan.num_units, threads, entry.run, &plan);
}

}  // namespace KVQ_ISA
}  // namespace kvq
