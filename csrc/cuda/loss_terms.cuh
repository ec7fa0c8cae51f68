// The formulas of the loss that need no neighbours: what a level's statistics turn its pixels into.
#pragma once

#include "device.cuh"

namespace harmonizer::cuda {

// Of a sample, both formulations; NaN throughout where either map is not finite.
struct BothStatistics {
  Statistics saliency, heatmap;
};
__device__ inline BothStatistics both_statistics(const Moments& saliency, const Moments& heatmap) {
  BothStatistics both{statistics(saliency), statistics(heatmap)};
  if (isnan(both.saliency.std + both.heatmap.std)) {
    const float nan = nanf("");
    both.saliency = both.heatmap = Statistics{nan, nan, nan, nan};
  }
  return both;
}

// What a level's two maps are compared by; (3), (7). Released: of level 0, with the human map
// brought to the saliency's maximum.
struct Difference {
  float mean, scale;      // of the saliency
  float mean_h, scale_h;  // of the human map

  __device__ float operator()(float x, float y) const {
    return fmaxf(x - mean, 0.f) * scale - fmaxf(y - mean_h, 0.f) * scale_h;
  }
};
__device__ inline Difference paper_difference(const BothStatistics& s) {
  return {s.saliency.mean, s.saliency.scale, s.heatmap.mean, s.heatmap.scale};
}
__device__ inline Difference released_difference(const BothStatistics& s) {
  // z and the cut are monotone: the maxima of the standardized maps follow from those of the maps.
  const float s_max = (s.saliency.maximum - s.saliency.mean) * s.saliency.scale;
  const float t_max = (s.heatmap.maximum - s.heatmap.mean) * s.heatmap.scale;
  const float rescale = s.heatmap.scale / (t_max + kMaximumEpsilon) * (s_max + kMaximumEpsilon);
  return {s.saliency.mean, s.saliency.scale, s.heatmap.mean, rescale};
}

// Sums over the pixels of a level, from which its distance and gradient follow; (14), (15).
struct LevelSums {
  float energy = 0;  // of d squared
  float g = 0;       // of G = d [x > mean]; released, of q_0 [x > mean]
  float g_e = 0;     // of G (x - mean)

  __device__ void add(const Difference& difference, float x, float y) {
    const float d = difference(x, y), e = x - difference.mean;
    energy += d * d;
    if (e > 0.f) {
      g += d;
      g_e += d * e;
    }
  }
};
__device__ inline LevelSums warp_sum(const LevelSums& s) {
  return {warp_sum(s.energy), warp_sum(s.g), warp_sum(s.g_e)};
}

// Derivative of the standardization (3'): factor (G - mean of G - (x - mean) slope).
struct Derivative {
  float factor, g_mean, slope;

  __device__ float operator()(float g, float e) const { return factor * (g - g_mean - e * slope); }
};
__device__ inline Derivative derivative(const LevelSums& sums, float pixels, const Statistics& s,
                                        float factor) {
  const float inverse = 1.f / pixels;
  const float slope = s.std > 0.f ? sums.g_e * inverse * s.scale / s.std : 0.f;
  // A std of NaN gives a slope of 0; the mean of x is NaN then, and with it every product.
  return {factor, sums.g * inverse, slope};
}

// What one level adds to the paper's loss, and what multiplies d in its derivative; (10), (15).
struct LevelDistance {
  float value, chain;
};
__device__ inline LevelDistance level_distance(float energy, float pixels, Distance distance) {
  if (distance == Distance::mse) return {energy / pixels, 2.f / pixels};
  const float norm = sqrtf(energy);
  return {norm, norm > 0.f ? 1.f / norm : 0.f};
}

// A level of the paper's pyramid once its sums are known; gamma of (15), divided by the channels.
struct LevelGradient {
  Difference difference;
  Derivative derivative;

  __device__ float operator()(float x, float y) const {
    const float e = x - difference.mean;
    return derivative(e > 0.f ? difference(x, y) : 0.f, e);
  }
};
__device__ inline LevelGradient level_gradient(const BothStatistics& s, const LevelSums& sums,
                                               float pixels, float chain,
                                               float weight_per_channel) {
  return {paper_difference(s),
          derivative(sums, pixels, s.saliency, weight_per_channel * chain * s.saliency.scale)};
}

}  // namespace harmonizer::cuda
