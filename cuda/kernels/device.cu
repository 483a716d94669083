// CUDA devices: finding and describing them, and what their errors mean.
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>

#include "device.h"

namespace sage {
namespace cuda {
namespace {

constexpr int kLeastComputeCapability = 80;

// Devices that were opened. Never destroyed: threads may still run while the process exits.
struct Devices {
  std::mutex mutex;
  std::map<int, std::unique_ptr<Device>> opened;
};

Devices& devices() {
  static auto* const all = new Devices;
  return *all;
}

std::string text(cudaError_t status) {
  return std::string(cudaGetErrorName(status)) + ": " + cudaGetErrorString(status);
}

std::string version(int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); }

// Errors that end the device's work for the whole process.
bool is_final(cudaError_t status) {
  switch (status) {
    case cudaErrorECCUncorrectable:
    case cudaErrorNvlinkUncorrectable:
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchTimeout:
    case cudaErrorAssert:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorLaunchFailure:
    case cudaErrorTensorMemoryLeak:
    case cudaErrorContextIsDestroyed:
    case cudaErrorMpsClientTerminated:
    case cudaErrorExternalDevice:
    case cudaErrorContained:
    case cudaErrorUnknown: return true;
    default: return false;
  }
}

sage_status status_of(cudaError_t status) {
  switch (status) {
    case cudaErrorMemoryAllocation: return SAGE_OUT_OF_MEMORY;
    case cudaErrorNoDevice:
    case cudaErrorInvalidDevice:
    case cudaErrorInsufficientDriver: return SAGE_NO_DEVICE;
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorUnsupportedPtxVersion: return SAGE_UNSUPPORTED;
    case cudaErrorInvalidValue:
    case cudaErrorInvalidConfiguration:
    case cudaErrorInvalidResourceHandle:
    case cudaErrorLaunchOutOfResources: return SAGE_INTERNAL;
    default: return SAGE_DEVICE_ERROR;
  }
}

int attribute(int ordinal, cudaDeviceAttr which) {
  int value = 0;
  SAGE_CUDA(cudaDeviceGetAttribute(&value, which, ordinal));
  return value;
}

int compute_capability(int ordinal) {
  return attribute(ordinal, cudaDevAttrComputeCapabilityMajor) * 10 +
         attribute(ordinal, cudaDevAttrComputeCapabilityMinor);
}

// Never launched: it tells which features the portable kernels were compiled with.
__global__ void portable_kernel() {}

int code_level(int ordinal) {
  SAGE_CUDA(cudaSetDevice(ordinal));
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, portable_kernel) == cudaSuccess) return attributes.ptxVersion;
  cudaGetLastError();  // no kernel runs, as the first one will say
  return kLeastComputeCapability;
}

void check_ordinal(int ordinal) {
  const int count = cuda_device_count();
  if (ordinal >= 0 && ordinal < count) return;
  SAGE_FAIL(SAGE_NO_DEVICE, "Cannot use a CUDA device as its number must be below " + std::to_string(count) +
                                ", the number of CUDA devices: current value is " + std::to_string(ordinal) + ".");
}

cudaMemPool_t make_pool(int ordinal) {
  cudaMemPoolProps properties{};
  properties.allocType = cudaMemAllocationTypePinned;
  properties.location.type = cudaMemLocationTypeDevice;
  properties.location.id = ordinal;
  cudaMemPool_t pool;
  SAGE_CUDA(cudaMemPoolCreate(&pool, &properties));
  uint64_t keep = UINT64_MAX;
  SAGE_CUDA(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &keep));
  return pool;
}

std::unique_ptr<Device> make_device(int ordinal) {
  auto device = std::make_unique<Device>();
  device->ordinal = ordinal;
  device->compute_capability = compute_capability(ordinal);
  if (device->compute_capability < kLeastComputeCapability) {
    SAGE_FAIL(SAGE_UNSUPPORTED, "Cannot use " + name_of(*device) + " as its compute capability must be at least 8.0: " +
                                    "current value is " + std::to_string(device->compute_capability / 10) + "." +
                                    std::to_string(device->compute_capability % 10) + ".");
  }
  if (!attribute(ordinal, cudaDevAttrMemoryPoolsSupported)) {
    SAGE_FAIL(SAGE_UNSUPPORTED, "Cannot use " + name_of(*device) + " as its driver must support memory pools.");
  }
  device->multiprocessors = attribute(ordinal, cudaDevAttrMultiProcessorCount);
  SAGE_CUDA(cudaSetDevice(ordinal));
  size_t free_bytes;
  SAGE_CUDA(cudaMemGetInfo(&free_bytes, &device->total_bytes));
  device->pool = make_pool(ordinal);
  return device;
}

}  // namespace

