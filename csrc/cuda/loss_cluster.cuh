// The fused loss on Hopper and later: one thread-block cluster per sample, every pixel read and
// written once. What the two formulations share.
//
// A block owns a slab of rows. A thread owns four columns of some rows of it and keeps their
// channel mean in registers. Level 1 is made columns first, so that the rows which come from the
// neighbours, through distributed shared memory, are of half the width. They are as many as the
// block needs to make its rows of the first levels alone, with what the way back up will read of
// its neighbours'. The level after is sent to every block, and each walks the levels below for
// itself.
#pragma once

#include <cooperative_groups.h>

#include "coarse.cuh"
#include "mbarrier.cuh"

namespace harmonizer::cuda {

// One specialization: square maps of kSize_, clusters of kCluster_ blocks, kRowsPerThread_ rows of
// four pixels in a thread's registers, kBlocksPerSm_ resident blocks asked of the compiler; blocks
// have slabs of levels 0 to kSlabs_ - 1, and all of the levels below.
template <int kSize_, int kCluster_, int kRowsPerThread_, int kBlocksPerSm_, int kSlabs_ = 2>
struct ClusterPlan {
  static constexpr int kSize = kSize_;
  static constexpr int kCluster = kCluster_;
  static constexpr int kRowsPerThread = kRowsPerThread_;
  static constexpr int kBlocksPerSm = kBlocksPerSm_;
  static constexpr int kSlabs = kSlabs_;

  static constexpr int kRows = kSize / kCluster;  // of a block's slab
  static constexpr int kQuads = kSize / 4;        // threads along a row
  static constexpr int kPixelThreads = kQuads * (kRows / kRowsPerThread);
  static constexpr int kThreads = (kPixelThreads + kWarp - 1) / kWarp * kWarp;
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kEntries = kCluster * kWarps;

  __host__ __device__ static constexpr int size(int level) { return kSize >> level; }
  __host__ __device__ static constexpr int rows(int level) { return kRows >> level; }
  __host__ __device__ static constexpr float pixels(int level) {
    return static_cast<float>(size(level)) * static_cast<float>(size(level));
  }
  // Rows of a slab's level beyond its own that a block makes. Down, row Y reads rows 2Y - 1 to
  // 2Y + 3. On the way back row -1 reads row -2 of the level below, and row -2 no further one.
  __host__ __device__ static constexpr int above(int level) {
    return level < kSlabs - 1 ? 2 * above(level + 1) + 1 : kSlabs == 2 ? 1 : 2;
  }
  __host__ __device__ static constexpr int below(int level) {
    return level < kSlabs - 1 ? 2 * below(level + 1) + 2 : 2;
  }
  __host__ __device__ static constexpr int slab_rows(int level) {
    return above(level) + rows(level) + below(level);
  }
  __host__ __device__ static constexpr int slab_pitch(int level) {
    return size(level) + 2 * kBorder;
  }
  static constexpr int kCoarseSize = kSize >> kSlabs;
  static constexpr int kCoarseFloats = stack_floats(kCoarseSize, kCoarseSize, kMaxLevels - kSlabs);

  static_assert(kSlabs == 2 || kSlabs == 3, "what above() and the kernels are written for");
  static_assert(kCoarseSize * (1 << kSlabs) == kSize && kCoarseSize % 2 == 0, "pairs of columns");
  static_assert(kRows * kCluster == kSize && rows(kSlabs) * (1 << kSlabs) == kRows,
                "whole rows of the first level that every block has");
  static_assert(kRows % kRowsPerThread == 0 && kRowsPerThread % 2 == 0,
                "pairs of rows in a thread");
  static_assert(kRows >= below(0), "rows come from the next block alone");
  static_assert(kCluster > 1 && kCluster <= 16 && kThreads <= 1024, "limits of the hardware");
};

namespace cg = cooperative_groups;

// What a warp tells the others: aligned, so that it reaches another block's memory in one store.
struct alignas(16) ToldMoments : Moments {};
static_assert(sizeof(ToldMoments) == sizeof(Moments), "read as an array of Moments");

template <class Plan>
struct ClusterBlock {
  cg::cluster_group cluster;
  int rank, sample;
  int warp, lane;
  bool active;       // whether the thread owns pixels
  int row, quad;     // the first of its rows in the slab, its four columns
  bool first, last;  // whether the slab is the image's first or last

