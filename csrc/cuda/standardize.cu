// Standardize and cut, and its derivative, on CUDA; MATH.md (3), (3').
//
// A map that the registers of one block can hold, or those of a cluster of blocks, is read once:
// its moments are merged over the cluster while its pixels wait. A larger map is read again for
// every kernel: blocks leave the moments of their part in the workspace, and whoever needs those of
// the map merges them, in the same order everywhere.
#include <cooperative_groups.h>

#include "device.cuh"
#include "launch.cuh"

namespace harmonizer::cuda {
namespace {

constexpr int kHeldThreads = 512;
constexpr unsigned kHeldPixels = kHeldThreads * kHeld;  // of a block
#ifdef HARMONIZER_CUDA_CLUSTERS     // whatever runs on a GPU with clusters was compiled for one
constexpr unsigned kMostRanks = 8;  // blocks of a cluster, on any such GPU
#else
constexpr unsigned kMostRanks = 1;
#endif
constexpr int kPartThreads = 256;
constexpr int kMostParts = kPartThreads;  // one thread reads one part's moments

// The two sums of (3'): G and G (x - mu).
struct Slopes {
  float g = 0;
  float ge = 0;
};

// One block's pixels of a map.
struct Piece {
  int64_t map;
  unsigned part;
  unsigned first;
  unsigned end;
};

struct BlockShared {
  Moments moments_of_warp[kWarp];
  float g_of_warp[kWarp];
  float ge_of_warp[kWarp];
  // What the other blocks of a cluster read.
  Moments moments;
  Slopes slopes;
};

__device__ inline Moments merge(const Moments& a, const Moments& b) {
  if (a.count == 0) return b;
  if (b.count == 0) return a;
  Moments m;
  m.count = a.count + b.count;
  const float apart = b.mean - a.mean, share = b.count / m.count;
  m.mean = a.mean + apart * share;
  m.m2 = a.m2 + b.m2 + apart * apart * (a.count * share);
  m.maximum = fmaxf(a.maximum, b.maximum);
  return m;
}

// Those of a block, in every thread. Threads without pixels come last.
__device__ inline Moments block_merge(Moments m, Moments (&of_warp)[kWarp]) {
  const unsigned lane = threadIdx.x % kWarp;
  m = warp_merge(m);
  if (lane == 0) of_warp[threadIdx.x / kWarp] = m;
  __syncthreads();
  return warp_merge(lane < blockDim.x / kWarp ? of_warp[lane] : Moments{});
}

// Those of the pixels a thread holds.
template <bool Fours>
__device__ inline Moments held_moments(const float (&v)[kHeld], unsigned first, unsigned end) {
  Moments m;
  const auto holds = [&](int k) { return held_pixel(first, Fours ? k - k % 4 : k) < end; };
  if (!holds(0)) return m;
  const float shift = v[0];
  float sum = 0;
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    if (!holds(k)) continue;
    m.count += 1;
    sum += v[k] - shift;
    m.maximum = fmaxf(m.maximum, v[k]);
  }
  m.mean = shift + sum / m.count;
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    if (!holds(k)) continue;
    const float apart = v[k] - m.mean;
    m.m2 += apart * apart;
  }
  return m;
}

// G in place of the gradient, which is 0 beyond the end.
__device__ inline Slopes held_slopes(float (&g)[kHeld], const float (&v)[kHeld], float mean) {
  Slopes s;
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const float e = v[k] - mean;
    g[k] = e > 0 ? g[k] : 0.f;
    s.g += g[k];
    s.ge += g[k] * e;
  }
  return s;
}

__device__ inline Slopes sum_over_block(Slopes s, BlockShared& shared) {
  s.g = block_sum(s.g, shared.g_of_warp);
  s.ge = block_sum(s.ge, shared.ge_of_warp);
  return s;
}

