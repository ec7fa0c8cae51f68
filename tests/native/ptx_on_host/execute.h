// Reading and writing registers as values of a type, and choosing code by that type.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "machine.h"
#include "program.h"

namespace ptx_on_host {

// What an instruction does that only advises, or that one access after another makes needless.
inline Outcome nothing(Thread&, const Instruction&) { return Outcome::next; }

// float16 and bfloat16 as their bits: computed with in float, rounded to the nearest.
template <int kMantissa, int kExponent>
struct Half {
  uint16_t bits;
};
using Float16 = Half<10, 5>;
using BFloat16 = Half<7, 8>;

template <class X>
inline constexpr bool is_half = false;
template <int kMantissa, int kExponent>
inline constexpr bool is_half<Half<kMantissa, kExponent>> = true;

template <int kMantissa, int kExponent>
double widened(Half<kMantissa, kExponent> half) {
  constexpr int kBias = (1 << (kExponent - 1)) - 1;
  const int exponent = half.bits >> kMantissa & ((1 << kExponent) - 1);
  const int mantissa = half.bits & ((1 << kMantissa) - 1);
  double value;
  if (exponent == (1 << kExponent) - 1)
    value = mantissa != 0 ? NAN : INFINITY;
  else if (exponent == 0)
    value = std::ldexp(mantissa, 1 - kBias - kMantissa);
  else
    value = std::ldexp(mantissa + (1 << kMantissa), exponent - kBias - kMantissa);
  return half.bits >> 15 ? -value : value;
}
inline double widened(float value) { return value; }
inline double widened(double value) { return value; }

// The nearest one, of two the even; towards zero if `truncate`.
template <class H>
H narrowed(double value, bool truncate = false);

template <int kMantissa, int kExponent>
Half<kMantissa, kExponent> narrow_half(double value, bool truncate) {
  constexpr int kBias = (1 << (kExponent - 1)) - 1;
  constexpr int kInfinity = ((1 << kExponent) - 1) << kMantissa;
  const int sign = std::signbit(value) ? 0x8000 : 0;
  const double size = std::fabs(value);
  if (std::isnan(value)) return {0x7fff};  // the one that PTX calls canonical
  if (std::isinf(value)) return {static_cast<uint16_t>(sign | kInfinity)};
  int exponent = 1 - kBias;
  if (size != 0) exponent = std::max(std::ilogb(size), exponent);
  const double scaled = std::ldexp(size, kMantissa - exponent);
  const auto digits = static_cast<int>(truncate ? std::trunc(scaled) : std::nearbyint(scaled));
  // The leading digit, where there is one, adds one to the exponent.
  int bits = ((exponent + kBias - 1) << kMantissa) + digits;
  if (bits >= kInfinity) bits = truncate ? kInfinity - 1 : kInfinity;
  return {static_cast<uint16_t>(sign | bits)};
}
template <>
inline Float16 narrowed(double value, bool truncate) {
  return narrow_half<10, 5>(value, truncate);
}
template <>
inline BFloat16 narrowed(double value, bool truncate) {
  return narrow_half<7, 8>(value, truncate);
}

inline uint64_t bits_of(const Thread& thread, const Operand& operand) {
  return operand.reg >= 0 ? thread.registers[operand.reg] : operand.value;
}

template <class X>
X read(const Thread& thread, const Operand& operand) {
  const uint64_t bits = bits_of(thread, operand);
  X value;
  std::memcpy(&value, &bits, sizeof(X));
  return value;
}
inline bool read_predicate(const Thread& thread, const Operand& operand) {
  return ((bits_of(thread, operand) & 1) != 0) != operand.negated;
}

// A narrow value fills a wider register as a load does: signed ones with their sign.
template <class X>
void write(Thread& thread, const Operand& operand, X value) {
  if (operand.reg < 0) return;
  uint64_t bits = 0;
  if constexpr (std::is_integral_v<X> && std::is_signed_v<X>)
    bits = static_cast<uint64_t>(static_cast<int64_t>(value));
  else
    std::memcpy(&bits, &value, sizeof(X));
  thread.registers[operand.reg] = bits;
}

// Denormals become zero of the same sign, where an instruction says .ftz.
template <class X>
X flushed(X value, bool flush) {
  if constexpr (std::is_same_v<X, float>)
    if (flush && std::fpclassify(value) == FP_SUBNORMAL) return std::copysign(0.0f, value);
  return value;
}

// Whatever NaN goes into an instruction that computes in single precision, one comes out.
template <class X>
X canonical(X value) {
  if constexpr (std::is_same_v<X, float>)
    if (std::isnan(value)) {
      constexpr uint32_t kBits = 0x7fffffff;
      std::memcpy(&value, &kBits, sizeof value);
    }
  return value;
}

// --- choosing by type ---------------------------------------------------------------------------

enum Kinds : unsigned { kIntegers = 1, kFloats = 2, kHalves = 4, kNumbers = 7 };

// Operation<X>::run for the type, or null where the operation has none of it.
template <template <class> class Operation, unsigned kKinds>
Execute choose(Type type) {
  if constexpr ((kKinds & kIntegers) != 0) switch (type) {
      case Type::b8:
      case Type::u8: return Operation<uint8_t>::run;
      case Type::s8: return Operation<int8_t>::run;
      case Type::b16:
      case Type::u16: return Operation<uint16_t>::run;
      case Type::s16: return Operation<int16_t>::run;
      case Type::b32:
      case Type::u32: return Operation<uint32_t>::run;
      case Type::s32: return Operation<int32_t>::run;
      case Type::b64:
      case Type::u64: return Operation<uint64_t>::run;
      case Type::s64: return Operation<int64_t>::run;
      default: break;
    }
  if constexpr ((kKinds & kFloats) != 0) {
    if (type == Type::f32) return Operation<float>::run;
    if (type == Type::f64) return Operation<double>::run;
  }
  if constexpr ((kKinds & kHalves) != 0) {
    if (type == Type::f16) return Operation<Float16>::run;
    if (type == Type::bf16) return Operation<BFloat16>::run;
  }
  return nullptr;
}

// By size alone: what only moves bits.
template <template <class> class Operation>
Execute choose_by_size(Type type) {
  switch (size_of(type)) {
    case 1: return Operation<uint8_t>::run;
    case 2: return Operation<uint16_t>::run;
    case 4: return Operation<uint32_t>::run;
    case 8: return Operation<uint64_t>::run;
    default: return nullptr;
  }
}

}  // namespace ptx_on_host
