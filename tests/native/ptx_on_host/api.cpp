// The C functions; api.h says what they do.
#include "api.h"

#include "machine.h"
#include "memory.h"
#include "program.h"

using namespace ptx_on_host;

namespace {

struct State_ {
  std::vector<std::unique_ptr<Module>> modules;
  Counts counts;
  std::string error, text;
};

State_& state() {
  static State_ all;
  return all;
}

const Kernel& find(int64_t module, const char* kernel) {
  const auto& kernels = state().modules.at(static_cast<size_t>(module))->kernels;
  const auto found = kernels.find(kernel);
  if (found == kernels.end()) throw Error(std::string("no kernel ") + kernel);
  return *found->second;
}

// Runs a function that may throw; -1 in place of what it gives where it does.
template <class Function>
int64_t guarded(Function function) {
  try {
    return function();
  } catch (const std::exception& error) {
    state().error = error.what();
    return -1;
  }
}

}  // namespace

extern "C" {

int64_t ptx_load(const char* text) {
  return guarded([&] {
    state().modules.push_back(parse(text));
    return static_cast<int64_t>(state().modules.size()) - 1;
  });
}

int64_t ptx_parameters(int64_t module, const char* kernel) {
  return guarded([&] { return static_cast<int64_t>(find(module, kernel).parameters.size()); });
}

int32_t ptx_launch(int64_t module, const char* kernel, const PtxLaunch* launch,
                   const PtxOptions* options, const void* const* arguments) {
  return static_cast<int32_t>(guarded([&] {
    Options chosen;
    chosen.order = static_cast<Order>(options->order);
    chosen.races = options->races != 0;
    chosen.seed = options->seed;
    chosen.clusters = options->clusters;
    if (options->count != 0) chosen.counts = &state().counts;
    Launch shape;
    std::copy(launch->grid, launch->grid + 3, shape.grid);
    std::copy(launch->block, launch->block + 3, shape.block);
    shape.cluster = launch->cluster;
    shape.dynamic_shared_bytes = launch->dynamic_shared_bytes;
    const Kernel& found = find(module, kernel);
    run(*state().modules[static_cast<size_t>(module)], found, shape, chosen, arguments);
    return int64_t{0};
  }));
}

const char* ptx_error() { return state().error.c_str(); }

void ptx_register_memory(const void* address, uint64_t bytes) { register_memory(address, bytes); }

void ptx_forget_memory(const void* address) { forget_memory(address); }

const char* ptx_counts() {
  state().text = state().counts.json();
  state().counts = Counts();
  return state().text.c_str();
}
}
