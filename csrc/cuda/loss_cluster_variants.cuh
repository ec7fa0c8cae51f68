// The compiled specializations of the cluster kernels, and how one is launched.
#pragma once

#include "launch.cuh"

namespace harmonizer::cuda {

struct ClusterVariant {
  LossVariant description;
  bool automatic;  // whether variant 0 may choose it
  void (*launch)(const LossParams&);
};

struct ClusterVariants {
  const ClusterVariant* begin;
  int count;
};
ClusterVariants released_variants();
ClusterVariants paper_variants();

template <class Plan, class Shared, auto Kernel>
constexpr ClusterVariant cluster_variant(const char* name, Formulation formulation,
                                         bool automatic) {
  // Of a Hopper multiprocessor's 228 KiB the system takes one for every block.
  static_assert((sizeof(Shared) + 1024) * Plan::kBlocksPerSm <= 228 * 1024, "resident blocks");
  return {{name, Plan::kSize, formulation, Plan::kCluster, Plan::kThreads, Plan::kSlabs,
           sizeof(Shared)},
          automatic,
          [](const LossParams& p) {
            const auto blocks = static_cast<unsigned>(p.batch * Plan::kCluster);
            launch<Kernel>(
                Grid{p.formulation == Formulation::released ? "loss_released" : "loss_paper",
                     dim3(blocks), Plan::kThreads, sizeof(Shared), Plan::kCluster},
                p.stream, p);
          }};
}

}  // namespace harmonizer::cuda
