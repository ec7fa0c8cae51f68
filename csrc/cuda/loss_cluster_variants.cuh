// The compiled specializations of the cluster kernels, and how one is launched.
#pragma once

#include "launch.cuh"

namespace harmonizer::cuda {

struct ClusterVariant {
  LossVariant description;
  bool automatic;            // whether variant 0 may choose it
  bool (*fits)(int device);  // whether the device, the current one, can hold a cluster of it
  void (*launch)(const LossParams&);
};

struct ClusterVariants {
  const ClusterVariant* begin;
  int count;
};
ClusterVariants released_variants();
ClusterVariants paper_variants();

template <class Plan, class Shared>
Grid cluster_grid(Formulation formulation, int64_t batch) {
  return {formulation == Formulation::released ? "loss_released" : "loss_paper",
          dim3(static_cast<unsigned>(batch * Plan::kCluster)), Plan::kThreads, sizeof(Shared),
          Plan::kCluster};
}

template <class Plan, class Shared, auto Kernel, Formulation kFormulation>
constexpr ClusterVariant cluster_variant(const char* name, bool automatic) {
  // Of a Hopper multiprocessor's 228 KiB the system takes one for every block.
  static_assert((sizeof(Shared) + 1024) * Plan::kBlocksPerSm <= 228 * 1024, "resident blocks");
  return {{name, Plan::kSize, kFormulation, Plan::kCluster, Plan::kThreads, Plan::kSlabs,
           sizeof(Shared)},
          automatic,
          [](int device) {
            return cluster_fits<Kernel>(cluster_grid<Plan, Shared>(kFormulation, 1), device);
          },
          [](const LossParams& p) {
            launch<Kernel>(cluster_grid<Plan, Shared>(kFormulation, p.batch), p.stream, p);
          }};
}

}  // namespace harmonizer::cuda
