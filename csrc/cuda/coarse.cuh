// The coarse levels of one sample, walked by one block in shared memory: down, and back up.
//
// Two zeros surround every level, which is all that the borders of (4) and (4') need.
#pragma once

#include "loss_terms.cuh"

namespace harmonizer::cuda {

constexpr int kBorder = 2;

__host__ __device__ constexpr int halved(int n) { return (n + 1) / 2; }
// Even, so that pairs of columns can be read at once.
__host__ __device__ constexpr int level_pitch(int width) {
  return (width + 2 * kBorder + 1) / 2 * 2;
}
__host__ __device__ constexpr int level_floats(int height, int width) {
  return (height + 2 * kBorder) * level_pitch(width);
}
// Floats of a level and those below it.
__host__ __device__ constexpr int stack_floats(int height, int width, int levels) {
  int floats = 0;
  for (int l = 0; l < levels; ++l) {
    floats += level_floats(height, width);
    height = halved(height);
    width = halved(width);
  }
  return floats;
}

struct Level {
  float* at;  // pixel (0, 0)
  int height, width, pitch;

  Level() = default;
  __device__ Level(float* floats, int h, int w)
      : at(floats + kBorder * level_pitch(w) + kBorder),
        height(h),
        width(w),
        pitch(level_pitch(w)) {}

  __device__ float& operator()(int y, int x) const { return at[y * pitch + x]; }
  __device__ float pixels() const { return static_cast<float>(height) * static_cast<float>(width); }
  // The level below, which lies behind this one.
  __device__ Level below(int levels = 1) const {
    Level level = *this;
    for (; levels > 0; --levels)
      level = Level(
          level.at - kBorder * level.pitch - kBorder + level_floats(level.height, level.width),
          halved(level.height), halved(level.width));
    return level;
  }
};

// Calls f(y, x) for this thread's pixels: every blockDim.x-th, without a division in the loop.
template <class F>
__device__ inline void for_each_pixel(int height, int width, F&& f) {
  const int threads = static_cast<int>(blockDim.x);
  const int rows = threads / width, columns = threads - rows * width;
  int y = static_cast<int>(threadIdx.x) / width;
  int x = static_cast<int>(threadIdx.x) - y * width;
  while (y < height) {
    f(y, x);
    y += rows;
    x += columns;
    if (x >= width) {
      x -= width;
      ++y;
    }
  }
}

// Zeros in a stack of levels; the caller synchronizes.
__device__ inline void clear(float* floats, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x))
    floats[i] = 0.f;
}

__device__ inline float taps(float a, float b, float c, float d, float e) {
  return kTap2 * c + kTap1 * (b + d) + kTap0 * (a + e);
}

// Row of five pixels from p on, downsampled; (4).
__device__ inline float taps(const float* p) { return taps(p[0], p[1], p[2], p[3], p[4]); }

// One step down, (4); calls each(value) for every pixel of the coarse level that this thread made.
template <class F>
__device__ inline void step_down(const Level& fine, const Level& coarse, F&& each) {
  const int before_y = 1 + fine.height % 2, before_x = 1 + fine.width % 2;
  for_each_pixel(coarse.height, coarse.width, [&](int y, int x) {
    const float* p = &fine(2 * y - before_y, 2 * x - before_x);
    const int pitch = fine.pitch;
    const float v = taps(taps(p), taps(p + pitch), taps(p + 2 * pitch), taps(p + 3 * pitch),
                         taps(p + 4 * pitch));
    coarse(y, x) = v;
    each(v);
  });
}

// The adjoint's weights of the coarse pixels Y - 1, Y and Y + 1 in the fine pixels 2Y and 2Y + 1 of
// one axis; (4'). They swap places between even and odd lengths.
struct AdjointTaps {
  float first[3], second[3];

  __device__ explicit AdjointTaps(bool odd) {
    const float outer = kTap0, inner = kTap2, half = kTap1;
    first[0] = odd ? outer : half;
    first[1] = odd ? inner : half;
    first[2] = odd ? outer : 0.f;
    second[0] = odd ? 0.f : outer;
    second[1] = odd ? half : inner;
    second[2] = odd ? half : outer;
  }
};

// One step up: fine(y, x) = own(y, x) + (D* coarse)(y, x), in place; (4'). Two by two fine pixels
// share the nine coarse ones around them.
template <class F>
__device__ inline void step_up(const Level& fine, const Level& coarse, F&& own) {
  const AdjointTaps vertical(fine.height % 2), horizontal(fine.width % 2);
  for_each_pixel(coarse.height, coarse.width, [&](int y, int x) {
    float first[3], second[3];  // columns 2x and 2x + 1 of three coarse rows
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      const float* p = &coarse(y - 1 + k, x - 1);
      first[k] =
          horizontal.first[0] * p[0] + horizontal.first[1] * p[1] + horizontal.first[2] * p[2];
      second[k] =
          horizontal.second[0] * p[0] + horizontal.second[1] * p[1] + horizontal.second[2] * p[2];
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float* v = row ? vertical.second : vertical.first;
      const int fine_y = 2 * y + row, fine_x = 2 * x;
      if (fine_y >= fine.height) break;
      fine(fine_y, fine_x) =
          own(fine_y, fine_x) + v[0] * first[0] + v[1] * first[1] + v[2] * first[2];
      if (fine_x + 1 < fine.width)
        fine(fine_y, fine_x + 1) =
            own(fine_y, fine_x + 1) + v[0] * second[0] + v[1] * second[1] + v[2] * second[2];
    }
  });
}

