// The Gaussian pyramid and its adjoint on CUDA; MATH.md (4), (4').
//
// A thread owns four neighbouring columns of the fine level, two of the coarse one, and walks down
// them with the last few lines, already filtered along the row, in registers: a line of the fine
// level is read once, save where two threads meet, and there it comes from a cache. Nothing is
// shared and nothing waits. The small levels of a map are made by one block, in one launch.
#include "device.cuh"
#include "launch.cuh"

namespace harmonizer::cuda {
namespace {

constexpr int kThreads = 256;
constexpr unsigned kMostRows = 8;  // coarse rows of a thread
// A fine level of so many pixels, and all below it, is left to one block.
constexpr int64_t kSmall = 1 << 14;
constexpr int kSmallThreads = 384;
constexpr unsigned kSmallRows = 2;

__host__ __device__ constexpr unsigned halved(unsigned n) { return n / 2 + n % 2; }
__host__ __device__ constexpr unsigned ceil_div(unsigned n, unsigned d) { return (n - 1) / d + 1; }

// Of a fine level: how its threads are laid out over a map.
struct Shape {
  unsigned channels;
  unsigned height;
  unsigned width;

  __host__ __device__ unsigned pairs() const { return halved(halved(width)); }
  __host__ __device__ unsigned threads(unsigned rows) const {
    return pairs() * ceil_div(halved(height), rows);
  }
};

// (4): the level below `fine`.
struct Down {
  Shape shape;
  Maps fine;
  void* coarse;  // dense
  Dtype dtype;   // of coarse
  float* exact;  // coarse before rounding, where a level below needs it; or null
};

// (4'): what `coarse` gives to the level above, and that level's own gradient.
struct Up {
  Shape shape;
  Maps coarse;
  Maps own;     // null data: none
  void* fine;   // dense
  Dtype dtype;  // of fine
};

__device__ inline float filter(float a, float b, float c, float d, float e) {
  return kTap0 * a + kTap1 * b + kTap2 * c + kTap1 * d + kTap0 * e;
}

// The fine pixels at 2i and 2i + 1 from the coarse ones at i - 1, i and i + 1. The sum of an odd
// length reads none that its tap of 0 would have to hide: 0 times infinity is no 0.
__device__ inline float2 spread(float before, float at, float after, bool odd) {
  const float three = kTap0 * before + kTap2 * at + kTap0 * after;
  const float two = kTap1 * (odd ? after : before) + kTap1 * at;
  return odd ? make_float2(three, two) : make_float2(two, three);
}

__device__ inline float2 load2(const float* p) { return *reinterpret_cast<const float2*>(p); }
template <class T>
__device__ inline float2 load2(const T* p) {
  union {
    unsigned bits;
    T value[2];
  } two;
  two.bits = *reinterpret_cast<const unsigned*>(p);
  return make_float2(widen(two.value[0]), widen(two.value[1]));
}
__device__ inline void store2(float* p, float2 v) { *reinterpret_cast<float2*>(p) = v; }
template <class T>
__device__ inline void store2(T* p, float2 v) {
  union {
    unsigned bits;
    T value[2];
  } two;
  two.value[0] = narrow<T>(v.x);
  two.value[1] = narrow<T>(v.y);
  *reinterpret_cast<unsigned*>(p) = two.bits;
}

// Stores two columns of a coarse level; the second may lie beyond it.
template <bool Fours, class T>
__device__ inline void store_pair(T* p, float2 v, bool both) {
  if constexpr (Fours) {
    store2(p, v);
  } else {
    p[0] = narrow<T>(v.x);
    if (both) p[1] = narrow<T>(v.y);
  }
}

// Rows row, row + 1, ... of the fine level, filtered along the row at the coarse columns 2j and
// 2j + 1; zero outside. An index before 0 has wrapped to a large one. A row outside is read as the
// last one and then dropped: a branch would wait for one row at a time.
template <bool Fours, int Count>
__device__ inline void filter_rows(float2 (&line)[Count], const Down& s, int64_t offset,
                                   unsigned row, unsigned j) {
  with_storage(s.fine.dtype, [&](auto* type) {
    const auto* map = static_cast<decltype(type)>(const_cast<void*>(s.fine.data)) + offset;
    float v[Count][7];
#pragma unroll
    for (int r = 0; r < Count; ++r) {
      const auto* p = map + min(row + r, s.shape.height - 1) * s.fine.stride_row;
      if constexpr (Fours) {
        // The width is even: the first of the seven columns is 4j - 1.
        p += 4 * j;
        const float4 four = load4_kept(p);
        const bool more = 4 * j + 4 < s.shape.width;
        const float2 two = more ? load2(p + 4) : make_float2(0, 0);
        v[r][0] = j > 0 ? widen(p[-1]) : 0.f;
        v[r][1] = four.x;
        v[r][2] = four.y;
        v[r][3] = four.z;
        v[r][4] = four.w;
        v[r][5] = two.x;
        v[r][6] = two.y;
      } else {
        const unsigned left = 4 * j - 1 - s.shape.width % 2;
#pragma unroll
        for (unsigned k = 0; k < 7; ++k)
          v[r][k] = left + k < s.shape.width ? widen(p[(left + k) * s.fine.stride_column]) : 0.f;
      }
    }
#pragma unroll
    for (int r = 0; r < Count; ++r) {
      const float(&f)[7] = v[r];
      const bool inside = row + r < s.shape.height;
      line[r].x = inside ? filter(f[0], f[1], f[2], f[3], f[4]) : 0.f;
      line[r].y = inside ? filter(f[2], f[3], f[4], f[5], f[6]) : 0.f;
    }
  });
}

// What thread `index` of a map does.
template <bool Fours>
__device__ inline void columns(const Down& s, int64_t map, unsigned index, unsigned rows) {
  const unsigned coarse_height = halved(s.shape.height), coarse_width = halved(s.shape.width);
  const unsigned j = index % s.shape.pairs(), begin = index / s.shape.pairs() * rows;
  const unsigned end = min(begin + rows, coarse_height);
  const bool both = 2 * j + 1 < coarse_width;
  const int64_t offset = map_offset(s.fine, map, s.shape.channels);
  int64_t at = (map * coarse_height + begin) * coarse_width + 2 * j;
  unsigned row = 2 * begin - 1 - s.shape.height % 2;
  float2 a[3], b[2];
  filter_rows<Fours>(a, s, offset, row, j);
  for (unsigned y = begin; y < end; ++y, row += 2, at += coarse_width) {
    filter_rows<Fours>(b, s, offset, row + 3, j);
    const float2 out = make_float2(filter(a[0].x, a[1].x, a[2].x, b[0].x, b[1].x),
                                   filter(a[0].y, a[1].y, a[2].y, b[0].y, b[1].y));
    with_storage(s.dtype, [&](auto* type) {
      store_pair<Fours>(static_cast<decltype(type)>(s.coarse) + at, out, both);
    });
    if (s.exact) store_pair<Fours>(s.exact + at, out, both);
    a[0] = a[2];
    a[1] = b[0];
    a[2] = b[1];
  }
}

// Row `row` of the coarse level, spread along the row to the fine columns 4j to 4j + 3; zero
// outside.
__device__ inline void spread_row(float (&line)[4], const Up& s, int64_t offset, unsigned row,
                                  unsigned j) {
  const unsigned height = halved(s.shape.height), width = halved(s.shape.width);
  float c[4];
  with_storage(s.coarse.dtype, [&](auto* type) {
    const auto* p = static_cast<decltype(type)>(const_cast<void*>(s.coarse.data)) + offset +
                    min(row, height - 1) * s.coarse.stride_row;
#pragma unroll
    for (unsigned k = 0; k < 4; ++k) {
      const unsigned column = 2 * j - 1 + k;
      c[k] = row < height && column < width ? widen(p[column * s.coarse.stride_column]) : 0.f;
    }
  });
  const bool odd = s.shape.width % 2;
  const float2 left = spread(c[0], c[1], c[2], odd), right = spread(c[1], c[2], c[3], odd);
  line[0] = left.x;
  line[1] = left.y;
  line[2] = right.x;
  line[3] = right.y;
}

// The fine level's own gradient at rows row and row + 1 and columns 4j to 4j + 3; anything beyond.
template <bool Fours>
__device__ inline void load_own(float (&own)[2][4], const Up& s, int64_t offset, unsigned row,
                                unsigned j) {
  with_storage(s.own.dtype, [&](auto* type) {
    const auto* map = static_cast<decltype(type)>(const_cast<void*>(s.own.data)) + offset;
#pragma unroll
    for (unsigned r = 0; r < 2; ++r) {
      const auto* p = map + min(row + r, s.shape.height - 1) * s.own.stride_row;
      if constexpr (Fours) {
        const float4 four = load4(p + 4 * j);
        own[r][0] = four.x;
        own[r][1] = four.y;
        own[r][2] = four.z;
        own[r][3] = four.w;
      } else {
#pragma unroll
        for (unsigned k = 0; k < 4; ++k)
          own[r][k] = widen(p[min(4 * j + k, s.shape.width - 1) * s.own.stride_column]);
      }
    }
  });
}

// The same two rows of the result.
template <bool Fours>
__device__ inline void store_fine(const Up& s, int64_t map, unsigned row, unsigned j,
                                  const float (&out)[2][4]) {
  with_storage(s.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
#pragma unroll
    for (unsigned r = 0; r < 2; ++r) {
      if (row + r >= s.shape.height) continue;
      T* p = static_cast<T*>(s.fine) + (map * s.shape.height + row + r) * s.shape.width + 4 * j;
      if constexpr (Fours) {
        store4(p, make_float4(out[r][0], out[r][1], out[r][2], out[r][3]));
      } else {
#pragma unroll
        for (unsigned k = 0; k < 4; ++k)
          if (4 * j + k < s.shape.width) p[k] = narrow<T>(out[r][k]);
      }
    }
  });
}

template <bool Fours>
__device__ inline void columns(const Up& s, int64_t map, unsigned index, unsigned rows) {
  const unsigned j = index % s.shape.pairs(), begin = index / s.shape.pairs() * rows;
  const unsigned end = min(begin + rows, halved(s.shape.height));
  const int64_t offset = map_offset(s.coarse, map, s.shape.channels);
  const int64_t own_offset = map_offset(s.own, map, s.shape.channels);
  const bool odd = s.shape.height % 2;
  float before[4], at[4], after[4];
  spread_row(before, s, offset, begin - 1, j);
  spread_row(at, s, offset, begin, j);
  for (unsigned y = begin; y < end; ++y) {
    float out[2][4] = {};
    if (s.own.data) load_own<Fours>(out, s, own_offset, 2 * y, j);
    spread_row(after, s, offset, y + 1, j);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float2 two = spread(before[k], at[k], after[k], odd);
      out[0][k] += two.x;
      out[1][k] += two.y;
      before[k] = at[k];
      at[k] = after[k];
    }
    store_fine<Fours>(s, map, 2 * y, j, out);
  }
}

