// Throws random descriptors, structs, sizes, handles and enum values at every function of the C ABI on the CPU
// device: fuzz [seconds] [seed]. Good calls, which must succeed, are mixed with damaged copies of them, which may
// do anything but crash, leak, or fail without a message; first from one thread, then from several that use each
// other's handles. Meant to be built with -fsanitize=address,undefined. At the end the library must still work.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "sage.h"

namespace {

[[noreturn]] void fail(const char* what, const char* message, int line) {
  std::printf("fuzz.cpp:%d: %s; last message: %s\n", line, what, message);
  std::fflush(stdout);
  std::abort();
}
#define CHECK(condition) ((condition) ? void() : fail(#condition, "", __LINE__))

struct Random {
  uint64_t state;

  uint64_t bits() {  // splitmix64
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t n) { return int64_t(bits() % uint64_t(n)); }
  int64_t between(int64_t low, int64_t high) { return low + below(high - low + 1); }
  bool one_in(int64_t n) { return below(n) == 0; }
  template <typename T>
  T any(std::initializer_list<T> values) {
    return values.begin()[below(int64_t(values.size()))];
  }
  uint64_t nasty() {
    switch (below(4)) {
      case 0: return uint64_t(between(-3, 300));
      case 1: return (uint64_t(1) << below(64)) + uint64_t(between(-1, 1));
      case 2: return bits();
      default: return any<uint64_t>({0, ~uint64_t(0), INT64_MAX, uint64_t(INT64_MIN), INT32_MAX, uint32_t(INT32_MIN)});
    }
  }
};

// ---- errors: a failure says why, within its buffer --------------------------------------------------------

struct ErrorBuffer {
  char text[640];
  size_t size;
  char* pointer;

  explicit ErrorBuffer(Random& random) {
    std::memset(text, 0x7e, sizeof text);
    size = random.one_in(8) ? size_t(random.below(20)) : sizeof text - 1;
    pointer = random.one_in(16) ? nullptr : text;
  }

  sage_status check(sage_status status, bool must_work, int line) const {
    if (status < SAGE_OK || status > SAGE_INTERNAL) fail("a status out of range", text, line);
    if (status == SAGE_INTERNAL) fail("an internal error", text, line);
    if (must_work && status != SAGE_OK) fail("a good call failed", text, line);
    if (!pointer) return status;
    for (size_t i = size; i < sizeof text; ++i) {
      if (text[i] != 0x7e) fail("an error buffer was overrun", "", line);
    }
    if (size == 0) return status;
    const char* end = static_cast<const char*>(std::memchr(text, 0, size));
    if (!end) fail("a message does not end", "", line);
    const bool full = size == sizeof text - 1;
    if (status == SAGE_OK && end != text) fail("success with a message", text, line);
    if (status != SAGE_OK && full && (!std::strstr(text, ".\ncuda/") || std::strncmp(text, "Cannot ", 7) != 0)) {
      fail("a message of another form", text, line);
    }
    return status;
  }
};

// Calls F(arguments..., error, size) and checks what comes back.
#define CALL(must_work, function, ...)                                                         \
  [&] {                                                                                        \
    ErrorBuffer error(random);                                                                 \
    return error.check(function(__VA_ARGS__, error.pointer, error.size), must_work, __LINE__); \
  }()

// ---- handles that every thread may use --------------------------------------------------------------------

struct Allocated {
  uint64_t address, bytes;
};

struct Shared {
  std::mutex mutex;
  std::vector<uint64_t> streams, events;
  std::vector<Allocated> memory;

  template <typename T>
  void add(std::vector<T>& list, T value) {
    std::lock_guard lock(mutex);
    list.push_back(value);
  }
  template <typename T>
  bool take(std::vector<T>& list, Random& random, T& value) {
    std::lock_guard lock(mutex);
    if (list.empty()) return false;
    std::swap(list[size_t(random.below(int64_t(list.size())))], list.back());
    value = list.back();
    list.pop_back();
    return true;
  }
  template <typename T>
  T peek(const std::vector<T>& list, Random& random, T otherwise) {
    std::lock_guard lock(mutex);
    return list.empty() ? otherwise : list[size_t(random.below(int64_t(list.size())))];
  }
} shared;

constexpr uint64_t kMostBytes = 1 << 18;

class Fuzzer {
 public:
  // `strict`: nobody else destroys this one's handles, so that good calls must succeed.
  Fuzzer(uint64_t seed, bool strict) : random{seed}, strict(strict), host(kMostBytes), arena(70000) {
    CHECK(sage_stream_create(SAGE_CPU, &stream, nullptr, 0) == SAGE_OK);
  }

