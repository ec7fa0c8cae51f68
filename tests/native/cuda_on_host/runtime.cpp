// The runtime calls, with the checks of a launch that CUDA makes, and the list of barriers.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>
#include <string>

#include "cuda_runtime.h"

namespace {

int setting(const char* name, int otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr ? otherwise : std::atoi(value);
}

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

// What was wrong, in words; CUDA would leave it at the code.
std::string detail;
cudaError_t refuse(cudaError_t error, const std::string& why) {
  detail = why;
  return error;
}

const char* base_name(const char* path) {
  const char* slash = std::strrchr(path, '/');
  return slash == nullptr ? path : slash + 1;
}

// The barriers met so far, and where to write them.
struct BarriersMet {
  const char* path = std::getenv("HARMONIZER_LIST_BARRIERS");
  std::set<std::string> lines;
};
BarriersMet& barriers_met() {
  static BarriersMet met;
  return met;
}

}  // namespace

const char* cudaGetErrorString(cudaError_t error) {
  static std::string text;
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: text = "invalid argument"; break;
    case cudaErrorInvalidConfiguration: text = "invalid configuration argument"; break;
    case cudaErrorInvalidDevice: text = "invalid device ordinal"; break;
    case cudaErrorInvalidDeviceFunction: text = "invalid device function"; break;
    case cudaErrorLaunchOutOfResources: text = "too many resources requested for launch"; break;
    case cudaErrorNotSupported: text = "operation not supported"; break;
    case cudaErrorInvalidClusterSize: text = "invalid cluster size"; break;
  }
  return (text += " (" + detail + ")").c_str();
}

cudaError_t cudaGetDevice(int* number) {
  *number = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int number) {
  if (number != 0) return refuse(cudaErrorInvalidDevice, "the only device is 0");
  return cudaSuccess;
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
  }
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  Leave& leave = leaves[kernel];
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
  if (const cudaError_t error = cuda_on_host::check_launch(kernel, *config, &blocks)) {
    if (error != cudaErrorInvalidClusterSize || device().largest_cluster < 0) return error;
    return cudaSuccess;  // 0 clusters, which is an answer
  }
  // Whoever asks keeps the answer.
  static std::set<std::pair<const void*, unsigned>> asked;
  if (!asked.insert({kernel, blocks}).second)
    return refuse(cudaErrorInvalidValue, "asked before for clusters of " + std::to_string(blocks));
  const int threads = config->blockDim.x * config->blockDim.y * config->blockDim.z;
  const int by_shared = (device().shared_bytes + kReservedShared) /
                        (static_cast<int>(config->dynamicSmemBytes) + kReservedShared);
  *clusters = device().multiprocessors * std::min({2048 / threads, by_shared, 32}) / blocks;
  return cudaSuccess;
}

namespace cuda_on_host {

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
  const auto text = [](uint64_t number) { return std::to_string(number); };
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

bool skipped(const Where& where, const char* kind) {
  static const std::string skip = [] {
    const char* value = std::getenv("HARMONIZER_SKIP_BARRIER");
    return std::string(value == nullptr ? "" : value);
  }();
  BarriersMet& met = barriers_met();
  if (skip.empty() && met.path == nullptr) return false;
  const std::string name = base_name(where.file_name()) + (":" + std::to_string(where.line()));
  if (met.path != nullptr) met.lines.insert(name + " " + kind);
  return name == skip;
}

void write_barriers_met() {
  BarriersMet& met = barriers_met();
  if (met.path == nullptr) return;
  std::FILE* file = std::fopen(met.path, "w");
  if (file == nullptr) fail("HARMONIZER_LIST_BARRIERS: cannot write %s", met.path);
  for (const std::string& line : met.lines) std::fprintf(file, "%s\n", line.c_str());
  std::fclose(file);
}

}  // namespace cuda_on_host
