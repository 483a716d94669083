// Attention on the CPU: means, codes, packed tiles of keys and values, then one task for every tile of queries.
#include <cmath>
#include <functional>
#include <initializer_list>

#include "cpu.h"
#include "kernels.h"

namespace sage::cpu {

namespace {

View described(DType dtype, int64_t batch, int64_t heads, int64_t tokens, int64_t channels) {
  View view;
  view.dtype = dtype;
  view.shape[0] = batch, view.shape[1] = heads, view.shape[2] = tokens, view.shape[3] = channels;
  return view;
}

// Hands out the workspace; with no memory behind it, says how much it takes.
class Arena {
 public:
  explicit Arena(void* base) : base_(reinterpret_cast<uintptr_t>(base)) {}

  template <class T>
  T* take(std::initializer_list<int64_t> sizes) {
    int64_t bytes = sizeof(T), end;
    bool overflow = false;
    for (int64_t size : sizes) overflow |= __builtin_mul_overflow(bytes, size, &bytes);
    overflow |= __builtin_add_overflow(bytes, 63, &bytes);
    overflow |= __builtin_add_overflow(used_, bytes / 64 * 64, &end);
    if (overflow) SAGE_FAIL(SAGE_OUT_OF_MEMORY, "Cannot plan attention as its workspace must be below 2^63 bytes");
    T* address = reinterpret_cast<T*>(base_ + uintptr_t(used_));
    used_ = end;
    return address;
  }

  // One byte an element, or f32.
  View take(DType dtype, int64_t batch, int64_t heads, int64_t tokens, int64_t channels) {
    View view = described(dtype, batch, heads, tokens, channels);
    view.data = take<char>({batch, heads, tokens, channels, bits_per_element(dtype) / 8});
    view.stride[3] = 1;
    for (int i = 2; i >= 0; --i) view.stride[i] = view.stride[i + 1] * view.shape[i + 1];
    return view;
  }

  size_t used() const { return size_t(used_); }

