// A stand-in of the CUDA runtime library: host code compiled by nvcc, linked with this and with
// ptx_on_host, runs its kernels on the CPU as nvcc compiled them.
//
// nvcc puts PTX into the object; with -no-compress it lies there as text. The device is described
// by the same settings as that of cuda_on_host (HARMONIZER_HOST_ARCH and others); further ones are
//   HARMONIZER_PTX_ORDER, _SEED, _RACES, _CLUSTERS   options of api.h
//   HARMONIZER_PTX_COUNT=file     writes the counts there when the process ends
//   HARMONIZER_PTX_DUMP=folder    writes the PTX there of every module of which a kernel is
//   launched HARMONIZER_PTX_EDITED=file    takes the kernels in this PTX in place of those of the
//   same names
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "ptx_on_host/api.h"

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
};
const Device& device() {
  static const Device d;
  return d;
}

std::string detail;  // what was wrong last, in words
cudaError_t refuse(cudaError_t error, const std::string& why) {
  detail = why;
  return error;
}

// --- PTX in objects -----------------------------------------------------------------------------

// How nvcc describes what it has put into an object.
struct Wrapper {
  uint32_t magic, version;
  const char* data;
  void* unused;
};
struct Container {
  uint32_t magic;
  uint16_t version, header_bytes;
  uint64_t bytes;  // of the entries behind the header
};
struct Entry {
  uint16_t kind, version;
  uint32_t header_bytes;
  uint64_t bytes;  // behind the header
  uint32_t compressed_bytes, options_offset;
  uint16_t ptx_minor, ptx_major;
  uint32_t architecture;
};
constexpr uint32_t kContainerMagic = 0xba55ed50;
constexpr uint16_t kPtx = 1;

struct Kernel {
  const Wrapper* wrapper = nullptr;
  std::string name;
  int shared_bytes = 48 * 1024;  // what cudaFuncSetAttribute allowed it
  bool large_clusters = false;
};
std::map<const void*, Kernel>& kernels() {
  static std::map<const void*, Kernel> all;
  return all;
}

// The PTX of the newest architecture that this device can run.
std::string ptx_of(const Wrapper& wrapper) {
  Container container;
  std::memcpy(&container, wrapper.data, sizeof container);
  if (container.magic != kContainerMagic)
    throw std::runtime_error("not a container of device code");
  const char* at = wrapper.data + container.header_bytes;
  const char* const end = at + container.bytes;
  std::string best;
  uint32_t architecture = 0;
  while (at < end) {
    Entry entry;
    std::memcpy(&entry, at, sizeof entry);
    const char* const text = at + entry.header_bytes;
    if (entry.kind == kPtx && entry.architecture > architecture &&
        entry.architecture <= static_cast<uint32_t>(device().architecture)) {
      if (strnlen(text, entry.bytes) < 16)
        throw std::runtime_error("PTX that is compressed; compile with -no-compress");
      architecture = entry.architecture;
      best.assign(text, strnlen(text, entry.bytes));
    }
    at = text + entry.bytes;
  }
  if (best.empty()) throw std::runtime_error("no PTX for this device");
  return best;
}

int64_t loaded(const std::string& text) {
  const int64_t module = ptx_load(text.c_str());
  if (module < 0) throw std::runtime_error(ptx_error());
  return module;
}

bool has_kernel(const std::string& text, const std::string& name) {
  return text.find(".entry " + name + "(") != std::string::npos;
}

// The kernels that are taken in place of others.
struct Edited {
  std::string text;
  int64_t module = -1;
};
const Edited& edited() {
  static const Edited read = [] {
    Edited made;
    if (const char* path = std::getenv("HARMONIZER_PTX_EDITED")) {
      std::ifstream file(path);
      std::stringstream content;
      content << file.rdbuf();
      made.text = content.str();
      made.module = loaded(made.text);
    }
    return made;
  }();
  return read;
}

void dump(const std::string& text, int64_t module, const std::string& kernel) {
  const char* folder = std::getenv("HARMONIZER_PTX_DUMP");
  if (folder == nullptr) return;
  const std::string path = folder + ("/" + std::to_string(module));
  std::ofstream(path + ".ptx") << text;
  static std::set<std::string> seen;
  if (seen.insert(kernel).second)
    std::ofstream(path + ".launched", std::ios::app) << kernel << "\n";
}

int64_t module_of(const Kernel& kernel) {
  static std::map<const Wrapper*, std::pair<int64_t, std::string>> modules;
  if (has_kernel(edited().text, kernel.name)) return edited().module;
  auto found = modules.find(kernel.wrapper);
  if (found == modules.end()) {
    std::string text = ptx_of(*kernel.wrapper);
    const int64_t module = loaded(text);
    found = modules.emplace(kernel.wrapper, std::make_pair(module, std::move(text))).first;
  }
  dump(found->second.second, found->second.first, kernel.name);
  return found->second.first;
}

// --- launches -----------------------------------------------------------------------------------

