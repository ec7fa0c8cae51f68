#include "loss_cluster_paper.cuh"
#include "loss_cluster_variants.cuh"

namespace harmonizer::cuda {
namespace {

template <int kSize, int kCluster, int kRowsPerThread, int kBlocksPerSm, int kSlabs>
constexpr ClusterVariant variant(const char* name, bool automatic) {
  using Plan = ClusterPlan<kSize, kCluster, kRowsPerThread, kBlocksPerSm, kSlabs>;
  return cluster_variant<Plan, PaperShared<Plan>, loss_paper<Plan>>(name, Formulation::paper,
                                                                    automatic);
}

// As in loss_cluster_released.cu.
constexpr ClusterVariant kVariants[] = {
    variant<112, 2, 14, 3, 2>("112/2x3", true),
    variant<128, 2, 16, 2, 2>("128/2x2", true),
    variant<224, 8, 14, 3, 2>("224/8x3", true),
    variant<256, 8, 16, 2, 2>("256/8x2", true),
    variant<384, 8, 12, 1, 3>("384/8x1", true),
    variant<448, 16, 14, 1, 2>("448/16x1", true),
    variant<512, 16, 16, 1, 3>("512/16x1", true),
    variant<224, 4, 14, 1, 3>("224/4x1 three slabs", false),
    variant<224, 8, 14, 2, 2>("224/8x2", false),
};

}  // namespace

ClusterVariants paper_variants() {
  return {kVariants, static_cast<int>(sizeof(kVariants) / sizeof(kVariants[0]))};
}

}  // namespace harmonizer::cuda