  __device__ ClusterBlock()
      : cluster(cg::this_cluster()),
        rank(static_cast<int>(cluster.block_rank())),
        sample(static_cast<int>(blockIdx.x) / Plan::kCluster),
        warp(static_cast<int>(threadIdx.x) / kWarp),
        lane(static_cast<int>(threadIdx.x) % kWarp),
        active(static_cast<int>(threadIdx.x) < Plan::kPixelThreads),
        row(static_cast<int>(threadIdx.x) / Plan::kQuads * Plan::kRowsPerThread),
        quad(static_cast<int>(threadIdx.x) % Plan::kQuads),
        first(rank == 0),
        last(rank == Plan::kCluster - 1) {}

  template <class T>
  __device__ T* remote(T* own, int other) const {
    return cluster.map_shared_rank(own, other);
  }
  // Blocks that this one's rows go to, and rows come from.
  __device__ unsigned neighbours() const { return !first + !last; }
  __device__ void arrive_at_neighbours(const uint64_t* own) const {
    if (!first) mbarrier_arrive(own, rank - 1);
    if (!last) mbarrier_arrive(own, rank + 1);
  }
  // Writes a warp's entry into every block of the cluster.
  template <class Entry, class Value>
  __device__ void tell_all(Entry (&entries)[Plan::kCluster][Plan::kWarps],
                           const Value& value) const {
    if (lane < Plan::kCluster) *remote(&entries[rank][warp], lane) = Entry{value};
  }
};

// Calls f(y, x) for this thread's share of `height` rows of kWidth; no division in the loop.
template <int kThreads, int kWidth, class F>
__device__ inline void for_each_item(int height, F&& f) {
  constexpr int kStepY = kThreads / kWidth, kStepX = kThreads % kWidth;
  int y = static_cast<int>(threadIdx.x) / kWidth, x = static_cast<int>(threadIdx.x) % kWidth;
  while (y < height) {
    f(y, x);
    y += kStepY;
    if constexpr (kStepX > 0) {
      x += kStepX;
      if (x >= kWidth) {
        x -= kWidth;
        ++y;
      }
    }
  }
}

// The sum of the entries of all warps of a cluster, in every lane.
__device__ inline LevelSums warp_sum(const LevelSums* entries, int count) {
  LevelSums sums;
  for (int i = static_cast<int>(threadIdx.x) % kWarp; i < count; i += kWarp) {
    sums.energy += entries[i].energy;
    sums.g += entries[i].g;
    sums.g_e += entries[i].g_e;
  }
  return warp_sum(sums);
}

// --- loading -------------------------------------------------------------------------------------

// This thread's pixels, averaged over the channels; (5). The rows of a map are dense.
template <class Plan, int kRows = Plan::kRowsPerThread>
__device__ inline void load_pixels(const ClusterBlock<Plan>& block, const Maps& maps, int channels,
                                   float4 (&pixels)[kRows]) {
  if (!block.active) return;
  with_storage(maps.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* p = static_cast<const T*>(maps.data) + block.sample * maps.stride_batch +
                 (block.rank * Plan::kRows + block.row) * Plan::kSize + 4 * block.quad;
#pragma unroll
    for (int j = 0; j < kRows; ++j) pixels[j] = load4(p + j * Plan::kSize);
#pragma unroll 1
    for (int c = 1; c < channels; ++c) {
      p += maps.stride_channel;
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        const float4 v = load4(p + j * Plan::kSize);
        pixels[j].x += v.x;
        pixels[j].y += v.y;
        pixels[j].z += v.z;
        pixels[j].w += v.w;
      }
    }
  });
  if (channels == 1) return;
  // Rounded here, whatever it meets next: contracted with the subtraction of a shift it would give
  // a constant map a standard deviation.
  const float share = 1.f / static_cast<float>(channels);
