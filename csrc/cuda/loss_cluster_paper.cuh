// The paper's formulation, one cluster per sample; (9), (10), (15), (16).
//
// Both raw maps go down the pyramid together, so that their statistics need no pass of their own,
// and by (15) the sums of a level do not wait for the adjoint of the one below.
#pragma once

#include "loss_cluster.cuh"

namespace harmonizer::cuda {

template <class Kernel>
struct alignas(16) PaperShared {
  union {
    Pixels<Kernel> pixels;  // of one map after the other, until its columns are made
    struct {
      Slabs<Kernel> saliency, heatmap;
    } slabs;
  };
  union {
    Half<Kernel> half[2];
    alignas(16) float coarse[2][Kernel::kCoarseFloats];
  };
  // Of the slabs' levels.
  ToldMoments saliency[Kernel::kSlabs][Kernel::kCluster][Kernel::kWarps];
  ToldMoments heatmap[Kernel::kSlabs][Kernel::kCluster][Kernel::kWarps];
  LevelSums sums[Kernel::kSlabs][Kernel::kCluster][Kernel::kWarps];
  PaperExchange<Kernel::kWarps> exchange;
};

// Calls f(y, x) for this thread's pairs of the slab's own pixels of a level, as indices into it.
template <class Plan, int kLevel, class F>
__device__ inline void for_each_pair(F&& f) {
  for_each_item<Plan::kThreads, Plan::size(kLevel) / 2>(
      Plan::rows(kLevel), [&](int y, int x) { f(Plan::above(kLevel) + y, kBorder + 2 * x); });
}

template <class Plan, int kLevel>
__device__ inline Moments slab_moments(const Slab<Plan, kLevel>& slab) {
  Moments m;
  float shift = 0, sum = 0;
  for_each_pair<Plan, kLevel>([&](int y, int x) {
    const float2 v = load_pair(&slab[y][x]);
    if (m.count == 0.f) shift = v.x;
    m.count += 2.f;
    sum += (v.x - shift) + (v.y - shift);
    m.maximum = fmaxf(m.maximum, fmaxf(v.x, v.y));
  });
  if (m.count == 0.f) return m;
  m.mean = shift + sum / m.count;
  for_each_pair<Plan, kLevel>([&](int y, int x) {
    const float2 v = load_pair(&slab[y][x]);
    const float a = v.x - m.mean, b = v.y - m.mean;
    m.m2 += a * a + b * b;
  });
  return m;
}

template <class Plan, int kLevel>
__device__ inline LevelSums slab_sums(const Slab<Plan, kLevel>& saliency,
                                      const Slab<Plan, kLevel>& heatmap,
                                      const Difference& difference) {
  LevelSums sums;
  for_each_pair<Plan, kLevel>([&](int y, int x) {
    const float2 a = load_pair(&saliency[y][x]), b = load_pair(&heatmap[y][x]);
    sums.add(difference, a.x, b.x);
    sums.add(difference, a.y, b.y);
  });
  return sums;
}

template <class Plan>
__device__ inline LevelSums pixel_sums(const float4 (&m)[Plan::kRowsPerThread],
                                       const float4 (&h)[Plan::kRowsPerThread],
                                       const Difference& difference) {
  LevelSums sums;
#pragma unroll
  for (int j = 0; j < Plan::kRowsPerThread; ++j) {
    sums.add(difference, m[j].x, h[j].x);
    sums.add(difference, m[j].y, h[j].y);
    sums.add(difference, m[j].z, h[j].z);
    sums.add(difference, m[j].w, h[j].w);
  }
  return sums;
}

// The gradient of a pair of a slab's pixels, for back_to_slab.
template <class Slab>
struct SlabGradient {
  const Slab &saliency, &heatmap;
  LevelGradient gradient;

