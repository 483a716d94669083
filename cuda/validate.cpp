// What a caller passed, checked: see validate.h.
#include "validate.h"

#include <algorithm>
#include <cmath>

namespace sage {

std::string cannot(const char* action, const std::string& what, const std::string& must, const std::string& current) {
  return "Cannot " + std::string(action) + " as " + what + " must " + must + ": current value is " + current + ".";
}

std::string cannot(const char* action, const std::string& what, const std::string& must, int64_t current) {
  return cannot(action, what, must, std::to_string(current));
}

static bool known(int32_t dtype) { return dtype >= SAGE_F32 && dtype <= SAGE_BOOL; }

const char* dtype_name(DType dtype) {
  static const char* const names[] = {"f32", "f16", "bf16", "i8", "i4", "e4m3", "bool"};
  return names[int(dtype)];
}

// ---- structs --------------------------------------------------------------------------------------------

constexpr uint32_t kLargestStruct = 65536;

void check_struct(const char* action, const char* name, const void* from, size_t least, size_t known, bool input) {
  if (!from) SAGE_FAIL(SAGE_INVALID_ARGUMENT, cannot(action, name, "not be a null pointer", "null"));
  uint32_t size;
  std::memcpy(&size, from, sizeof size);
  if (size < least || size > kLargestStruct) {
    SAGE_FAIL(SAGE_INVALID_ARGUMENT, cannot(action, std::string(name) + "->size",
                                            "be from " + std::to_string(least) + " to " +
                                                std::to_string(kLargestStruct) + " (another version of sage.h?)",
                                            size));
  }
  if (!input) return;
  const auto* bytes = static_cast<const uint8_t*>(from);
  for (size_t i = known; i < size; ++i) {
    if (bytes[i] == 0) continue;
    SAGE_FAIL(SAGE_INVALID_ARGUMENT,
              cannot(action, std::string(name) + ", byte " + std::to_string(i),
                     "be 0, since this library knows only " + std::to_string(known) + " bytes of it", bytes[i]));
  }
}

// ---- options --------------------------------------------------------------------------------------------

static void check_option(const char* name, int32_t value, int32_t first, int32_t last, const char* must) {
  if (value >= first && value <= last) return;
  SAGE_FAIL(SAGE_INVALID_ARGUMENT, cannot(kAttention, std::string("options.") + name, must, value));
}

static void check_window(const sage_attention_options& options) {
  check_option("windowed", options.windowed, 0, 1, "be 0 or 1");
  const auto check = [](const char* name, int64_t value, bool good, const char* must) {
    if (good) return;
    SAGE_FAIL(SAGE_INVALID_ARGUMENT, cannot(kAttention, std::string("options.") + name, must, value));
  };
  const int64_t before = options.window_before, after = options.window_after;
  if (!options.windowed) {
    check("window_before", before, before == 0, "be 0 where options.windowed is 0");
    check("window_after", after, after == 0, "be 0 where options.windowed is 0");
  } else {
    check("window_before", before, before >= kUnlimited, "be at least 0, or -1 for no limit");
    check("window_after", after, after >= kUnlimited, "be at least 0, or -1 for no limit");
    check("window_after", after, !options.causal || after <= 0, "be 0 or -1 where options.causal is 1");
  }
}

void check_options(const sage_attention_options& options) {
  constexpr const char* kSwitch = "be default (0), off (1) or on (2)";
  check_option("kernel", options.kernel, SAGE_KERNEL_AUTO, SAGE_KERNEL_SAGE2PP,
               "be auto (0), flash (1), sage1 (2), sage1-int8 (3), sage2 (4), sage2-int4 (5) or sage2++ (6)");
  check_option("causal", options.causal, 0, 1, "be 0 or 1");
  check_option("granularity", options.granularity, SAGE_GRANULARITY_DEFAULT, SAGE_GRANULARITY_THREAD,
               "be default (0), token (1), block (2), warp (3) or thread (4)");
  check_option("smooth_q", options.smooth_q, SAGE_DEFAULT, SAGE_ON, kSwitch);
  check_option("smooth_k", options.smooth_k, SAGE_DEFAULT, SAGE_ON, kSwitch);
  check_option("smooth_v", options.smooth_v, SAGE_DEFAULT, SAGE_ON, kSwitch);
  check_option("pv_accumulator", options.pv_accumulator, SAGE_ACCUMULATOR_DEFAULT, SAGE_ACCUMULATOR_F16,
               "be default (0), f32 (1) or f16 (2)");
  check_option("pv_range", options.pv_range, SAGE_RANGE_DEFAULT, SAGE_RANGE_112_9,
               "be default (0), 448/2.25 (1), 224/4.5 (2) or 112/9 (3)");
  check_option("exponential", options.exponential, SAGE_EXPONENTIAL_DEFAULT, SAGE_EXPONENTIAL_FAST,
               "be default (0), exact (1) or fast (2)");
  check_option("alignment", options.alignment, SAGE_ALIGN_BOTTOM_RIGHT, SAGE_ALIGN_TOP_LEFT,
               "be bottom-right (0) or top-left (1)");
  check_window(options);
  if (!std::isfinite(options.softcap) || options.softcap < 0) {
    SAGE_FAIL(SAGE_INVALID_ARGUMENT, cannot(kAttention, "options.softcap", "be positive and finite, or 0 for none",
                                            std::to_string(options.softcap)));
  }
  check_option("rotate", options.rotate, 0, 0, "be 0");
  check_option("band", options.band, 0, 0, "be 0");
  check_option("first_token", options.first_token, 0, 0, "be 0");
  if (!std::isfinite(options.scale) || options.scale < 0) {
    SAGE_FAIL(SAGE_INVALID_ARGUMENT, cannot(kAttention, "options.scale", "be positive and finite, or 0 for 1/sqrt(D)",
                                            std::to_string(options.scale)));
  }
}

void check_quantized_options(const sage_attention_options& options) {
  constexpr const char* kSwitch = "be default (0) for quantized tensors, as the means given decide";
  check_options(options);
  check_option("kernel", options.kernel, SAGE_KERNEL_SAGE1, SAGE_KERNEL_SAGE2PP,
               "be sage1 (2), sage1-int8 (3), sage2 (4), sage2-int4 (5) or sage2++ (6) for quantized tensors");
  check_option("smooth_q", options.smooth_q, SAGE_DEFAULT, SAGE_DEFAULT, kSwitch);
  check_option("smooth_k", options.smooth_k, SAGE_DEFAULT, SAGE_DEFAULT, kSwitch);
  check_option("smooth_v", options.smooth_v, SAGE_DEFAULT, SAGE_DEFAULT, kSwitch);
}

// ---- one tensor -----------------------------------------------------------------------------------------

// Far more than any memory holds, and few enough that sizes of workspaces cannot overflow.
constexpr int64_t kMostElements = int64_t(1) << 48;

static std::string list(const int64_t (&values)[4]) {
  std::string text = "[";
  for (int i = 0; i < 4; ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  return text + "]";
}

static std::string at(const char* name, const char* field, int dimension) {
  return std::string(name) + "." + field + "[" + std::to_string(dimension) + "]";
}

static std::string one_of(std::initializer_list<DType> allowed) {
  std::string text = "be ";
  size_t i = 0;
  for (const DType dtype : allowed) {
    text += (i == 0                    ? ""
             : i + 1 == allowed.size() ? " or "
                                       : ", ") +
            std::string(dtype_name(dtype)) + " (" + std::to_string(int(dtype)) + ")";
    ++i;
  }
  return text;
}

static void check_dtype(const char* action, const char* name, int32_t dtype, std::initializer_list<DType> allowed) {
  for (const DType one : allowed) {
    if (dtype == int32_t(one)) return;
  }
  const std::string current = known(dtype) ? dtype_name(DType(dtype)) : std::to_string(dtype);
  SAGE_FAIL(SAGE_INVALID_ARGUMENT, cannot(action, std::string(name) + ".dtype", one_of(allowed), current));
}

static void check_shape(const char* action, const char* name, const int64_t (&shape)[4]) {
  int64_t elements = 1;
  for (int i = 0; i < 4; ++i) {
    if (shape[i] < 1) SAGE_FAIL(SAGE_INVALID_ARGUMENT, cannot(action, at(name, "shape", i), "be at least 1", shape[i]));
    if (__builtin_mul_overflow(elements, shape[i], &elements) || elements > kMostElements) {
      SAGE_FAIL(SAGE_INVALID_ARGUMENT,
                cannot(action, std::string(name) + ".shape", "hold at most 2^48 elements", list(shape)));
    }
  }
}

static void check_strides(const char* action, const char* name, const sage_tensor& tensor) {
  for (int i = 0; i < 4; ++i) {
    if (tensor.stride[i] < 0) {
      SAGE_FAIL(SAGE_INVALID_ARGUMENT, cannot(action, at(name, "stride", i), "be at least 0", tensor.stride[i]));
    }
    if (tensor.dtype != SAGE_I4 || tensor.shape[i] == 1) continue;
    if (i == 3 && tensor.stride[i] != 1) {
      SAGE_FAIL(SAGE_INVALID_ARGUMENT, cannot(action, at(name, "stride", i), "be 1 for i4", tensor.stride[i]));
    }
    if (i < 3 && tensor.stride[i] % 2 != 0) {
      SAGE_FAIL(SAGE_INVALID_ARGUMENT, cannot(action, at(name, "stride", i), "be even for i4", tensor.stride[i]));
    }
  }
}

// Rows of i4 are runs of whole bytes; everything else is counted by the element.
static Footprint footprint_of(const char* action, const char* name, const sage_tensor& tensor) {
  Footprint footprint;
  footprint.address = tensor.data;
  footprint.element = 1;
  const bool packed = tensor.dtype == SAGE_I4;
  if (!packed) footprint.element = bits_per_element(DType(tensor.dtype)) / 8;
  int64_t last = 0;
  bool overflow = false;
  for (int i = 0; i < 4; ++i) {
    const bool row = packed && i == 3;
    footprint.count[i] = row ? (tensor.shape[i] + 1) / 2 : tensor.shape[i];
    const int64_t stride = row ? 1 : footprint.count[i] == 1 ? 0 : packed ? tensor.stride[i] / 2 : tensor.stride[i];
    int64_t reach = 0;
    overflow |= __builtin_mul_overflow(stride, footprint.element, &footprint.stride[i]);
    overflow |= __builtin_mul_overflow(footprint.count[i] - 1, footprint.stride[i], &reach);
    overflow |= __builtin_add_overflow(last, reach, &last);
  }
  uint64_t end;
  overflow |= __builtin_add_overflow(last, footprint.element, &footprint.bytes);
  overflow |= __builtin_add_overflow(footprint.address, uint64_t(footprint.bytes), &end);
  if (overflow) {
    SAGE_FAIL(SAGE_INVALID_ARGUMENT,
              cannot(action, std::string(name) + ".stride", "keep the tensor within a 64-bit address space",
                     list(tensor.stride) + " for shape " + list(tensor.shape)));
  }
  return footprint;
}

// Written elements must lie apart: each stride passes over all that the smaller ones reach.
static void check_apart(const char* action, const char* name, const Footprint& footprint, const sage_tensor& tensor) {
  int order[4] = {0, 1, 2, 3};
  std::sort(order, order + 4, [&](int a, int b) { return footprint.stride[a] < footprint.stride[b]; });
  int64_t reach = footprint.element;
  for (const int i : order) {
    if (footprint.count[i] == 1) continue;
    if (footprint.stride[i] < reach) {
      SAGE_FAIL(SAGE_INVALID_ARGUMENT, cannot(action, std::string(name) + ".stride", "keep written elements apart",
                                              list(tensor.stride) + " for shape " + list(tensor.shape)));
    }
    reach += (footprint.count[i] - 1) * footprint.stride[i];
  }
}

View Tensors::add(const char* name, const sage_tensor& tensor, Access access, std::initializer_list<DType> allowed) {
  check_dtype(action_, name, tensor.dtype, allowed);
  if (tensor.device != device_) {
    SAGE_FAIL(SAGE_INVALID_ARGUMENT,
              cannot(action_, std::string(name) + ".device",
                     "equal the stream's device (" + std::to_string(device_) + ")", tensor.device));
  }
  check_shape(action_, name, tensor.shape);
  check_strides(action_, name, tensor);
  Entry& entry = entries_.at(count_++);
  entry.name = name;
  entry.tensor = &tensor;
  entry.access = access;

  View view;
  view.data = reinterpret_cast<void*>(tensor.data);
  view.dtype = DType(tensor.dtype);
  for (int i = 0; i < 4; ++i) {
    view.shape[i] = tensor.shape[i];
    view.stride[i] = tensor.shape[i] > 1 ? tensor.stride[i] : i == 3;  // one that is never taken counts as dense
  }
  return view;
}

View Tensors::add_optional(const char* name, const sage_tensor& tensor, Access access,
                           std::initializer_list<DType> allowed) {
  return tensor.data ? add(name, tensor, access, allowed) : View{};
}

// ---- several tensors ------------------------------------------------------------------------------------

void Tensors::expect(const char* name, const View& view, int dimension, int64_t value, const char* source) const {
  if (view.shape[dimension] == value) return;
  SAGE_FAIL(SAGE_INVALID_ARGUMENT,
            cannot(action_, at(name, "shape", dimension),
                   "equal " + std::string(source) + " (" + std::to_string(value) + ")", view.shape[dimension]));
}

void Tensors::expect_or_one(const char* name, const View& view, int dimension, int64_t value,
                            const char* source) const {
  if (view.shape[dimension] == 1 || view.shape[dimension] == value) return;
  SAGE_FAIL(SAGE_INVALID_ARGUMENT,
            cannot(action_, at(name, "shape", dimension),
                   "be 1 or equal " + std::string(source) + " (" + std::to_string(value) + ")", view.shape[dimension]));
}

void Tensors::expect_same_shape(const char* name, const View& view, const char* other_name, const View& other) const {
  for (int i = 0; i < 4; ++i) {
    if (view.shape[i] != other.shape[i]) expect(name, view, i, other.shape[i], at(other_name, "shape", i).c_str());
  }
}

void Tensors::expect_same_dtype(const char* name, const View& view, const char* other_name, const View& other) const {
  if (view.dtype == other.dtype) return;
  SAGE_FAIL(
      SAGE_INVALID_ARGUMENT,
      cannot(action_, std::string(name) + ".dtype",
             "equal " + std::string(other_name) + ".dtype (" + dtype_name(other.dtype) + ")", dtype_name(view.dtype)));
}

static void check_inside(const char* action, const char* name, const char* field,
                         const std::shared_ptr<Allocation>& memory, int device, uint64_t address, uint64_t bytes) {
  if (memory && bytes <= memory->bytes - (address - memory->address)) return;
  std::string current = std::to_string(address);
  current += memory ? ", with " + std::to_string(memory->bytes - (address - memory->address)) + " bytes left"
                    : ", outside every allocation";
  SAGE_FAIL(SAGE_INVALID_ARGUMENT, cannot(action, std::string(name) + field,
                                          "be followed by " + std::to_string(bytes) +
                                              " bytes of one live allocation of " + device_name(device),
                                          current));
}

void Tensors::pin(const OpenStream& stream, Absent absent) {
  for (int i = 0; i < count_; ++i) {
    Entry& entry = entries_[i];
    const Footprint& footprint = entry.footprint = footprint_of(action_, entry.name, *entry.tensor);
    if (entry.access == Access::kWrite) check_apart(action_, entry.name, footprint, *entry.tensor);
    if (footprint.address == 0) {
      if (absent == Absent::kAllowed) continue;
      SAGE_FAIL(SAGE_INVALID_ARGUMENT, cannot(action_, std::string(entry.name) + ".data", "not be 0", 0));
    }
    if (footprint.address % footprint.element != 0) {
      SAGE_FAIL(SAGE_INVALID_ARGUMENT, cannot(action_, std::string(entry.name) + ".data",
                                              "be a multiple of " + std::to_string(footprint.element) + " for " +
                                                  dtype_name(DType(entry.tensor->dtype)),
                                              std::to_string(footprint.address)));
    }
    entry.memory = Registry::shared().use(stream, footprint.address);
    check_inside(action_, entry.name, ".data", entry.memory, stream.device, footprint.address, footprint.bytes);
  }
  for (int i = 0; i < count_; ++i) {
    for (int j = 0; j < i; ++j) {
      const Entry &a = entries_[i], &b = entries_[j];
      if (a.access == Access::kRead && b.access == Access::kRead) continue;
      if (!a.memory || !b.memory || !may_overlap(a.footprint, b.footprint)) continue;
      const Entry &written = a.access == Access::kWrite ? a : b, &other = &written == &a ? b : a;
      SAGE_FAIL(SAGE_INVALID_ARGUMENT, cannot(action_, written.name, "not overlap " + std::string(other.name),
                                              "addresses " + std::to_string(written.footprint.address) + " and " +
                                                  std::to_string(other.footprint.address)));
    }
  }
}

std::shared_ptr<Allocation> pin_range(const char* action, const char* name, const OpenStream& stream, uint64_t address,
                                      uint64_t bytes) {
  if (bytes == 0) SAGE_FAIL(SAGE_INVALID_ARGUMENT, cannot(action, "bytes", "be at least 1", 0));
  auto memory = Registry::shared().use(stream, address);
  check_inside(action, name, "", memory, stream.device, address, bytes);
  return memory;
}

// ---- overlaps -------------------------------------------------------------------------------------------

namespace {

// Do terms coefficient * x, with low <= x <= high, have a sum of `target`? Coefficients are positive and
// descending; `below[i]` and `above[i]` bound what terms i and later can add. A search with few branches, as
// inner terms seldom reach further than one step of an outer one; gives up, saying yes, after `budget` steps.
struct Sum {
  struct Term {
    __int128 coefficient, low, high;
  };
  Term terms[10];
  int count = 0;
  __int128 below[11], above[11];
  int budget = 4096;

  void add(int64_t coefficient, int64_t low, int64_t high) {
    if (coefficient == 0 || (low == 0 && high == 0)) return;
    for (int i = 0; i < count; ++i) {
      if (terms[i].coefficient != coefficient) continue;
      terms[i].low += low;
      terms[i].high += high;
      return;
    }
    terms[count++] = {coefficient, low, high};
  }

  void prepare() {
    std::sort(terms, terms + count, [](const Term& a, const Term& b) { return a.coefficient > b.coefficient; });
    below[count] = above[count] = 0;
    for (int i = count - 1; i >= 0; --i) {
      below[i] = below[i + 1] + terms[i].coefficient * terms[i].low;
      above[i] = above[i + 1] + terms[i].coefficient * terms[i].high;
    }
  }

  bool possible(int i, __int128 target) {
    if (target < below[i] || target > above[i]) return false;
    if (i == count || --budget < 0) return true;
    const Term& term = terms[i];
    // target - coefficient * x must stay within what the later terms can add.
    const __int128 first = std::max(term.low, divide_up(target - above[i + 1], term.coefficient));
    const __int128 last = std::min(term.high, divide_down(target - below[i + 1], term.coefficient));
    for (__int128 x = first; x <= last; ++x) {
      if (possible(i + 1, target - term.coefficient * x)) return true;
    }
    return false;
  }

  static __int128 divide_down(__int128 a, __int128 b) { return a / b - (a % b != 0 && a < 0); }
  static __int128 divide_up(__int128 a, __int128 b) { return a / b + (a % b != 0 && a > 0); }
};

}  // namespace

bool may_overlap(const Footprint& a, const Footprint& b) {
  const __int128 distance = __int128(b.address) - __int128(a.address);
  if (distance >= a.bytes || -distance >= b.bytes) return false;
  Sum sum;  // bytes of a minus bytes of b
  for (int i = 0; i < 4; ++i) {
    sum.add(a.stride[i], 0, a.count[i] - 1);
    sum.add(b.stride[i], -(b.count[i] - 1), 0);
  }
  sum.add(1, 0, a.element - 1);
  sum.add(1, -(b.element - 1), 0);
  sum.prepare();
  return sum.possible(0, distance);
}

// ---- rows that share a scale ----------------------------------------------------------------------------

Groups resolve_groups(const char* action, const char* name, int granularity, int operand, uint32_t group_rows) {
  const bool query = operand == SAGE_OPERAND_QUERY;
  switch (granularity) {
    case SAGE_GRANULARITY_TOKEN: return {Grouping::kToken, 1};
    case SAGE_GRANULARITY_BLOCK: return {Grouping::kRows, group_rows ? group_rows : query ? 128 : 64};
    case SAGE_GRANULARITY_WARP: return {Grouping::kRows, group_rows ? group_rows : query ? 32 : 64};
    default:
      if (group_rows % 8 != 0) {
        SAGE_FAIL(SAGE_INVALID_ARGUMENT, cannot(action, name, "be a multiple of 8 per thread", group_rows));
      }
      return {query ? Grouping::kThreadQuery : Grouping::kThreadKey, group_rows ? group_rows : query ? 32 : 64};
  }
}

}  // namespace sage