  ~Fuzzer() { CALL(false, sage_stream_destroy, stream); }

  void step() {
    switch (random.below(14)) {
      case 0: streams(); break;
      case 12: traces(); break;
      case 1: events(); break;
      case 2:
      case 3: memory(); break;
      case 4: descriptions(); break;
      case 5: smooth(); break;
      case 6:
      case 7: quantize(); break;
      case 8:
      case 9: attention(); break;
      case 13: attention_varlen(); break;
      default: attention_quantized(); break;
    }
    ++steps;
  }

  uint64_t steps = 0, refused = 0, accepted = 0;

 private:
  Random random;
  const bool strict;
  uint64_t stream = 0;
  std::vector<uint8_t> host, arena;
  std::vector<uint64_t> owned;  // by the call being made

  uint64_t some_stream() {
    if (random.one_in(20)) return random.nasty();
    return strict || random.one_in(2) ? stream : shared.peek(shared.streams, random, stream);
  }

  Allocated some_memory() { return shared.peek(shared.memory, random, Allocated{random.nasty(), 64}); }

  // ---- lifecycles -------------------------------------------------------------------------------------------

  void streams() {
    uint64_t id = 0;
    int32_t idle;
    const auto device = random.one_in(3) ? int32_t(random.nasty()) : SAGE_CPU;
    if (shared.streams.size() < 6) {
      if (CALL(device == SAGE_CPU, sage_stream_create, device, &id) == SAGE_OK) shared.add(shared.streams, id);
    }
    CALL(false, sage_stream_create, SAGE_CPU, nullptr);
    if (const auto wrong = int32_t(random.nasty())) {
      CHECK(CALL(false, sage_stream_create_for, SAGE_CPU, wrong, &id) == SAGE_INVALID_ARGUMENT);
    }
    CALL(false, sage_stream_query, some_stream(), &idle);
    CALL(false, sage_stream_query, some_stream(), nullptr);
    CALL(strict, sage_stream_synchronize, stream);
    sage_stream_wait(some_stream());
    if (random.one_in(3) && shared.take(shared.streams, random, id)) CALL(strict, sage_stream_destroy, id);
    if (strict) {
      CHECK(CALL(false, sage_stream_destroy, id + 1000000000) == SAGE_INVALID_ARGUMENT);
      return;
    }
    if (random.one_in(4)) {  // what another thread may be using
      CALL(false, sage_stream_destroy, stream);
      CALL(true, sage_stream_create, SAGE_CPU, &stream);
    }
  }

  void events() {
    uint64_t id = 0;
    float milliseconds;
    if (shared.events.size() < 20 && CALL(false, sage_event_create, some_stream(), &id) == SAGE_OK) {
      if (random.one_in(2)) CALL(strict, sage_event_record, id, stream);
      shared.add(shared.events, id);
    }
    CALL(false, sage_event_create, stream, nullptr);
    CALL(false, sage_event_record, shared.peek(shared.events, random, random.nasty()), some_stream());
    const uint64_t begin = shared.peek(shared.events, random, random.nasty());
    const uint64_t end = shared.peek(shared.events, random, random.nasty());
    CALL(false, sage_event_elapsed, begin, end, &milliseconds);
    CALL(false, sage_event_elapsed, begin, random.nasty(), &milliseconds);
    CALL(false, sage_event_elapsed, begin, end, nullptr);
    if (random.one_in(2) && shared.take(shared.events, random, id)) CALL(strict, sage_event_destroy, id);
    CALL(false, sage_event_destroy, uint64_t(1) << 60);
  }

  void traces() {
    sage_stage stages[8];
    uint64_t count = 0;
    const uint64_t traced = some_stream(), capacity = uint64_t(random.below(9));
    CALL(false, sage_stream_trace, traced, random.one_in(9) ? int32_t(random.nasty()) : int32_t(random.below(2)));
    CALL(false, sage_stream_read_trace, traced, capacity ? nullptr : stages, capacity, nullptr);
    if (CALL(false, sage_stream_read_trace, traced, stages, capacity, &count) != SAGE_OK) return;
    for (uint64_t i = 0; i < std::min(capacity, count); ++i) {
      CHECK(std::memchr(stages[i].name, 0, sizeof stages[i].name) && stages[i].name[0] && stages[i].ms >= 0);
    }
  }

