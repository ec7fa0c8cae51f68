// The fused loss for any size, strides and batch, through the second-level cache.
//
// loss_moments      channel mean, human map, and moments of slabs of both
// loss_level_down   level 0's sums and level 1; and likewise from every level too large for a block
// loss_coarse       the levels below, in one block's shared memory, and the row loss
// loss_level_up     the adjoint of large levels, and at last the gradient
//
// Four launches a chunk of samples where level 1 fits a block's shared memory.
#pragma once

#include "launch.cuh"
#include "loss_parts.cuh"

namespace harmonizer::cuda {

// --- plan: a pure function of the parameters and the device's limits ---

// How the step from a level to the next is cut up. A lane owns a group of four fine columns and
// walks down a strip of coarse rows.
struct DownTiling {
  int groups;       // in a row
  int tile_groups;  // that a warp owns of them
  int tiles;        // across a row
  int segments;     // strips side by side in a warp, where a row leaves lanes free
  int strip_rows;   // coarse rows
  int strips;
  int blocks;  // of a sample
};

// How the step back is cut up: a thread makes four fine columns and two fine rows of a coarse one.
struct UpTiling {
  int groups;
  int strip_rows;
  int strips;
  int blocks;
};

struct LevelPlan {
  int height, width;
  int pitch;  // floats between rows in the workspace
  DownTiling down;
  UpTiling up;

  int64_t pixels() const { return static_cast<int64_t>(height) * width; }
  int64_t plane() const { return static_cast<int64_t>(height) * pitch; }
};

struct GeneralPlan {
  int64_t chunk;          // samples whose workspace exists at once
  bool store_mean;        // a channel mean is kept as float32,
  bool mean_in_gradient;  // where the gradient will be
  bool store_heatmap;
  int slab;  // pixels whose moments one block takes
  int slabs;
  // Levels before this one are walked by many blocks, those from it on by one block a sample, in
  // `coarse_bytes` of shared memory. At least 1; `levels` where not even the last level fits.
  int first;
  size_t coarse_bytes;
  int count;  // of levels
  LevelPlan levels[kMaxLevels];

  // Floats of a sample's channel mean or human map in the workspace.
  int64_t map_floats() const { return (levels[0].pixels() + 3) / 4 * 4; }
  // How many moments a level's statistics are merged from.
  int parts(int level) const { return level == 0 ? slabs : levels[level - 1].down.blocks; }
};

GeneralPlan general_plan(const LossParams&, const DeviceLimits&);

size_t general_workspace_bytes(const LossParams&, const DeviceLimits&);
void general_loss(const LossParams&, const DeviceLimits&);

// --- launches ---

constexpr int kMomentsThreads = 256;
constexpr int kDownWarps = 4;
constexpr int kUpThreads = 128;
constexpr int kCoarseWarps = 16;
// More moments than these are merged by a launch of their own.
constexpr int kPartsAtOnce = 64;

// A map of every sample, its columns next to each other. No data: not there.
struct Planes {
  float* data = nullptr;
  int64_t sample = 0;
  int64_t pitch = 0;
};

struct MomentsArguments {
  Maps saliency, heatmaps;
  const float* weights;
  int channels;
  int width;  // of all pixels, where every row begins as far from the last as its columns go
  int64_t pixels;
  float share;     // 1 / C
  Planes mean;     // written where there
  Planes heatmap;  // likewise
  MomentsPair* parts;
  int slab, slabs;
};
void launch_moments(const MomentsArguments&, bool vector, int64_t samples, void* stream);
// Merges (samples, count) to (samples).
void launch_merge(const MomentsPair* parts, int count, MomentsPair* merged, const float* weights,
                  int64_t samples, void* stream);

// The step down from level 0 of the released loss, with what its gradient needs or without; from a
// level of the paper's two pyramids; from a level of the released difference's.
enum class Down { released, released_value, paper, level };

struct DownArguments {
  const float* weights;
  Planes a, b;  // saliency and human map; or the difference alone
  int height, width;
  // The coarse level, in planes of the same layout. Released: difference, (m - mu)+, [m > mu].
  float *out_a, *out_b;
  __half* out_mask;
  int64_t out_sample;
  int out_pitch;
  const MomentsPair* parts;  // of this level
  int part_count;
  MomentsPair* out_parts;  // of the coarse level, where there
  float4* sums;            // of a block: this level's LevelSums, and the coarse level's energy
  DownTiling tiling;
  int samples;
};
void launch_level_down(const DownArguments&, Down kind, bool vector, void* stream);

// What a large level leaves to the block that ends the sample.
struct LargeLevel {
  const MomentsPair* parts;
  const float4* sums;
  int part_count, sum_count;
  float pixels, next_pixels;  // of this level and the next one
};

struct CoarseArguments {
  const float* weights;
  float* rows;
  float* saliency_std;
  Distance distance;
  int levels, first;
  bool gradient;
  float share;                   // 1 / C
  LargeLevel large[kMaxLevels];  // levels before `first`
  // Level `first`; with the gradient, a returns q or Gamma.
  Planes a, b;
  int height, width;
  // Released, level 1: D (m - mu)+ and D [m > mu], in planes like a.
  const float* positive;
  const __half* mask;
  float2* dots;  // released, large levels: products of level 1 with those, of each block
  int dot_count;
  LevelConstants* constants;  // (first, samples)
  int samples;
};
// Shared memory of the block that walks `levels` levels, the first of this size.
size_t coarse_shared_bytes(Formulation, int height, int width, int levels);
void launch_coarse(const CoarseArguments&, Formulation, size_t shared_bytes, void* stream);
// The constants of level 0 of the released loss once large levels have left their `dots`.
void launch_finish(const CoarseArguments&, void* stream);

// The gradient of either loss; or q of a level of the released one's. The paper's Gamma of a level
// is made as its gradient is.
enum class Up { released, paper, level };

struct UpArguments {
  const float* weights;
  Planes a, b;  // saliency and human map; or the difference alone
  int height, width;
  Planes coarse;  // q or Gamma of the level below, where there
  const LevelConstants* constants;
  void* out;
  Dtype out_dtype;
  int64_t out_sample, out_pitch;
  float factor;  // of (11), without the weight: 2 / (L n)
  const float* positive;
  const __half* mask;
  float2* dots;  // where there
  UpTiling tiling;
  int samples;
};
void launch_level_up(const UpArguments&, Up kind, bool vector, void* stream);

}  // namespace harmonizer::cuda
