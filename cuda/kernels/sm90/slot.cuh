// A place in a ring of tiles, and the parity that its barriers complete next.
#pragma once

#include <cstdint>

namespace sage::cuda::sm90 {

template <int kStages>
struct Slot {
  uint32_t index = 0, parity = 0;
  __device__ __forceinline__ void next() {
    if (++index == kStages) {
      index = 0;
      parity ^= 1;
    }
  }

  __device__ __forceinline__ Slot previous() const {
    return index == 0 ? Slot{kStages - 1, parity ^ 1} : Slot{index - 1, parity};
  }
};

}  // namespace sage::cuda::sm90
