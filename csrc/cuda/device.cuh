// What the CUDA kernels share: typed loads and stores, sums of a warp, moments of a map.
//
// Everything a kernel shares between its threads lies in one named struct in dynamic shared memory,
// reached through shared_layout(). Nothing here or above depends on the order in which threads run.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cfloat>
#include <cstdint>
#include <type_traits>

#include "../harmonizer.h"

namespace harmonizer::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kStandardizeEpsilon = 1e-5f;  // (3)
constexpr float kMaximumEpsilon = 1e-6f;      // (7)

// Taps of the pyramid step (4).
constexpr float kTap0 = 1.f / 16, kTap1 = 4.f / 16, kTap2 = 6.f / 16;

#ifndef HARMONIZER_CUDA_ON_HOST  // tests/native/cuda_on_host gives every block its own
__device__ inline void* shared_memory() {
  extern __shared__ float4 bytes[];
  return bytes;
}
// A hint to bring the line of an address into the second-level cache.
__device__ inline void prefetch_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}
#endif

template <class Layout>
__device__ inline Layout& shared_layout() {
  static_assert(alignof(Layout) <= alignof(float4), "dynamic shared memory is 16-byte aligned");
  return *static_cast<Layout*>(shared_memory());
}

// --- values --------------------------------------------------------------------------------------

__device__ inline float widen(float v) { return v; }
__device__ inline float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline float widen(__half v) { return __half2float(v); }

template <class T>
__device__ inline T narrow(float v);
template <>
__device__ inline float narrow<float>(float v) {
  return v;
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ inline __half narrow<__half>(float v) {
  return __float2half_rn(v);
}

template <class T>
__device__ inline float4 widen4(uint2 bits) {
  union {
    uint2 bits;
    T value[4];
  } four;
  four.bits = bits;
  return make_float4(widen(four.value[0]), widen(four.value[1]), widen(four.value[2]),
                     widen(four.value[3]));
}

// Four neighbours at once; the address must be aligned to all four. Read and written once, so that
// they need not stay in a cache.
__device__ inline float4 load4(const float* p) {
  return __ldcs(reinterpret_cast<const float4*>(p));
}
template <class T>
__device__ inline float4 load4(const T* p) {
  return widen4<T>(__ldcs(reinterpret_cast<const uint2*>(p)));
}
__device__ inline void store4(float* p, float4 v) { __stcs(reinterpret_cast<float4*>(p), v); }
template <class T>
__device__ inline void store4(T* p, float4 v) {
  union {
    uint2 bits;
    T value[4];
  } four;
  four.value[0] = narrow<T>(v.x);
  four.value[1] = narrow<T>(v.y);
  four.value[2] = narrow<T>(v.z);
  four.value[3] = narrow<T>(v.w);
  __stcs(reinterpret_cast<uint2*>(p), four.bits);
}

// The same of what will be read again soon.
__device__ inline float4 load4_kept(const float* p) { return *reinterpret_cast<const float4*>(p); }
template <class T>
__device__ inline float4 load4_kept(const T* p) {
  return widen4<T>(*reinterpret_cast<const uint2*>(p));
}

// Calls f with a typed null pointer of a storage type; the branch is the same for a whole grid.
#ifdef __CUDACC__
#pragma nv_exec_check_disable  // host code gives it host functions
#endif
template <class F>
__host__ __device__ inline void with_storage(Dtype dtype, F&& f) {
  if (dtype == Dtype::float32)
    f(static_cast<float*>(nullptr));
  else if (dtype == Dtype::bfloat16)
    f(static_cast<__nv_bfloat16*>(nullptr));
  else
    f(static_cast<__half*>(nullptr));
}

// --- maps ----------------------------------------------------------------------------------------

// Maps that lie behind one another.
__host__ __device__ inline Maps dense(const void* data, Dtype dtype, int64_t channels,
                                      int64_t height, int64_t width) {
  Maps maps;
  maps.data = data;
  maps.dtype = dtype;
  maps.stride_batch = channels * height * width;
  maps.stride_channel = height * width;
  maps.stride_row = width;
  maps.stride_column = 1;
  return maps;
}

// Whether load4 and store4 may take four neighbours from an address on.
__host__ __device__ inline bool in_fours(const void* data, Dtype dtype) {
  const uintptr_t bytes = dtype == Dtype::float32 ? sizeof(float4) : sizeof(uint2);
  return reinterpret_cast<uintptr_t>(data) % bytes == 0;
}
// Whether they may take every row in fours.
__host__ __device__ inline bool in_fours(const Maps& maps, int64_t width) {
  return maps.stride_column == 1 && width % 4 == 0 && maps.stride_row % 4 == 0 &&
         maps.stride_channel % 4 == 0 && maps.stride_batch % 4 == 0 &&
         in_fours(maps.data, maps.dtype);
}

// Where map number `index` of a batch begins, in elements.
__device__ inline int64_t map_offset(const Maps& maps, int64_t index, unsigned channels) {
  return index / channels * maps.stride_batch + index % channels * maps.stride_channel;
}

// --- blocks: as many as there are, beyond the limit of one dimension of a grid -------------------

inline dim3 grid_of(int64_t blocks) {
  constexpr int64_t kMost = int64_t{1} << 30;  // whole clusters of any size
  if (blocks <= kMost) return dim3(static_cast<unsigned>(blocks));
  return dim3(static_cast<unsigned>(kMost), static_cast<unsigned>((blocks - 1) / kMost + 1));
}
// May lie beyond the last one.
__device__ inline int64_t block_index() {
  return static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
}

// --- sums of a warp, the same in every lane; always in the same order ----------------------------

__device__ inline float warp_sum(float v) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(kAllLanes, v, offset);
  return v;
}
__device__ inline float warp_max(float v) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, offset));
  return v;
}

