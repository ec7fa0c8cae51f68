// Stands in for the CUDA header of this name, so that kernels run unchanged on the CPU:
// found first on the include path of tests/native. Here is what the kernels write; machine.cpp runs
// it. Nothing exists that the project's kernels do not use: `__shared__` variables, say, would be
// shared by all blocks.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#include <math.h>

#include "machine.h"

#define HARMONIZER_CUDA_ON_HOST 1

// --- qualifiers ---------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __align__(bytes) alignas(bytes)

// --- vectors ------------------------------------------------------------------------------------

#define CUDA_ON_HOST_VECTORS(Type, name, bytes2, bytes4)                      \
  struct alignas(bytes2) name##2 { Type x, y; };                              \
  struct name##3 { Type x, y, z; };                                           \
  struct alignas(bytes4) name##4 { Type x, y, z, w; };                        \
  inline name##2 make_##name##2(Type x, Type y) { return {x, y}; }            \
  inline name##3 make_##name##3(Type x, Type y, Type z) { return {x, y, z}; } \
  inline name##4 make_##name##4(Type x, Type y, Type z, Type w) { return {x, y, z, w}; }
CUDA_ON_HOST_VECTORS(float, float, 8, 16)
CUDA_ON_HOST_VECTORS(int, int, 8, 16)
CUDA_ON_HOST_VECTORS(unsigned, uint, 8, 16)
CUDA_ON_HOST_VECTORS(double, double, 16, 16)
#undef CUDA_ON_HOST_VECTORS

struct dim3 {
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  unsigned x, y, z;
};

// --- where a thread is --------------------------------------------------------------------------

inline constinit uint3 threadIdx{}, blockIdx{};  // of the thread that runs
inline constinit dim3 blockDim{}, gridDim{};
constexpr int warpSize = 32;

inline void* shared_memory() { return cuda_on_host::shared_memory(); }
inline void prefetch_l2(const void*) {}

// --- barriers and shuffles: where they are called is part of their name -------------------------

inline void __syncthreads(cuda_on_host::Where where = cuda_on_host::Where::current()) {
  cuda_on_host::sync_block(where);
}
inline void __syncwarp(unsigned mask = 0xffffffffu,
                       cuda_on_host::Where where = cuda_on_host::Where::current()) {
  cuda_on_host::sync_warp(mask, where);
}

namespace cuda_on_host {
// The same place in the shared memory of a block of the cluster.
template <class T>
T* in_block(T* address, int rank) {
  const auto own = reinterpret_cast<uintptr_t>(cuda_on_host::shared_memory());
  const auto other = reinterpret_cast<uintptr_t>(cuda_on_host::shared_memory_of(rank));
  return reinterpret_cast<T*>(other + (reinterpret_cast<uintptr_t>(address) - own));
}
}  // namespace cuda_on_host

// An mbarrier's own bytes hold what it was initialized for, so that another address is noticed.
inline void mbarrier_init(uint64_t* own, unsigned arrivals) {
  cuda_on_host::check_alignment(own, sizeof *own);
  *own = arrivals;
  cuda_on_host::init_mbarrier(own, arrivals);
}
inline void mbarrier_arrive(const uint64_t* own, int rank,
                            cuda_on_host::Where where = cuda_on_host::Where::current()) {
  const uint64_t* theirs = cuda_on_host::in_block(own, rank);
  cuda_on_host::arrive_mbarrier(theirs, *theirs, where);
}
inline void mbarrier_wait(const uint64_t* own,
                          cuda_on_host::Where where = cuda_on_host::Where::current()) {
  cuda_on_host::wait_mbarrier(own, *own, where);
}

