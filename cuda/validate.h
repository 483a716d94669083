// What a caller passed, checked: struct sizes, tensors and where they lie, and which rows share a scale. Errors
// name the value as sage.h does and say what it must be.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <string>

#include "ops.h"
#include "registry.h"

namespace sage {

std::string cannot(const char* action, const std::string& what, const std::string& must, const std::string& current);
std::string cannot(const char* action, const std::string& what, const std::string& must, int64_t current);
const char* dtype_name(DType dtype);

// ---- structs --------------------------------------------------------------------------------------------

// A struct's size tells its version: newer ones are longer, and what is unknown here must be 0. `least` is the size of
// the first version.
void check_struct(const char* action, const char* name, const void* from, size_t least, size_t known, bool input);

template <typename T>
T read_struct(const char* action, const char* name, const T* from) {
  check_struct(action, name, from, sizeof(T), sizeof(T), true);
  T copy;
  std::memcpy(&copy, from, sizeof copy);
  return copy;
}

template <typename T>
void write_struct(const char* action, const char* name, T* to, T value, size_t least = sizeof(T)) {
  check_struct(action, name, to, least, sizeof(T), false);
  std::memcpy(&value.size, to, sizeof value.size);
  std::memcpy(to, &value, std::min<size_t>(value.size, sizeof value));
}

// ---- options --------------------------------------------------------------------------------------------

constexpr const char* kAttention = "run attention";

// Each option by itself; plan.cpp refuses those that contradict the kernel.
void check_options(const sage_attention_options& options);
void check_quantized_options(const sage_attention_options& options);

// ---- tensors --------------------------------------------------------------------------------------------

enum class Access { kRead, kWrite };

// The bytes that a tensor touches: runs of `element` bytes at address + sum of index * stride.
struct Footprint {
  uint64_t address;
  int64_t bytes;  // from the first to the last
  int64_t element;
  int64_t count[4], stride[4];
};

// The tensors of one call, which must outlive this object. add() checks each by itself; shapes are compared by the
// caller; pin() then checks where they lie and keeps that memory alive as long as this object lives.
class Tensors {
 public:
  Tensors(const char* action, int device) : action_(action), device_(device) {}

  View add(const char* name, const sage_tensor& tensor, Access access, std::initializer_list<DType> allowed);
  View add_optional(const char* name, const sage_tensor& tensor, Access access, std::initializer_list<DType> allowed);
  void expect(const char* name, const View& view, int dimension, int64_t value, const char* source) const;
  void expect_or_one(const char* name, const View& view, int dimension, int64_t value, const char* source) const;
  void expect_same_shape(const char* name, const View& view, const char* other_name, const View& other) const;
  void expect_same_dtype(const char* name, const View& view, const char* other_name, const View& other) const;

  // For calls that only ask: memory is checked where a tensor has any.
  enum class Absent { kRefused, kAllowed };
  void pin(const OpenStream& stream, Absent absent = Absent::kRefused);

 private:
  struct Entry {
    const char* name;
    const sage_tensor* tensor;
    Access access;
    Footprint footprint;
    std::shared_ptr<Allocation> memory;
  };
  static constexpr int kMost = 11;

  const char* action_;
  int device_;
  int count_ = 0;
  std::array<Entry, kMost> entries_;
};

// Whether two tensors may share a byte; exact but for layouts too irregular to decide quickly, which may.
bool may_overlap(const Footprint& a, const Footprint& b);

// Bytes of a plain range, which must lie in one live allocation of the stream's device.
std::shared_ptr<Allocation> pin_range(const char* action, const char* name, const OpenStream& stream, uint64_t address,
                                      uint64_t bytes);

// ---- rows that share a scale ----------------------------------------------------------------------------

struct Groups {
  Grouping grouping;
  int64_t rows;  // group_rows, resolved
};

// `granularity` is TOKEN to THREAD; group_rows 0 means the default of the operand.
Groups resolve_groups(const char* action, const char* name, int granularity, int operand, uint32_t group_rows);

}  // namespace sage