// --- the steps of a call: the same on the host and in a block that takes several -----------------

__host__ __device__ inline bool fours(const Down& s) {
  return in_fours(s.fine, s.shape.width) && in_fours(dense(s.coarse, s.dtype, 1, 4, 4), 4);
}
__host__ __device__ inline bool fours(const Up& s) {
  return in_fours(dense(s.fine, s.dtype, 1, s.shape.height, s.shape.width), s.shape.width) &&
         (!s.own.data || in_fours(s.own, s.shape.width));
}

// Floats of the workspace for one level of all maps.
__host__ __device__ inline int64_t room(int64_t maps, Shape level) {
  return (maps * level.height * level.width + 63) / 64 * 64;
}
__host__ __device__ inline Shape below(Shape s) {
  return {s.channels, halved(s.height), halved(s.width)};
}
template <class Params>
__host__ __device__ inline Shape top(const Params& p) {
  return {static_cast<unsigned>(p.channels), static_cast<unsigned>(p.height),
          static_cast<unsigned>(p.width)};
}

// Whether a level is carried in float32 beside its output.
__host__ __device__ inline bool is_carried(const PyramidParams& p, int level) {
  return p.maps.dtype != Dtype::float32 && level + 1 < p.levels;
}

// Makes `level` from the one above.
__host__ __device__ inline Down step(const PyramidParams& p, int level) {
  Down s{top(p), p.maps, nullptr, p.maps.dtype, nullptr};
  float* workspace = static_cast<float*>(p.workspace);
  for (int l = 1;; ++l) {
    const Shape made = below(s.shape);
    s.coarse = p.outputs[l];
    s.exact = is_carried(p, l) ? workspace : nullptr;
    if (l == level) return s;
    s.fine = s.exact ? dense(s.exact, Dtype::float32, p.channels, made.height, made.width)
                     : dense(s.coarse, s.dtype, p.channels, made.height, made.width);
    if (s.exact) workspace += room(p.batch * p.channels, made);
    s.shape = made;
  }
}

