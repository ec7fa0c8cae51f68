// Vectors of one register, written with the compilers' vector extensions so that one source serves
// SSE2, AVX2, AVX-512 and NEON. The build compiles the kernels once per instruction set; everything
// here has internal linkage, so that no code of one set can be linked into another.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX512F__)
#define HARMONIZER_VECTOR_BYTES 64
#include <immintrin.h>
#elif defined(__AVX__)
#define HARMONIZER_VECTOR_BYTES 32
#include <immintrin.h>
#else
#define HARMONIZER_VECTOR_BYTES 16
#if defined(__SSE2__)
#include <emmintrin.h>
#endif
#endif

#define HARMONIZER_INLINE inline __attribute__((always_inline))

namespace harmonizer::cpu {
namespace {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <class Real>
constexpr int kLanes = HARMONIZER_VECTOR_BYTES / sizeof(Real);

template <class T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <class T, int N>
using Vector = typename VectorOf<T, N>::type;

template <class Real>
using Vec = Vector<Real, kLanes<Real>>;
template <class Real>
using Index = std::conditional_t<sizeof(Real) == 4, int32_t, int64_t>;
template <class Real>
using Mask = Vec<Index<Real>>;

// memcpy of a whole register compiles to one unaligned load or store.
template <class V>
HARMONIZER_INLINE V load_as(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <class V>
HARMONIZER_INLINE void store_as(void* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}
// The same past the caches, to an address that is a multiple of the register. What is stored is in
// memory for other threads after stream_fence().
template <class V>
HARMONIZER_INLINE void stream_as(void* p, V v) {
  static_assert(sizeof(V) == HARMONIZER_VECTOR_BYTES);
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(p), reinterpret_cast<__m512i>(v));
#elif defined(__AVX__)
  _mm256_stream_si256(static_cast<__m256i*>(p), reinterpret_cast<__m256i>(v));
#elif defined(__SSE2__)
  _mm_stream_si128(static_cast<__m128i*>(p), reinterpret_cast<__m128i>(v));
#else
  store_as(p, v);
#endif
}
HARMONIZER_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

template <class Real>
HARMONIZER_INLINE Vec<Real> load(const Real* p) {
  return load_as<Vec<Real>>(p);
}
template <class Real>
HARMONIZER_INLINE void store(Real* p, Vec<Real> v) {
  store_as(p, v);
}

template <class Real>
HARMONIZER_INLINE Vec<Real> splat(Real value) {
  return Vec<Real>{} + value;
}

// First n lanes true.
template <class Real>
HARMONIZER_INLINE Mask<Real> first_lanes(int64_t n) {
  Mask<Real> lane;
  for (int i = 0; i < kLanes<Real>; ++i) lane[i] = i;
  return lane < static_cast<Index<Real>>(n);
}

template <class Real>
HARMONIZER_INLINE Vec<Real> positive_part(Vec<Real> v) {
  return v > Real(0) ? v : Vec<Real>{};
}
template <class Real>
HARMONIZER_INLINE Vec<Real> maximum(Vec<Real> a, Vec<Real> b) {
  return a > b ? a : b;
}
template <class Real>
HARMONIZER_INLINE Vec<Real> keep(Mask<Real> mask, Vec<Real> v) {
  return mask ? v : Vec<Real>{};
}

template <class Real>
HARMONIZER_INLINE Real maximum(Vec<Real> v) {
  Real best = v[0];
  for (int i = 1; i < kLanes<Real>; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

template <class V, class M, int... I>
HARMONIZER_INLINE V shuffle(V a, V b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, M{I...});
#endif
}
template <int... I>
constexpr auto every_second(std::integer_sequence<int, I...>, int) {
  return std::integer_sequence<int, (2 * I)...>{};
}
template <int... I>
constexpr auto every_other(std::integer_sequence<int, I...>) {
  return std::integer_sequence<int, (2 * I + 1)...>{};
}
template <int N, int... I>
constexpr auto zipped(std::integer_sequence<int, I...>, int) {
  return std::integer_sequence<int, (I % 2 ? N + I / 2 : I / 2)...>{};
}
template <int N, int... I>
constexpr auto zipped_high(std::integer_sequence<int, I...>) {
  return std::integer_sequence<int, (N / 2 + (I % 2 ? N + I / 2 : I / 2))...>{};
}

// Lanes 0, 2, 4... and 1, 3, 5... of two consecutive registers.
template <class Real>
HARMONIZER_INLINE Vec<Real> even_lanes(Vec<Real> a, Vec<Real> b) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes<Real>>{};
  return shuffle<Vec<Real>, Mask<Real>>(a, b, every_second(lanes, 0));
}
template <class Real>
HARMONIZER_INLINE Vec<Real> odd_lanes(Vec<Real> a, Vec<Real> b) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes<Real>>{};
  return shuffle<Vec<Real>, Mask<Real>>(a, b, every_other(lanes));
}
// The inverse: e0 o0 e1 o1 ..., its first and its second register.
template <class Real>
HARMONIZER_INLINE Vec<Real> interleave_low(Vec<Real> e, Vec<Real> o) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes<Real>>{};
  return shuffle<Vec<Real>, Mask<Real>>(e, o, zipped<kLanes<Real>>(lanes, 0));
}
template <class Real>
HARMONIZER_INLINE Vec<Real> interleave_high(Vec<Real> e, Vec<Real> o) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes<Real>>{};
  return shuffle<Vec<Real>, Mask<Real>>(e, o, zipped_high<kLanes<Real>>(lanes));
}