// The sum over a block, in every thread. All its threads must come here, and again pass a barrier
// before `warps` is written anew.
__device__ inline float block_sum(float v, float (&warps)[kWarp]) {
  const unsigned lane = threadIdx.x % kWarp;
  v = warp_sum(v);
  if (lane == 0) warps[threadIdx.x / kWarp] = v;
  __syncthreads();
  return warp_sum(lane < blockDim.x / kWarp ? warps[lane] : 0.f);
}

// --- a map in order, without neighbours ----------------------------------------------------------

// A thread of a block holds so many pixels of a piece of a map at once: four neighbours out of
// every 4 * blockDim.x pixels, whatever the strides, which must not change the order of a sum.
constexpr int kHeld = 16;

// The pixel of slot k of the piece that begins at `first`.
__device__ inline unsigned held_pixel(unsigned first, int k) {
  return first + (k / 4 * blockDim.x + threadIdx.x) * 4 + k % 4;
}

// Pixels beyond the end are 0. Kept: the map is read again soon. The piece has at least one pixel,
// and slots beyond its end read the last: a branch for each would wait for one load at a time.
template <bool Fours, bool Kept>
__device__ inline void load_held(float (&v)[kHeld], const Maps& maps, int64_t offset,
                                 unsigned width, unsigned first, unsigned end) {
  const bool flat = maps.stride_row == width * maps.stride_column;
  with_storage(maps.dtype, [&](auto* type) {
    const auto* data = static_cast<decltype(type)>(const_cast<void*>(maps.data)) + offset;
    const auto load_slots = [&](auto&& place) {
#pragma unroll
      for (int k = 0; k < kHeld; k += Fours ? 4 : 1) {
        const auto* p = data + place(min(held_pixel(first, k), end - (Fours ? 4 : 1)));
        if constexpr (Fours) {
          const float4 four = Kept ? load4_kept(p) : load4(p);
          v[k] = four.x;
          v[k + 1] = four.y;
          v[k + 2] = four.z;
          v[k + 3] = four.w;
        } else {
          v[k] = widen(*p);
        }
      }
    };
    if (flat)
      load_slots([&](unsigned i) { return i * maps.stride_column; });
    else
      load_slots(
          [&](unsigned i) { return i / width * maps.stride_row + i % width * maps.stride_column; });
  });
#pragma unroll
  for (int k = 0; k < kHeld; ++k)
    if (held_pixel(first, Fours ? k - k % 4 : k) >= end) v[k] = 0;
}

