// The machine of cuda_on_host itself: values, and what it must notice. Run by test_cuda_machine.py.
//
//   harness_check            the sums below, right
//   harness_check NAME       a mistake that must not pass
#include <cooperative_groups.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../csrc/cuda/device.cuh"
#include "../../csrc/cuda/launch.cuh"
#include "../../csrc/cuda/mbarrier.cuh"

namespace harmonizer::cuda {
namespace {

namespace cg = cooperative_groups;

constexpr int kThreads = 80;  // two warps and a half

struct Shared {
  float value[kThreads];
  float sum[kWarp];
  float warp[3];
  float total;
};

// Every block writes the sum of what the threads of its whole cluster hold.
__global__ void __launch_bounds__(kThreads, 1) sums(float* output, bool split) {
  Shared& shared = shared_layout<Shared>();
  const cg::cluster_group cluster = cg::this_cluster();
  const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
  shared.value[thread] = static_cast<float>(blockIdx.x * 100 + thread);
  __syncthreads();
  float sum = shared.value[kThreads - 1 - thread];
  const bool half = warp == 2;
  for (int offset = half ? 8 : 16; offset > 0; offset /= 2)
    sum += __shfl_xor_sync(half ? 0xffffu : kAllLanes, sum, offset);
  if (lane == 0 && warp != 1) shared.warp[warp] = sum;
  if (warp == 1) {
    shared.sum[lane] = sum;
    __syncwarp();
    if (lane == 0) shared.warp[warp] = shared.sum[1];
  }
  __syncthreads();
  if (thread == 0) shared.total = shared.warp[0] + shared.warp[1] + shared.warp[2];
  if (split) {
    cluster.barrier_arrive();
    cluster.barrier_wait();
  } else {
    cluster.sync();
  }
  if (thread == 0) {
    float total = 0;
    for (unsigned rank = 0; rank < cluster.num_blocks(); ++rank)
      total += *cluster.map_shared_rank(&shared.total, static_cast<int>(rank));
    output[blockIdx.x] = total;
  }
  cluster.sync();
}

struct Ring {
  float from_previous;
  uint64_t come;
};

// Every block writes what the one before it in its cluster has written to it.
__global__ void ring(float* output, unsigned initialized_for, unsigned arrivals) {
  Ring& shared = shared_layout<Ring>();
  const cg::cluster_group cluster = cg::this_cluster();
  const int next = static_cast<int>((cluster.block_rank() + 1) % cluster.num_blocks());
  if (threadIdx.x == 0 && initialized_for > 0) mbarrier_init(&shared.come, initialized_for);
  cluster.sync();
  if (threadIdx.x == 0) {
    cluster.map_shared_rank(&shared, next)->from_previous = static_cast<float>(blockIdx.x);
    for (unsigned i = 0; i < arrivals; ++i) mbarrier_arrive(&shared.come, next);
  }
  mbarrier_wait(&shared.come);
  if (threadIdx.x == 1) output[blockIdx.x] = shared.from_previous;
}

__global__ void behind_shared() { static_cast<char*>(shared_memory())[4 + threadIdx.x / 31] = 1; }
__global__ void unwritten_shared(float* output) {
  output[threadIdx.x] = static_cast<float*>(shared_memory())[threadIdx.x];
}
__global__ void misaligned(float* output) { store4(output + 1, make_float4(0, 0, 0, 0)); }
__global__ void two_places() {
  if (threadIdx.x < 8)
    __syncthreads();
  else
    __syncthreads();
}
__global__ void deadlock() {
  const cg::cluster_group cluster = cg::this_cluster();
  if (threadIdx.x == 0)
    __syncthreads();
  else
    cluster.sync();
}
__global__ void missing_lanes(float* output) { *output = warp_sum(1.f); }
__global__ void exited_lane(float* output) {
  if (threadIdx.x == 3) return;
  *output = warp_sum(1.f);
}
// The other block may be gone.
__global__ void late_neighbour(float* output) {
  const cg::cluster_group cluster = cg::this_cluster();
  float* shared = static_cast<float*>(shared_memory());
  cluster.sync();
  if (threadIdx.x == 1)
    output[blockIdx.x] = *cluster.map_shared_rank(shared, cluster.block_rank() ^ 1);
}

int check_sums() {
  for (int cluster : {1, 2, 9}) {
    for (bool split : {false, true}) {
      const int blocks = 3 * cluster;
      std::vector<float> output(blocks);
      launch<sums>(Grid{"sums", dim3(blocks), kThreads, sizeof(Shared), cluster}, nullptr,
                   output.data(), split);
      for (int block = 0; block < blocks; ++block) {
        float expected = 0;
        for (int b = block / cluster * cluster; b < (block / cluster + 1) * cluster; ++b)
          expected += kThreads * 100 * b + kThreads * (kThreads - 1) / 2;
        if (output[block] != expected) {
          std::printf("block %d: %g, expected %g\n", block, output[block], expected);
          return 1;
        }
      }
    }
  }
  return 0;
}

int check_ring() {
  constexpr int kCluster = 3, kBlocks = 2 * kCluster;
  std::vector<float> output(kBlocks);
  launch<ring>(Grid{"ring", dim3(kBlocks), 33, sizeof(Ring), kCluster}, nullptr, output.data(), 1u,
               1u);
  for (int block = 0; block < kBlocks; ++block) {
    const int previous = block % kCluster == 0 ? block + kCluster - 1 : block - 1;
    if (output[block] != static_cast<float>(previous)) {
      std::printf("block %d: %g, expected %d\n", block, output[block], previous);
      return 1;
    }
  }
  return 0;
}

int make_mistake(const char* name) {
  std::vector<float> output(64);
  float* out = output.data();
  const auto is = [&](const char* other) { return std::strcmp(name, other) == 0; };
  if (is("behind_shared")) launch<behind_shared>({name, dim3(1), 32, 5}, nullptr);
  if (is("unwritten_shared")) {
    launch<unwritten_shared>({name, dim3(1), 32, 128}, nullptr, out);
    for (float value : output)
      if (value != value) return 1;
  }
  if (is("misaligned")) launch<misaligned>({name, dim3(1), 1}, nullptr, out);
  if (is("two_places")) launch<two_places>({name, dim3(1), 32}, nullptr);
  if (is("deadlock")) launch<deadlock>({name, dim3(1), 32}, nullptr);
  if (is("missing_lanes")) launch<missing_lanes>({name, dim3(1), 33}, nullptr, out);
  if (is("exited_lane")) launch<exited_lane>({name, dim3(1), 32}, nullptr, out);
  if (is("late_neighbour")) launch<late_neighbour>({name, dim3(2), 32, 128, 2}, nullptr, out);
  const auto go_round = [&](unsigned initialized_for, unsigned arrivals) {
    launch<ring>({name, dim3(2), 32, sizeof(Ring), 2}, nullptr, out, initialized_for, arrivals);
  };
  if (is("mbarrier_uninitialized")) go_round(0, 1);
  if (is("mbarrier_overrun")) go_round(1, 2);
  if (is("mbarrier_deadlock")) go_round(2, 1);
  if (is("threads")) launch<two_places>({name, dim3(1), 1025}, nullptr);
  if (is("grid")) launch<two_places>({name, dim3(1, 65536), 32}, nullptr);
  if (is("shared")) launch<two_places>({name, dim3(1), 32, 232449}, nullptr);
  if (is("cluster")) launch<two_places>({name, dim3(3), 32, 0, 2}, nullptr);
  return 0;
}

}  // namespace
}  // namespace harmonizer::cuda

int main(int count, char** arguments) try {
  using namespace harmonizer::cuda;
  return count > 1 ? make_mistake(arguments[1]) : check_sums() || check_ring();
} catch (const std::runtime_error& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 2;
}