// v becomes what is stored: (3), or (3') with the sums over the map.
__device__ inline void standardized(float (&v)[kHeld], const Statistics& stats) {
  // The scale of a map that is not finite is NaN, and a cut pixel's 0 times NaN is NaN too.
#pragma unroll
  for (int k = 0; k < kHeld; ++k) v[k] = fmaxf(v[k] - stats.mean, 0.f) * stats.scale;
}
__device__ inline void derivative(float (&v)[kHeld], const float (&g)[kHeld],
                                  const Statistics& stats, const Slopes& sums, unsigned pixels) {
  const float n = static_cast<float>(pixels), g_mean = sums.g / n;
  const float slope = stats.std > 0 ? sums.ge / n * stats.scale / stats.std : 0.f;
#pragma unroll
  for (int k = 0; k < kHeld; ++k)
    v[k] = stats.scale * (g[k] - g_mean - (v[k] - stats.mean) * slope);
}

// --- where a block is ----------------------------------------------------------------------------

__device__ inline unsigned pixels_of(const StandardizeParams& p) {
  return static_cast<unsigned>(p.height * p.width);
}
__device__ inline Piece piece_of(unsigned pixels, unsigned parts, unsigned share) {
  const int64_t block = block_index();
  Piece piece;
  piece.map = block / parts;
  piece.part = static_cast<unsigned>(block % parts);
  piece.first = piece.part * share;
  piece.end = min(piece.first + share, pixels);
  return piece;
}
template <bool Fours, bool Kept>
__device__ inline void load_piece(float (&v)[kHeld], const StandardizeParams& p, const Maps& maps,
                                  const Piece& piece, unsigned first) {
  load_held<Fours, Kept>(v, maps, map_offset(maps, piece.map, static_cast<unsigned>(p.channels)),
                         static_cast<unsigned>(p.width), first, piece.end);
}
template <bool Fours>
__device__ inline void store_piece(const StandardizeParams& p, const Piece& piece, unsigned first,
                                   const float (&v)[kHeld]) {
  store_held<Fours>(p.output, p.maps.dtype, piece.map * pixels_of(p), first, piece.end, v);
}

// --- maps that are held --------------------------------------------------------------------------

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
using ClusterGroup = cooperative_groups::cluster_group;
__device__ inline ClusterGroup this_cluster() { return cooperative_groups::this_cluster(); }
#else
// Never called: the host asks for no clusters there.
struct ClusterGroup {
  __device__ void sync() const { __trap(); }
  template <class T>
  __device__ T* map_shared_rank(T* place, int) const {
    return place;
  }
};
__device__ inline ClusterGroup this_cluster() { return {}; }
#endif

// Merges over the `ranks` blocks of a cluster, every warp for itself: a lane reads a rank.
class Cluster {
 public:
  __device__ explicit Cluster(unsigned ranks) : ranks_(ranks), group_(this_cluster()) {}

  __device__ Moments merge(const Moments& m, BlockShared& shared) const {
    if (ranks_ == 1) return m;
    if (threadIdx.x == 0) shared.moments = m;
    group_.sync();
    return warp_merge(of_rank(shared.moments));
  }
  __device__ Slopes sum(const Slopes& s, BlockShared& shared) const {
    if (ranks_ == 1) return s;
    if (threadIdx.x == 0) shared.slopes = s;
    group_.sync();
    const Slopes other = of_rank(shared.slopes);
    return {warp_sum(other.g), warp_sum(other.ge)};
  }
  // A block's shared memory lasts until all have read it.
  __device__ void leave() const {
    if (ranks_ > 1) group_.sync();
  }

 private:
  template <class T>
  __device__ T of_rank(T& place) const {
    const unsigned rank = threadIdx.x % kWarp;
    return rank < ranks_ ? *group_.map_shared_rank(&place, static_cast<int>(rank)) : T{};
  }

  unsigned ranks_;
  ClusterGroup group_;
};

template <bool Fours, bool Derivative>
__global__ void __launch_bounds__(kHeldThreads)
    standardize_held(const StandardizeParams p, const unsigned ranks, const unsigned share) {
  BlockShared& shared = shared_layout<BlockShared>();
  const unsigned pixels = pixels_of(p);
  const Piece piece = piece_of(pixels, ranks, share);
  if (piece.map >= p.batch * p.channels) return;  // with the whole cluster
  const Cluster cluster(ranks);
  float v[kHeld], g[kHeld];
  load_piece<Fours, false>(v, p, p.maps, piece, piece.first);
  if constexpr (Derivative) load_piece<Fours, false>(g, p, p.grad, piece, piece.first);
  const Moments own =
      block_merge(held_moments<Fours>(v, piece.first, piece.end), shared.moments_of_warp);
  const Statistics stats = statistics(cluster.merge(own, shared));
  if constexpr (Derivative) {
    const Slopes some = held_slopes(g, v, stats.mean);
    derivative(v, g, stats, cluster.sum(sum_over_block(some, shared), shared), pixels);
  } else {
    standardized(v, stats);
  }
  store_piece<Fours>(p, piece, piece.first, v);
  cluster.leave();
}