// To a dense map that begins at an offset in elements.
template <bool Fours>
__device__ inline void store_held(void* output, Dtype dtype, int64_t offset, unsigned first,
                                  unsigned end, const float (&v)[kHeld]) {
  with_storage(dtype, [&](auto* type) {
    auto* data = static_cast<decltype(type)>(output) + offset;
#pragma unroll
    for (int k = 0; k < kHeld; k += Fours ? 4 : 1) {
      const unsigned i = held_pixel(first, k);
      if (i >= end) continue;
      if constexpr (Fours)
        store4(data + i, make_float4(v[k], v[k + 1], v[k + 2], v[k + 3]));
      else
        data[i] = narrow<std::remove_pointer_t<decltype(type)>>(v[k]);
    }
  });
}

// --- moments -------------------------------------------------------------------------------------

// Of some pixels: how many, their mean, the sum of squares about it, and the largest. Merged, never
// summed: a large mean cancels against nothing, and a constant map has m2 of exactly 0; (1), (2).
struct Moments {
  float count = 0;
  float mean = 0;
  float m2 = 0;
  float maximum = -FLT_MAX;
};

// The sum of squares about the mean as a difference of two sums, which rounding may leave a hair
// below zero. What is not finite stays so: cut to zero, an overflow would read as a constant map.
__device__ inline float squares_about_mean(float squares, float correction) {
  const float m2 = squares - correction;
  return m2 < 0.f && m2 >= -FLT_MAX ? 0.f : m2;
}

// Those of all lanes. Lanes without pixels must come after those with some.
__device__ inline Moments warp_merge(Moments m) {
  Moments all;
  all.count = warp_sum(m.count);
  const float inverse = all.count > 0 ? 1.f / all.count : 0.f;
  const float shift = __shfl_sync(kAllLanes, m.mean, 0);
  all.mean = shift + warp_sum(m.count * (m.mean - shift)) * inverse;
  const float apart = m.mean - all.mean;
  all.m2 = warp_sum(m.m2 + m.count * apart * apart);
  all.maximum = warp_max(m.maximum);
  return all;
}

// Those of any number of entries, the same in every lane; the first must have pixels.
__device__ inline Moments warp_merge(const Moments* entries, int count) {
  Moments m;
  const float shift = entries[0].mean;
  float sum = 0;
  for (int i = static_cast<int>(threadIdx.x) % kWarp; i < count; i += kWarp) {
    m.count += entries[i].count;
    sum += entries[i].count * (entries[i].mean - shift);
    m.maximum = fmaxf(m.maximum, entries[i].maximum);
  }
  const float pixels = warp_sum(m.count);
  m.mean = shift + warp_sum(sum) / pixels;
  for (int i = static_cast<int>(threadIdx.x) % kWarp; i < count; i += kWarp) {
    const float apart = entries[i].mean - m.mean;
    m.m2 += entries[i].m2 + entries[i].count * apart * apart;
  }
  return {pixels, m.mean, warp_sum(m.m2), warp_max(m.maximum)};
}

// Mean, standard deviation and scale of a map; (1) to (3).
struct Statistics {
  float mean;
  float scale;  // r
  float std;
  float maximum;
};

// NaN throughout where the map, or its variance, is not finite: an overflown variance would turn
// the map into zeros and the loss into a plausible lie.
__device__ inline Statistics statistics(const Moments& m) {
  Statistics s{m.mean, 0, sqrtf(m.m2 / m.count), m.maximum};
  if (!(fabsf(s.mean) <= FLT_MAX && s.std <= FLT_MAX)) s.mean = s.std = nanf("");
  s.scale = 1.f / (s.std + kStandardizeEpsilon);
  return s;
}

}  // namespace harmonizer::cuda
