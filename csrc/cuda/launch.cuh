// How the host side launches: the caller's device and stream, a check with the kernel's name,
// limits, and whether the device can hold a cluster of blocks.
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

// The device of a call must be the current one. To switch to it is the caller's part
// (harmonizer_ext/backends/cuda.py): whoever switches must go back, and going back to a device on
// which nothing has run yet creates a context there, for hundreds of megabytes. Where that would
// happen, and what to do then, PyTorch knows and this library does not.
inline void check_current(int device) {
  int current = 0;
  check(cudaGetDevice(&current), "cudaGetDevice");
  if (current != device)
    throw std::runtime_error("device: expected the current device, " + std::to_string(current) +
                             ", got " + std::to_string(device) + "; make it current first");
}

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
constexpr int kPortableCluster = 8;  // blocks that every device with clusters can hold by itself
constexpr int kLargestCluster = 16;

// Leave for much shared memory, and for clusters of more blocks than every device has, is asked
// once for a kernel and a device.
template <auto Kernel>
cudaError_t allow(const Grid& grid) {
  if (grid.shared_bytes <= 48 * 1024 && grid.cluster <= kPortableCluster) return cudaSuccess;
  static std::atomic<bool> ready[kMaxDevices];
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess || ready[device].load(std::memory_order_relaxed)) return error;
  const void* kernel = reinterpret_cast<const void*>(Kernel);
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               device_limits(device).shared_bytes);
  if (error == cudaSuccess && grid.cluster > kPortableCluster)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error == cudaSuccess) ready[device].store(true, std::memory_order_relaxed);
  return error;
}

// What the runtime wants to know of a grid. Points into itself, so that it stays where it is.
class Configuration {
 public:
  Configuration(const Grid& grid, void* stream) {
    config_.gridDim = grid.blocks;
    config_.blockDim = dim3(static_cast<unsigned>(grid.threads));
    config_.dynamicSmemBytes = grid.shared_bytes;
    config_.stream = static_cast<cudaStream_t>(stream);
    if (grid.cluster == 1) return;
    attribute_.id = cudaLaunchAttributeClusterDimension;
    attribute_.val.clusterDim.x = static_cast<unsigned>(grid.cluster);
    attribute_.val.clusterDim.y = attribute_.val.clusterDim.z = 1;
    config_.attrs = &attribute_;
    config_.numAttrs = 1;
  }
  Configuration(const Configuration&) = delete;
  Configuration& operator=(const Configuration&) = delete;
  const cudaLaunchConfig_t* get() const { return &config_; }

 private:
  cudaLaunchConfig_t config_{};
  cudaLaunchAttribute attribute_{};
};

// Whether an error says that a device has no room for a cluster of that shape.
bool is_lack_of_room(cudaError_t error);

// Whether the device, which must be the current one, can hold a cluster of the grid's shape at
// least once: one whose blocks need more multiprocessors than a partition of the device has (a MIG
// slice, a limit of MPS, a GPU with few multiprocessors in a group) would never start. A kernel is
// asked for with one shape for each size of a cluster, and the runtime is asked once for that and a
// device; two threads that come together write the same answer.
//
// The question is about the attributes of a kernel and of a device, which the driver answers on the
// host: nothing is enqueued, allocated on the device or waited for. It is therefore as legal while
// a stream is being captured as the launch that follows, and like that launch it makes the driver
// load the kernel where that has not happened yet.
template <auto Kernel>
bool cluster_fits(const Grid& grid, int device) {
  enum : signed char { kUnknown, kFits, kDoesNot };
  static std::atomic<signed char> answers[kMaxDevices][kLargestCluster + 1];
  std::atomic<signed char>& answer = answers[device][grid.cluster];
  if (answer.load(std::memory_order_relaxed) == kUnknown) {
    int clusters = 0;
    cudaError_t error = allow<Kernel>(grid);
    if (error == cudaSuccess) {
      const Configuration config(grid, nullptr);
      error = cudaOccupancyMaxActiveClusters(&clusters, reinterpret_cast<const void*>(Kernel),
                                             config.get());
    }
    if (is_lack_of_room(error)) {
      cudaGetLastError();  // answered here: nobody is to meet it as an error of theirs
      clusters = 0;
    } else {
      check(error, grid.kernel);
    }
    answer.store(clusters > 0 ? kFits : kDoesNot, std::memory_order_relaxed);
  }
  return answer.load(std::memory_order_relaxed) == kFits;
}

// Launches Kernel on a stream of the current device. Nothing is allocated, nothing waited for.
template <auto Kernel, class... Arguments>
void launch(const Grid& grid, void* stream, const Arguments&... arguments) {
  check(allow<Kernel>(grid), grid.kernel);
  const Configuration config(grid, stream);
  check(cudaLaunchKernelEx(config.get(), Kernel, arguments...), grid.kernel);
}

}  // namespace harmonizer::cuda
