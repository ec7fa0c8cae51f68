// Every pixel of both maps, read once: channel mean, human map as float32, moments of slabs.
#include <type_traits>

#include "loss_general.cuh"

namespace harmonizer::cuda {
namespace {

constexpr int kWarps = kMomentsThreads / kWarp;

struct MomentsShared {
  MomentsPair warps[kWarps];
};

// Of a thread, a few pixels at a time: two passes over those in registers, then (1), (2) merged.
struct RunningMoments {
  float mean = 0, m2 = 0, maximum = -FLT_MAX;

  // `before` pixels are in already; share is kCount / (before + kCount).
  template <int kCount>
  __device__ void add(const float (&v)[kCount], float before, float share) {
    float sum = 0, squares = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      sum += v[i] - v[0];
      maximum = fmaxf(maximum, v[i]);
    }
    const float group = v[0] + sum * (1.f / kCount);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float apart = v[i] - group;
      squares += apart * apart;
    }
    const float apart = group - mean;
    mean += apart * share;
    // In this order: the first pixels may lie so far from 0 that the square would overflow.
    m2 += squares + before * share * apart * apart;
  }
};

struct BothMoments {
  float count = 0;
  RunningMoments saliency, heatmap;

  template <int kCount>
  __device__ void add(const float (&m)[kCount], const float (&h)[kCount]) {
    const float share = kCount / (count + kCount);
    saliency.add(m, count, share);
    heatmap.add(h, count, share);
    count += kCount;
  }
  __device__ MomentsPair pair() const {
    return {{count, saliency.mean, saliency.m2, saliency.maximum},
            {count, heatmap.mean, heatmap.m2, heatmap.maximum}};
  }
};

__device__ inline void add4(float* sum, float4 v) {
  sum[0] += v.x;
  sum[1] += v.y;
  sum[2] += v.z;
  sum[3] += v.w;
}
__device__ inline float4 four(const float* v) { return make_float4(v[0], v[1], v[2], v[3]); }

// Where one sample's slab is read and written.
template <class S, class H>
struct Slab {
  const S* saliency;
  const H* heatmap;
  float* mean;
  float* heatmap_out;
  BothMoments moments;
};

// kQuads times four pixels, a block's width apart, from pixel `at` of the slab on.
template <int kQuads, class S, class H>
__device__ inline void add_quads(const MomentsArguments& a, Slab<S, H>& slab, int at) {
  constexpr int kStep = 4 * kMomentsThreads;
  float m[4 * kQuads] = {}, h[4 * kQuads] = {};
#pragma unroll
  for (int i = 0; i < kQuads; ++i) add4(h + 4 * i, load4_kept(slab.heatmap + at + i * kStep));
  const S* channel = slab.saliency + at;
#pragma unroll 3
  for (int c = 0; c < a.channels; ++c) {
#pragma unroll
    for (int i = 0; i < kQuads; ++i) add4(m + 4 * i, load4(channel + i * kStep));
    channel += a.saliency.stride_channel;
  }
  // Rounded before any difference is taken, so that a constant map stays one.
#pragma unroll
  for (int i = 0; i < 4 * kQuads; ++i) m[i] = __fmul_rn(m[i], a.share);
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    if (slab.mean) *reinterpret_cast<float4*>(slab.mean + at + i * kStep) = four(m + 4 * i);
    if (slab.heatmap_out)
      *reinterpret_cast<float4*>(slab.heatmap_out + at + i * kStep) = four(h + 4 * i);
  }
  slab.moments.add(m, h);
}

// A thread's way through rows with gaps, a block's width of pixels at a time.
struct Cursor {
  unsigned x;
  int64_t saliency, heatmap;
};

template <int kCount, class S, class H>
__device__ inline void add_pixels(const MomentsArguments& a, Slab<S, H>& slab, int at,
                                  Cursor& cursor, const Cursor& step, const Cursor& wrap) {
  const unsigned width = static_cast<unsigned>(a.width);
  int64_t from[kCount];
  float m[kCount] = {}, h[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    from[i] = cursor.saliency;
    h[i] = widen(slab.heatmap[cursor.heatmap]);
    cursor.x += step.x;
    cursor.saliency += step.saliency;
    cursor.heatmap += step.heatmap;
    if (cursor.x >= width) {
      cursor.x -= width;
      cursor.saliency += wrap.saliency;
      cursor.heatmap += wrap.heatmap;
    }
  }
  const S* channel = slab.saliency;
#pragma unroll 3
  for (int c = 0; c < a.channels; ++c) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) m[i] += widen(channel[from[i]]);
    channel += a.saliency.stride_channel;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    m[i] = __fmul_rn(m[i], a.share);
    if (slab.mean) slab.mean[at + i * kMomentsThreads] = m[i];
    if (slab.heatmap_out) slab.heatmap_out[at + i * kMomentsThreads] = h[i];
  }
  slab.moments.add(m, h);
}

