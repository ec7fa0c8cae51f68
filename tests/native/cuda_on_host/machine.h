// The machine that stands in for a GPU: CUDA threads with warps, blocks and clusters, in which they
// share memory and wait for each other. machine.cpp has what it promises.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>

struct cudaLaunchConfig_st;
enum cudaError_t : int;

namespace cuda_on_host {

using Where = std::source_location;

// Ends the process with a message that names the thread: on a GPU this would be undefined
// behaviour.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Runs body(arguments) in every thread of the grid.
cudaError_t run_grid(const void* kernel, const cudaLaunchConfig_st& config, void (*body)(void*),
                     void* arguments);

// For the calling CUDA thread:
void* shared_memory();                  // of its block, exactly as many bytes as were asked for
void* shared_memory_of(unsigned rank);  // of a block of its cluster
unsigned cluster_blocks();
unsigned cluster_rank();

// Barriers.
void sync_block(const Where& where);
void sync_warp(unsigned mask, const Where& where);
void sync_cluster(const Where& where);
void arrive_cluster(const Where& where);
void wait_cluster(const Where& where);

// An mbarrier that serves once; it holds how many arrivals it was initialized for.
void init_mbarrier(const uint64_t* mbarrier, unsigned arrivals);
void arrive_mbarrier(const uint64_t* mbarrier, uint64_t held, const Where& where);
void wait_mbarrier(const uint64_t* mbarrier, uint64_t held, const Where& where);

// What lane `source` of the mask gave.
uint64_t exchange(unsigned mask, uint64_t value, unsigned source, const Where& where);
// A bit for every lane of the mask in which the predicate holds.
unsigned ballot(unsigned mask, bool predicate, const Where& where);

// Ends the process where an address is not a multiple of the bytes accessed at once.
inline void check_alignment(const volatile void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0)
    fail("address %p is not aligned to the %zu bytes accessed at once",
         const_cast<const void*>(address), bytes);
}

}  // namespace cuda_on_host
