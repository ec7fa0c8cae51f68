// Rows of maps: the arithmetic that every CPU kernel is made of.
//
// A map is worked on in a Plane, whose rows are padded to whole registers with zeros. Inner loops
// therefore have neither tails nor borders: out-of-range rows are one shared row of zeros, and
// out-of-range columns are the padding. Only reading from and writing to the caller's tensors meets
// ragged edges, and both do so here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

#include "../harmonizer.h"
#include "vector.h"

namespace harmonizer::cpu {
namespace {

// Calls f with a typed null pointer for the storage type; float64 storage accumulates in double.
template <class Real, class F>
HARMONIZER_INLINE void with_storage(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::float32: f(static_cast<const float*>(nullptr)); break;
    case Dtype::bfloat16: f(static_cast<const bfloat16*>(nullptr)); break;
    case Dtype::float16: f(static_cast<const float16*>(nullptr)); break;
    case Dtype::float64:
      if constexpr (sizeof(Real) == 8) f(static_cast<const double*>(nullptr));
      break;
  }
}

constexpr size_t kAlignment = 64;

inline size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Hands out pieces of the workspace; with a null base it only counts them.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    T* piece = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += aligned(static_cast<size_t>(count) * sizeof(T));
    return piece;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

inline int64_t halved(int64_t n) { return (n + 1) / 2; }

// Rows are padded to two registers, because a pyramid step reads pairs of them.
template <class Real>
inline int64_t padded(int64_t width) {
  constexpr int64_t unit = 2 * kLanes<Real>;
  return (width + unit - 1) / unit * unit;
}

template <class Real>
struct Plane {
  Real* data = nullptr;
  int64_t height = 0;
  int64_t width = 0;
  int64_t pitch = 0;

  Plane() = default;
  Plane(Arena& arena, int64_t h, int64_t w)
      : data(arena.take<Real>(h * padded<Real>(w))), height(h), width(w), pitch(padded<Real>(w)) {}
  Real* row(int64_t y) const { return data + y * pitch; }
};

// Scratch rows shared by all levels of one thread, wide enough for the widest.
template <class Real>
struct Scratch {
  Real* zeros = nullptr;  // stands in for every row outside a map
  Real* even = nullptr;   // columns 0, 2, 4... of one row, one register of zeros before them
  Real* odd = nullptr;    // columns 1, 3, 5...
  int64_t width = 0;      // of zeros
  int64_t half = 0;       // of even and odd: half a row, rounded up, between registers of zeros