  void memory() {
    uint64_t address = 0;
    const uint64_t bytes = uint64_t(random.between(1, 5000));
    if (shared.memory.size() < 40 && CALL(strict, sage_memory_allocate, stream, bytes, &address) == SAGE_OK) {
      CHECK(address % 64 == 0);
      CALL(strict, sage_memory_write, stream, address, host.data(), bytes);
      shared.add(shared.memory, Allocated{address, bytes});
    }
    CALL(false, sage_memory_allocate, stream, bytes, nullptr);
    const uint64_t wanted = random.nasty();  // little, or more than any machine has: between is slow to poison
    const uint64_t all = wanted >> 20 ? wanted | uint64_t(1) << 50 : wanted;
    if (CALL(false, sage_memory_allocate, some_stream(), all, &address) == SAGE_OK) {
      CHECK(CALL(false, sage_memory_free, stream, address + 1) != SAGE_OK);
      CALL(strict, sage_memory_free, stream, address);
    }
    const Allocated a = some_memory(), b = some_memory();
    const uint64_t at = a.address + (random.one_in(2) ? 0 : uint64_t(random.between(-70, 5000)));
    const uint64_t size = random.one_in(2) ? uint64_t(random.between(0, int64_t(a.bytes))) : random.nasty();
    CALL(false, sage_memory_write, some_stream(), at, host.data(), size);
    CALL(false, sage_memory_read, some_stream(), host.data(), at, size);
    CALL(false, sage_memory_fill, some_stream(), at, uint8_t(random.bits()), size);
    CALL(false, sage_memory_copy, some_stream(), at, b.address, size);
    CALL(false, sage_memory_write, stream, a.address, nullptr, 1);
    CALL(false, sage_memory_read, stream, nullptr, a.address, 1);
    CALL(false, sage_memory_free, some_stream(), random.nasty());
    Allocated gone;
    if (random.one_in(2) && shared.take(shared.memory, random, gone)) {
      const uint64_t by = some_stream();
      if (CALL(false, sage_memory_free, by, gone.address) != SAGE_OK)
        CALL(strict, sage_memory_free, stream, gone.address);
    }
  }

  void descriptions() {
    sage_device_info info;
    info.size = sizeof info;
    CALL(true, sage_device_describe, SAGE_CPU, &info);
    sage_memory_stats stats;
    stats.size = sizeof stats;
    CALL(true, sage_memory_describe, SAGE_CPU, &stats);
    sage_build_info build;
    build.size = sizeof build;
    CALL(true, sage_build_describe, &build);
    int32_t count = 7;
    CHECK(CALL(false, sage_cuda_device_count, &count) == SAGE_OK ? count > 0 : count == 0);
    CALL(false, sage_cuda_device_count, nullptr);
    const uint32_t size = uint32_t(random.nasty());
    std::memcpy(arena.data(), &size, sizeof size);
    const auto device = random.one_in(2) ? int32_t(random.nasty()) : SAGE_CPU;
    CALL(false, sage_device_describe, device, random.one_in(9) ? nullptr : at<sage_device_info>(0));
    std::memcpy(arena.data(), &size, sizeof size);
    CALL(false, sage_memory_describe, device, random.one_in(9) ? nullptr : at<sage_memory_stats>(0));
    std::memcpy(arena.data(), &size, sizeof size);
    CALL(false, sage_build_describe, random.one_in(9) ? nullptr : at<sage_build_info>(0));
  }

  template <typename T>
  T* at(size_t offset) {
    return reinterpret_cast<T*>(arena.data() + offset);
  }

  // ---- tensors, each in an allocation that just holds it ------------------------------------------------------

  struct Shape {
    int64_t b, h, n, d;
  };

  int32_t float_type() { return random.any<int32_t>({SAGE_F32, SAGE_F16, SAGE_BF16}); }

