// Plans of CUDA devices that need not be there: which products each architecture gets. Prints a line for every check
// that fails; the exit status says whether any did.
#include <cstdio>
#include <cstring>
#include <string>

#include "ops.h"

using namespace sage;

namespace {

int failures = 0, checks = 0;

void check(bool good, const std::string& what, int line) {
  ++checks;
  if (good) return;
  ++failures;
  std::printf("plans.cpp:%d: %s\n", line, what.c_str());
}
#define CHECK(condition, what) check((condition), std::string(#condition) + ": " + (what), __LINE__)

DeviceTraits gpu(int compute_capability, int code_level) {
  DeviceTraits traits;
  traits.cpu = false;
  traits.compute_capability = traits.architecture = compute_capability;
  traits.code_level = code_level;
  traits.multiprocessors = 108;
  return traits;
}

DeviceTraits as(DeviceTraits traits, int architecture) {
  traits.architecture = choose_architecture(traits, architecture);
  return traits;
}

std::string refusal(const DeviceTraits& traits, int architecture) {
  try {
    choose_architecture(traits, architecture);
    return "";
  } catch (const Error& error) {
    return (error.status == SAGE_UNSUPPORTED ? "unsupported: " : "invalid: ") + error.message;
  }
}

AttentionShape shape_of(int64_t head_dim) {
  AttentionShape shape{1, 8, 8, 1000, 1000, head_dim, head_dim, DType::kF16, DType::kF16, false, true};
  return shape;
}

Plan plan_of(const DeviceTraits& traits, int32_t kernel, int64_t head_dim = 128, float softcap = 0,
             int32_t granularity = SAGE_GRANULARITY_DEFAULT) {
  AttentionShape shape = shape_of(head_dim);
  shape.masking.softcap = softcap;
  sage_attention_options options{};
  options.kernel = kernel;
  options.granularity = granularity;
  return plan_attention(shape, options, traits);
}

void check_architectures() {
  const auto says = [](const std::string& text, const char* words) { return text.find(words) != std::string::npos; };
  for (const int own : {80, 86, 87, 89, 90, 100, 120}) {
    const DeviceTraits traits = gpu(own, 89);
    const std::string name = "sm_" + std::to_string(own);
    CHECK(choose_architecture(traits, 0) == own, name);
    CHECK(choose_architecture(traits, own) == own, name);
    CHECK(choose_architecture(traits, 80) == 80, name);
    CHECK(refusal(traits, 89).empty() == (own >= 89), name);
    for (const int wrong : {-1, 1, 75, 81, own + 1, 200}) {
      const std::string text = refusal(traits, wrong);
      CHECK(says(text, ("current value is " + std::to_string(wrong)).c_str()) && says(text, "unsupported"), text);
      CHECK(says(text, own == 80 ? "be 80 on" : own == 86 ? "be 80 or 86 on" : "be 80"), text);
    }
  }
  CHECK(says(refusal(gpu(90, 89), 120), "be 80, 89 or 90 on"), refusal(gpu(90, 89), 120));
  CHECK(says(refusal(gpu(120, 89), 90), "be 80, 89 or 120 on"), refusal(gpu(120, 89), 90));
  CHECK(says(refusal(gpu(89, 89), 90), "be 80 or 89 on"), refusal(gpu(89, 89), 90));
  CHECK(says(refusal(gpu(120, 80), 89), "be 80 or 120 on"), "code without FP8");
  CHECK(choose_architecture(DeviceTraits{}, 0) == 0, "CPU");
  CHECK(says(refusal(DeviceTraits{}, 80), "invalid"), refusal(DeviceTraits{}, 80));
}

struct Products {
  int own, architecture;
  bool fp8, int4;
};

// Tensor cores for FP8: 8.9 and 12.x; for INT4: 8.x.
constexpr Products kProducts[] = {{80, 80, false, true}, {86, 86, false, true},    {87, 87, false, true},
                                  {89, 89, true, true},  {89, 80, false, true},    {90, 89, true, true},
                                  {90, 80, false, true}, {100, 100, false, false}, {120, 120, true, false},
                                  {120, 89, true, true}, {120, 80, false, true}};

void check_products() {
  for (const auto& [own, architecture, fp8, int4] : kProducts) {
    const DeviceTraits traits = as(gpu(own, 89), architecture);
    const std::string name = "sm_" + std::to_string(own) + " as " + std::to_string(architecture);
    for (const int64_t head_dim : {40, 64, 128, 256}) {
      for (const int32_t kernel : {SAGE_KERNEL_SAGE2, SAGE_KERNEL_SAGE2_INT4, SAGE_KERNEL_SAGE2PP}) {
        const Plan plan = plan_of(traits, kernel, head_dim);
        const bool has_int4 = int4 && kernel == SAGE_KERNEL_SAGE2_INT4;
        CHECK(plan.fp8_products == fp8 && plan.int4_products == has_int4, name);
        CHECK(plan.architecture == (fp8 ? 89 : 80), name);
        std::string code = fp8 ? "sm_89 mma" : "sm_80 mma";
        if (has_int4) code += ", INT4";
        if (fp8) code += ", FP8";
        CHECK(plan.implementation == code, name + " runs " + plan.implementation);
      }
      for (const int32_t kernel : {SAGE_KERNEL_FLASH, SAGE_KERNEL_SAGE1, SAGE_KERNEL_SAGE1_INT8}) {
        const Plan plan = plan_of(traits, kernel, head_dim);
        CHECK(!plan.fp8_products && !plan.int4_products && plan.architecture == 80, name);
      }
    }
    // V in tiles of FP8 codes takes a byte a channel more, and INT4 codes of Q and K half a byte less.
    const size_t plain = plan_of(as(gpu(90, 89), 80), SAGE_KERNEL_SAGE2).workspace_bytes, values = 8 * 1024 * 128;
    CHECK(plan_of(traits, SAGE_KERNEL_SAGE2).workspace_bytes == plain + (fp8 ? values : 0), name);
    // Where scores are masked or changed, INT8 tensor cores multiply INT4 codes.
    for (const int32_t kernel : {SAGE_KERNEL_SAGE2, SAGE_KERNEL_SAGE2_INT4, SAGE_KERNEL_SAGE2PP}) {
      const Plan masked = plan_of(traits, kernel, 128, 20.0f);
      CHECK(masked.fp8_products == fp8 && !masked.int4_products, name);
    }
    // GPUs whose code was compiled without FP8 have no such products.
    if (own >= 89) CHECK(!plan_of(as(gpu(own, 80), own), SAGE_KERNEL_SAGE2, 64, 20.0f).fp8_products, name);
  }
  for (const int own : {100, 120}) CHECK(!plan_of(gpu(own, 80), SAGE_KERNEL_SAGE2).fp8_products, std::to_string(own));
}

// Rotated rows have codes of a byte; what else goes beyond the papers has the products that are everywhere.
void check_beyond() {
  for (const auto& [own, architecture, fp8, int4] : kProducts) {
    const DeviceTraits traits = as(gpu(own, 89), architecture);
    const std::string name = "sm_" + std::to_string(own) + " as " + std::to_string(architecture);
    const auto planned = [&](void (*choose)(sage_attention_options&)) {
      AttentionShape shape = shape_of(64);
      sage_attention_options options{};
      options.kernel = SAGE_KERNEL_SAGE2_INT4;
      choose(options);
      shape.causal = options.causal;
      shape.masking.after = options.causal ? 0 : kUnlimited;
      return plan_attention(shape, options, traits);
    };
    const Plan rotated = planned([](sage_attention_options& options) { options.rotate = SAGE_ON; });
    CHECK(rotated.fp8_products == fp8 && !rotated.int4_products && rotated.architecture < 90, name);
    for (const Plan& plan : {planned([](sage_attention_options& options) { options.first_token = SAGE_ON; }),
                             planned([](sage_attention_options& options) { options.k_mean_rows = 64; }),
                             planned([](sage_attention_options& options) {
                               options.causal = 1, options.smooth_q = SAGE_ON, options.band = SAGE_ON;
                             })}) {
      CHECK(!plan.fp8_products && !plan.int4_products && plan.architecture == 80, name);
    }
  }
}

void check_hopper() {
  const DeviceTraits own = gpu(90, 89);
  CHECK(plan_of(own, SAGE_KERNEL_SAGE2).architecture == 90, "own kernel");
  CHECK(plan_of(own, SAGE_KERNEL_FLASH).architecture == 90, "own kernel");
  for (const int older : {80, 89}) {
    for (const int32_t kernel : {SAGE_KERNEL_FLASH, SAGE_KERNEL_SAGE1, SAGE_KERNEL_SAGE2}) {
      CHECK(plan_of(as(own, older), kernel).architecture < 90, std::to_string(older));
    }
    CHECK(plan_of(as(own, older), SAGE_KERNEL_AUTO).kernel == Kernel::kFlash, "auto as on an older GPU");
  }
  // It packs rotated rows itself, and into the same workspace.
  for (const int32_t kernel : {SAGE_KERNEL_SAGE2, SAGE_KERNEL_SAGE2_INT4, SAGE_KERNEL_SAGE2PP}) {
    sage_attention_options options{};
    options.kernel = kernel;
    options.rotate = SAGE_ON;
    const Plan rotated = plan_attention(shape_of(128), options, own), plain = plan_of(own, kernel, 128);
    CHECK(rotated.architecture == 90 && rotated.workspace_bytes == plain.workspace_bytes, rotated.reason);
    CHECK(rotated.fast_exponential == plain.fast_exponential && rotated.block_k == plain.block_k, rotated.reason);
  }
  // Hopper's own path of granularities that its kernel lacks emulates nothing.
  const Plan warp = plan_of(own, SAGE_KERNEL_SAGE2_INT4, 128, 0, SAGE_GRANULARITY_WARP);
  CHECK(warp.architecture == 80 && !warp.fp8_products && !warp.int4_products, warp.implementation);
}

// Hopper's own sage2 has the precision band at every head dimension, of tensors that boxes suit.
void check_hopper_band() {
  const int64_t dims[][2] = {{64, 64}, {128, 128}, {128, 256}, {160, 160}, {192, 128}, {256, 256}};
  for (const auto& [head_dim, v_dim] : dims) {
    AttentionShape shape = shape_of(head_dim);
    shape.v_dim = v_dim;
    shape.causal = true;
    shape.masking.after = 0;
    sage_attention_options options{};
    options.kernel = SAGE_KERNEL_SAGE2;
    options.causal = 1;
    options.band = SAGE_ON;
    const std::string name = std::to_string(head_dim) + "/" + std::to_string(v_dim);
    const auto planned = [&] { return plan_attention(shape, options, gpu(90, 89)); };
    CHECK(planned().architecture == 90 && planned().fast_exponential, name);
    shape.boxes = false;
    CHECK(planned().architecture == 80 && !planned().fast_exponential, name);
  }
}

// Hopper's own sage2 takes bool masks, where nothing else changes scores; auto chooses as it does without one.
void check_hopper_masks() {
  const auto planned = [](void (*change)(AttentionShape&, sage_attention_options&)) {
    static uint8_t somewhere;
    AttentionShape shape = shape_of(128);
    shape.q_tokens = shape.k_tokens = 4096;
    shape.masking.mask = {&somewhere, DType::kBool, {1, 1, 4096, 4096}, {0, 0, 4096, 1}};
    sage_attention_options options{};
    options.kernel = SAGE_KERNEL_SAGE2;
    change(shape, options);
    return plan_attention(shape, options, gpu(90, 89));
  };
  const Plan own = planned([](AttentionShape&, sage_attention_options&) {});
  CHECK(own.architecture == 90 && own.fast_exponential, own.reason);
  const Plan lse = planned([](AttentionShape& shape, sage_attention_options&) { shape.lse = true; });
  CHECK(lse.architecture == 90 && !lse.fast_exponential, lse.reason);
  const Plan chosen =
      planned([](AttentionShape&, sage_attention_options& options) { options.kernel = SAGE_KERNEL_AUTO; });
  CHECK(chosen.kernel == Kernel::kSage2 && chosen.architecture == 90, chosen.reason);
  const auto reason_of = [&](void (*change)(AttentionShape&, sage_attention_options&)) {
    const Plan plan = planned(change);
    return plan.architecture < 90 && !plan.fast_exponential ? plan.reason : "Hopper's own kernel";
  };
  const auto expect = [](const std::string& reason, const char* words) {
    CHECK(reason.find(std::string("by the portable kernel, as ") + words) != std::string::npos, reason);
  };
  expect(reason_of([](AttentionShape& shape, sage_attention_options&) { shape.masking.mask.dtype = DType::kF16; }),
         "scores are masked or changed");
  expect(reason_of([](AttentionShape& shape, sage_attention_options&) { shape.masking.softcap = 5; }),
         "scores are masked or changed");
  expect(reason_of([](AttentionShape& shape, sage_attention_options&) { shape.masking.sinks = shape.masking.mask; }),
         "scores are masked or changed");
  expect(reason_of([](AttentionShape& shape, sage_attention_options& options) {
           shape.masking.after = 0;
           shape.causal = true;
           options.causal = 1;
           options.band = SAGE_ON;
         }),
         "keys are masked beside a band");
  expect(reason_of([](AttentionShape&, sage_attention_options& options) { options.smooth_q = SAGE_ON; }),
         "keys are masked and queries smoothed");
  expect(reason_of([](AttentionShape&, sage_attention_options& options) { options.kernel = SAGE_KERNEL_SAGE2PP; }),
         "keys are masked in sage2++");
}

}  // namespace

int main() {
  check_architectures();
  check_products();
  check_beyond();
  check_hopper();
  check_hopper_band();
  check_hopper_masks();
  std::printf("%d checks, %d failed\n", checks, failures);
  return failures != 0;
}