  Scratch() = default;
  Scratch(Arena& arena, int64_t w)
      : width(padded<Real>(w)), half(padded<Real>(w) / 2 + 3 * kLanes<Real>) {
    zeros = arena.take<Real>(width);
    even = arena.take<Real>(half);
    odd = arena.take<Real>(half);
  }
  void clear() const {
    std::memset(zeros, 0, width * sizeof(Real));
    std::memset(even, 0, half * sizeof(Real));
    std::memset(odd, 0, half * sizeof(Real));
  }
};

// Calls body(x, mask) for every register of a row, the last with a mask of the lanes that exist.
template <class Real, class Body>
HARMONIZER_INLINE void for_row(int64_t width, Body&& body) {
  constexpr int64_t lanes = kLanes<Real>;
  const Mask<Real> all = first_lanes<Real>(lanes);
  int64_t x = 0;
  for (; x + lanes <= width; x += lanes) body(x, all);
  if (x < width) body(x, first_lanes<Real>(width - x));
}

// --- between the caller's tensors and planes ---

// Mean over channels of one row into a padded row. The mean of one channel is that channel.
template <class Real, int kChannels, class T>
HARMONIZER_INLINE void load_dense_row(Real* out, const T* in, int64_t channels,
                                      int64_t stride_channel, int64_t width) {
  constexpr int64_t lanes = kLanes<Real>;
  const int64_t count = kChannels ? kChannels : channels;
  const Real share = Real(1) / static_cast<Real>(count);
  int64_t x = 0;
  for (; x + lanes <= width; x += lanes) {
    Vec<Real> total = load_real<Real>(in + x);
    for (int64_t c = 1; c < count; ++c) total += load_real<Real>(in + c * stride_channel + x);
    store(out + x, kChannels == 1 ? total : total * share);
  }
  for (; x < width; ++x) {
    Real total = load_one<Real>(in + x);
    for (int64_t c = 1; c < count; ++c) total += load_one<Real>(in + c * stride_channel + x);
    out[x] = kChannels == 1 ? total : total * share;
  }
}

// Three channels that lie side by side, as channels_last has them.
template <class Real, class T>
HARMONIZER_INLINE void load_interleaved_row(Real* out, const T* in, int64_t width) {
  constexpr int64_t lanes = kLanes<Real>;
  const Real share = Real(1) / Real(3);
  int64_t x = 0;
  for (; x + lanes <= width; x += lanes) {
    const Vec<Real> v0 = load_real<Real>(in + 3 * x), v1 = load_real<Real>(in + 3 * x + lanes),
                    v2 = load_real<Real>(in + 3 * x + 2 * lanes);
    const Vec<Real> total = third_lanes<Real, 0>(v0, v1, v2) + third_lanes<Real, 1>(v0, v1, v2) +
                            third_lanes<Real, 2>(v0, v1, v2);
    store(out + x, total * share);
  }
  for (; x < width; ++x)
    out[x] = (load_one<Real>(in + 3 * x) + load_one<Real>(in + 3 * x + 1) +
              load_one<Real>(in + 3 * x + 2)) *
             share;
}

template <class Real, class T>
HARMONIZER_INLINE void load_strided_row(Real* out, const T* in, int64_t channels,
                                        int64_t stride_channel, int64_t stride_column,
                                        int64_t width) {
  const Real share = Real(1) / static_cast<Real>(channels);
  for (int64_t x = 0; x < width; ++x) {
    Real total = load_one<Real>(in + x * stride_column);
    for (int64_t c = 1; c < channels; ++c)
      total += load_one<Real>(in + c * stride_channel + x * stride_column);
    out[x] = channels == 1 ? total : total * share;
  }
}

// Loads the channel mean of row y of sample b into a row of a plane, padding included; (5).
template <class Real>
inline void load_row(Real* out, const Maps& maps, int64_t b, int64_t first_channel,
                     int64_t channels, int64_t y, int64_t width) {
  with_storage<Real>(maps.dtype, [&](auto* type) {
    const auto* in = static_cast<decltype(type)>(maps.data) + b * maps.stride_batch +
                     first_channel * maps.stride_channel + y * maps.stride_row;
    if (channels == 3 && maps.stride_channel == 1 && maps.stride_column == 3) {
      load_interleaved_row<Real>(out, in, width);
    } else if (maps.stride_column != 1 && width > 1) {
      load_strided_row<Real>(out, in, channels, maps.stride_channel, maps.stride_column, width);
    } else if (channels == 1) {
      load_dense_row<Real, 1>(out, in, 1, 0, width);
    } else if (channels == 3) {
      load_dense_row<Real, 3>(out, in, 3, maps.stride_channel, width);
    } else {
      load_dense_row<Real, 0>(out, in, channels, maps.stride_channel, width);
    }
  });
  std::memset(out + width, 0, (padded<Real>(width) - width) * sizeof(Real));
}

// Asks for a row that will be loaded soon. The hardware follows each channel's stream by itself but
// stops at every page, which costs a quarter of the time that a sample takes to arrive.
template <class Real>
HARMONIZER_INLINE void prefetch_row(const Maps& maps, int64_t b, int64_t channels, int64_t y,
                                    int64_t width) {
  with_storage<Real>(maps.dtype, [&](auto* type) {
    const bool interleaved = maps.stride_channel == 1 && maps.stride_column == channels;
    if (maps.stride_column != 1 && !interleaved) return;
    if (interleaved) {
      width *= channels;
      channels = 1;
    }
    const auto* in =
        static_cast<decltype(type)>(maps.data) + b * maps.stride_batch + y * maps.stride_row;
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t x = 0; x < width; x += 64 / sizeof(*in))
        __builtin_prefetch(in + c * maps.stride_channel + x);
  });
}

// Writes value(x), a register, to a dense row of the caller's tensor.
template <class Real, class T, class Value>
HARMONIZER_INLINE void store_row(T* out, int64_t width, Value&& value) {
  constexpr int64_t lanes = kLanes<Real>;
  int64_t x = 0;
  for (; x + lanes <= width; x += lanes) store_real<Real>(out + x, value(x));
  if (x < width) {
    const Vec<Real> last = value(x);
    for (int64_t i = 0; x + i < width; ++i) store_one<Real>(out + x + i, Real(last[i]));
  }
}