#pragma unroll
  for (int j = 0; j < kRows; ++j) {
    pixels[j].x = __fmul_rn(pixels[j].x, share);
    pixels[j].y = __fmul_rn(pixels[j].y, share);
    pixels[j].z = __fmul_rn(pixels[j].z, share);
    pixels[j].w = __fmul_rn(pixels[j].w, share);
  }
}

template <class F>
__device__ inline void for_each_of(const float4& v, F&& f) {
  f(v.x);
  f(v.y);
  f(v.z);
  f(v.w);
}

// In one pass: the shift is one of the values, so that what cancels is at most as many times the
// result as there are values.
template <int kRows>
__device__ inline Moments moments_of_pixels(bool active, const float4 (&pixels)[kRows]) {
  Moments m;
  if (!active) return m;
  const float shift = pixels[0].x;
  float sum = 0, squares = 0;
#pragma unroll
  for (int j = 0; j < kRows; ++j)
    for_each_of(pixels[j], [&](float v) {
      const float apart = v - shift;
      sum += apart;
      squares += apart * apart;
      m.maximum = fmaxf(m.maximum, v);
    });
  m.count = 4 * kRows;
  const float offset = sum * (1.f / (4 * kRows));
  m.mean = shift + offset;
  m.m2 = squares_about_mean(squares, sum * offset);
  return m;
}

// Asks for a later sample's slab, so that the memory bus has work while this one is computed.
template <class Plan>
__device__ inline void prefetch_slab(const ClusterBlock<Plan>& block, const Maps& maps,
                                     int channels, int64_t sample) {
  with_storage(maps.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kLine = 128 / static_cast<int>(sizeof(T));
    constexpr int kLines = (Plan::kSize + kLine - 1) / kLine;
    const T* slab = static_cast<const T*>(maps.data) + sample * maps.stride_batch +
                    block.rank * Plan::kRows * Plan::kSize;
    for (int c = 0; c < channels; ++c)
      for_each_item<Plan::kThreads, kLines>(Plan::kRows, [&](int y, int line) {
        prefetch_l2(slab + c * maps.stride_channel + y * Plan::kSize + line * kLine);
      });
  });
}

// --- down ----------------------------------------------------------------------------------------

template <class Plan>
using Pixels = float4[Plan::kRows][Plan::kQuads];
// Level 0 with the columns of level 1.
template <class Plan>
using Half = float[Plan::slab_rows(0)][Plan::size(1)];
// Two columns of zeros on either side.
template <class Plan, int kLevel>
using Slab = float[Plan::slab_rows(kLevel)][Plan::slab_pitch(kLevel)];

template <class Plan, int kSlabs = Plan::kSlabs>
struct Slabs;
template <class Plan>
struct alignas(16) Slabs<Plan, 2> {
  Slab<Plan, 1> level1;
};
template <class Plan>
struct alignas(16) Slabs<Plan, 3> {
  Slab<Plan, 1> level1;
  alignas(16) Slab<Plan, 2> level2;
};

__device__ inline void store_pair(float* p, float a, float b) {
  *reinterpret_cast<float2*>(p) = make_float2(a, b);
}
__device__ inline float2 load_pair(const float* p) { return *reinterpret_cast<const float2*>(p); }

// Whether a row of a slab's level lies beyond the image.
template <class Plan, int kLevel>
__device__ inline bool outside(const ClusterBlock<Plan>& block, int row) {
  return (block.first && row < Plan::above(kLevel)) ||
         (block.last && row >= Plan::above(kLevel) + Plan::rows(kLevel));
}

// Zeros for the rows beyond the image; before the barrier that publishes the neighbours' rows.
template <class Plan>
__device__ inline void clear_outside(const ClusterBlock<Plan>& block, Half<Plan>& half) {
  constexpr int kBelow = Plan::above(0) + Plan::kRows;
  const int begin = block.first ? 0 : kBelow,
            end = block.last ? Plan::slab_rows(0) : Plan::above(0);
  for_each_item<Plan::kThreads, Plan::size(1)>(end - begin, [&](int y, int x) {
    if (begin + y < Plan::above(0) || begin + y >= kBelow) half[begin + y][x] = 0.f;
  });
}

