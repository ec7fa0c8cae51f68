#include "host_device.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <set>
#include <utility>

namespace host_device {
namespace {

struct Device {
  int architecture = setting("HARMONIZER_HOST_ARCH", 90);
  int multiprocessors = setting("HARMONIZER_HOST_MULTIPROCESSORS", 132);
  int shared_bytes = setting("HARMONIZER_HOST_SHARED", 232448);
  int l2_bytes = setting("HARMONIZER_HOST_L2", 52428800);
  // Blocks of the largest cluster that it holds, whatever the architecture allows: as on a slice of
  // a GPU. Below 0, the same, and it says so by an error in place of a number.
  int largest_cluster = setting("HARMONIZER_HOST_LARGEST_CLUSTER", 16);
};
const Device& device() {
  static const Device d;
  return d;
}
constexpr int kSharedWithoutLeave = 48 * 1024, kReservedShared = 1024, kMaxThreads = 1024;

// What cudaFuncSetAttribute allowed a kernel.
struct Leave {
  int shared_bytes = kSharedWithoutLeave;
  bool large_clusters = false;
};
std::map<const void*, Leave> leaves;

std::string detail;

std::string text(uint64_t number) { return std::to_string(number); }

}  // namespace

int setting(const char* name, int otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr ? otherwise : std::atoi(value);
}

int architecture() { return device().architecture; }

cudaError_t refuse(cudaError_t error, const std::string& why) {
  detail = why;
  return error;
}

cudaError_t check_launch(const void* kernel, const cudaLaunchConfig_t& config, unsigned* blocks) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  const Leave leave = leaves[kernel];
  *blocks = 1;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id != cudaLaunchAttributeClusterDimension) continue;
    const auto& cluster = config.attrs[i].val.clusterDim;
    if (cluster.y != 1 || cluster.z != 1)
      return refuse(cudaErrorNotSupported, "clusters are run in x only here");
    *blocks = cluster.x;
  }
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads < 1 || threads > kMaxThreads || block.z > 64)
    return refuse(cudaErrorInvalidConfiguration, text(threads) + " threads in a block");
  if (grid.x < 1 || grid.x > 0x7fffffffu || grid.y < 1 || grid.y > 65535 || grid.z < 1 ||
      grid.z > 65535)
    return refuse(cudaErrorInvalidConfiguration,
                  "grid of " + text(grid.x) + " by " + text(grid.y) + " by " + text(grid.z));
  if (*blocks > 1 && device().architecture < 90)
    return refuse(cudaErrorNotSupported, "clusters need architecture 90");
  if (*blocks < 1 || *blocks > (leave.large_clusters ? 16u : 8u))
    return refuse(cudaErrorInvalidConfiguration, "cluster of " + text(*blocks) + " blocks");
  if (*blocks > static_cast<unsigned>(std::abs(device().largest_cluster)))
    return refuse(cudaErrorInvalidClusterSize, text(*blocks) + " blocks, the device holds " +
                                                   text(std::abs(device().largest_cluster)));
  if (grid.x % *blocks != 0)
    return refuse(cudaErrorInvalidConfiguration,
                  text(grid.x) + " blocks in clusters of " + text(*blocks));
  if (config.dynamicSmemBytes > static_cast<size_t>(leave.shared_bytes))
    return refuse(cudaErrorInvalidValue, text(config.dynamicSmemBytes) +
                                             " bytes of shared memory, allowed are " +
                                             text(leave.shared_bytes));
  return cudaSuccess;
}

}  // namespace host_device

using host_device::device, host_device::refuse, host_device::kMaxThreads,
    host_device::kReservedShared, host_device::kSharedWithoutLeave;

const char* cudaGetErrorString(cudaError_t error) {
  static std::string words;
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: words = "invalid argument"; break;
    case cudaErrorInvalidConfiguration: words = "invalid configuration argument"; break;
    case cudaErrorInvalidDevice: words = "invalid device ordinal"; break;
    case cudaErrorInvalidDeviceFunction: words = "invalid device function"; break;
    case cudaErrorLaunchOutOfResources: words = "too many resources requested for launch"; break;
    case cudaErrorNotSupported: words = "operation not supported"; break;
    case cudaErrorInvalidClusterSize: words = "invalid cluster size"; break;
    default: words = "error " + std::to_string(static_cast<int>(error));
  }
  return (words += " (" + host_device::detail + ")").c_str();
}

cudaError_t cudaGetDevice(int* number) {
  *number = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int number) {
  return number == 0 ? cudaSuccess : refuse(cudaErrorInvalidDevice, "the only device is 0");
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int number) {
  if (number != 0) return refuse(cudaErrorInvalidDevice, "the only device is 0");
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = kMaxThreads; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = kSharedWithoutLeave; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = device().shared_bytes; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = device().shared_bytes + kReservedShared;
      break;
    case cudaDevAttrMultiProcessorCount: *value = device().multiprocessors; break;
    case cudaDevAttrL2CacheSize: *value = device().l2_bytes; break;
    case cudaDevAttrComputeCapabilityMajor: *value = device().architecture / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = device().architecture % 10; break;
    default: return refuse(cudaErrorInvalidValue, "an attribute that this device does not tell");
  }
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  host_device::Leave& leave = host_device::leaves[kernel];
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value < 0 || value > device().shared_bytes)
      return refuse(cudaErrorInvalidValue, std::to_string(value) + " bytes of shared memory");
    leave.shared_bytes = value;
  } else if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    leave.large_clusters = value != 0;
  }
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* kernel,
                                           const cudaLaunchConfig_t* config) {
  unsigned blocks = 1;
  *clusters = 0;
  if (const cudaError_t error = host_device::check_launch(kernel, *config, &blocks)) {
    if (error != cudaErrorInvalidClusterSize || device().largest_cluster < 0) return error;
    return cudaSuccess;  // 0 clusters, which is an answer
  }
  // Whoever asks keeps the answer.
  static std::set<std::pair<const void*, unsigned>> asked;
  if (!asked.insert({kernel, blocks}).second)
    return refuse(cudaErrorInvalidValue, "asked before for clusters of " + std::to_string(blocks));
  const int threads =
      static_cast<int>(config->blockDim.x * config->blockDim.y * config->blockDim.z);
  const int by_shared = (device().shared_bytes + kReservedShared) /
                        (static_cast<int>(config->dynamicSmemBytes) + kReservedShared);
  *clusters = device().multiprocessors * std::min({2048 / threads, by_shared, 32}) /
              static_cast<int>(blocks);
  return cudaSuccess;
}