PtxOptions options() {
  PtxOptions chosen{};
  chosen.order = setting("HARMONIZER_PTX_ORDER", 0);
  chosen.races = setting("HARMONIZER_PTX_RACES", 1);
  chosen.seed = static_cast<uint64_t>(setting("HARMONIZER_PTX_SEED", 1));
  chosen.clusters = static_cast<uint64_t>(setting("HARMONIZER_PTX_CLUSTERS", 0));
  chosen.count = std::getenv("HARMONIZER_PTX_COUNT") != nullptr;
  static const bool once = [&] {
    if (chosen.count)
      std::atexit([] { std::ofstream(std::getenv("HARMONIZER_PTX_COUNT")) << ptx_counts(); });
    return true;
  }();
  (void)once;
  return chosen;
}

// What CUDA checks of a launch.
cudaError_t check(const Kernel& kernel, const PtxLaunch& launch) {
  const uint64_t threads = uint64_t{launch.block[0]} * launch.block[1] * launch.block[2];
  if (threads < 1 || threads > 1024)
    return refuse(cudaErrorInvalidConfiguration, std::to_string(threads) + " threads in a block");
  if (launch.grid[0] < 1 || launch.grid[0] > 0x7fffffffu || launch.grid[1] < 1 ||
      launch.grid[1] > 65535 || launch.grid[2] < 1 || launch.grid[2] > 65535)
    return refuse(cudaErrorInvalidConfiguration, "the grid");
  if (launch.cluster > 1 && device().architecture < 90)
    return refuse(cudaErrorNotSupported, "clusters need architecture 90");
  if (launch.cluster < 1 || launch.cluster > (kernel.large_clusters ? 16u : 8u) ||
      launch.grid[0] % launch.cluster != 0)
    return refuse(cudaErrorInvalidConfiguration,
                  "clusters of " + std::to_string(launch.cluster) + " blocks");
  if (launch.dynamic_shared_bytes > static_cast<uint64_t>(kernel.shared_bytes))
    return refuse(cudaErrorInvalidValue, std::to_string(launch.dynamic_shared_bytes) +
                                             " bytes of shared memory, of " +
                                             std::to_string(kernel.shared_bytes));
  return cudaSuccess;
}

cudaError_t run(const void* function, dim3 grid, dim3 block, size_t shared, unsigned cluster,
                void** arguments) {
  const auto found = kernels().find(function);
  if (found == kernels().end()) return refuse(cudaErrorInvalidDeviceFunction, "no such kernel");
  const PtxLaunch launch{{grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, cluster, shared};
  if (const cudaError_t error = check(found->second, launch)) return error;
  try {
    const int64_t module = module_of(found->second);
    const PtxOptions chosen = options();
    if (ptx_launch(module, found->second.name.c_str(), &launch, &chosen, arguments) < 0)
      return refuse(cudaErrorLaunchFailure, ptx_error());
  } catch (const std::exception& error) {
    return refuse(cudaErrorLaunchFailure, error.what());
  }
  return cudaSuccess;
}

unsigned cluster_of(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i)
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension)
      return config.attrs[i].val.clusterDim.x;
  return 1;
}

}  // namespace

// --- what nvcc's code and the project's call ----------------------------------------------------

extern "C" {

void** __cudaRegisterFatBinary(void* wrapper) { return static_cast<void**>(wrapper); }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void** wrapper, const char* function, char*, const char* name, int,
                            uint3*, uint3*, dim3*, dim3*, int*) {
  Kernel& kernel = kernels()[function];
  kernel.wrapper = reinterpret_cast<const Wrapper*>(wrapper);
  kernel.name = name;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, struct CUstream_st*) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) {
  return refuse(cudaErrorNotSupported, "launches by <<<>>>");
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                               size_t shared, cudaStream_t) {
  return run(kernel, grid, block, shared, 1, arguments);
}

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments,
                             size_t shared, cudaStream_t) {
  return run(function, grid, block, shared, 1, arguments);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function,
                                void** arguments) {
  return run(function, config->gridDim, config->blockDim, config->dynamicSmemBytes,
             cluster_of(*config), arguments);
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  Kernel& kernel = kernels()[function];
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value < 0 || value > device().shared_bytes)
      return refuse(cudaErrorInvalidValue, std::to_string(value) + " bytes of shared memory");
    kernel.shared_bytes = value;
  } else {
    kernel.large_clusters = value != 0;
  }
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* function,
                                           const cudaLaunchConfig_t* config) {
  const unsigned cluster = cluster_of(*config);
  *clusters = kernels()[function].large_clusters || cluster <= 8
                  ? device().multiprocessors / static_cast<int>(cluster)
                  : 0;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDevice(int* number) {
  *number = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int number) {
  return number == 0 ? cudaSuccess : refuse(cudaErrorInvalidDevice, "the only device is 0");
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = device().shared_bytes; break;
    case cudaDevAttrMultiProcessorCount: *value = device().multiprocessors; break;
    case cudaDevAttrL2CacheSize: *value = device().l2_bytes; break;
    case cudaDevAttrComputeCapabilityMajor: *value = device().architecture / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = device().architecture % 10; break;
    default: return refuse(cudaErrorInvalidValue, "an attribute that this device does not tell");
  }
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t error) {
  static std::string text;
  text = "error " + std::to_string(static_cast<int>(error)) + " (" + detail + ")";
  return text.c_str();
}
}