template <class Plan>
__device__ inline void stage_pixels(const ClusterBlock<Plan>& block,
                                    const float4 (&own)[Plan::kRowsPerThread],
                                    Pixels<Plan>& pixels) {
  if (!block.active) return;
#pragma unroll
  for (int j = 0; j < Plan::kRowsPerThread; ++j) pixels[block.row + j][block.quad] = own[j];
}

// Columns of level 1 at this thread's rows, from `pixels` that all threads see; (4) along rows.
// What the neighbours need goes to them too.
template <class Plan>
__device__ inline void make_columns(const ClusterBlock<Plan>& block, const Pixels<Plan>& pixels,
                                    Half<Plan>& half) {
  if (!block.active) return;
  constexpr int kAbove = Plan::above(0), kBelow = Plan::below(0);
  Half<Plan>* previous = block.first ? nullptr : block.remote(&half, block.rank - 1);
  Half<Plan>* next = block.last ? nullptr : block.remote(&half, block.rank + 1);
#pragma unroll
  for (int j = 0; j < Plan::kRowsPerThread; ++j) {
    const int y = block.row + j, x = 2 * block.quad;
    const float4 v = pixels[y][block.quad];
    const float left = block.quad > 0 ? pixels[y][block.quad - 1].w : 0.f;
    float2 right = make_float2(0.f, 0.f);
    if (block.quad + 1 < Plan::kQuads) right = load_pair(&pixels[y][block.quad + 1].x);
    const float a = taps(left, v.x, v.y, v.z, v.w), b = taps(v.y, v.z, v.w, right.x, right.y);
    store_pair(&half[kAbove + y][x], a, b);
    if (y < kBelow && previous) store_pair(&(*previous)[kAbove + Plan::kRows + y][x], a, b);
    if (y >= Plan::kRows - kAbove && next)
      store_pair(&(*next)[y - (Plan::kRows - kAbove)][x], a, b);
  }
}

// Five rows of pairs, downsampled along the columns.
__device__ inline float2 taps(const float2 (&r)[5]) {
  return make_float2(taps(r[0].x, r[1].x, r[2].x, r[3].x, r[4].x),
                     taps(r[0].y, r[1].y, r[2].y, r[3].y, r[4].y));
}

// Two neighbours of the level below `fine`, the first of its rows and columns being row and column.
template <class Plan, int kLevel>
__device__ inline float2 down_pair(const Slab<Plan, kLevel>& fine, int row, int column) {
  float2 r[5];
#pragma unroll
  for (int k = 0; k < 5; ++k) {
    const float* p = &fine[row + k][column];
    const float before = p[0];
    const float2 a = load_pair(p + 1), b = load_pair(p + 3), c = load_pair(p + 5);
    r[k] = make_float2(taps(before, a.x, a.y, b.x, b.y), taps(a.y, b.x, b.y, c.x, c.y));
  }
  return taps(r);
}