// Lanes c, c + 3, c + 6... of three consecutive registers.
template <int N, int C, int... I>
constexpr auto third_of_two(std::integer_sequence<int, I...>) {
  return std::integer_sequence<int, (3 * I + C < 2 * N ? 3 * I + C : 0)...>{};
}
template <int N, int C, int... I>
constexpr auto third_of_last(std::integer_sequence<int, I...>) {
  return std::integer_sequence<int, (3 * I + C < 2 * N ? I : 3 * I + C - N)...>{};
}
template <class Real, int C>
HARMONIZER_INLINE Vec<Real> third_lanes(Vec<Real> v0, Vec<Real> v1, Vec<Real> v2) {
  constexpr int N = kLanes<Real>;
  constexpr auto lanes = std::make_integer_sequence<int, N>{};
  const Vec<Real> two = shuffle<Vec<Real>, Mask<Real>>(v0, v1, third_of_two<N, C>(lanes));
  return shuffle<Vec<Real>, Mask<Real>>(two, v2, third_of_last<N, C>(lanes));
}

// --- conversions ---

// Half types are converted with integer arithmetic, which vectorizes on every instruction set and
// needs no compiler support for the types. N is a number of lanes.

template <int N>
HARMONIZER_INLINE Vector<float, N> as_float(Vector<uint32_t, N> bits) {
  return reinterpret_cast<Vector<float, N>>(bits);
}
template <int N>
HARMONIZER_INLINE Vector<uint32_t, N> as_bits(Vector<float, N> v) {
  return reinterpret_cast<Vector<uint32_t, N>>(v);
}

