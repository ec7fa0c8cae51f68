#include "launch.cuh"

namespace harmonizer::cuda {
namespace {

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
  return value;
}

}  // namespace

bool is_lack_of_room(cudaError_t error) {
  return error == cudaErrorInvalidClusterSize || error == cudaErrorInvalidConfiguration ||
         error == cudaErrorLaunchOutOfResources || error == cudaErrorNotSupported;
}

const DeviceLimits& device_limits(int device) {
  static DeviceLimits limits[kMaxDevices];
  static std::atomic<bool> known[kMaxDevices];
  if (device < 0 || device >= kMaxDevices)
    throw std::runtime_error("device: expected 0 to " + std::to_string(kMaxDevices - 1) + ", got " +
                             std::to_string(device));
  if (!known[device].load(std::memory_order_acquire)) {
    // Two threads may both come here; they write the same numbers.
    DeviceLimits& l = limits[device];
    l.architecture = 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
                     attribute(cudaDevAttrComputeCapabilityMinor, device);
    l.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
    l.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    l.l2_bytes = attribute(cudaDevAttrL2CacheSize, device);
    known[device].store(true, std::memory_order_release);
  }
  return limits[device];
}

}  // namespace harmonizer::cuda
