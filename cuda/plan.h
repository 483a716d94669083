// Plans: which kernel, tile and workspace a call gets. Host-only and pure; plan.cpp resolves the options that
// every device shares, then one of these fills in what the device decides.
#pragma once

#include "ops.h"

namespace sage {

// Tiles, workspace and implementation of a resolved plan; throw SAGE_UNSUPPORTED, with the allowed values.
void plan_cpu(const AttentionShape& shape, const DeviceTraits& device, Plan& plan);
void plan_cuda(const AttentionShape& shape, const DeviceTraits& device, Plan& plan);
void plan_cpu_quantized(const AttentionShape& shape, const DeviceTraits& device, Plan& plan);
void plan_cuda_quantized(const AttentionShape& shape, const DeviceTraits& device, Plan& plan);

// What SAGE_KERNEL_AUTO means on a device.
Kernel cpu_auto_kernel(const AttentionShape& shape, std::string& reason);
Kernel cuda_auto_kernel(const AttentionShape& shape, const DeviceTraits& device, std::string& reason);

// What SAGE_EXPONENTIAL_DEFAULT means for sage2 on a device; the plan knows granularity and smoothing.
bool cpu_fast_exponential();
bool cuda_fast_exponential(const AttentionShape& shape, const DeviceTraits& device, const Plan& plan);

const char* kernel_name(Kernel kernel);  // "sage2++"

}  // namespace sage