template <int N>
HARMONIZER_INLINE Vector<float, N> widen(const float* p) {
  return load_as<Vector<float, N>>(p);
}
template <int N>
HARMONIZER_INLINE Vector<float, N> widen(const bfloat16* p) {
  const auto bits = load_as<Vector<uint16_t, N>>(p);
  return as_float<N>(__builtin_convertvector(bits, Vector<uint32_t, N>) << 16);
}
template <int N>
HARMONIZER_INLINE Vector<float, N> widen(const float16* p) {
  const auto bits = __builtin_convertvector(load_as<Vector<uint16_t, N>>(p), Vector<uint32_t, N>);
  const auto magnitude = bits & 0x7fffu;
  // Exponent and fraction are moved into place; the multiplication by 2^112 rebiases the exponent
  // and normalizes subnormals exactly.
  const auto scaled = as_bits<N>(as_float<N>(magnitude << 13) * 0x1p112f);
  const auto special = magnitude >= 0x7c00u;  // infinity and NaN
  const auto value = special ? (magnitude << 13) | 0x7f800000u : scaled;
  return as_float<N>(value | ((bits & 0x8000u) << 16));
}
template <int N>
HARMONIZER_INLINE Vector<double, N> widen(const double* p) {
  return load_as<Vector<double, N>>(p);
}

// One register of the accumulation type from any storage type.
template <class Real, class T>
HARMONIZER_INLINE Vec<Real> load_real(const T* p) {
  constexpr int N = kLanes<Real>;
  return __builtin_convertvector(widen<N>(p), Vec<Real>);
}

template <int N>
HARMONIZER_INLINE void narrow(float* p, Vector<float, N> v) {
  store_as(p, v);
}
template <int N>
HARMONIZER_INLINE void narrow(bfloat16* p, Vector<float, N> v) {
  const auto bits = as_bits<N>(v);
  const auto rounded = (bits + (0x7fffu + ((bits >> 16) & 1u))) >> 16;  // to nearest, ties to even
  const auto quiet = (bits >> 16) | 0x40u;
  const auto value = (bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded;
  store_as(p, __builtin_convertvector(value, Vector<uint16_t, N>));
}
template <int N>
HARMONIZER_INLINE void narrow(float16* p, Vector<float, N> v) {
  const auto bits = as_bits<N>(v);
  const auto sign = (bits >> 16) & 0x8000u;
  const auto magnitude = bits & 0x7fffffffu;
  // Normal range: rebias the exponent, round to nearest, ties to even.
  const auto odd = (magnitude >> 13) & 1u;
  const auto normal = (magnitude - 0x38000000u + 0xfffu + odd) >> 13;
  // Below 2^-14 the adder itself rounds: 0.5 has the unit of the last place that is wanted.
  const auto subnormal = as_bits<N>(as_float<N>(magnitude) + 0.5f) - 0x3f000000u;
  auto value = magnitude < 0x38800000u ? subnormal : normal;
  value = magnitude >= 0x477ff000u ? Vector<uint32_t, N>{} + 0x7c00u : value;  // 65520 and above
  value = magnitude > 0x7f800000u ? Vector<uint32_t, N>{} + 0x7e00u : value;
  store_as(p, __builtin_convertvector(value | sign, Vector<uint16_t, N>));
}
template <int N>
HARMONIZER_INLINE void narrow(float* p, Vector<double, N> v) {
  store_as(p, __builtin_convertvector(v, Vector<float, N>));
}
template <int N>
HARMONIZER_INLINE void narrow(bfloat16* p, Vector<double, N> v) {
  narrow<N>(p, __builtin_convertvector(v, Vector<float, N>));
}
template <int N>
HARMONIZER_INLINE void narrow(float16* p, Vector<double, N> v) {
  narrow<N>(p, __builtin_convertvector(v, Vector<float, N>));
}
template <int N>
HARMONIZER_INLINE void narrow(double* p, Vector<double, N> v) {
  store_as(p, v);
}

template <class Real, class T>
HARMONIZER_INLINE void store_real(T* p, Vec<Real> v) {
  narrow<kLanes<Real>>(p, v);
}
// The scalar conversions go through the same code, one lane wide.
template <class Real, class T>
HARMONIZER_INLINE Real load_one(const T* p) {
  return static_cast<Real>(widen<1>(p)[0]);
}
template <class Real, class T>
HARMONIZER_INLINE void store_one(T* p, Real value) {
  narrow<1>(p, Vector<Real, 1>{value});
}

}  // namespace
}  // namespace harmonizer::cpu