// A level of the slab with the rows around it, make(y, x) being its pair x of row y where that lies
// in the image. Calls each(a, b) for the pairs of the slab's own rows.
template <class Plan, int kLevel, class Make, class Each>
__device__ inline void make_slab(const ClusterBlock<Plan>& block, Slab<Plan, kLevel>& slab,
                                 Make&& make, Each&& each) {
  constexpr int kAbove = Plan::above(kLevel), kEnd = Plan::size(kLevel) + kBorder;
  for_each_item<Plan::kThreads, Plan::size(kLevel) / 2>(Plan::slab_rows(kLevel), [&](int y, int x) {
    float2 v = make_float2(0.f, 0.f);
    if (!outside<Plan, kLevel>(block, y)) {
      v = make(y, x);
      if (y >= kAbove && y < kAbove + Plan::rows(kLevel)) each(v.x, v.y);
    }
    store_pair(&slab[y][kBorder + 2 * x], v.x, v.y);
  });
  for (int y = static_cast<int>(threadIdx.x); y < Plan::slab_rows(kLevel); y += Plan::kThreads) {
    store_pair(&slab[y][0], 0.f, 0.f);
    store_pair(&slab[y][kEnd], 0.f, 0.f);
  }
}
template <class Plan, class Each>
__device__ inline void make_level1(const ClusterBlock<Plan>& block, const Half<Plan>& half,
                                   Slab<Plan, 1>& level1, Each&& each) {
  make_slab<Plan, 1>(
      block, level1,
      [&](int y, int x) {
        float2 r[5];
#pragma unroll
        for (int k = 0; k < 5; ++k) r[k] = load_pair(&half[2 * y + k][2 * x]);
        return taps(r);
      },
      each);
}
template <class Plan, class Each>
__device__ inline void make_level2(const ClusterBlock<Plan>& block, const Slab<Plan, 1>& level1,
                                   Slab<Plan, 2>& level2, Each&& each) {
  make_slab<Plan, 2>(
      block, level2,
      [&](int y, int x) { return down_pair<Plan, 1>(level1, 2 * y, kBorder + 4 * x - 1); }, each);
}

// The slab's rows of the first level that every block has, from the last slab, sent to the blocks
// before `to`; each(a, b) for every pair.
template <class Plan, class Each>
__device__ inline void make_coarse(const ClusterBlock<Plan>& block,
                                   const Slab<Plan, Plan::kSlabs - 1>& slab, float* coarse, int to,
                                   Each&& each) {
  constexpr int kLast = Plan::kSlabs - 1, kRows = Plan::rows(Plan::kSlabs);
  const Level top(coarse, Plan::kCoarseSize, Plan::kCoarseSize);
  for_each_item<Plan::kThreads, Plan::kCoarseSize / 2>(kRows, [&](int y, int x) {
    const float2 v =
        down_pair<Plan, kLast>(slab, 2 * y - 1 + Plan::above(kLast), kBorder + 4 * x - 1);
    each(v.x, v.y);
    float* own = &top(block.rank * kRows + y, 2 * x);
    for (int other = 0; other < to; ++other) store_pair(block.remote(own, other), v.x, v.y);
  });
}

// --- and back up ---------------------------------------------------------------------------------

// A level of the slab, and the rows around it that the next will read, become own(row, column) +
// (D* below); (12), (16). below(y, x) is the address of a pixel of the level below, y counted from
// the slab's first row; own gets indices into the slab and returns the two pixels from there on.
template <class Plan, int kLevel, class Below, class Own>
__device__ inline void back_to_slab(const ClusterBlock<Plan>& block, Slab<Plan, kLevel>& slab,
                                    Below&& below, Own&& own) {
  constexpr int kRowsBelow = Plan::rows(kLevel + 1), kAbove = Plan::above(kLevel);
  for_each_item<Plan::kThreads, Plan::size(kLevel + 1)>(kRowsBelow + 2, [&](int y, int x) {
    float even[3], odd[3];  // columns 2x and 2x + 1
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      const float* p = below(y - 2 + k, x);
      even[k] = kTap1 * (p[-1] + p[0]);
      odd[k] = kTap2 * p[0] + kTap0 * (p[-1] + p[1]);
    }
    // Rows 2y - 2 and 2y - 1 of the slab, from row -kLevel to the first one beyond the last.
    const int row = kAbove + 2 * y - 2, column = kBorder + 2 * x;
    if (kLevel == 2 || y > 0) {
      float2 v = make_float2(0.f, 0.f);
      if (!outside<Plan, kLevel>(block, row)) {
        v = own(row, column);
        v.x += kTap1 * (even[0] + even[1]);
        v.y += kTap1 * (odd[0] + odd[1]);
      }
      store_pair(&slab[row][column], v.x, v.y);
    }
    if (y < kRowsBelow + 1) {
      float2 v = make_float2(0.f, 0.f);
      if (!outside<Plan, kLevel>(block, row + 1)) {
        v = own(row + 1, column);
        v.x += kTap2 * even[1] + kTap0 * (even[0] + even[2]);
        v.y += kTap2 * odd[1] + kTap0 * (odd[0] + odd[2]);
      }
      store_pair(&slab[row + 1][column], v.x, v.y);
    }
  });
}
// To the last slab, from the coarse levels.
template <class Plan, class Own>
__device__ inline void back_from_coarse(const ClusterBlock<Plan>& block, float* coarse,
                                        Slab<Plan, Plan::kSlabs - 1>& slab, Own&& own) {
  const Level top(coarse, Plan::kCoarseSize, Plan::kCoarseSize);
  const int first = block.rank * Plan::rows(Plan::kSlabs);
  back_to_slab<Plan, Plan::kSlabs - 1>(
      block, slab, [&](int y, int x) { return &top(first + y, x); }, own);
}
template <class Plan, class Own>
__device__ inline void back_from_level2(const ClusterBlock<Plan>& block,
                                        const Slab<Plan, 2>& level2, Slab<Plan, 1>& level1,
                                        Own&& own) {
  back_to_slab<Plan, 1>(
      block, level1, [&](int y, int x) { return &level2[Plan::above(2) + y][kBorder + x]; }, own);
}

