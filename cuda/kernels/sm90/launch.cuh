// Launches that overlap: a kernel starts while the one before it in the stream still runs, and waits for it itself.
#pragma once

#include "../kernels.h"
#include "../ptx/barrier.cuh"

namespace sage::cuda::sm90 {

// Every thread of the kernel must pass ptx::wait_for_previous_kernel() before it touches what an earlier kernel
// writes or reads. A kernel that passes it and only then lets the next one start spares the next one that wait, but
// for what it writes itself.
template <class... Parameters, class... Arguments>
void launch_clusters(void (*kernel)(Parameters...), unsigned cluster, unsigned blocks, unsigned threads,
                     size_t shared_bytes, cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {cluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = cluster > 1 ? 2 : 1;
  SAGE_CUDA(cudaLaunchKernelEx(&config, kernel, arguments...));
}

template <class... Parameters, class... Arguments>
void launch_overlapped(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, size_t shared_bytes,
                       cudaStream_t stream, const Arguments&... arguments) {
  launch_clusters(kernel, 1, blocks, threads, shared_bytes, stream, arguments...);
}

}  // namespace sage::cuda::sm90