  sage_tensor tensor(int32_t dtype, Shape shape, bool written) {
    sage_tensor made{0, dtype, SAGE_CPU, {shape.b, shape.h, shape.n, shape.d}, {}};
    const bool packed = dtype == SAGE_I4;
    const int64_t pad = packed ? shape.d % 2 + 2 * random.below(2) : random.one_in(3) ? random.below(5) : 0;
    const int order = int(random.below(3));  // HND, NHD, and tokens innermost
    int64_t next = 1;
    const auto place = [&](int dimension) {
      made.stride[dimension] = next;
      next *= made.shape[dimension];
      if (dimension == 3) next += pad;
    };
    if (order == 2 && !packed) {
      for (const int dimension : {2, 3, 1, 0}) place(dimension);
    } else {
      for (const int dimension : order ? std::vector<int>{3, 1, 2, 0} : std::vector<int>{3, 2, 1, 0}) place(dimension);
    }
    if (!written && random.one_in(4)) made.stride[random.below(2)] = 0;  // one batch or head for all
    int64_t last = packed ? (shape.d + 1) / 2 * 2 - shape.d : 0;
    for (int i = 0; i < 4; ++i) last += (made.shape[i] - 1) * made.stride[i];
    const int64_t bits = dtype == SAGE_F32 ? 32 : dtype == SAGE_F16 || dtype == SAGE_BF16 ? 16 : packed ? 4 : 8;
    const auto bytes = uint64_t((last + 1) * bits + 7) / 8;
    CHECK(bytes <= kMostBytes);
    if (CALL(strict, sage_memory_allocate, stream, bytes, &made.data) == SAGE_OK) owned.push_back(made.data);
    if (!written) {
      for (uint64_t i = 0; i < bytes; i += 8) {
        const uint64_t noise = random.one_in(1000) ? ~uint64_t(0) : random.bits() & 0xbbffbbffbbffbbffu;
        std::memcpy(host.data() + i, &noise, 8);
      }
      CALL(strict, sage_memory_write, stream, made.data, host.data(), bytes);
    }
    return made;
  }

  void drop_tensors() {
    for (const uint64_t address : owned) CALL(strict, sage_memory_free, stream, address);
    owned.clear();
  }

  // ---- calls and damaged copies of them -----------------------------------------------------------------------

  // A tensor that repeats one element for ever is legal and would take for ever.
  static bool endless(const sage_tensor& t) {
    for (int i = 0; i < 4; ++i) {
      if (t.shape[i] > 4096 && t.stride[i] < 1) return true;
    }
    return false;
  }

  template <typename Call, typename Function>
  void try_call(const Call& good, std::initializer_list<sage_tensor Call::*> tensors, Function function) {
    const auto exact = std::make_unique<Call>(good);
    CALL(strict, function, exact.get());
    ++accepted;
    for (int i = 0; i < 6; ++i) {
      Call bad = good;
      for (int64_t changes = random.between(1, 3); changes > 0; --changes) damage(bad, tensors);
      bool skip = false;
      for (const auto member : tensors) skip |= endless(bad.*member);
      if (skip) continue;
      const size_t offset = size_t(random.below(2) * random.below(8));
      std::fill(arena.begin(), arena.end(), uint8_t(0));
      if (random.one_in(10)) arena[size_t(random.between(int64_t(sizeof bad), 2000))] = 1;
      std::memcpy(arena.data() + offset, &bad, sizeof bad);
      CALL(false, function, at<Call>(offset)) == SAGE_OK ? ++accepted : ++refused;
    }
    CALL(false, function, static_cast<const Call*>(nullptr));
    drop_tensors();
  }

  template <typename Call>
  void damage(Call& call, std::initializer_list<sage_tensor Call::*> tensors) {
    auto* bytes = reinterpret_cast<uint8_t*>(&call);
    const uint64_t value = random.nasty();
    if (random.one_in(3)) {
      const size_t word = sizeof(uint32_t) * size_t(random.below(int64_t(sizeof call / sizeof(uint32_t))));
      std::memcpy(bytes + word, &value, sizeof(uint32_t));
      return;
    }
    const auto member = [&] { return tensors.begin()[random.below(int64_t(tensors.size()))]; };
    sage_tensor& tensor = call.*member();
    const int dimension = int(random.below(4));
    switch (random.below(8)) {
      case 0: tensor.shape[dimension] = int64_t(value); break;
      case 1: tensor.stride[dimension] = int64_t(value); break;
      case 2: tensor.shape[dimension] ^= random.between(-2, 2); break;
      case 3: tensor.stride[dimension] ^= random.between(-2, 2); break;
      case 4: tensor.data += uint64_t(random.between(-130, 130)); break;
      case 5: tensor.data = random.one_in(2) ? value : some_memory().address; break;
      case 6: tensor.dtype = int32_t(random.between(-1, 7)); break;
      default: tensor = call.*member(); break;
    }
  }