// store_row past the caches, where the row lies on registers and T is what is computed in.
template <class Real, class T, class Value>
HARMONIZER_INLINE void stream_row(T* out, int64_t width, Value&& value) {
  constexpr int64_t lanes = kLanes<Real>;
  constexpr bool plain = sizeof(T) == sizeof(Real);
  if (!plain || reinterpret_cast<uintptr_t>(out) % sizeof(Vec<Real>) != 0 || width % lanes != 0)
    return store_row<Real>(out, width, value);
  for (int64_t x = 0; x < width; x += lanes) stream_as(out + x, value(x));
}

// --- statistics ---

template <class Real>
struct Statistics {
  Real mean = 0;
  Real std = 0;
  Real maximum = 0;
  Real scale = 0;  // 1 / (std + epsilon)
  bool finite = false;
};

constexpr double kStandardizeEpsilon = 1e-5;
constexpr double kMaximumEpsilon = 1e-6;

// A sum over a map: within a row in the accumulation type and lane by lane, over rows in double.
template <class Real>
class Sum {
 public:
  HARMONIZER_INLINE void add_row(Vec<Real> row_sums) {
    total_ += __builtin_convertvector(row_sums, Vector<double, kLanes<Real>>);
  }
  // Lanes are added in one fixed order: same inputs, same bits.
  HARMONIZER_INLINE double total() const {
    double sum = 0;
    for (int i = 0; i < kLanes<Real>; ++i) sum += total_[i];
    return sum;
  }

 private:
  Vector<double, kLanes<Real>> total_{};
};

// Mean, population standard deviation and maximum of a map, a row at a time; (1), (2).
//
// Values are shifted by the mean of the first row, so that no large mean is subtracted from a large
// square: with H rows the relative error of the variance is at most about H times that of one
// row's sum. The mean of a constant row is that constant to the bit, which makes the standard
// deviation of a constant map exactly zero.
template <class Real>
class Moments {
 public:
  HARMONIZER_INLINE void add_row(const Real* row, int64_t width) {
    if (rows_ == 0) shift_ = row_mean(row, width);
    const Vec<Real> shift = splat(shift_);
    const Vec<Real> lowest = splat(-std::numeric_limits<Real>::infinity());
    Vec<Real> first{}, second{}, best = best_;
    for_row<Real>(width, [&](int64_t x, Mask<Real> mask) {
      const Vec<Real> v = load(row + x);
      const Vec<Real> e = keep<Real>(mask, v - shift);
      first += e;
      second += e * e;
      best = maximum<Real>(mask ? v : lowest, best);
    });
    first_.add_row(first);
    second_.add_row(second);
    best_ = best;
    ++rows_;
  }

  HARMONIZER_INLINE Statistics<Real> finish(int64_t width) const {
    const double pixels = static_cast<double>(rows_) * static_cast<double>(width);
    const double offset = first_.total() / pixels;
    double variance = second_.total() / pixels - offset * offset;
    // Rounding may leave a hair below zero; NaN must pass.
    if (variance < 0) variance = 0;
    Statistics<Real> s;
    s.mean = static_cast<Real>(static_cast<double>(shift_) + offset);
    s.std = static_cast<Real>(__builtin_sqrt(variance));
    s.maximum = maximum<Real>(best_);
    s.scale = static_cast<Real>(1.0 / (static_cast<double>(s.std) + kStandardizeEpsilon));
    s.finite = __builtin_isfinite(s.mean) && __builtin_isfinite(s.std);
    return s;
  }

 private:
  static Real row_mean(const Real* row, int64_t width) {
    double offset = 0;
    for (int64_t x = 1; x < width; ++x) offset += static_cast<double>(row[x]) - row[0];
    return static_cast<Real>(row[0] + offset / static_cast<double>(width));
  }

  int64_t rows_ = 0;
  Real shift_ = 0;
  Sum<Real> first_, second_;
  Vec<Real> best_ = splat(-std::numeric_limits<Real>::infinity());
};

// --- pyramid steps ---

