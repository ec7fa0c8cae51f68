#include "loss_cluster_paper.cuh"
#include "loss_cluster_variants.cuh"

namespace harmonizer::cuda {
namespace {

template <int kSize, int kCluster, int kRowsPerThread, int kBlocksPerSm, int kSlabs>
constexpr ClusterVariant variant(const char* name, bool automatic) {
  using Plan = ClusterPlan<kSize, kCluster, kRowsPerThread, kBlocksPerSm, kSlabs>;
  return cluster_variant<Plan, PaperShared<Plan>, loss_paper<Plan>, Formulation::paper>(name,
                                                                                        automatic);
}

// As in loss_cluster_released.cu. The clusters of 4 are for devices that hold none of 8: the only
// automatic one with one block on a multiprocessor.
constexpr ClusterVariant kVariants[] = {
    variant<112, 2, 14, 3, 2>("112/2x3", true),
    variant<128, 2, 16, 2, 2>("128/2x2", true),
    variant<224, 8, 14, 3, 2>("224/8x3", true),
    variant<256, 8, 16, 2, 2>("256/8x2", true),
    variant<384, 8, 12, 1, 3>("384/8x1", false),
    variant<448, 16, 14, 1, 2>("448/16x1", false),
    variant<512, 16, 16, 1, 3>("512/16x1", false),
    variant<224, 4, 14, 1, 3>("224/4x1 three slabs", true),
    variant<224, 8, 14, 2, 2>("224/8x2", false),
};

}  // namespace

ClusterVariants paper_variants() {
  return {kVariants, static_cast<int>(sizeof(kVariants) / sizeof(kVariants[0]))};
}

}  // namespace harmonizer::cuda
