// Stands in for the CUDA header of this name: float16, as the compiler has it.
#pragma once

#include <bit>
#include <cstdint>

#include "cuda_runtime.h"

struct alignas(2) __half {
  uint16_t bits;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline float __half2float(__half v) { return static_cast<float>(std::bit_cast<_Float16>(v.bits)); }
inline __half __float2half_rn(float v) {
  if (v != v) return {0x7fff};
  return {std::bit_cast<uint16_t>(static_cast<_Float16>(v))};
}
inline __half __float2half(float v) { return __float2half_rn(v); }

inline float2 __half22float2(__half2 v) {
  return make_float2(__half2float(v.x), __half2float(v.y));
}
inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