  void smooth() {
    const Shape shape{random.between(1, 2), random.between(1, 3), random.between(1, 40), random.between(1, 20)};
    sage_smooth_call call{};
    call.size = sizeof call;
    call.stream = stream;
    call.block_rows = random.one_in(2) ? 0 : uint32_t(random.between(1, 50));
    const int64_t rows = call.block_rows ? (shape.n + call.block_rows - 1) / call.block_rows : 1;
    call.x = tensor(float_type(), shape, false);
    call.mean = tensor(SAGE_F32, {shape.b, shape.h, rows, shape.d}, true);
    if (random.one_in(2)) call.smoothed = tensor(float_type(), shape, true);
    try_call(call, {&sage_smooth_call::x, &sage_smooth_call::mean, &sage_smooth_call::smoothed}, sage_smooth);
  }

  static int64_t groups(int32_t granularity, int32_t operand, uint32_t group_rows, int64_t rows) {
    const bool query = operand == SAGE_OPERAND_QUERY;
    const int64_t by_default = !query ? 64 : granularity == SAGE_GRANULARITY_BLOCK ? 128 : 32;
    const int64_t each = group_rows ? group_rows : by_default, runs = (rows + each - 1) / each;
    if (granularity == SAGE_GRANULARITY_TOKEN) return rows;
    return granularity == SAGE_GRANULARITY_THREAD ? runs * (query ? 8 : 4) : runs;
  }

  uint32_t some_group_rows(int32_t granularity) {
    if (random.one_in(2)) return 0;
    return uint32_t(granularity == SAGE_GRANULARITY_THREAD ? 8 * random.between(1, 9) : random.between(1, 70));
  }

  void quantize() {
    const Shape shape{random.between(1, 2), random.between(1, 3), random.between(1, 80), random.between(1, 20)};
    const bool inverse = random.one_in(2);
    sage_quantize_call call{};
    call.size = sizeof call;
    call.stream = stream;
    call.granularity = int32_t(random.between(SAGE_GRANULARITY_TOKEN, SAGE_GRANULARITY_CHANNEL));
    call.operand = int32_t(random.below(call.granularity == SAGE_GRANULARITY_THREAD ? 2 : 3));
    call.group_rows = some_group_rows(call.granularity);
    call.mean_rows = random.one_in(2) ? 0 : uint32_t(random.between(1, 90));
    const bool per_channel = call.granularity == SAGE_GRANULARITY_CHANNEL;
    const auto codes = random.any<int32_t>({SAGE_I8, SAGE_I4, SAGE_E4M3});
    call.range = codes == SAGE_E4M3 && random.one_in(2) ? float(random.between(1, 448)) : 0;
    call.x = tensor(float_type(), shape, inverse);
    if (random.one_in(2)) {
      const int64_t rows = call.mean_rows ? (shape.n + call.mean_rows - 1) / call.mean_rows : 1;
      call.takes_mean = !inverse && random.one_in(2);
      call.mean = tensor(SAGE_F32, {shape.b, shape.h, rows, shape.d}, call.takes_mean != 0);
    }
    call.codes = tensor(codes, shape, !inverse);
    const int64_t count = per_channel ? 1 : groups(call.granularity, call.operand, call.group_rows, shape.n);
    call.scales = tensor(SAGE_F32, {shape.b, shape.h, count, per_channel ? shape.d : 1}, !inverse);
    const auto tensors = {&sage_quantize_call::x, &sage_quantize_call::mean, &sage_quantize_call::codes,
                          &sage_quantize_call::scales};
    inverse ? try_call(call, tensors, sage_dequantize) : try_call(call, tensors, sage_quantize);
  }

  struct Problem {
    int64_t b, hq, hkv, nq, nk, d, dv;
  };

  Problem problem() {
    const int64_t kv = random.between(1, 2);
    return {random.between(1, 2),  kv * random.between(1, 2), kv, random.between(1, 70), random.between(1, 90),
            random.between(1, 20), random.between(1, 20)};
  }

  sage_attention_options options(int32_t kernel) {
    sage_attention_options made{};
    made.kernel = kernel;
    made.causal = int32_t(random.below(2));
    made.scale = random.one_in(2) ? 0 : 0.25f;
    if (kernel > SAGE_KERNEL_FLASH) {
      made.granularity = int32_t(random.between(SAGE_GRANULARITY_DEFAULT, SAGE_GRANULARITY_THREAD));
    }
    if (kernel == SAGE_KERNEL_SAGE1) made.pv_accumulator = int32_t(random.below(3));
    if (kernel == SAGE_KERNEL_SAGE2PP) made.pv_range = int32_t(random.below(4));
    made.exponential = int32_t(random.below(kernel == SAGE_KERNEL_SAGE2 ? 3 : 2));
    mask_positions(made);
    return made;
  }