// --- released ------------------------------------------------------------------------------------

// Down from `top`, whose pixels and borders all threads can see, and with `up` back to it: then it
// holds q of (12). Returns this thread's part of the sum over the levels below top of the mean of
// p^2. All threads of the block call it; it ends with a barrier. `factor` is 2 w / L of (11).
__device__ inline float released_levels(const Level& top, int levels, float factor, bool up) {
  float energy = 0;
  Level level = top;
  for (int l = 1; l < levels; ++l) {
    const Level next = level.below();
    const float inverse = 1.f / next.pixels();
    step_down(level, next, [&](float v) { energy += v * v * inverse; });
    __syncthreads();
    level = next;
  }
  if (!up) return energy;
  const float last = factor / level.pixels();
  for_each_pixel(level.height, level.width, [&](int y, int x) { level(y, x) *= last; });
  __syncthreads();
  for (int l = levels - 2; l >= 0; --l) {
    const Level fine = top.below(l);
    const float c = factor / fine.pixels();
    step_up(fine, level, [&](int y, int x) { return c * fine(y, x); });
    __syncthreads();
    level = fine;
  }
  return energy;
}

// --- paper ---------------------------------------------------------------------------------------

__device__ inline Moments level_moments(const Level& level) {
  Moments m;
  float shift = 0, sum = 0;
  int count = 0;
  for_each_pixel(level.height, level.width, [&](int y, int x) {
    const float v = level(y, x);
    if (count++ == 0) shift = v;
    sum += v - shift;
    m.maximum = fmaxf(m.maximum, v);
  });
  if (count == 0) return m;
  m.count = static_cast<float>(count);
  m.mean = shift + sum / m.count;
  for_each_pixel(level.height, level.width, [&](int y, int x) {
    const float apart = level(y, x) - m.mean;
    m.m2 += apart * apart;
  });
  return m;
}

// What the warps of a block tell each other about the paper's coarse levels.
template <int kWarps>
struct PaperExchange {
  Moments saliency[kMaxLevels][kWarps];
  Moments heatmap[kMaxLevels][kWarps];
  LevelSums sums[kMaxLevels][kWarps];
  BothStatistics statistics[kMaxLevels];
  LevelGradient gradient[kMaxLevels];
  float distance[kMaxLevels];
};

// As released_levels, for (9), (15) and (16): with `up`, the saliency's top level holds Gamma when
// it ends. Returns the sum of the levels' distances, top included, in every thread.
template <int kWarps>
__device__ inline float paper_levels(const Level& top_x, const Level& top_y, int levels,
                                     float weight_per_channel, Distance distance, bool up,
                                     PaperExchange<kWarps>& exchange) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp,
            lane = static_cast<int>(threadIdx.x) % kWarp;
  Level x = top_x, y = top_y;
  for (int l = 0; l < levels; ++l) {
    const Moments m = warp_merge(level_moments(x)), h = warp_merge(level_moments(y));
    if (lane == 0) {
      exchange.saliency[l][warp] = m;
      exchange.heatmap[l][warp] = h;
    }
    if (l + 1 < levels) {
      const Level next_x = x.below(), next_y = y.below();
      step_down(x, next_x, [](float) {});
      step_down(y, next_y, [](float) {});
      x = next_x;
      y = next_y;
    }
    __syncthreads();
  }
  // A warp finishes a level.
  for (int l = warp; l < levels; l += kWarps) {
    const bool has = lane < kWarps;
    const Moments m = warp_merge(has ? exchange.saliency[l][lane] : Moments());
    const Moments h = warp_merge(has ? exchange.heatmap[l][lane] : Moments());
    if (lane == 0) exchange.statistics[l] = both_statistics(m, h);
  }
  __syncthreads();
  for (int l = 0; l < levels; ++l) {
    x = top_x.below(l);
    y = top_y.below(l);
    const Difference difference = paper_difference(exchange.statistics[l]);
    LevelSums sums;
    for_each_pixel(x.height, x.width,
                   [&](int i, int j) { sums.add(difference, x(i, j), y(i, j)); });
    sums = warp_sum(sums);
    if (lane == 0) exchange.sums[l][warp] = sums;
  }
  __syncthreads();
  for (int l = warp; l < levels; l += kWarps) {
    const LevelSums sums = warp_sum(lane < kWarps ? exchange.sums[l][lane] : LevelSums());
    const float pixels = top_x.below(l).pixels();
    const LevelDistance d = level_distance(sums.energy, pixels, distance);
    if (lane == 0) {
      exchange.distance[l] = d.value;
      exchange.gradient[l] =
          level_gradient(exchange.statistics[l], sums, pixels, d.chain, weight_per_channel);
    }
  }
  __syncthreads();
  float total = 0;
  for (int l = 0; l < levels; ++l) total += exchange.distance[l];
  if (!up) return total;
  x = top_x.below(levels - 1);
  y = top_y.below(levels - 1);
  const LevelGradient& last = exchange.gradient[levels - 1];
  for_each_pixel(x.height, x.width, [&](int i, int j) { x(i, j) = last(x(i, j), y(i, j)); });
  __syncthreads();
  for (int l = levels - 2; l >= 0; --l) {
    const Level fine_x = top_x.below(l), fine_y = top_y.below(l);
    const LevelGradient gradient = exchange.gradient[l];
    step_up(fine_x, x, [&](int i, int j) { return gradient(fine_x(i, j), fine_y(i, j)); });
    __syncthreads();
    x = fine_x;
  }
  return total;
}

}  // namespace harmonizer::cuda