  __device__ float2 operator()(int y, int x) const {
    const float2 a = load_pair(&saliency[y][x]), b = load_pair(&heatmap[y][x]);
    return make_float2(gradient(a.x, b.x), gradient(a.y, b.y));
  }
};
template <class Slab>
__device__ inline SlabGradient<Slab> slab_gradient(const Slab& saliency, const Slab& heatmap,
                                                   const LevelGradient& gradient) {
  return {saliency, heatmap, gradient};
}

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kBlocksPerSm)
    loss_paper(const __grid_constant__ LossParams p) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  constexpr int kRows = Kernel::kRowsPerThread;
  const ClusterBlock<Kernel> block;
  const float weight = static_cast<const float*>(p.weights)[block.sample];
  if (weight == 0.f) return store_nothing(block, p);
  auto& shared = shared_layout<PaperShared<Kernel>>();
  block.cluster.barrier_arrive();

  float4 m[kRows], h[kRows];
  load_pixels(block, p.saliency, p.channels, m);
  load_pixels(block, p.heatmaps, 1, h);
  stage_pixels(block, m, shared.pixels);
  clear_outside(block, shared.half[0]);
  clear_outside(block, shared.half[1]);
  {
    const Moments of_m = warp_merge(moments_of_pixels(block.active, m));
    const Moments of_h = warp_merge(moments_of_pixels(block.active, h));
    // Another block's memory may be written once that block runs.
    block.cluster.barrier_wait();
    block.tell_all(shared.saliency[0], of_m);
    block.tell_all(shared.heatmap[0], of_h);
  }
  __syncthreads();
  make_columns(block, shared.pixels, shared.half[0]);
  __syncthreads();
  stage_pixels(block, h, shared.pixels);
  __syncthreads();
  make_columns(block, shared.pixels, shared.half[1]);
  block.cluster.sync();

  // The other levels of the slab, and the first that every block has.
  auto &x = shared.slabs.saliency, &y = shared.slabs.heatmap;
  const auto nothing = [](float, float) {};
  make_level1(block, shared.half[0], x.level1, nothing);
  make_level1(block, shared.half[1], y.level1, nothing);
  __syncthreads();
  clear(&shared.coarse[0][0], 2 * Kernel::kCoarseFloats);
  block.tell_all(shared.saliency[1], warp_merge(slab_moments<Kernel, 1>(x.level1)));
  block.tell_all(shared.heatmap[1], warp_merge(slab_moments<Kernel, 1>(y.level1)));
  if constexpr (Kernel::kSlabs == 3) {
    make_level2(block, x.level1, x.level2, nothing);
    make_level2(block, y.level1, y.level2, nothing);
    __syncthreads();
    block.tell_all(shared.saliency[2], warp_merge(slab_moments<Kernel, 2>(x.level2)));
    block.tell_all(shared.heatmap[2], warp_merge(slab_moments<Kernel, 2>(y.level2)));
  }
  block.cluster.sync();
  if constexpr (Kernel::kSlabs == 3) {
    make_coarse(block, x.level2, shared.coarse[0], Kernel::kCluster, nothing);
    make_coarse(block, y.level2, shared.coarse[1], Kernel::kCluster, nothing);
  } else {
    make_coarse(block, x.level1, shared.coarse[0], Kernel::kCluster, nothing);
    make_coarse(block, y.level1, shared.coarse[1], Kernel::kCluster, nothing);
  }
  if (p.prefetch > 0 && block.sample + p.prefetch < p.batch) {
    prefetch_slab(block, p.saliency, p.channels, block.sample + p.prefetch);
    prefetch_slab(block, p.heatmaps, 1, block.sample + p.prefetch);
  }

  // Sums of the slab's levels; then of the others, with their way back up.
  BothStatistics statistics[Kernel::kSlabs];
#pragma unroll
  for (int l = 0; l < Kernel::kSlabs; ++l)
    statistics[l] = both_statistics(warp_merge(&shared.saliency[l][0][0], Kernel::kEntries),
                                    warp_merge(&shared.heatmap[l][0][0], Kernel::kEntries));
  LevelSums own;
  if (block.active) own = pixel_sums<Kernel>(m, h, paper_difference(statistics[0]));
  block.tell_all(shared.sums[0], warp_sum(own));
  own = slab_sums<Kernel, 1>(x.level1, y.level1, paper_difference(statistics[1]));
  block.tell_all(shared.sums[1], warp_sum(own));
  if constexpr (Kernel::kSlabs == 3) {
    own = slab_sums<Kernel, 2>(x.level2, y.level2, paper_difference(statistics[2]));
    block.tell_all(shared.sums[2], warp_sum(own));
  }
  block.cluster.sync();
  const float per_channel = weight / static_cast<float>(p.channels);
  const Level top_x(shared.coarse[0], Kernel::kCoarseSize, Kernel::kCoarseSize);
  const Level top_y(shared.coarse[1], Kernel::kCoarseSize, Kernel::kCoarseSize);
  float distance = paper_levels(top_x, top_y, p.levels - Kernel::kSlabs, per_channel, p.distance,
                                p.gradient, shared.exchange);
  LevelGradient gradients[Kernel::kSlabs];
#pragma unroll
  for (int l = 0; l < Kernel::kSlabs; ++l) {
    const LevelSums sums = warp_sum(&shared.sums[l][0][0], Kernel::kEntries);
    const LevelDistance d = level_distance(sums.energy, Kernel::pixels(l), p.distance);
    distance += d.value;
    gradients[l] = level_gradient(statistics[l], sums, Kernel::pixels(l), d.chain, per_channel);
  }
  if (block.first && threadIdx.x == 0) {
    static_cast<float*>(p.rows)[block.sample] = weight * distance;
    static_cast<float*>(p.saliency_std)[block.sample] = statistics[0].saliency.std;
  }
  if (!p.gradient) return;

  // Back to level 0.
  const auto level1 = slab_gradient(x.level1, y.level1, gradients[1]);
  if constexpr (Kernel::kSlabs == 3) {
    back_from_coarse(block, shared.coarse[0], x.level2,
                     slab_gradient(x.level2, y.level2, gradients[2]));
    __syncthreads();
    back_from_level2(block, x.level2, x.level1, level1);
  } else {
    back_from_coarse(block, shared.coarse[0], x.level1, level1);
  }
  __syncthreads();
  if (block.active)
    back_to_pixels(block, x.level1, [&](int j, const float4& up) {
      const LevelGradient& g = gradients[0];
      m[j] = make_float4(g(m[j].x, h[j].x) + up.x, g(m[j].y, h[j].y) + up.y,
                         g(m[j].z, h[j].z) + up.z, g(m[j].w, h[j].w) + up.w);
    });
  store_gradient(block, p, [&](int j) { return m[j]; });
#endif
}

}  // namespace harmonizer::cuda
