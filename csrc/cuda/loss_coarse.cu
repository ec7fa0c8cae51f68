// What ends a sample: the levels that fit one block's shared memory, the row loss, and what the
// gradient's launch needs to know.
#include "loss_general.cuh"

namespace harmonizer::cuda {
namespace {

constexpr int kThreads = kCoarseWarps * kWarp;

// The levels' floats follow either of these.
struct alignas(16) ReleasedShared {
  BothStatistics statistics;
  float energy[kCoarseWarps], g[kCoarseWarps], g_e[kCoarseWarps];
};
struct alignas(16) PaperShared {
  PaperExchange<kCoarseWarps> exchange;
  float distance[kMaxLevels];
};

// Calls use(offset, pixel, both, load(offset)) for each of this thread's pairs of a level's pixels:
// where a pair lies in a plane and in the level, and whether its second pixel is one. Several loads
// are under way at once; they begin before the first use.
template <class Load, class Use>
__device__ inline void for_each_pair(const Level& level, int64_t pitch, Load&& load, Use&& use) {
  constexpr int kAtOnce = 4;
  const int threads = kThreads, width = (level.width + 1) / 2;
  const int rows = threads / width, columns = threads - rows * width;
  int y = static_cast<int>(threadIdx.x) / width;
  int x = static_cast<int>(threadIdx.x) - y * width;
  while (y < level.height) {
    int at_y[kAtOnce], at_x[kAtOnce];
    decltype(load(0)) value[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      at_y[i] = y;
      at_x[i] = 2 * x;
      y += rows;
      x += columns;
      if (x >= width) {
        x -= width;
        ++y;
      }
      // Beyond the end, the first once more: a branch would wait for one load at a time.
      const bool inside = at_y[i] < level.height;
      value[i] = load((inside ? at_y[i] : at_y[0]) * static_cast<int>(pitch) +
                      (inside ? at_x[i] : at_x[0]));
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (at_y[i] >= level.height) break;
      use(at_y[i] * static_cast<int>(pitch) + at_x[i], &level(at_y[i], at_x[i]),
          at_x[i] + 1 < level.width, value[i]);
    }
  }
}

__device__ inline float2 load_pair(const float* p) { return *reinterpret_cast<const float2*>(p); }
__device__ inline void store_pair(float* p, float2 v) { *reinterpret_cast<float2*>(p) = v; }

__device__ inline void read_level(const Planes& planes, int sample, const Level& level) {
  const float* plane = planes.data + sample * planes.sample;
  for_each_pair(
      level, planes.pitch, [&](int at) { return load_pair(plane + at); },
      [](int, float* pixel, bool both, float2 v) {
        store_pair(pixel, make_float2(v.x, both ? v.y : 0.f));
      });
}

__device__ inline void write_level(const Planes& planes, int sample, const Level& level) {
  float* plane = planes.data + sample * planes.sample;
  for_each_pair(
      level, planes.pitch, [](int) { return 0; },
      [&](int at, float* pixel, bool, int) { store_pair(plane + at, load_pair(pixel)); });
}

// What (14) needs of a pair of level 1.
struct DotPair {
  float2 positive;
  union {
    unsigned bits;
    __half mask[2];
  };
};

__device__ inline int warp_index() { return static_cast<int>(threadIdx.x) / kWarp; }
__device__ inline int lane_index() { return static_cast<int>(threadIdx.x) % kWarp; }

__device__ inline float energy_factor(const CoarseArguments& a, float weight) {
  return 2.f * weight / static_cast<float>(a.levels);
}

// The sums of all threads, in thread 0; ends after a barrier.
__device__ inline LevelSums block_sum(ReleasedShared& shared, const LevelSums& own) {
  const LevelSums of_warp = warp_sum(own);
  if (lane_index() == 0) {
    shared.energy[warp_index()] = of_warp.energy;
    shared.g[warp_index()] = of_warp.g;
    shared.g_e[warp_index()] = of_warp.g_e;
  }
  __syncthreads();
  if (warp_index() > 0) return of_warp;
  const int i = lane_index();
  const bool has = i < kCoarseWarps;
  return warp_sum(
      LevelSums{has ? shared.energy[i] : 0.f, has ? shared.g[i] : 0.f, has ? shared.g_e[i] : 0.f});
}

// The first warp leaves level 0's statistics to all threads, which must synchronize.
__device__ inline void merge_statistics(ReleasedShared& shared, const CoarseArguments& a,
                                        int sample) {
  if (warp_index() > 0) return;
  const LargeLevel& level = a.large[0];
  const MomentsPair m = warp_merge_parts(
      level.parts + static_cast<int64_t>(sample) * level.part_count, level.part_count);
  if (lane_index() == 0) shared.statistics = both_statistics(m.saliency, m.heatmap);
}

__global__ void __launch_bounds__(kThreads) loss_coarse_released(const CoarseArguments a) {
  ReleasedShared& shared = shared_layout<ReleasedShared>();
  const int sample = static_cast<int>(blockIdx.x);
  const float weight = a.weights[sample];
  if (weight == 0.f) {
    if (threadIdx.x == 0) a.rows[sample] = a.saliency_std[sample] = 0.f;
    return;
  }
  const int walked = a.levels - a.first;
  float* floats = reinterpret_cast<float*>(&shared + 1);
  const Level top(floats, a.height, a.width);
  if (walked > 0) {
    clear(floats, stack_floats(a.height, a.width, walked));
    __syncthreads();
    read_level(a.a, sample, top);
  }
  merge_statistics(shared, a, sample);

  LevelSums sums;
  for (int l = 0; l < a.first; ++l) {
    const LargeLevel& level = a.large[l];
    const float4* parts = level.sums + static_cast<int64_t>(sample) * level.sum_count;
    LevelSums own;
    float next = 0;
    for (int i = static_cast<int>(threadIdx.x); i < level.sum_count; i += kThreads) {
      const float4 part = parts[i];
      own.energy += part.x;
      own.g += part.y;
      own.g_e += part.z;
      next += part.w;
    }
    sums.energy += own.energy / level.pixels + next / level.next_pixels;
    sums.g += own.g;
    sums.g_e += own.g_e;
  }
  __syncthreads();

  const float factor = energy_factor(a, weight), chain = factor / a.large[0].pixels;
  sums.g *= chain;
  sums.g_e *= chain;
  if (walked > 0) {
    sums.energy += released_levels(top, walked, factor, a.gradient);
    if (a.gradient) write_level(a.a, sample, top);
    if (a.gradient && a.first == 1) {
      const float* positive = a.positive + sample * a.a.sample;
      const __half* mask = a.mask + sample * a.a.sample;
      for_each_pair(
          top, a.a.pitch,
          [&](int at) {
            DotPair v;
            v.positive = load_pair(positive + at);
            v.bits = *reinterpret_cast<const unsigned*>(mask + at);
            return v;
          },
          [&](int, const float* pixel, bool both, const DotPair& v) {
            const float2 q = load_pair(pixel);
            sums.g += q.x * widen(v.mask[0]);
            sums.g_e += q.x * v.positive.x;
            if (!both) return;
            sums.g += q.y * widen(v.mask[1]);
            sums.g_e += q.y * v.positive.y;
          });
    }
  }
  const LevelSums all = block_sum(shared, sums);
  if (threadIdx.x > 0) return;
  const BothStatistics& statistics = shared.statistics;
  a.rows[sample] = weight * all.energy / static_cast<float>(a.levels);
  a.saliency_std[sample] = statistics.saliency.std;
  if (a.gradient && a.first == 1)
    a.constants[sample] =
        released_constants(statistics, all.g, all.g_e, a.large[0].pixels, a.share, chain);
}

__global__ void __launch_bounds__(kThreads) loss_finish(const CoarseArguments a) {
  ReleasedShared& shared = shared_layout<ReleasedShared>();
  const int sample = static_cast<int>(blockIdx.x);
  const float weight = a.weights[sample];
  if (weight == 0.f) return;
  merge_statistics(shared, a, sample);
  const LargeLevel& level = a.large[0];
  const float4* parts = level.sums + static_cast<int64_t>(sample) * level.sum_count;
  LevelSums sums;
  for (int i = static_cast<int>(threadIdx.x); i < level.sum_count; i += kThreads) {
    sums.g += parts[i].y;
    sums.g_e += parts[i].z;
  }
  const float chain = energy_factor(a, weight) / level.pixels;
  sums.g *= chain;
  sums.g_e *= chain;
  const float2* dots = a.dots + static_cast<int64_t>(sample) * a.dot_count;
  for (int i = static_cast<int>(threadIdx.x); i < a.dot_count; i += kThreads) {
    sums.g += dots[i].x;
    sums.g_e += dots[i].y;
  }
  const LevelSums all = block_sum(shared, sums);
  if (threadIdx.x == 0)
    a.constants[sample] =
        released_constants(shared.statistics, all.g, all.g_e, level.pixels, a.share, chain);
}

// A large level's distance and constants, made by one warp.
__device__ inline float finish_level(const CoarseArguments& a, int l, int sample, float weight) {
  const LargeLevel& level = a.large[l];
  const MomentsPair m = warp_merge_parts(
      level.parts + static_cast<int64_t>(sample) * level.part_count, level.part_count);
  const BothStatistics statistics = both_statistics(m.saliency, m.heatmap);
  const float4* parts = level.sums + static_cast<int64_t>(sample) * level.sum_count;
  LevelSums own;
  for (int i = lane_index(); i < level.sum_count; i += kWarp) {
    const float4 part = parts[i];
    own.energy += part.x;
    own.g += part.y;
    own.g_e += part.z;
  }
  const LevelSums sums = warp_sum(own);
  const LevelDistance distance = level_distance(sums.energy, level.pixels, a.distance);
  if (lane_index() == 0) {
    if (a.gradient)
      a.constants[static_cast<int64_t>(l) * a.samples + sample] = {
          level_gradient(statistics, sums, level.pixels, distance.chain, weight * a.share), 0.f};
    if (l == 0) a.saliency_std[sample] = statistics.saliency.std;
  }
  return distance.value;
}

__global__ void __launch_bounds__(kThreads) loss_coarse_paper(const CoarseArguments a) {
  PaperShared& shared = shared_layout<PaperShared>();
  const int sample = static_cast<int>(blockIdx.x);
  const float weight = a.weights[sample];
  if (weight == 0.f) {
    if (threadIdx.x == 0) a.rows[sample] = a.saliency_std[sample] = 0.f;
    return;
  }
  const int walked = a.levels - a.first;
  const int stack = walked > 0 ? stack_floats(a.height, a.width, walked) : 0;
  float* floats = reinterpret_cast<float*>(&shared + 1);
  const Level x(floats, a.height, a.width), y(floats + stack, a.height, a.width);
  if (walked > 0) {
    clear(floats, 2 * stack);
    __syncthreads();
    read_level(a.a, sample, x);
    read_level(a.b, sample, y);
  }
  for (int l = warp_index(); l < a.first; l += kCoarseWarps) {
    const float distance = finish_level(a, l, sample, weight);
    if (lane_index() == 0) shared.distance[l] = distance;
  }
  __syncthreads();
  float loss = 0;
  for (int l = 0; l < a.first; ++l) loss += shared.distance[l];
  if (walked > 0) {
    loss += paper_levels(x, y, walked, weight * a.share, a.distance, a.gradient, shared.exchange);
    if (a.gradient) write_level(a.a, sample, x);
  }
  if (threadIdx.x == 0) a.rows[sample] = weight * loss;
}

}  // namespace

size_t coarse_shared_bytes(Formulation formulation, int height, int width, int levels) {
  const bool paper = formulation == Formulation::paper;
  const size_t fixed = paper ? sizeof(PaperShared) : sizeof(ReleasedShared);
  const size_t floats = levels > 0 ? stack_floats(height, width, levels) : 0;
  return fixed + (paper ? 2 : 1) * floats * sizeof(float);
}

void launch_coarse(const CoarseArguments& a, Formulation formulation, size_t shared_bytes,
                   void* stream) {
  const Grid grid{"loss_coarse", dim3(static_cast<unsigned>(a.samples)), kThreads, shared_bytes};
  if (formulation == Formulation::paper)
    launch<loss_coarse_paper>(grid, stream, a);
  else
    launch<loss_coarse_released>(grid, stream, a);
}

void launch_finish(const CoarseArguments& a, void* stream) {
  const Grid grid{"loss_finish", dim3(static_cast<unsigned>(a.samples)), kThreads,
                  sizeof(ReleasedShared)};
  launch<loss_finish>(grid, stream, a);
}

}  // namespace harmonizer::cuda
