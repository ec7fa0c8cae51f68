// Mean squared difference of positive parts, and its derivatives, on CUDA; MATH.md (6), (6').
#include "device.cuh"
#include "launch.cuh"

namespace harmonizer::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kAtOnce = kThreads * kHeld;  // pixels of a block
constexpr int64_t kMostParts = 256;            // of a row, forward

struct BlockShared {
  float of_warp[kWarp];
};

// Unlike a maximum, this lets NaN through.
__device__ inline float relu(float v) { return v < 0 ? 0.f : v; }

// One block's pixels of a row.
struct Piece {
  int64_t row;
  unsigned first;
  unsigned end;
};
__device__ inline Piece piece_of(const PositivePartMseParams& p, unsigned parts, unsigned share) {
  const int64_t block = block_index();
  const unsigned first = static_cast<unsigned>(block % parts) * share;
  return {block / parts, first, min(first + share, static_cast<unsigned>(p.height * p.width))};
}

template <bool Fours>
__device__ inline void load_both(float (&a)[kHeld], float (&b)[kHeld],
                                 const PositivePartMseParams& p, const Piece& piece,
                                 unsigned first) {
  const unsigned width = static_cast<unsigned>(p.width);
  load_held<Fours, false>(a, p.a, piece.row * p.a.stride_batch, width, first, piece.end);
  load_held<Fours, false>(b, p.b, piece.row * p.b.stride_batch, width, first, piece.end);
}

// Sums of squares of the parts of every row. Of a row's only part it is the row's result.
template <bool Fours>
__global__ void __launch_bounds__(kThreads)
    positive_part_squares(const PositivePartMseParams p, float* sums, const unsigned parts,
                          const unsigned share) {
  BlockShared& shared = shared_layout<BlockShared>();
  const Piece piece = piece_of(p, parts, share);
  if (piece.row >= p.batch) return;
  float total = 0;
  for (unsigned first = piece.first; first < piece.end; first += blockDim.x * kHeld) {
    float a[kHeld], b[kHeld], sum = 0;
    load_both<Fours>(a, b, p, piece, first);
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {  // pixels beyond the end are 0 in both
      const float d = relu(a[k]) - relu(b[k]);
      sum += d * d;
    }
    total += sum;
  }
  total = block_sum(total, shared.of_warp);
  if (threadIdx.x != 0) return;
  if (parts == 1)
    static_cast<float*>(p.rows)[piece.row] = total / static_cast<float>(p.height * p.width);
  else
    sums[block_index()] = total;
}

// A warp adds up one row's parts.
__global__ void __launch_bounds__(kThreads)
    positive_part_rows(const PositivePartMseParams p, const float* sums, const unsigned parts) {
  const int64_t row = block_index() * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= p.batch) return;
  float sum = 0;
  for (unsigned i = threadIdx.x % kWarp; i < parts; i += kWarp) sum += sums[row * parts + i];
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0)
    static_cast<float*>(p.rows)[row] = sum / static_cast<float>(p.height * p.width);
}

template <bool Fours>
__global__ void __launch_bounds__(kThreads)
    positive_part_derivatives(const PositivePartMseParams p, const unsigned parts,
                              const unsigned share) {
  const Piece piece = piece_of(p, parts, share);
  if (piece.row >= p.batch) return;
  const int64_t pixels = p.height * p.width;
  const float factor =
      static_cast<const float*>(p.grad)[piece.row] * (2.f / static_cast<float>(pixels));
  float a[kHeld], b[kHeld];
  load_both<Fours>(a, b, p, piece, piece.first);
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const float d = factor * (relu(a[k]) - relu(b[k]));
    a[k] = a[k] <= 0 ? 0.f : d;
    b[k] = b[k] <= 0 ? 0.f : -d;
  }
  const int64_t offset = piece.row * pixels;
  store_held<Fours>(p.grad_a, p.a.dtype, offset, piece.first, piece.end, a);
  store_held<Fours>(p.grad_b, p.b.dtype, offset, piece.first, piece.end, b);
}

// --- launches ------------------------------------------------------------------------------------

int64_t ceil_div(int64_t n, int64_t d) { return (n - 1) / d + 1; }

// How a row is cut into parts that begin at a multiple of four pixels, and threads enough for one.
struct Cut {
  unsigned parts;
  unsigned share;
  int threads;
};
Cut cut(const PositivePartMseParams& p) {
  const int64_t pixels = p.height * p.width;
  int64_t parts = ceil_div(pixels, kAtOnce);
  // The result of a row depends on the row alone: their number does not count.
  if (!p.grad) parts = parts < kMostParts ? parts : kMostParts;
  const int64_t share = ceil_div(ceil_div(pixels, parts), 4) * 4;
  const int64_t warps = ceil_div(share < kAtOnce ? share : kAtOnce, kWarp * kHeld);
  return {static_cast<unsigned>(ceil_div(pixels, share)), static_cast<unsigned>(share),
          static_cast<int>(warps * kWarp)};
}

template <bool Fours>
void run(const PositivePartMseParams& p) {
  const Cut c = cut(p);
  const dim3 blocks = grid_of(p.batch * c.parts);
  if (p.grad) {
    launch<positive_part_derivatives<Fours>>(Grid{"positive_part_derivatives", blocks, c.threads},
                                             p.stream, p, c.parts, c.share);
    return;
  }
  float* sums = static_cast<float*>(p.workspace);
  launch<positive_part_squares<Fours>>(
      Grid{"positive_part_squares", blocks, c.threads, sizeof(BlockShared)}, p.stream, p, sums,
      c.parts, c.share);
  if (c.parts > 1)
    launch<positive_part_rows>(
        Grid{"positive_part_rows", grid_of(ceil_div(p.batch, kThreads / kWarp)), kThreads},
        p.stream, p, sums, c.parts);
}

}  // namespace

size_t positive_part_mse_workspace_bytes(const PositivePartMseParams& p) {
  const Cut c = cut(p);
  if (p.grad || c.parts == 1) return 0;
  return static_cast<size_t>(p.batch) * c.parts * sizeof(float);
}

void positive_part_mse(const PositivePartMseParams& p) {
  if (p.batch == 0) return;
  check_current(p.device);
  bool fours = in_fours(p.a, p.width) && in_fours(p.b, p.width);
  if (p.grad)
    fours = fours && in_fours(dense(p.grad_a, p.a.dtype, 1, p.height, p.width), p.width) &&
            in_fours(dense(p.grad_b, p.b.dtype, 1, p.height, p.width), p.width);
  fours ? run<true>(p) : run<false>(p);
}

}  // namespace harmonizer::cuda