 private:
  const uintptr_t base_;
  int64_t used_ = 0;
};

// What both kinds of attention need: packed tiles and a scratch for every worker.
void take_tiles(Attention& a, bool exact_keys, Arena& arena) {
  const int64_t batch = a.k.batch(), heads = a.k.heads(), tiles = a.tiles(), channels = a.k.channels();
  const int64_t code_channels = a.rotated ? rotated_channels(channels) : channels;
  const int64_t codes_per_word = 4 / kernels().code_bytes;
  const bool flash = a.kernel == Kernel::kFlash;
  a.key_tile_bytes = size_t(kKeyTile * 4 * (flash ? channels : ceil_div(code_channels, codes_per_word)));
  a.value_tile_bytes = size_t(kKeyTile * 4 * a.padded_v_dim() / (a.integer_values() ? codes_per_word : 1));
  a.key_tiles = arena.take<char>({batch, heads, tiles, int64_t(a.key_tile_bytes)});
  a.value_tiles = arena.take<char>({batch, heads, tiles, int64_t(a.value_tile_bytes)});
  if (!flash) {
    a.key_scales = arena.take<float>({batch, heads, tiles, kKeyTile});
    a.bad_keys = arena.take<uint64_t>({batch, heads, tiles});
    if (exact_keys) a.exact_keys = arena.take<float>({batch, heads, tiles, kKeyTile, channels});
    if (a.band) a.exact_values = arena.take<float>({batch, heads, tiles, kKeyTile, a.padded_v_dim()});
  }
  a.bad_values = arena.take<uint64_t>({batch, heads, tiles});
  a.value_peaks = arena.take<float>({batch, heads, tiles});
  if (a.masking.mask) a.covers = arena.take<uint8_t>({a.cover_tasks(), tiles, a.cover_rows()});
  a.scratch_bytes = kernels().scratch_bytes(a);
  a.scratch = arena.take<char>({int64_t(a.scratch_bytes), Pool::shared().workers()});
}

// Whether sage1 needs V in another range than its own to add it up in f16.
bool scales_values(const Attention& a) {
  return a.kernel == Kernel::kSage1 && (a.v.dtype != DType::kF16 || a.center_values || a.f16_accumulator);
}

// The steps before packing, which only attention on numbers has.
struct Preparation {
  SmoothOp q_mean, k_mean, v_mean;
  QuantizeOp q, k, v;
  bool quantizes_values;
};

Attention prepare(const AttentionOp& op, Arena& arena, Preparation& steps) {
  const Plan& plan = op.plan;
  const bool flash = plan.kernel == Kernel::kFlash;
  Attention a = {};
  a.kernel = plan.kernel;
  a.masking = op.masking;
  a.f16_accumulator = plan.f16_accumulator;
  a.fast_exponential = plan.fast_exponential;
  a.scale = op.scale;
  a.p_range = plan.p_range;
  a.q = op.q, a.k = op.k, a.v = op.v, a.o = op.o, a.lse = op.lse;
  a.values = op.v;
  steps = {};
  if (!flash) {  // flash is exact without smoothing
    const auto means = [&](bool smooth, const View& x, int64_t rows, View& mean, SmoothOp& step) {
      if (!smooth) return;
      mean = arena.take(DType::kF32, x.batch(), x.heads(), ceil_div(x.tokens(), rows), x.channels());
      step = {x, mean, View{}, rows};
    };
    means(plan.smooth_q, op.q, kQueryMeanRows, a.q_mean, steps.q_mean);
    means(plan.smooth_k, op.k, plan.k_mean_rows, a.k_mean, steps.k_mean);
    means(plan.smooth_v, op.v, op.v.tokens(), a.v_mean, steps.v_mean);
    a.q_mean_rows = kQueryMeanRows;
    a.k_mean_rows = plan.k_mean_rows;
    a.many_k_means = plan.smooth_k && plan.k_mean_rows < op.k.tokens();
    a.rotated = plan.rotate;
    a.band = plan.band;
    a.first_token = plan.first_token;

    const float range = plan.kernel == Kernel::kSage2Int4 ? kInt4Range : kInt8Range;
    const auto codes = [&](const View& x, const View& mean, int64_t mean_rows, Grouping grouping, int64_t group_rows,
                           View& codes, View& scales, QuantizeOp& step) {
      const int64_t channels = plan.rotate ? rotated_channels(x.channels()) : x.channels();
      codes = arena.take(DType::kI8, x.batch(), x.heads(), x.tokens(), channels);
      scales = arena.take(DType::kF32, x.batch(), x.heads(), group_count(grouping, x.tokens(), group_rows), 1);
      step = {x, mean, codes, scales, false, grouping, group_rows, mean_rows, range, plan.rotate};
    };
    a.q_grouping = plan.q_grouping, a.q_group_rows = plan.q_group_rows;
    a.k_grouping = plan.k_grouping, a.k_group_rows = plan.k_group_rows;
    codes(op.q, a.q_mean, kQueryMeanRows, a.q_grouping, a.q_group_rows, a.q_codes, a.q_scales, steps.q);
    codes(op.k, a.k_mean, plan.k_mean_rows, a.k_grouping, a.k_group_rows, a.k_codes, a.k_scales, steps.k);

    a.center_values = plan.kernel == Kernel::kSage1 && plan.smooth_v;
    steps.quantizes_values = plan.kernel != Kernel::kSage1;
    if (steps.quantizes_values || scales_values(a)) {
      a.v_scales = arena.take(DType::kF32, op.v.batch(), op.v.heads(), 1, op.v.channels());
    }
    if (steps.quantizes_values) {
      const bool int8 = a.integer_values();
      a.values =
          arena.take(int8 ? DType::kI8 : DType::kE4M3, op.v.batch(), op.v.heads(), op.v.tokens(), op.v.channels());
      steps.v = {op.v,       a.v_mean,      a.values,
                 a.v_scales, true,          Grouping::kToken,
                 1,          op.v.tokens(), int8 ? kInt8Range : plan.v_range};
    }
  }
  take_tiles(a, plan.smooth_q || plan.band, arena);
  return a;
}

Attention prepare(const QuantizedAttentionOp& op, Arena& arena) {
  const Plan& plan = op.plan;
  Attention a = {};
  a.kernel = plan.kernel;
  a.masking = op.masking;
  a.f16_accumulator = plan.f16_accumulator;
  a.fast_exponential = plan.fast_exponential;
  a.scale = op.scale;
  a.p_range = plan.p_range;
  a.q = a.q_codes = op.q, a.q_scales = op.q_scales, a.q_mean = op.q_mean;
  a.k = a.k_codes = op.k, a.k_scales = op.k_scales, a.k_mean = op.k_mean;
  a.v = a.values = op.v, a.v_scales = op.v_scales, a.v_mean = op.v_mean;
  a.o = op.o, a.lse = op.lse;
  a.q_grouping = plan.q_grouping, a.q_group_rows = plan.q_group_rows;
  a.k_grouping = plan.k_grouping, a.k_group_rows = plan.k_group_rows;
  a.q_mean_rows = op.q_mean_rows;
  a.k_mean_rows = op.k.tokens();
  if (scales_values(a)) a.v_scales = arena.take(DType::kF32, op.v.batch(), op.v.heads(), 1, op.v.channels());
  take_tiles(a, true, arena);
  return a;
}

void pack_and_attend(const Attention& a, Pool& pool, const OnStage& begin) {
  begin("pack");
  const int64_t tiles = a.k.batch() * a.k.heads() * a.tiles();
  if (scales_values(a)) {
    const int64_t slices = ceil_div(a.v.channels(), kSliceChannels);
    pool.run(a.v.batch() * a.v.heads() * slices, [&a](int64_t task, int) { kernels().scale_values(a, task); });
  }
  const auto pack = [&a, tiles](int64_t task, int) {
    if (task < tiles) {
      kernels().pack_keys(a, task);
    } else if (task < 2 * tiles) {
      kernels().pack_values(a, task - tiles);
    } else {
      kernels().cover_mask(a, task - 2 * tiles);
    }
  };
  pool.run(2 * tiles + a.cover_tasks(), std::cref(pack));
  begin("attention");
  pool.run(a.q.batch() * a.q.heads() * a.query_tiles(),
           [&a](int64_t task, int worker) { kernels().attend(a, task, worker); });
}

template <class Op>
Op described(const AttentionShape& shape, const Plan& plan) {
  Op op = {};
  op.q = described(shape.dtype, shape.batch, shape.q_heads, shape.q_tokens, shape.head_dim);
  op.k = described(shape.dtype, shape.batch, shape.kv_heads, shape.k_tokens, shape.head_dim);
  op.v = described(shape.dtype, shape.batch, shape.kv_heads, shape.k_tokens, shape.v_dim);
  op.masking = shape.masking;
  op.plan = plan;
  return op;
}

}  // namespace

size_t attention_workspace(const AttentionShape& shape, const Plan& plan) {
  Arena arena(nullptr);
  Preparation steps;
  prepare(described<AttentionOp>(shape, plan), arena, steps);
  return arena.used();
}

size_t attention_quantized_workspace(const AttentionShape& shape, const Plan& plan) {
  Arena arena(nullptr);
  prepare(described<QuantizedAttentionOp>(shape, plan), arena);
  return arena.used();
}

void attention(const AttentionOp& op, void* workspace, Pool& pool, const OnStage& begin) {
  Arena arena(workspace);
  Preparation steps;
  const Attention a = prepare(op, arena, steps);

  const int64_t q_means = a.q_mean ? mean_tasks(steps.q_mean) : 0, k_means = a.k_mean ? mean_tasks(steps.k_mean) : 0;
  const int64_t v_means = a.v_mean ? mean_tasks(steps.v_mean) : 0;
  const auto take_means = [&](int64_t task, int) {
    if (task < k_means) {
      kernels().mean(steps.k_mean, task);
    } else if (task < k_means + v_means) {
      kernels().mean(steps.v_mean, task - k_means);
    } else {
      kernels().mean(steps.q_mean, task - k_means - v_means);
    }
  };
  if (k_means + v_means + q_means != 0) {
    begin("mean");
    pool.run(k_means + v_means + q_means, std::cref(take_means));
  }

  if (a.kernel != Kernel::kFlash) {
    const int64_t v_codes = steps.quantizes_values ? quantize_tasks(steps.v) : 0;
    const int64_t k_codes = quantize_tasks(steps.k), q_codes = quantize_tasks(steps.q);
    const auto take_codes = [&](int64_t task, int) {
      if (task < v_codes) {
        quantize_task(steps.v, task);
      } else if (task < v_codes + k_codes) {
        quantize_task(steps.k, task - v_codes);
      } else {
        quantize_task(steps.q, task - v_codes - k_codes);
      }
    };
    begin("quantize");
    pool.run(v_codes + k_codes + q_codes, std::cref(take_codes));
  }
  pack_and_attend(a, pool, begin);
}

void attention_quantized(const QuantizedAttentionOp& op, void* workspace, Pool& pool, const OnStage& begin) {
  Arena arena(workspace);
  pack_and_attend(prepare(op, arena), pool, begin);
}

}  // namespace sage::cpu