// --- maps in parts -------------------------------------------------------------------------------

// What the kernels leave for each other, one for every part of every map.
struct Partials {
  Moments* moments;
  Slopes* slopes;
};

__device__ inline Statistics merged_statistics(const Partials& partials, const Piece& piece,
                                               unsigned parts, BlockShared& shared) {
  const Moments* of_map = partials.moments + piece.map * parts;
  return statistics(
      block_merge(threadIdx.x < parts ? of_map[threadIdx.x] : Moments{}, shared.moments_of_warp));
}

template <bool Fours>
__global__ void __launch_bounds__(kPartThreads, 3)
    standardize_moments(const StandardizeParams p, const Partials partials, const unsigned parts,
                        const unsigned share) {
  BlockShared& shared = shared_layout<BlockShared>();
  const Piece piece = piece_of(pixels_of(p), parts, share);
  if (piece.map >= p.batch * p.channels) return;
  Moments m;
  for (unsigned first = piece.first; first < piece.end; first += kPartThreads * kHeld) {
    float v[kHeld];
    load_piece<Fours, true>(v, p, p.maps, piece, first);
    m = merge(m, held_moments<Fours>(v, first, piece.end));
  }
  m = block_merge(m, shared.moments_of_warp);
  if (threadIdx.x == 0) partials.moments[piece.map * parts + piece.part] = m;
}

template <bool Fours>
__global__ void __launch_bounds__(kPartThreads)
    standardize_slopes(const StandardizeParams p, const Partials partials, const unsigned parts,
                       const unsigned share) {
  BlockShared& shared = shared_layout<BlockShared>();
  const Piece piece = piece_of(pixels_of(p), parts, share);
  if (piece.map >= p.batch * p.channels) return;
  const Statistics stats = merged_statistics(partials, piece, parts, shared);
  Slopes sums;
  for (unsigned first = piece.first; first < piece.end; first += kPartThreads * kHeld) {
    float v[kHeld], g[kHeld];
    load_piece<Fours, true>(v, p, p.maps, piece, first);
    load_piece<Fours, true>(g, p, p.grad, piece, first);
    const Slopes some = held_slopes(g, v, stats.mean);
    sums.g += some.g;
    sums.ge += some.ge;
  }
  sums = sum_over_block(sums, shared);
  if (threadIdx.x == 0) partials.slopes[piece.map * parts + piece.part] = sums;
}

template <bool Fours, bool Derivative>
__global__ void __launch_bounds__(kPartThreads)
    standardize_apply(const StandardizeParams p, const Partials partials, const unsigned parts,
                      const unsigned share) {
  BlockShared& shared = shared_layout<BlockShared>();
  const unsigned pixels = pixels_of(p);
  const Piece piece = piece_of(pixels, parts, share);
  if (piece.map >= p.batch * p.channels) return;
  const Statistics stats = merged_statistics(partials, piece, parts, shared);
  Slopes sums;
  if constexpr (Derivative) {
    if (threadIdx.x < parts) sums = partials.slopes[piece.map * parts + threadIdx.x];
    sums = sum_over_block(sums, shared);
  }
  for (unsigned first = piece.first; first < piece.end; first += kPartThreads * kHeld) {
    float v[kHeld];
    load_piece<Fours, false>(v, p, p.maps, piece, first);
    if constexpr (Derivative) {
      float g[kHeld];
      load_piece<Fours, false>(g, p, p.grad, piece, first);
      held_slopes(g, v, stats.mean);
      derivative(v, g, stats, sums, pixels);
    } else {
      standardized(v, stats);
    }
    store_piece<Fours>(p, piece, first, v);
  }
}

