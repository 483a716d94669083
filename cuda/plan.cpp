// Plans, what every device shares: option checks, defaults of each kernel, and the CPU device's tiles.
#include "plan.h"

#include <algorithm>
#include <initializer_list>
#include <vector>

#include "cpu/cpu.h"
#include "validate.h"

namespace sage {

const char* kernel_name(Kernel kernel) {
  static const char* const names[] = {"auto",  "flash",      "sage1",   "sage1-int8",
                                      "sage2", "sage2-int4", "sage2++", "sage-int8"};
  return names[int(kernel)];
}

namespace {

// ---- option checks --------------------------------------------------------------------------------------

// An option that the kernel has no use for is refused: it would be ignored silently.
void check_use(Kernel kernel, const char* name, int32_t value, std::initializer_list<int32_t> allowed,
               const char* must) {
  for (const int32_t one : allowed) {
    if (value == one) return;
  }
  SAGE_FAIL(SAGE_INVALID_ARGUMENT, cannot(kAttention, std::string("options.") + name,
                                          std::string(must) + " with kernel " + kernel_name(kernel), value));
}

void check_contradictions(Kernel kernel, const sage_attention_options& options) {
  if (kernel == Kernel::kFlash) {
    check_use(kernel, "granularity", options.granularity, {SAGE_GRANULARITY_DEFAULT}, "be default (0)");
    check_use(kernel, "smooth_q", options.smooth_q, {SAGE_DEFAULT, SAGE_OFF}, "be default (0) or off (1)");
    check_use(kernel, "smooth_k", options.smooth_k, {SAGE_DEFAULT, SAGE_OFF}, "be default (0) or off (1)");
    check_use(kernel, "smooth_v", options.smooth_v, {SAGE_DEFAULT, SAGE_OFF}, "be default (0) or off (1)");
    check_use(kernel, "rotate", options.rotate, {SAGE_DEFAULT, SAGE_OFF}, "be default (0) or off (1)");
    check_use(kernel, "band", options.band, {SAGE_DEFAULT, SAGE_OFF}, "be default (0) or off (1)");
    check_use(kernel, "first_token", options.first_token, {SAGE_DEFAULT, SAGE_OFF}, "be default (0) or off (1)");
    check_use(kernel, "k_mean_rows", int32_t(options.k_mean_rows), {0}, "be 0");
  }
  if (kernel == Kernel::kSage2PP) {
    check_use(kernel, "pv_accumulator", options.pv_accumulator, {SAGE_ACCUMULATOR_DEFAULT, SAGE_ACCUMULATOR_F16},
              "be default (0) or f16 (2)");
  } else {
    check_use(kernel, "pv_range", options.pv_range, {SAGE_RANGE_DEFAULT}, "be default (0)");
    if (kernel != Kernel::kSage1) {
      check_use(kernel, "pv_accumulator", options.pv_accumulator, {SAGE_ACCUMULATOR_DEFAULT, SAGE_ACCUMULATOR_F32},
                "be default (0) or f32 (1)");
    }
  }
  if (kernel != Kernel::kSage2) {
    check_use(kernel, "exponential", options.exponential, {SAGE_EXPONENTIAL_DEFAULT, SAGE_EXPONENTIAL_EXACT},
              "be default (0) or exact (1)");
  }
}

void check_band(const AttentionShape& shape, const sage_attention_options& options) {
  if (options.band != SAGE_ON || shape.causal) return;
  SAGE_FAIL(SAGE_INVALID_ARGUMENT, cannot(kAttention, "options.causal", "be 1 with options.band on (2)", 0));
}

void set_mean_rows(Plan& plan, const AttentionShape& shape, const sage_attention_options& options) {
  plan.k_mean_rows = options.k_mean_rows ? options.k_mean_rows : shape.k_tokens;
  if (options.k_mean_rows == 0 || plan.smooth_k) return;
  SAGE_FAIL(SAGE_INVALID_ARGUMENT,
            cannot(kAttention, "options.k_mean_rows", "be 0 where options.smooth_k is off (1)", options.k_mean_rows));
}

// ---- defaults -------------------------------------------------------------------------------------------

bool on(int32_t option, bool by_default) { return option == SAGE_DEFAULT ? by_default : option == SAGE_ON; }

void set_groups(Plan& plan, int32_t granularity, uint32_t q_group_rows, uint32_t k_group_rows) {
  const Kernel kernel = plan.kernel;
  if (kernel == Kernel::kFlash) {
    plan.granularity = SAGE_GRANULARITY_DEFAULT;
    plan.q_grouping = plan.k_grouping = Grouping::kToken;
    plan.q_group_rows = plan.k_group_rows = 1;
    return;
  }
  const bool first = kernel == Kernel::kSage1 || kernel == Kernel::kSage1Int8;
  plan.granularity = granularity != SAGE_GRANULARITY_DEFAULT ? granularity
                     : first                                 ? SAGE_GRANULARITY_BLOCK
                                                             : SAGE_GRANULARITY_THREAD;
  const Groups q = resolve_groups(kAttention, "q_group_rows", plan.granularity, SAGE_OPERAND_QUERY, q_group_rows);
  const Groups k = resolve_groups(kAttention, "k_group_rows", plan.granularity, SAGE_OPERAND_KEY, k_group_rows);
  plan.q_grouping = q.grouping;
  plan.q_group_rows = q.rows;
  plan.k_grouping = k.grouping;
  plan.k_group_rows = k.rows;
}

// Where accuracy is asked for by other options, the default is exact: sums of codes make no exact log-sum-exp.
bool fast_exponential(const Plan& plan, int32_t option, const AttentionShape& shape, const DeviceTraits& device) {
  if (option != SAGE_EXPONENTIAL_DEFAULT) return option == SAGE_EXPONENTIAL_FAST;
  if (plan.kernel != Kernel::kSage2 || plan.smooth_q || shape.lse) return false;
  return device.cpu ? cpu_fast_exponential() : cuda_fast_exponential(shape, device, plan);
}

void set_product(Plan& plan, const sage_attention_options& options, const AttentionShape& shape,
                 const DeviceTraits& device) {
  plan.fast_exponential = fast_exponential(plan, options.exponential, shape, device);
  plan.f16_accumulator = plan.kernel == Kernel::kSage1 && options.pv_accumulator == SAGE_ACCUMULATOR_F16;
  plan.p_range = plan.v_range = kE4m3Range;
  if (plan.kernel != Kernel::kSage2PP) return;
  switch (options.pv_range) {
    case SAGE_RANGE_448_2: plan.p_range = 448.0f, plan.v_range = 2.25f; break;
    case SAGE_RANGE_224_4: plan.p_range = 224.0f, plan.v_range = 4.5f; break;
    default: plan.p_range = 112.0f, plan.v_range = 9.0f; break;
  }
}

std::string asked_for(Kernel kernel) { return std::string(kernel_name(kernel)) + " was asked for"; }

}  // namespace

int choose_architecture(const DeviceTraits& device, int wanted) {
  constexpr const char* kAction = "use a device";
  if (device.cpu) {
    if (wanted == 0) return 0;
    SAGE_FAIL(SAGE_INVALID_ARGUMENT, cannot(kAction, "architecture", "be absent (0) on the CPU", wanted));
  }
  if (wanted == 0) return device.compute_capability;
  std::vector<int> allowed = {80};
  if (device.compute_capability >= 89 && device.code_level >= 89) allowed.push_back(89);
  if (device.compute_capability != allowed.back()) allowed.push_back(device.compute_capability);
  if (std::find(allowed.begin(), allowed.end(), wanted) != allowed.end()) return wanted;
  std::string must = "be ";
  for (size_t i = 0; i < allowed.size(); i++) {
    must += (i == 0 ? "" : i + 1 < allowed.size() ? ", " : " or ") + std::to_string(allowed[i]);
  }
  SAGE_FAIL(SAGE_UNSUPPORTED, cannot(kAction, "architecture", must + " on this CUDA device", wanted));
}

Plan plan_attention(const AttentionShape& shape, const sage_attention_options& options, const DeviceTraits& device) {
  Plan plan{};
  plan.kernel = Kernel(options.kernel);
  const bool beyond = options.rotate == SAGE_ON || options.first_token == SAGE_ON || options.k_mean_rows != 0;
  if (plan.kernel == Kernel::kAuto && !device.cpu && options.band == SAGE_ON) {
    plan.kernel = Kernel::kSage2;
    plan.reason = "auto: sage2 has the fastest precision band of CUDA devices";
  } else if (plan.kernel == Kernel::kAuto && !device.cpu && beyond) {
    plan.kernel = Kernel::kSage1;
    plan.reason = "auto: sage1 is the most accurate of the quantized kernels, which alone have these options";
  } else if (plan.kernel == Kernel::kAuto) {
    plan.kernel = device.cpu ? cpu_auto_kernel(shape, plan.reason) : cuda_auto_kernel(shape, device, plan.reason);
  } else {
    plan.reason = asked_for(plan.kernel);
  }
  check_contradictions(plan.kernel, options);
  set_groups(plan, options.granularity, 0, 0);
  const bool quantized = plan.kernel != Kernel::kFlash;
  plan.smooth_q = on(options.smooth_q, plan.kernel == Kernel::kSage2Int4);
  plan.smooth_k = on(options.smooth_k, quantized);
  plan.smooth_v = on(options.smooth_v, false);
  plan.rotate = on(options.rotate, false);
  plan.band = on(options.band, false);
  plan.first_token = on(options.first_token, false);
  check_band(shape, options);
  set_mean_rows(plan, shape, options);
  set_product(plan, options, shape, device);
  device.cpu ? plan_cpu(shape, device, plan) : plan_cuda(shape, device, plan);
  return plan;
}

Plan plan_attention_quantized(const AttentionShape& shape, const sage_attention_quantized_call& call,
                              const DeviceTraits& device) {
  const sage_attention_options& options = call.options;
  Plan plan{};
  plan.kernel = Kernel(options.kernel);
  plan.reason = asked_for(plan.kernel);
  check_contradictions(plan.kernel, options);
  set_groups(plan, options.granularity, call.q_group_rows, call.k_group_rows);
  set_product(plan, options, shape, device);
  device.cpu ? plan_cpu_quantized(shape, device, plan) : plan_cuda_quantized(shape, device, plan);
  return plan;
}

// ---- the CPU device -------------------------------------------------------------------------------------

// sage1 everywhere: measured, it is faster than flash, and closer to it than any other quantized kernel.
Kernel cpu_auto_kernel(const AttentionShape&, std::string& reason) {
  reason = "auto: sage1 is faster than flash on the CPU device, and the most accurate of the quantized kernels";
  return Kernel::kSage1;
}

// The integer path is no faster here, so the more accurate one it is.
bool cpu_fast_exponential() { return false; }

static void set_cpu_tiles(const AttentionShape& shape, const DeviceTraits& device, Plan& plan) {
  plan.architecture = 0;
  plan.block_q = kQueryMeanRows;
  plan.block_k = 64;
  plan.padded_head_dim = int((std::max(shape.head_dim, shape.v_dim) + 15) / 16 * 16);
  plan.implementation = device.implementation;
}

void plan_cpu(const AttentionShape& shape, const DeviceTraits& device, Plan& plan) {
  set_cpu_tiles(shape, device, plan);
  plan.workspace_bytes = cpu::attention_workspace(shape, plan);
}

void plan_cpu_quantized(const AttentionShape& shape, const DeviceTraits& device, Plan& plan) {
  set_cpu_tiles(shape, device, plan);
  plan.workspace_bytes = cpu::attention_quantized_workspace(shape, plan);
}

}  // namespace sage