template <class S, class H, bool kVector>
__global__ void __launch_bounds__(kMomentsThreads) loss_moments(const MomentsArguments a) {
  MomentsShared& shared = shared_layout<MomentsShared>();
  const int block = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const int sample = block / a.slabs, index = block - sample * a.slabs;
  if (a.weights[sample] == 0.f) return;
  const int64_t begin = static_cast<int64_t>(index) * a.slab;
  const int count = static_cast<int>(a.pixels - begin < a.slab ? a.pixels - begin : a.slab);
  Slab<S, H> slab;
  slab.saliency = static_cast<const S*>(a.saliency.data) + sample * a.saliency.stride_batch;
  slab.heatmap = static_cast<const H*>(a.heatmaps.data) + sample * a.heatmaps.stride_batch;
  slab.mean = a.mean.data ? a.mean.data + sample * a.mean.sample + begin : nullptr;
  slab.heatmap_out = a.heatmap.data ? a.heatmap.data + sample * a.heatmap.sample + begin : nullptr;
  if (kVector) {
    constexpr int kStep = 4 * kMomentsThreads;
    slab.saliency += begin;
    slab.heatmap += begin;
    int at = 4 * thread;
    for (; at + kStep < count; at += 2 * kStep) add_quads<2>(a, slab, at);
    if (at < count) add_quads<1>(a, slab, at);
  } else {
    constexpr int kGroup = 4;
    const int rows = kMomentsThreads / a.width, columns = kMomentsThreads - rows * a.width;
    const Cursor step{static_cast<unsigned>(columns),
                      rows * a.saliency.stride_row + columns * a.saliency.stride_column,
                      rows * a.heatmaps.stride_row + columns * a.heatmaps.stride_column};
    const Cursor wrap{0, a.saliency.stride_row - a.width * a.saliency.stride_column,
                      a.heatmaps.stride_row - a.width * a.heatmaps.stride_column};
    const unsigned from = static_cast<unsigned>(begin) + static_cast<unsigned>(thread);
    const unsigned y = from / static_cast<unsigned>(a.width);
    const unsigned x = from - y * static_cast<unsigned>(a.width);
    Cursor cursor{x, y * a.saliency.stride_row + x * a.saliency.stride_column,
                  y * a.heatmaps.stride_row + x * a.heatmaps.stride_column};
    int at = thread;
    for (; at + (kGroup - 1) * kMomentsThreads < count; at += kGroup * kMomentsThreads)
      add_pixels<kGroup>(a, slab, at, cursor, step, wrap);
    for (; at < count; at += kMomentsThreads) add_pixels<1>(a, slab, at, cursor, step, wrap);
  }
  const MomentsPair all = block_merge(slab.moments.pair(), shared.warps);
  if (thread == 0) a.parts[block] = all;
}

__global__ void __launch_bounds__(kMomentsThreads)
    loss_merge(const MomentsPair* parts, int count, MomentsPair* merged, const float* weights) {
  MomentsShared& shared = shared_layout<MomentsShared>();
  const int sample = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  if (weights[sample] == 0.f) return;
  const MomentsPair own =
      merge_parts(parts + static_cast<int64_t>(sample) * count, thread, count, kMomentsThreads);
  const MomentsPair all = block_merge(own, shared.warps);
  if (thread == 0) merged[sample] = all;
}

template <class S, class H>
void launch_typed(const MomentsArguments& a, bool vector, const Grid& grid, void* stream) {
  if (vector)
    launch<loss_moments<S, H, true>>(grid, stream, a);
  else
    launch<loss_moments<S, H, false>>(grid, stream, a);
}

}  // namespace

void launch_moments(const MomentsArguments& a, bool vector, int64_t samples, void* stream) {
  const Grid grid{"loss_moments", dim3(static_cast<unsigned>(samples * a.slabs)), kMomentsThreads,
                  sizeof(MomentsShared)};
  with_storage(a.saliency.dtype, [&](auto* saliency) {
    with_storage(a.heatmaps.dtype, [&](auto* heatmap) {
      using S = std::remove_pointer_t<decltype(saliency)>;
      using H = std::remove_pointer_t<decltype(heatmap)>;
      launch_typed<S, H>(a, vector, grid, stream);
    });
  });
}

void launch_merge(const MomentsPair* parts, int count, MomentsPair* merged, const float* weights,
                  int64_t samples, void* stream) {
  const Grid grid{"loss_merge", dim3(static_cast<unsigned>(samples)), kMomentsThreads,
                  sizeof(MomentsShared)};
  launch<loss_merge>(grid, stream, parts, count, merged, weights);
}

}  // namespace harmonizer::cuda