void check(cudaError_t status, const char* what, const char* file, int line) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // not for whoever calls next
  std::string where = "the device";
  int ordinal = -1;
  if (cudaGetDevice(&ordinal) == cudaSuccess) where = "CUDA device " + std::to_string(ordinal);
  if (is_final(status)) {
    std::lock_guard lock(devices().mutex);
    const auto found = devices().opened.find(ordinal);
    if (found != devices().opened.end()) found->second->failure = status;
  }
  throw Error{status_of(status), "Cannot go on with " + where + " as " + what + " failed with " + text(status) + ".",
              file, line};
}

Device& open_device(int ordinal) {
  check_ordinal(ordinal);
  Devices& all = devices();
  {
    std::lock_guard lock(all.mutex);
    const auto found = all.opened.find(ordinal);
    if (found != all.opened.end()) return *found->second;
  }
  auto device = make_device(ordinal);
  std::lock_guard lock(all.mutex);
  const auto [entry, inserted] = all.opened.emplace(ordinal, nullptr);
  if (inserted) {
    entry->second = std::move(device);
  } else {
    cudaMemPoolDestroy(device->pool);  // another thread was first
  }
  return *entry->second;
}

void enter(const Device& device) {
  if (const int failure = device.failure) {
    SAGE_FAIL(SAGE_DEVICE_ERROR, "Cannot use " + name_of(device) +
                                     " in this process any more as it failed earlier with " +
                                     text(static_cast<cudaError_t>(failure)) + ".");
  }
  SAGE_CUDA(cudaSetDevice(device.ordinal));
}

std::string name_of(const Device& device) { return "CUDA device " + std::to_string(device.ordinal); }

}  // namespace cuda

int cuda_device_count() {
  const std::string action = "Cannot use a CUDA device as ";
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess && count > 0) return count;
  cudaGetLastError();
  if (status == cudaErrorInsufficientDriver) {
    int driver = 0;
    if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
      SAGE_FAIL(SAGE_NO_DEVICE, action + "no NVIDIA driver is installed.");
    }
    SAGE_FAIL(SAGE_NO_DEVICE, action + "the NVIDIA driver is too old: it supports CUDA " + cuda::version(driver) +
                                  ", this library needs " + cuda::version(CUDART_VERSION / 1000 * 1000) + " or later.");
  }
  if (status == cudaSuccess || status == cudaErrorNoDevice) {
    const char* const visible = std::getenv("CUDA_VISIBLE_DEVICES");
    SAGE_FAIL(SAGE_NO_DEVICE,
              action + "there is no NVIDIA GPU" +
                  (visible ? " among those that CUDA_VISIBLE_DEVICES=\"" + std::string(visible) + "\" allows." : "."));
  }
  SAGE_FAIL(SAGE_NO_DEVICE, action + "the NVIDIA driver failed with " + cuda::text(status) + ".");
}

sage_device_info describe_cuda(int ordinal) {
  cuda::check_ordinal(ordinal);
  sage_device_info info{};
  info.device = ordinal;
  info.compute_capability = cuda::compute_capability(ordinal);
  info.multiprocessors = cuda::attribute(ordinal, cudaDevAttrMultiProcessorCount);
  info.clock_khz = cuda::attribute(ordinal, cudaDevAttrClockRate);
  SAGE_CUDA(cudaDriverGetVersion(&info.driver_version));
  cudaDeviceProp properties;
  SAGE_CUDA(cudaGetDeviceProperties(&properties, ordinal));
  std::string(properties.name).copy(info.name, sizeof info.name - 1);
  const std::string features =
      "sm_" + std::to_string(info.compute_capability) + (info.compute_capability >= 90 ? "a" : "");
  features.copy(info.features, sizeof info.features - 1);
  SAGE_CUDA(cudaSetDevice(ordinal));
  size_t free_bytes, total_bytes;
  SAGE_CUDA(cudaMemGetInfo(&free_bytes, &total_bytes));
  info.memory_bytes = total_bytes;
  info.free_bytes = free_bytes;
  return info;
}

DeviceTraits cuda_traits(int ordinal) {
  cuda::check_ordinal(ordinal);
  DeviceTraits traits;
  traits.cpu = false;
  traits.compute_capability = cuda::compute_capability(ordinal);
  traits.code_level = cuda::code_level(ordinal);
  traits.architecture = traits.compute_capability;
  traits.multiprocessors = cuda::attribute(ordinal, cudaDevAttrMultiProcessorCount);
  return traits;
}

}  // namespace sage