  // Masks that follow from positions; -1 is no limit.
  void mask_positions(sage_attention_options& options) {
    const auto limit = [&] { return random.one_in(3) ? -1 : random.one_in(4) ? INT64_MAX : random.between(0, 90); };
    options.alignment = int32_t(random.below(2));
    if (random.one_in(3)) options.softcap = random.one_in(2) ? 0.5f : 1e30f;
    if (!random.one_in(2)) return;
    options.windowed = 1;
    options.window_before = limit();
    options.window_after = options.causal ? -int64_t(random.below(2)) : limit();
  }

  void add_mask_tensors(sage_attention_call& call, const Problem& p) {
    const auto some = [&](int64_t length) { return random.one_in(2) ? 1 : length; };
    if (random.one_in(2)) {
      const int32_t dtype = random.one_in(2) ? int32_t(SAGE_BOOL) : float_type();
      call.mask = tensor(dtype, {some(p.b), some(p.hq), some(p.nq), p.nk}, false);
    }
    if (random.one_in(3)) call.sinks = tensor(SAGE_F32, {1, p.hq, 1, 1}, false);
    if (random.one_in(3)) call.alibi = tensor(SAGE_F32, {some(p.b), p.hq, 1, 1}, false);
  }

  // Rising, from 0 to all tokens.
  std::vector<int64_t> starts(int64_t tokens, uint64_t sequences) {
    std::vector<int64_t> made{0};
    for (uint64_t i = 1; i < sequences; ++i) made.push_back(random.between(made.back(), tokens));
    made.push_back(tokens);
    return made;
  }

  void attention_varlen() {
    Problem p = problem();
    p.b = 1;
    const sage_attention_call call = attention_call(p);
    const auto sequences = uint64_t(random.between(1, 6));
    std::vector<int64_t> q_starts = starts(p.nq, sequences), k_starts = starts(p.nk, sequences);
    const auto run = [&](const sage_attention_call* from, char* error, size_t error_size) {
      return sage_attention_varlen(from, q_starts.data(), k_starts.data(), sequences, error, error_size);
    };
    CALL(strict, run, &call);
    ++accepted;
    for (int i = 0; i < 4; ++i) {
      int64_t& start = (random.one_in(2) ? q_starts : k_starts)[size_t(random.below(int64_t(sequences + 1)))];
      start = random.one_in(2) ? start ^ random.between(-2, 2) : int64_t(random.nasty());
      CALL(false, run, &call) == SAGE_OK ? ++accepted : ++refused;
    }
    CALL(false, sage_attention_varlen, &call, nullptr, k_starts.data(), sequences);
    CALL(false, sage_attention_varlen, &call, q_starts.data(), nullptr, sequences);
    CALL(false, sage_attention_varlen, &call, q_starts.data(), k_starts.data(), uint64_t(0));
    drop_tensors();
  }

  sage_attention_call attention_call(const Problem& p) {
    sage_attention_call call{};
    call.size = sizeof call;
    call.stream = stream;
    call.options = options(int32_t(random.between(SAGE_KERNEL_AUTO, SAGE_KERNEL_SAGE_INT8)));
    if (call.options.kernel > SAGE_KERNEL_FLASH) {
      for (int32_t* option : {&call.options.smooth_q, &call.options.smooth_k, &call.options.smooth_v}) {
        *option = int32_t(random.below(3));
      }
      for (int32_t* option : {&call.options.rotate, &call.options.first_token}) *option = int32_t(random.below(3));
      if (call.options.causal) call.options.band = int32_t(random.below(3));
      if (call.options.smooth_k != SAGE_OFF) call.options.k_mean_rows = 64 * uint32_t(random.below(3));
    }
    const int32_t dtype = float_type();
    call.q = tensor(dtype, {p.b, p.hq, p.nq, p.d}, false);
    call.k = tensor(dtype, {p.b, p.hkv, p.nk, p.d}, false);
    call.v = tensor(dtype, {p.b, p.hkv, p.nk, p.dv}, false);
    call.o = tensor(float_type(), {p.b, p.hq, p.nq, p.dv}, true);
    if (random.one_in(2)) call.lse = tensor(SAGE_F32, {p.b, p.hq, p.nq, 1}, true);
    add_mask_tensors(call, p);
    return call;
  }