namespace cuda_on_host {

inline unsigned lane() {
  return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % warpSize;
}
template <class T>
T exchange_value(unsigned mask, T value, unsigned source, const Where& where) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(mask, bits, source, where);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
// The first lane of the group of `width` lanes that this one is in.
inline unsigned group(int width) {
  if (width < 1 || width > warpSize || !std::has_single_bit(static_cast<unsigned>(width)))
    fail("shuffle: width %d is no power of two up to 32", width);
  return lane() & ~(static_cast<unsigned>(width) - 1);
}

}  // namespace cuda_on_host

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,
              cuda_on_host::Where where = cuda_on_host::Where::current()) {
  const unsigned first = cuda_on_host::group(width);
  return cuda_on_host::exchange_value(mask, value, first + static_cast<unsigned>(source) % width,
                                      where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = warpSize,
                  cuda_on_host::Where where = cuda_on_host::Where::current()) {
  const unsigned own = cuda_on_host::lane(), source = own ^ static_cast<unsigned>(bits);
  // Earlier groups may be read, later ones not: as documented.
  const bool within = source < cuda_on_host::group(width) + width;
  return cuda_on_host::exchange_value(mask, value, within ? source : own, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   cuda_on_host::Where where = cuda_on_host::Where::current()) {
  const unsigned own = cuda_on_host::lane(), source = own + delta;
  const bool within = source < cuda_on_host::group(width) + width;
  return cuda_on_host::exchange_value(mask, value, within ? source : own, where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                 cuda_on_host::Where where = cuda_on_host::Where::current()) {
  const unsigned own = cuda_on_host::lane();
  const bool within = own >= cuda_on_host::group(width) + delta;
  return cuda_on_host::exchange_value(mask, value, within ? own - delta : own, where);
}
inline unsigned __ballot_sync(unsigned mask, int predicate,
                              cuda_on_host::Where where = cuda_on_host::Where::current()) {
  return cuda_on_host::ballot(mask, predicate != 0, where);
}
inline int __any_sync(unsigned mask, int predicate,
                      cuda_on_host::Where where = cuda_on_host::Where::current()) {
  return cuda_on_host::ballot(mask, predicate != 0, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate,
                      cuda_on_host::Where where = cuda_on_host::Where::current()) {
  return cuda_on_host::ballot(mask, predicate != 0, where) == mask;
}

// --- memory: hints mean nothing here, alignment does --------------------------------------------

#define CUDA_ON_HOST_LOAD(name)                        \
  template <class T>                                   \
  T name(const T* address) {                           \
    cuda_on_host::check_alignment(address, sizeof(T)); \
    return *address;                                   \
  }
CUDA_ON_HOST_LOAD(__ldg)
CUDA_ON_HOST_LOAD(__ldcg)
CUDA_ON_HOST_LOAD(__ldca)
CUDA_ON_HOST_LOAD(__ldcs)
CUDA_ON_HOST_LOAD(__ldlu)
#undef CUDA_ON_HOST_LOAD
#define CUDA_ON_HOST_STORE(name)                         \
  template <class T>                                     \
  void name(T* address, std::type_identity_t<T> value) { \
    cuda_on_host::check_alignment(address, sizeof(T));   \
    *address = value;                                    \
  }
CUDA_ON_HOST_STORE(__stcg)
CUDA_ON_HOST_STORE(__stcs)
CUDA_ON_HOST_STORE(__stwb)
CUDA_ON_HOST_STORE(__stwt)
#undef CUDA_ON_HOST_STORE

// --- arithmetic ---------------------------------------------------------------------------------

namespace cuda_on_host {
// What nvcc may not fuse with its neighbours, the compiler of the host may not either.
inline float rounded(float value) {
  int bits = std::bit_cast<int>(value);
  asm("" : "+r"(bits));
  return std::bit_cast<float>(bits);
}
}  // namespace cuda_on_host

inline float __fadd_rn(float a, float b) { return cuda_on_host::rounded(a + b); }
inline float __fsub_rn(float a, float b) { return cuda_on_host::rounded(a - b); }
inline float __fmul_rn(float a, float b) { return cuda_on_host::rounded(a * b); }
inline float __fdiv_rn(float a, float b) { return cuda_on_host::rounded(a / b); }
inline float __fsqrt_rn(float a) { return cuda_on_host::rounded(sqrtf(a)); }
inline float __frcp_rn(float a) { return cuda_on_host::rounded(1.f / a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float rsqrtf(float a) { return 1.f / sqrtf(a); }

inline float __int_as_float(int v) { return std::bit_cast<float>(v); }
inline float __uint_as_float(unsigned v) { return std::bit_cast<float>(v); }
inline int __float_as_int(float v) { return std::bit_cast<int>(v); }
inline unsigned __float_as_uint(float v) { return std::bit_cast<unsigned>(v); }
inline int __popc(unsigned v) { return std::popcount(v); }
inline int __clz(int v) { return std::countl_zero(static_cast<unsigned>(v)); }
inline int __ffs(int v) { return v == 0 ? 0 : std::countr_zero(static_cast<unsigned>(v)) + 1; }

template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}

#include "runtime_api.h"  // the host's side: launches and questions
