// Paged attention that dequantizes on read. Compiled once per ISA.
//
// plan.h cuts the work up. A chunk of 512 tokens is attended on its own, and chunks' results merge
// in an order that their positions fix; whether one thread does all chunks of an item or many
// threads do some each changes nothing. So a row's output depends on its own sequence alone, bit
// for bit: not on the batch, the number of threads, or how a prompt was cut into prefill chunks.
#include "range.h"
#include "rotate.h"

namespace kvq {
namespace {

struct Empty {};

template <int kFormat>
struct Kernel {
  static constexpr Format kF = kFormats[kFormat];
  // All rows; or the sealed ones, and then the recent ones.
  using Main = Range<kFormat>;
  using Recent = Range<kF.recent ? kRecentFormat : kFormat>;

  // What one kv head of an item keeps between tiles.
  struct Head {
    typename Main::Head main;
    std::conditional_t<kF.recent, typename Recent::Head, Empty> recent;
  };

  // What a worker needs for whatever it works on; heads and their states lie behind it.
  struct Scratch {
    typename Main::Scratch main;
    std::conditional_t<kF.recent, typename Recent::Scratch, Empty> recent;
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

  // Rows of positions before this are sealed for some query of the item, or for all.
  int sealed(int row) const {
    if constexpr (!kF.recent) return 0;
    return static_cast<int>(sealed_before(position(row)));
  }

  int position(int row) const {
    const int count = p.query_start[item.seq + 1] - p.query_start[item.seq];
    return p.seq_lens[item.seq] - count + (item.first + row) / plan.heads_per_kv;
  }

  // `recent`: whether the unit reaches recent rows.
  void prepare(int h, bool recent) {
    Head& at = heads[h];
    const int length = p.seq_lens[item.seq];
    const long channels = (item.head + h) * d;
    const float* scale = kF.key.is_static() ? p.key_scale.factor + channels : nullptr;
    const float* zero = p.key_scale.zero_point ? p.key_scale.zero_point + channels : nullptr;
    bool uniform = true;
    if (scale) {
      for (long i = 1; i < d; ++i) uniform &= scale[i] == scale[0];
    }
    // Scores come out in log2 units, or in units of the softcap.
    const float unit = p.scale * (p.softcap > 0.0f ? 1.0f / p.softcap : kLog2e);
    const float gain = kF.key.rotated ? rotation_gain(static_cast<int>(d)) : 1.0f;
    const float factor = (scale && uniform ? scale[0] * unit : unit) * gain;
    RowFacts& facts = at.main.facts;
    facts.softcap = p.softcap;
    facts.shaped = p.softcap > 0.0f || p.alibi_slopes;
    facts.common = {0, length};
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
      Main::KeyDot::set_query(at.main.query, r, d, q, factor);
      if constexpr (kF.recent) {
        if (recent) Recent::KeyDot::set_query(at.recent.query, r, d, q, factor);
      }
      facts.key_bias[r] = bias * unit;
      facts.position[r] = position(r);
      const Span seen = visible(p, facts.position[r], length);
      facts.span[r] = seen;
      if (seen.begin > facts.common.begin) facts.common.begin = seen.begin;
      if (seen.end < facts.common.end) facts.common.end = seen.end;
      facts.slope[r] = p.alibi_slopes ? p.alibi_slopes[query_head(h, r)] * kLog2e : 0.0f;
    }
    if constexpr (kF.recent) {
      if (recent) at.recent.facts = facts;
      for (int r = 0; r < item.rows; ++r) {
        const Span seen = facts.span[r];
        const int bound = sealed(r);
        facts.sees_first[r] = seen.begin == 0 && bound > 0;
        facts.span[r] = {seen.begin > 1 ? seen.begin : 1, bound};
        at.recent.facts.span[r].begin = seen.begin > bound ? seen.begin : bound;
      }
    }
  }

  // One chunk, for every head its state.
  template <class StateOf>
  void attend_chunk(const Main& main, const Recent& recent, long chunk, const StateOf& state_of) {
    for (int h = 0; h < item.heads; ++h) {
      state_of(h).clear(item.rows, d);
      if constexpr (kF.recent) {
        if (chunk == 0 && main.end > 0) main.attend_first(heads[h].main, h, state_of(h));
      }
    }
    main.attend_chunk(chunk, [&](int h) -> auto& { return heads[h].main; }, state_of);
    if constexpr (kF.recent) {
      recent.attend_chunk(chunk, [&](int h) -> auto& { return heads[h].recent; }, state_of);
    }
  }

  void finish(int h, State state) {
    alignas(64) float row[kMaxHead];
    const float* scale =
        kF.value.is_static() ? p.value_scale.factor + (item.head + h) * d : nullptr;
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
  void attend_node(const Main& main, const Recent& recent, long begin, long end,
                   const StateOf& state_of) {
    int depth = 0;
    const auto merge_last = [&] {
      --depth;
      for (int h = 0; h < item.heads; ++h) {
        merge(state_of(depth - 1, h), state_of(depth, h), item.rows, d);
      }
    };
    for (long c = begin; c < end; ++c) {
      attend_chunk(main, recent, c, [&](int h) { return state_of(depth, h); });
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
    [[maybe_unused]] const FlushSubnormals flush;
    fit_output(k.s.main.weights, plan.params->query.type, kF.value.per_token);
#if defined(KVQ_AMX)
    using Key = typename Main::KeyDot;
    using Value = typename Main::ValueDot;
    const bool tiles = item.rows >= kFewestTileRows<Key> || item.rows >= kFewestTileRows<Value>;
    const TileSession session(tiles, item.rows);
#endif
    const bool recent_rows = unit.end * kChunk > k.sealed(0);
    for (int h = 0; h < item.heads; ++h) k.prepare(h, recent_rows);
    const long size = plan.state_floats(item), mine = index - item.first_unit;
    const bool split = item.units() > 1;
    const auto partial = [&](long unit, int h) {
      return State::at(plan.partial(item, unit, h), item.rows);
    };
    const AttendParams& p = *plan.params;
    const int first_sealed = k.sealed(0), all_sealed = k.sealed(item.rows - 1);
    const int begin = kF.recent && item.begin == 0 ? 1 : item.begin;
    const Main main{item,        p.cache, p.block_table + item.seq * p.block_table_stride,
                    plan.layout, begin,   kF.recent ? all_sealed : item.end,
                    k.s.main,    k.d};
    const Recent recent = [&]() -> Recent {
      if constexpr (!kF.recent) {
        return main;
      } else {
        return {item,
                p.recent,
                p.recent_table + item.seq * p.recent_table_stride,
                plan.recent_layout,
                first_sealed > item.begin ? first_sealed : item.begin,
                item.end,
                k.s.recent,
                k.d};
      }
    }();
    k.attend_node(main, recent, unit.begin, unit.end, [&](int depth, int h) {
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
  if (kFormats[p.format].recent) {
    plan.recent_layout =
        page_layout(kFormats[kRecentFormat], p.recent.head_size, p.recent.block_size);
  }
  const Entry entry = pick(p.format, MakeIndices<kNumFormats>::type{});
  const int threads = work_of(p, plan.heads_per_kv) < kAlone ? 1 : runtime.num_threads;
  make_plan(plan, threads, entry.scratch, runtime.memory);
  runtime.parallel_for(plan.num_units, threads, entry.run, &plan);
}

}  // namespace KVQ_ISA
}  // namespace kvq
