// The released formulation, one cluster per sample; (7), (8), (11) to (14).
#pragma once

#include "loss_cluster.cuh"

namespace harmonizer::cuda {

// What is special in a specialization, to be or-ed.
enum Special : unsigned {
  kNothing = 0,
  // The coarse levels have memory of their own. Else they lie where the half-width rows were, which
  // costs a barrier and lets more blocks share a multiprocessor.
  kApart = 1,
  // Block 0 alone walks the coarse levels.
  kOneWalks = 2,
  // A block waits for its neighbours' rows alone, not for all blocks.
  kSignals = 4,
};

template <class Plan, unsigned kSpecial>
struct ReleasedKernel : Plan {
  static constexpr bool kOverlay = !(kSpecial & kApart);
  static constexpr bool kOneWalks = kSpecial & cuda::kOneWalks;
  static constexpr bool kSignals = kSpecial & cuda::kSignals;
};

template <class Kernel>
struct alignas(16) ReleasedShared {
  struct Apart {
    Half<Kernel> half;
    alignas(16) float coarse[Kernel::kCoarseFloats];
  };
  union Overlaid {
    Half<Kernel> half;
    alignas(16) float coarse[Kernel::kCoarseFloats];
  };
  Pixels<Kernel> pixels;  // human map, then difference, then G
  std::conditional_t<Kernel::kOverlay, Overlaid, Apart> levels;
  Slabs<Kernel> slabs;
  ToldMoments saliency[Kernel::kCluster][Kernel::kWarps];
  ToldMoments heatmap[Kernel::kCluster][Kernel::kWarps];
  LevelSums sums[Kernel::kCluster][Kernel::kWarps];
  uint64_t rows_come;  // an mbarrier: the neighbours' rows are in `half`
};

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kBlocksPerSm)
    loss_released(const __grid_constant__ LossParams p) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  constexpr int kRows = Kernel::kRowsPerThread;
  const ClusterBlock<Kernel> block;
  const float weight = static_cast<const float*>(p.weights)[block.sample];
  if (weight == 0.f) return store_nothing(block, p);
  auto& shared = shared_layout<ReleasedShared<Kernel>>();
  if (Kernel::kSignals && threadIdx.x == 0) mbarrier_init(&shared.rows_come, block.neighbours());
  block.cluster.barrier_arrive();

  Moments of_h;
  {
    float4 h[kRows];
    load_pixels(block, p.heatmaps, 1, h);
    of_h = warp_merge(moments_of_pixels(block.active, h));
    stage_pixels(block, h, shared.pixels);
  }
  float4 m[kRows];
  load_pixels(block, p.saliency, p.channels, m);
  const Moments of_m = warp_merge(moments_of_pixels(block.active, m));
  if constexpr (!Kernel::kOverlay) clear(shared.levels.coarse, Kernel::kCoarseFloats);
  // Another block's memory may be written once that block runs.
  block.cluster.barrier_wait();
  block.tell_all(shared.saliency, of_m);
  block.tell_all(shared.heatmap, of_h);
  block.cluster.sync();
  const BothStatistics s = both_statistics(warp_merge(&shared.saliency[0][0], Kernel::kEntries),
                                           warp_merge(&shared.heatmap[0][0], Kernel::kEntries));
  const Difference difference = released_difference(s);
  if (p.prefetch > 0 && block.sample + p.prefetch < p.batch) {
    prefetch_slab(block, p.saliency, p.channels, block.sample + p.prefetch);
    prefetch_slab(block, p.heatmaps, 1, block.sample + p.prefetch);
  }

  // Level 0.
  float energy = 0;
  if (block.active)
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      float4& v = shared.pixels[block.row + j][block.quad];
      const float4 h = v;
      const float4 d = make_float4(difference(m[j].x, h.x), difference(m[j].y, h.y),
                                   difference(m[j].z, h.z), difference(m[j].w, h.w));
      for_each_of(d, [&](float x) { energy += x * x; });
      v = d;
    }
  energy *= 1.f / Kernel::pixels(0);
  clear_outside(block, shared.levels.half);
  __syncthreads();
  make_columns(block, shared.pixels, shared.levels.half);
  if constexpr (Kernel::kSignals) {
    __syncthreads();
    if (threadIdx.x == 0) block.arrive_at_neighbours(&shared.rows_come);
    mbarrier_wait(&shared.rows_come);
  } else {
    block.cluster.sync();
  }

  // The slab's levels, and those that every block has.
  const auto add_to = [](float& sum) { return [&sum](float a, float b) { sum += a * a + b * b; }; };
  float energy1 = 0, energy2 = 0, energy3 = 0;
  make_level1(block, shared.levels.half, shared.slabs.level1, add_to(energy1));
  __syncthreads();
  if constexpr (Kernel::kOverlay) {
    clear(shared.levels.coarse, Kernel::kCoarseFloats);
    block.cluster.sync();
  }
  constexpr int kWalkers = Kernel::kOneWalks ? 1 : Kernel::kCluster;
  if constexpr (Kernel::kSlabs == 3) {
    make_level2(block, shared.slabs.level1, shared.slabs.level2, add_to(energy2));
    __syncthreads();
    make_coarse(block, shared.slabs.level2, shared.levels.coarse, kWalkers, add_to(energy3));
    energy += energy3 / Kernel::pixels(3);
  } else {
    make_coarse(block, shared.slabs.level1, shared.levels.coarse, kWalkers, add_to(energy2));
  }
  block.cluster.sync();
  energy += energy1 / Kernel::pixels(1) + energy2 / Kernel::pixels(2);
  const float factor = 2.f * weight / static_cast<float>(p.levels);
  if (block.first || !Kernel::kOneWalks) {
    const Level top(shared.levels.coarse, Kernel::kCoarseSize, Kernel::kCoarseSize);
    const float below = released_levels(top, p.levels - Kernel::kSlabs, factor, p.gradient);
    if (block.first) energy += below;
  }
  if constexpr (Kernel::kOneWalks) {
    // The others fetch what they need of it: their rows and two on either side.
    block.cluster.sync();
    if (!block.first && p.gradient) {
      constexpr int kPitch = level_pitch(Kernel::kCoarseSize),
                    kRowsHere = Kernel::rows(Kernel::kSlabs);
      const float* theirs = block.remote(shared.levels.coarse, 0);
      const int begin = block.rank * kRowsHere * kPitch;
      for (int i = begin + static_cast<int>(threadIdx.x);
           i < begin + (kRowsHere + 2 * kBorder) * kPitch; i += Kernel::kThreads)
        shared.levels.coarse[i] = theirs[i];
      __syncthreads();
    }
  }

  // Back to level 0, the cut, and the two sums of (13).
  LevelSums sums;
  if (p.gradient) {
    const auto scaled = [](const auto& slab, float c) {
      return [&slab, c](int y, int x) {
        const float2 v = load_pair(&slab[y][x]);
        return make_float2(c * v.x, c * v.y);
      };
    };
    const float c0 = factor / Kernel::pixels(0);
    const auto level1 = scaled(shared.slabs.level1, factor / Kernel::pixels(1));
    if constexpr (Kernel::kSlabs == 3) {
      back_from_coarse(block, shared.levels.coarse, shared.slabs.level2,
                       scaled(shared.slabs.level2, factor / Kernel::pixels(2)));
      __syncthreads();
      back_from_level2(block, shared.slabs.level2, shared.slabs.level1, level1);
    } else {
      back_from_coarse(block, shared.levels.coarse, shared.slabs.level1, level1);
    }
    __syncthreads();
    if (block.active)
      back_to_pixels(block, shared.slabs.level1, [&](int j, const float4& up) {
        float4& v = shared.pixels[block.row + j][block.quad];
        const float4 d = v;
        const auto cut = [&](float x, float d_x, float up_x) {
          const float e = x - difference.mean;
          const float g = e > 0.f ? c0 * d_x + up_x : 0.f;
          sums.g += g;
          sums.g_e += g * e;
          return g;
        };
        v = make_float4(cut(m[j].x, d.x, up.x), cut(m[j].y, d.y, up.y), cut(m[j].z, d.z, up.z),
                        cut(m[j].w, d.w, up.w));
      });
  }
  sums.energy = energy;
  block.tell_all(shared.sums, warp_sum(sums));
  block.cluster.sync();
  sums = warp_sum(&shared.sums[0][0], Kernel::kEntries);
  if (block.first && threadIdx.x == 0) {
    static_cast<float*>(p.rows)[block.sample] = weight / static_cast<float>(p.levels) * sums.energy;
    static_cast<float*>(p.saliency_std)[block.sample] = s.saliency.std;
  }
  if (!p.gradient) return;
  // (13) as a G + b m + c.
  const float share = s.saliency.scale / static_cast<float>(p.channels);
  const Derivative derived = derivative(sums, Kernel::pixels(0), s.saliency, share);
  const float b = -share * derived.slope;
  const float c = -share * derived.g_mean - b * difference.mean;
  store_gradient(block, p, [&](int j) {
    const float4 g = shared.pixels[block.row + j][block.quad];
    return make_float4(fmaf(share, g.x, fmaf(b, m[j].x, c)), fmaf(share, g.y, fmaf(b, m[j].y, c)),
                       fmaf(share, g.z, fmaf(b, m[j].z, c)), fmaf(share, g.w, fmaf(b, m[j].w, c)));
  });
#endif
}

}  // namespace harmonizer::cuda
