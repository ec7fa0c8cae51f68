// What the launches of the general path of the loss leave for each other in the workspace.
#pragma once

#include "coarse.cuh"

namespace harmonizer::cuda {

// Of both maps, of the same pixels.
struct alignas(16) MomentsPair {
  Moments saliency, heatmap;
};

// What the gradient of a level's pixels needs; (13), (15). Released: `chain` is c of (11).
struct alignas(16) LevelConstants {
  LevelGradient gradient;
  float chain;
};

// Of two sets of pixels; exact where their means are the same.
__device__ inline Moments merge(const Moments& a, const Moments& b) {
  if (b.count == 0.f) return a;
  if (a.count == 0.f) return b;
  Moments both;
  both.count = a.count + b.count;
  const float share = b.count / both.count, apart = b.mean - a.mean;
  both.mean = a.mean + apart * share;
  both.m2 = a.m2 + b.m2 + a.count * share * apart * apart;
  both.maximum = fmaxf(a.maximum, b.maximum);
  return both;
}

// Those of `count` parts, every stride-th from `from` on: of one thread.
__device__ inline MomentsPair merge_parts(const MomentsPair* parts, int from, int count,
                                          int stride) {
  MomentsPair all;
  for (int i = from; i < count; i += stride) {
    all.saliency = merge(all.saliency, parts[i].saliency);
    all.heatmap = merge(all.heatmap, parts[i].heatmap);
  }
  return all;
}

// Those of all parts, in every lane of a warp.
__device__ inline MomentsPair warp_merge_parts(const MomentsPair* parts, int count) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const MomentsPair own = merge_parts(parts, lane, count, kWarp);
  return {warp_merge(own.saliency), warp_merge(own.heatmap)};
}

// Those of all threads of a block, in thread 0; `warps` is shared. Threads without pixels must come
// after those with some.
template <int kWarps>
__device__ inline MomentsPair block_merge(const MomentsPair& own, MomentsPair (&warps)[kWarps]) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp,
            lane = static_cast<int>(threadIdx.x) % kWarp;
  const MomentsPair merged{warp_merge(own.saliency), warp_merge(own.heatmap)};
  if (lane == 0) warps[warp] = merged;
  __syncthreads();
  if (warp > 0) return merged;
  const MomentsPair part = lane < kWarps ? warps[lane] : MomentsPair();
  return {warp_merge(part.saliency), warp_merge(part.heatmap)};
}

// The constants of level 0 once the sums of (14) are known.
__device__ inline LevelConstants released_constants(const BothStatistics& s, float g, float g_e,
                                                    float pixels, float share, float chain) {
  const LevelSums sums{0.f, g, g_e};
  return {{released_difference(s), derivative(sums, pixels, s.saliency, share * s.saliency.scale)},
          chain};
}

}  // namespace harmonizer::cuda
