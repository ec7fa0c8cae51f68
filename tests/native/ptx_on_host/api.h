// The interpreter as C functions, for Python's ctypes and for the stand-in of the CUDA runtime.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

struct PtxLaunch {
  uint32_t grid[3], block[3];
  uint32_t cluster;
  uint64_t dynamic_shared_bytes;
};

struct PtxOptions {
  int32_t order;  // 0 ascending, 1 descending, 2 shuffled, 3 interleaved
  int32_t races;  // whether accesses that no barrier orders are errors
  int32_t count;  // whether to count
  uint64_t seed;
  uint64_t clusters;  // how many of the grid; 0 is all
};

// Reads a module. Returns its number, or -1.
int64_t ptx_load(const char* text);
// How many parameters a kernel has, or -1.
int64_t ptx_parameters(int64_t module, const char* kernel);
// Returns 0, or -1 where the kernel could not be run or did what no kernel may.
int32_t ptx_launch(int64_t module, const char* kernel, const PtxLaunch* launch,
                   const PtxOptions* options, const void* const* arguments);
// What went wrong last.
const char* ptx_error();
// Memory that kernels may access, from now on, or no more.
void ptx_register_memory(const void* address, uint64_t bytes);
void ptx_forget_memory(const void* address);
// The counts so far, as JSON; forgotten when read.
const char* ptx_counts();
}
