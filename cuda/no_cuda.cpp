// What a library that was built without CUDA says of CUDA devices.
#include "ops.h"

namespace sage {

[[noreturn]] static void fail() {
  SAGE_FAIL(SAGE_NO_DEVICE, "Cannot use a CUDA device as this library was built without CUDA.");
}

int cuda_device_count() { fail(); }
std::unique_ptr<Stream> open_cuda_stream(int) { fail(); }
sage_device_info describe_cuda(int) { fail(); }
DeviceTraits cuda_traits(int) { fail(); }

}  // namespace sage
