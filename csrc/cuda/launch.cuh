// How the host side launches: the caller's device and stream, a check with the kernel's name,
// limits.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <stdexcept>
#include <string>

#include "../harmonizer.h"

namespace harmonizer::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// The caller's device while it lives; then the one that was current before.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ != device) check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = before_ != device;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// What a plan depends on. Read once per device.
struct DeviceLimits {
  int architecture = 0;  // 90 for compute capability 9.0
  int multiprocessors = 0;
  int shared_bytes = 0;  // of one block, with opt-in
  int l2_bytes = 0;
};
const DeviceLimits& device_limits(int device);

struct Grid {
  const char* kernel;  // its name, for errors
  dim3 blocks;
  int threads;
  size_t shared_bytes = 0;
  int cluster = 1;  // blocks in x that form a thread-block cluster
};

constexpr int kMaxDevices = 64;

// Launches Kernel on a stream. Nothing is allocated, nothing waited for.
template <auto Kernel, class... Arguments>
void launch(const Grid& grid, void* stream, const Arguments&... arguments) {
  if (grid.shared_bytes > 48 * 1024 || grid.cluster > 8) {
    // Leave for so much shared memory, or so many blocks, is asked once per kernel and device.
    static std::atomic<bool> ready[kMaxDevices];
    int device = 0;
    check(cudaGetDevice(&device), grid.kernel);
    if (!ready[device].load(std::memory_order_relaxed)) {
      const void* kernel = reinterpret_cast<const void*>(Kernel);
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 device_limits(device).shared_bytes),
            grid.kernel);
      if (grid.cluster > 8)
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
              grid.kernel);
      ready[device].store(true, std::memory_order_relaxed);
    }
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid.blocks;
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute{};
  if (grid.cluster > 1) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(grid.cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  check(cudaLaunchKernelEx(&config, Kernel, arguments...), grid.kernel);
}

}  // namespace harmonizer::cuda