// Makes `level` from the one below.
__host__ __device__ inline Up step(const PyramidAdjointParams& p, int level) {
  const int64_t maps = p.batch * p.channels;
  const Dtype dtype = p.gradients[1].dtype;
  Shape shape = top(p);
  float* carried = static_cast<float*>(p.workspace);  // this level, unless it is level 0
  for (int l = 0; l < level; ++l) {
    if (l > 0) carried += room(maps, shape);
    shape = below(shape);
  }
  const Shape coarse = below(shape);
  const float* next = level > 0 ? carried + room(maps, shape) : carried;
  Up s;
  s.shape = shape;
  s.coarse = level + 2 == p.levels
                 ? p.gradients[level + 1]
                 : dense(next, Dtype::float32, p.channels, coarse.height, coarse.width);
  if (level > 0) s.own = p.gradients[level];
  s.fine = level > 0 ? carried : p.output;
  s.dtype = level > 0 ? Dtype::float32 : dtype;
  return s;
}

// --- kernels -------------------------------------------------------------------------------------

template <bool Fours, class Step>
__global__ void __launch_bounds__(kThreads)
    pyramid_level(const Step s, const int64_t maps, const unsigned rows) {
  const int64_t thread = block_index() * kThreads + threadIdx.x;
  const unsigned threads = s.shape.threads(rows);
  const int64_t map = thread / threads;
  if (map < maps) columns<Fours>(s, map, static_cast<unsigned>(thread % threads), rows);
}