  void attention() {
    const sage_attention_call call = attention_call(problem());
    sage_plan plan;
    plan.size = sizeof plan;
    const auto explain = [&](const sage_attention_call* from, char* error, size_t error_size) {
      return sage_explain(from, &plan, error, error_size);
    };
    CALL(strict, sage_explain, &call, &plan);
    CALL(false, sage_explain, &call, nullptr);
    const auto tensors = {&sage_attention_call::q,     &sage_attention_call::k,    &sage_attention_call::v,
                          &sage_attention_call::o,     &sage_attention_call::lse,  &sage_attention_call::mask,
                          &sage_attention_call::sinks, &sage_attention_call::alibi};
    const bool flash = call.options.kernel <= SAGE_KERNEL_FLASH;
    if (random.one_in(4)) {
      try_call(call, tensors, explain);
    } else {
      flash&& random.one_in(2) ? try_call(call, tensors, sage_flash_attention)
                               : try_call(call, tensors, sage_attention);
    }
  }

  void attention_quantized() {
    const Problem p = problem();
    sage_attention_quantized_call call{};
    call.size = sizeof call;
    call.stream = stream;
    const auto kernel = int32_t(random.between(SAGE_KERNEL_SAGE1, SAGE_KERNEL_SAGE_INT8));
    call.options = options(kernel);
    const int32_t granularity = call.options.granularity           ? call.options.granularity
                                : kernel <= SAGE_KERNEL_SAGE1_INT8 ? SAGE_GRANULARITY_BLOCK
                                                                   : SAGE_GRANULARITY_THREAD;
    call.q_group_rows = some_group_rows(granularity);
    call.k_group_rows = some_group_rows(granularity);
    const int32_t dtype = kernel == SAGE_KERNEL_SAGE2_INT4 ? SAGE_I4 : SAGE_I8;
    const int64_t q_groups = groups(granularity, SAGE_OPERAND_QUERY, call.q_group_rows, p.nq);
    const int64_t k_groups = groups(granularity, SAGE_OPERAND_KEY, call.k_group_rows, p.nk);
    call.q = tensor(dtype, {p.b, p.hq, p.nq, p.d}, false);
    call.q_scales = tensor(SAGE_F32, {p.b, p.hq, q_groups, 1}, false);
    call.k = tensor(dtype, {p.b, p.hkv, p.nk, p.d}, false);
    call.k_scales = tensor(SAGE_F32, {p.b, p.hkv, k_groups, 1}, false);
    if (random.one_in(2)) {
      call.q_mean_rows = random.one_in(2) ? 0 : uint32_t(random.between(1, 90));
      const int64_t rows = call.q_mean_rows ? (p.nq + call.q_mean_rows - 1) / call.q_mean_rows : 1;
      call.q_mean = tensor(SAGE_F32, {p.b, p.hq, rows, p.d}, false);
    }
    if (random.one_in(2)) call.k_mean = tensor(SAGE_F32, {p.b, p.hkv, 1, p.d}, false);
    const int32_t v_type = kernel == SAGE_KERNEL_SAGE1        ? float_type()
                           : kernel == SAGE_KERNEL_SAGE1_INT8 ? SAGE_I8
                           : kernel == SAGE_KERNEL_SAGE_INT8  ? SAGE_I8
                                                              : SAGE_E4M3;
    call.v = tensor(v_type, {p.b, p.hkv, p.nk, p.dv}, false);
    if (kernel != SAGE_KERNEL_SAGE1) call.v_scales = tensor(SAGE_F32, {p.b, p.hkv, 1, p.dv}, false);
    if (random.one_in(2)) call.v_mean = tensor(SAGE_F32, {p.b, p.hkv, 1, p.dv}, false);
    call.o = tensor(float_type(), {p.b, p.hq, p.nq, p.dv}, true);
    if (random.one_in(2)) call.lse = tensor(SAGE_F32, {p.b, p.hq, p.nq, 1}, true);
    using Call = sage_attention_quantized_call;
    try_call(call,
             {&Call::q, &Call::q_scales, &Call::q_mean, &Call::k, &Call::k_scales, &Call::k_mean, &Call::v,
              &Call::v_scales, &Call::v_mean, &Call::o, &Call::lse},
             sage_attention_quantized);
  }
};

// ---- afterwards -------------------------------------------------------------------------------------------

void destroy_all() {
  uint64_t stream;
  CHECK(sage_stream_create(SAGE_CPU, &stream, nullptr, 0) == SAGE_OK);
  for (const auto& memory : shared.memory) CHECK(sage_memory_free(stream, memory.address, nullptr, 0) == SAGE_OK);
  for (const uint64_t id : shared.streams) CHECK(sage_stream_destroy(id, nullptr, 0) == SAGE_OK);
  for (const uint64_t id : shared.events) CHECK(sage_event_destroy(id, nullptr, 0) == SAGE_OK);
  CHECK(sage_stream_destroy(stream, nullptr, 0) == SAGE_OK);
  shared.memory.clear();
  shared.streams.clear();
  shared.events.clear();
  sage_memory_stats stats;
  stats.size = sizeof stats;
  CHECK(sage_memory_describe(SAGE_CPU, &stats, nullptr, 0) == SAGE_OK);
  std::printf("left: %u streams, %llu allocations; at most %llu bytes\n", stats.streams,
              static_cast<unsigned long long>(stats.allocations), static_cast<unsigned long long>(stats.peak_bytes));
  CHECK(stats.streams == 0 && stats.allocations == 0 && stats.bytes == 0);
}

// Two keys, one channel: small enough to do by hand.
void still_works() {
  uint64_t stream, data;
  CHECK(sage_stream_create(SAGE_CPU, &stream, nullptr, 0) == SAGE_OK);
  CHECK(sage_memory_allocate(stream, 256, &data, nullptr, 0) == SAGE_OK);
  const float values[] = {1.0f, /* k */ 0.5f, -0.25f, /* v */ 3.0f, -2.0f};
  CHECK(sage_memory_write(stream, data, values, sizeof values, nullptr, 0) == SAGE_OK);
  const auto make = [](uint64_t at, int64_t tokens) {
    return sage_tensor{at, SAGE_F32, SAGE_CPU, {1, 1, tokens, 1}, {tokens, tokens, 1, 1}};
  };
  sage_attention_call call{};
  call.size = sizeof call;
  call.stream = stream;
  call.options.kernel = SAGE_KERNEL_FLASH;
  call.q = make(data, 1);
  call.k = make(data + 4, 2);
  call.v = make(data + 12, 2);
  call.o = make(data + 64, 1);
  CHECK(sage_attention(&call, nullptr, 0) == SAGE_OK);
  float out = 0;
  CHECK(sage_memory_read(stream, &out, call.o.data, sizeof out, nullptr, 0) == SAGE_OK);
  const double a = std::exp(0.5), b = std::exp(-0.25), expected = (3 * a - 2 * b) / (a + b);
  CHECK(std::fabs(out - expected) < 1e-5);
  CHECK(sage_memory_free(stream, data, nullptr, 0) == SAGE_OK);
  CHECK(sage_stream_destroy(stream, nullptr, 0) == SAGE_OK);
}

void fuzz(const char* what, double seconds, uint64_t seed, int threads) {
  using Clock = std::chrono::steady_clock;
  const auto end = Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
  std::mutex mutex;
  uint64_t steps = 0, accepted = 0, refused = 0;
  const auto run = [&](uint64_t own_seed) {
    Fuzzer fuzzer(own_seed, threads == 1);
    while (Clock::now() < end) fuzzer.step();
    std::lock_guard lock(mutex);
    steps += fuzzer.steps;
    accepted += fuzzer.accepted;
    refused += fuzzer.refused;
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(run, seed + uint64_t(i) * 7919);
  run(seed);
  for (auto& other : others) other.join();
  std::printf("%s: %llu steps; of the operations %llu accepted, %llu refused\n", what,
              static_cast<unsigned long long>(steps), static_cast<unsigned long long>(accepted),
              static_cast<unsigned long long>(refused));
  CHECK(accepted > 0 && refused > 0);
}

}  // namespace

int main(int count, char** arguments) {
  const double seconds = count > 1 ? std::atof(arguments[1]) : 10;
  const uint64_t seed = count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 1;
  std::printf("fuzzing for %g seconds, seed %llu\n", seconds, static_cast<unsigned long long>(seed));
  fuzz("one thread", seconds / 2, seed, 1);
  destroy_all();
  fuzz("four threads", seconds / 2, seed, 4);
  destroy_all();
  still_works();
  std::printf("the library still works\n");
  return 0;
}
