// A stand-in of the CUDA runtime library: host code compiled by nvcc, linked with this and with
// ptx_on_host, runs its kernels on the CPU as nvcc compiled them.
//
// nvcc puts PTX into the object; with -no-compress it lies there as text. The device is described
// by the settings of host_device.cpp (HARMONIZER_HOST_ARCH and others); further ones are
//   HARMONIZER_PTX_ORDER, _SEED, _RACES, _CLUSTERS   options of api.h
//   HARMONIZER_PTX_COUNT=file     writes the counts there when the process ends
//   HARMONIZER_PTX_DUMP=folder    writes there the PTX of every module that has a launched kernel
//   HARMONIZER_PTX_EDITED=file    has kernels that are taken in place of those of the same names
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

#include "host_device.h"
#include "ptx_on_host/api.h"

namespace {

using host_device::refuse, host_device::setting;

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
        entry.architecture <= static_cast<uint32_t>(host_device::architecture())) {
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

cudaError_t run(const void* function, const cudaLaunchConfig_t& config, void** arguments) {
  const auto found = kernels().find(function);
  if (found == kernels().end()) return refuse(cudaErrorInvalidDeviceFunction, "no such kernel");
  PtxLaunch launch{{config.gridDim.x, config.gridDim.y, config.gridDim.z},
                   {config.blockDim.x, config.blockDim.y, config.blockDim.z},
                   1,
                   config.dynamicSmemBytes};
  if (const cudaError_t error = host_device::check_launch(function, config, &launch.cluster))
    return error;
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

cudaError_t run(const void* function, dim3 grid, dim3 block, size_t shared, void** arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  return run(function, config, arguments);
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
  return run(kernel, grid, block, shared, arguments);
}

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments,
                             size_t shared, cudaStream_t) {
  return run(function, grid, block, shared, arguments);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function,
                                void** arguments) {
  return run(function, *config, arguments);
}

cudaError_t cudaGetLastError() { return cudaSuccess; }
}