// --- launches ------------------------------------------------------------------------------------

int64_t ceil_div(int64_t n, int64_t d) { return (n - 1) / d + 1; }

// How a map is cut into pieces that begin at a multiple of four pixels.
struct Cut {
  unsigned parts;
  unsigned share;
};
Cut cut(int64_t pixels, int64_t parts) {
  const int64_t share = ceil_div(ceil_div(pixels, parts), 4) * 4;
  return {static_cast<unsigned>(ceil_div(pixels, share)), static_cast<unsigned>(share)};
}
// Depends on the map alone, so that a map's result does not depend on the others.
Cut cut_in_parts(int64_t pixels) {
  return cut(pixels, min(ceil_div(pixels, kPartThreads * kHeld), int64_t{kMostParts}));
}

Grid held_grid(int64_t maps, unsigned ranks, int threads) {
  return {"standardize_held", grid_of(maps * ranks), threads, sizeof(BlockShared),
          static_cast<int>(ranks)};
}
// How many blocks hold a map of so many pixels; 0 where more would be needed than the device has in
// a cluster.
template <bool Fours, bool Derivative>
unsigned ranks_that_hold(const StandardizeParams& p, int64_t pixels) {
  unsigned ranks = 1;
  while (ranks <= kMostRanks && ceil_div(pixels, ranks) > kHeldPixels) ranks *= 2;
  if (ranks == 1) return 1;
  if (ranks > kMostRanks || device_limits(p.device).architecture < 90) return 0;
  // Asked with the largest block that any map needs.
  const Grid grid = held_grid(1, ranks, kHeldThreads);
  return cluster_fits<standardize_held<Fours, Derivative>>(grid, p.device) ? ranks : 0;
}

template <bool Fours, bool Derivative>
void run(const StandardizeParams& p) {
  const int64_t maps = p.batch * p.channels, pixels = p.height * p.width;
  if (const unsigned ranks = ranks_that_hold<Fours, Derivative>(p, pixels)) {
    const unsigned share = cut(pixels, ranks).share;
    const int64_t threads = ceil_div(ceil_div(share, kHeld), kWarp) * kWarp;
    launch<standardize_held<Fours, Derivative>>(held_grid(maps, ranks, static_cast<int>(threads)),
                                                p.stream, p, ranks, share);
    return;
  }
  const Cut c = cut_in_parts(pixels);
  Partials partials;
  partials.moments = static_cast<Moments*>(p.workspace);
  partials.slopes = reinterpret_cast<Slopes*>(partials.moments + maps * c.parts);
  const auto grid = [&](const char* kernel) {
    return Grid{kernel, grid_of(maps * c.parts), kPartThreads, sizeof(BlockShared)};
  };
  launch<standardize_moments<Fours>>(grid("standardize_moments"), p.stream, p, partials, c.parts,
                                     c.share);
  if constexpr (Derivative)
    launch<standardize_slopes<Fours>>(grid("standardize_slopes"), p.stream, p, partials, c.parts,
                                      c.share);
  launch<standardize_apply<Fours, Derivative>>(grid("standardize_apply"), p.stream, p, partials,
                                               c.parts, c.share);
}

template <bool Fours>
void run(const StandardizeParams& p) {
  p.grad.data ? run<Fours, true>(p) : run<Fours, false>(p);
}

}  // namespace

size_t standardize_workspace_bytes(const StandardizeParams& p) {
  const int64_t maps = p.batch * p.channels, pixels = p.height * p.width;
  if (pixels <= kHeldPixels) return 0;
  const size_t one = sizeof(Moments) + (p.grad.data ? sizeof(Slopes) : 0);
  return static_cast<size_t>(maps) * cut_in_parts(pixels).parts * one;
}

void standardize(const StandardizeParams& p) {
  if (p.batch * p.channels == 0) return;
  check_current(p.device);
  const Maps output = dense(p.output, p.maps.dtype, p.channels, p.height, p.width);
  const bool fours = in_fours(p.maps, p.width) && in_fours(output, p.width) &&
                     (!p.grad.data || in_fours(p.grad, p.width));
  fours ? run<true>(p) : run<false>(p);
}

}  // namespace harmonizer::cuda