// Four pixels of a row of level 1, spread along the columns of level 0; (4').
template <class Plan>
__device__ inline float4 spread(const Slab<Plan, 1>& level1, int row, int quad) {
  const float* p = &level1[row][kBorder + 2 * quad];
  const float before = p[-1], after = p[2];
  const float2 v = load_pair(p);
  return make_float4(kTap1 * (before + v.x), kTap2 * v.x + kTap0 * (before + v.y),
                     kTap1 * (v.x + v.y), kTap2 * v.y + kTap0 * (v.x + after));
}

// Calls f(j, up) with the adjoint of level 1 at each of the thread's rows; (4').
template <class Plan, class F>
__device__ inline void back_to_pixels(const ClusterBlock<Plan>& block, const Slab<Plan, 1>& level1,
                                      F&& f) {
  const int y = Plan::above(1) - 1 + block.row / 2;  // the row before the thread's first
  float4 a = spread<Plan>(level1, y, block.quad), b = spread<Plan>(level1, y + 1, block.quad);
#pragma unroll
  for (int j = 0; j < Plan::kRowsPerThread; j += 2) {
    const float4 c = spread<Plan>(level1, y + j / 2 + 2, block.quad);
    f(j, make_float4(kTap1 * (a.x + b.x), kTap1 * (a.y + b.y), kTap1 * (a.z + b.z),
                     kTap1 * (a.w + b.w)));
    f(j + 1, make_float4(kTap2 * b.x + kTap0 * (a.x + c.x), kTap2 * b.y + kTap0 * (a.y + c.y),
                         kTap2 * b.z + kTap0 * (a.z + c.z), kTap2 * b.w + kTap0 * (a.w + c.w)));
    a = b;
    b = c;
  }
}

// Calls f(j) for each of the thread's rows and stores the four values it returns as the gradient.
template <class Plan, class F>
__device__ inline void store_gradient(const ClusterBlock<Plan>& block, const LossParams& p, F&& f) {
  if (!block.active) return;
  with_storage(p.saliency.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t y =
        static_cast<int64_t>(block.sample) * Plan::kSize + block.rank * Plan::kRows + block.row;
    T* out = static_cast<T*>(p.gradient) + y * Plan::kSize + 4 * block.quad;
#pragma unroll
    for (int j = 0; j < Plan::kRowsPerThread; ++j) store4(out + j * Plan::kSize, f(j));
  });
}

// A row without a human map: it is not read, whatever it holds.
template <class Plan>
__device__ inline void store_nothing(const ClusterBlock<Plan>& block, const LossParams& p) {
  if (block.first && threadIdx.x == 0) {
    static_cast<float*>(p.rows)[block.sample] = 0.f;
    static_cast<float*>(p.saliency_std)[block.sample] = 0.f;
  }
  if (p.gradient) store_gradient(block, p, [](int) { return make_float4(0.f, 0.f, 0.f, 0.f); });
}

}  // namespace harmonizer::cuda