// Several steps, one block a map: those that make the levels from `begin` to before `end`, which
// may lie above it.
template <class Params>
__global__ void __launch_bounds__(kSmallThreads, 2)
    pyramid_small_levels(const Params p, const int begin, const int end) {
  const int64_t map = block_index();
  if (map >= p.batch * p.channels) return;
  for (int level = begin; level != end; level += begin < end ? 1 : -1) {
    const auto s = step(p, level);
    const bool wide = fours(s);
    for (unsigned i = threadIdx.x; i < s.shape.threads(kSmallRows); i += blockDim.x)
      wide ? columns<true>(s, map, i, kSmallRows) : columns<false>(s, map, i, kSmallRows);
    __syncthreads();  // the next step reads what this one wrote
  }
}

// --- launches ------------------------------------------------------------------------------------

template <class Params>
void launch_level(const Params& p, const char* kernel, int level) {
  const auto s = step(p, level);
  using Step = std::remove_const_t<decltype(s)>;
  const int64_t maps = p.batch * p.channels;
  // A long way down a column saves reading, a short one waiting where there is little to do.
  const int64_t enough = int64_t{1024} * device_limits(p.device).multiprocessors;
  unsigned rows = kMostRows;
  while (rows > 1 && maps * s.shape.threads(rows) < enough) rows /= 2;
  const int64_t blocks = (maps * s.shape.threads(rows) - 1) / kThreads + 1;
  const Grid grid{kernel, grid_of(blocks), kThreads};
  if (fours(s))
    launch<pyramid_level<true, Step>>(grid, p.stream, s, maps, rows);
  else
    launch<pyramid_level<false, Step>>(grid, p.stream, s, maps, rows);
}

template <class Params>
void launch_small_levels(const Params& p, const char* kernel, int begin, int end) {
  // The level of most threads, the finest, is at one of the two ends.
  const Shape finest = step(p, min(begin, end + (begin > end))).shape;
  const unsigned threads = ceil_div(finest.threads(kSmallRows), kWarp) * kWarp;
  const Grid grid{kernel, grid_of(p.batch * p.channels),
                  static_cast<int>(min(threads, unsigned{kSmallThreads}))};
  launch<pyramid_small_levels<Params>>(grid, p.stream, p, begin, end);
}

bool is_small(Shape s) { return int64_t{s.height} * s.width <= kSmall; }

}  // namespace

size_t pyramid_workspace_bytes(const PyramidParams& p) {
  int64_t floats = 0;
  Shape shape = top(p);
  for (int level = 1; level < p.levels; ++level) {
    shape = below(shape);
    if (is_carried(p, level)) floats += room(p.batch * p.channels, shape);
  }
  return static_cast<size_t>(floats) * sizeof(float);
}

size_t pyramid_adjoint_workspace_bytes(const PyramidAdjointParams& p) {
  int64_t floats = 0;
  Shape shape = top(p);
  for (int level = 1; level + 1 < p.levels; ++level) {
    shape = below(shape);
    floats += room(p.batch * p.channels, shape);
  }
  return static_cast<size_t>(floats) * sizeof(float);
}

void pyramid(const PyramidParams& p) {
  if (p.batch * p.channels == 0) return;
  check_current(p.device);
  for (int level = 1; level < p.levels; ++level) {
    if (level + 1 < p.levels && is_small(step(p, level).shape)) {
      launch_small_levels(p, "pyramid_small_levels", level, p.levels);
      return;
    }
    launch_level(p, "pyramid_level", level);
  }
}

void pyramid_adjoint(const PyramidAdjointParams& p) {
  if (p.batch * p.channels == 0) return;
  check_current(p.device);
  int level = p.levels - 2, end = level;
  while (end >= 0 && is_small(step(p, end).shape)) --end;
  if (level - end > 1) {
    launch_small_levels(p, "pyramid_adjoint_small_levels", level, end);
    level = end;
  }
  for (; level >= 0; --level) launch_level(p, "pyramid_adjoint_level", level);
}

}  // namespace harmonizer::cuda