// One coarse row from five fine ones, first down the columns, then along the row; (4).
// fine(y) gives row y of the finer level, or the row of zeros outside it.
template <class Real, class Fine>
HARMONIZER_INLINE void downsample_row(Real* out, int64_t coarse_y, int64_t fine_height,
                                      int64_t fine_width, const Scratch<Real>& scratch,
                                      Fine&& fine) {
  constexpr int64_t lanes = kLanes<Real>;
  const Vec<Real> outer = splat(Real(1) / 16), inner = splat(Real(4) / 16),
                  middle = splat(Real(6) / 16);
  const int64_t top = 2 * coarse_y - (fine_height % 2 ? 2 : 1);
  const Real *r0 = fine(top), *r1 = fine(top + 1), *r2 = fine(top + 2), *r3 = fine(top + 3),
             *r4 = fine(top + 4);
  const auto column = [&](int64_t x) {
    return outer * (load(r0 + x) + load(r4 + x)) + inner * (load(r1 + x) + load(r3 + x)) +
           middle * load(r2 + x);
  };
  Real* even = scratch.even + lanes;
  Real* odd = scratch.odd + lanes;
  const int64_t pairs = padded<Real>(fine_width) / 2;
  for (int64_t x = 0; x < pairs; x += lanes) {
    const Vec<Real> a = column(2 * x), b = column(2 * x + lanes);
    store(even + x, even_lanes<Real>(a, b));
    store(odd + x, odd_lanes<Real>(a, b));
  }
  // A narrower level than the last must not see its columns.
  store(even + pairs, Vec<Real>{});
  store(odd + pairs, Vec<Real>{});
  const int64_t width = halved(fine_width);
  if (fine_width % 2) {
    for_row<Real>(width, [&](int64_t x, Mask<Real> mask) {
      const Vec<Real> v = outer * (load(even + x - 1) + load(even + x + 1)) +
                          inner * (load(odd + x - 1) + load(odd + x)) + middle * load(even + x);
      store(out + x, keep<Real>(mask, v));
    });
  } else {
    for_row<Real>(width, [&](int64_t x, Mask<Real> mask) {
      const Vec<Real> v = outer * (load(odd + x - 1) + load(odd + x + 1)) +
                          inner * (load(even + x) + load(even + x + 1)) + middle * load(odd + x);
      store(out + x, keep<Real>(mask, v));
    });
  }
  const int64_t written = (width + lanes - 1) / lanes * lanes;
  for (int64_t x = written; x < padded<Real>(width); x += lanes) store(out + x, Vec<Real>{});
}

// One fine row of the adjoint from three coarse ones; (4'). coarse(y) gives row y of the coarser
// level or the row of zeros; body(x, value, mask) receives every register of the fine row.
template <class Real, class Coarse, class Body>
HARMONIZER_INLINE void upsample_row(int64_t fine_y, int64_t fine_height, int64_t fine_width,
                                    const Scratch<Real>& scratch, Coarse&& coarse, Body&& body) {
  constexpr int64_t lanes = kLanes<Real>;
  const Vec<Real> outer = splat(Real(1) / 16), inner = splat(Real(4) / 16),
                  middle = splat(Real(6) / 16);
  const int64_t y = fine_y / 2;
  const int64_t coarse_padded = padded<Real>(halved(fine_width));
  Real* column = scratch.even + lanes;
  // Even lengths: even positions take (4, 4), odd ones (1, 6, 1); odd lengths the reverse.
  if ((fine_height + fine_y) % 2) {
    const Real *above = coarse(y - 1), *here = coarse(y), *below = coarse(y + 1);
    for (int64_t x = 0; x < coarse_padded; x += lanes)
      store(column + x, outer * (load(above + x) + load(below + x)) + middle * load(here + x));
  } else {
    const Real *here = coarse(y), *other = coarse(fine_height % 2 ? y + 1 : y - 1);
    for (int64_t x = 0; x < coarse_padded; x += lanes)
      store(column + x, inner * (load(here + x) + load(other + x)));
  }
  store(column + coarse_padded, Vec<Real>{});
  const Mask<Real> all = first_lanes<Real>(lanes);
  const int64_t odd_width = fine_width % 2;
  for (int64_t x = 0; x < fine_width; x += 2 * lanes) {
    const Real* c = column + x / 2;
    const Vec<Real> before = load(c - 1), here = load(c), after = load(c + 1);
    const Vec<Real> wide = outer * (before + after) + middle * here;
    const Vec<Real> narrow = inner * (here + (odd_width ? after : before));
    const Vec<Real> even = odd_width ? wide : narrow, odd = odd_width ? narrow : wide;
    const int64_t left = fine_width - x;
    body(x, interleave_low<Real>(even, odd), left >= lanes ? all : first_lanes<Real>(left));
    if (left > lanes)
      body(x + lanes, interleave_high<Real>(even, odd),
           left >= 2 * lanes ? all : first_lanes<Real>(left - lanes));
  }
}

// Row y of a plane, or zeros outside it.
template <class Real>
HARMONIZER_INLINE const Real* row_or_zeros(const Plane<Real>& plane, int64_t y,
                                           const Scratch<Real>& scratch) {
  return y >= 0 && y < plane.height ? plane.row(y) : scratch.zeros;
}

}  // namespace
}  // namespace harmonizer::cpu
