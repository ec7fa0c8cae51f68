// An mbarrier of sm_90 as a signal between the blocks of a cluster: who needs what a few of them
// have written waits for those alone, where a barrier of the cluster would wait for all.
//
// It serves once: initialized for a number of arrivals, arrived at, waited for.
#pragma once

#include <cstdint>

#include "device.cuh"

// CUDA 11.8 has clusters, but no mbarrier that another block can arrive at.
#if !defined(__CUDACC_VER_MAJOR__) || __CUDACC_VER_MAJOR__ >= 12
#define HARMONIZER_CUDA_SIGNALS 1
#else
#define HARMONIZER_CUDA_SIGNALS 0
#endif

namespace harmonizer::cuda {

#ifndef HARMONIZER_CUDA_ON_HOST  // tests/native/cuda_on_host has them for its machine
__device__ inline uint32_t shared_address(const uint64_t* mbarrier) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(mbarrier));
}

// By one thread; before anybody arrives, a barrier of the cluster must make it known.
__device__ inline void mbarrier_init(uint64_t* own, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(own)), "r"(arrivals)
               : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// At the same place of another block of the cluster. Who waits there sees what this thread has
// written, and what it knew to be written.
__device__ inline void mbarrier_arrive(const uint64_t* own, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 theirs;\n"
      "mapa.shared::cluster.u32 theirs, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [theirs];\n"
      "}" ::"r"(shared_address(own)),
      "r"(rank)
      : "memory");
}

// By every thread that wants to see it.
__device__ inline void mbarrier_wait(const uint64_t* own) {
  uint32_t complete = 0;
  while (!complete)
    asm volatile(
        "{\n"
        ".reg .pred complete;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 complete, [%1], 0;\n"
        "selp.u32 %0, 1, 0, complete;\n"
        "}"
        : "=r"(complete)
        : "r"(shared_address(own))
        : "memory");
}
#endif

}  // namespace harmonizer::cuda
