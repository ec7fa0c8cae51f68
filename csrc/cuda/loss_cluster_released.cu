#include "loss_cluster_released.cuh"
#include "loss_cluster_variants.cuh"

namespace harmonizer::cuda {
namespace {

template <int kSize, int kCluster, int kRowsPerThread, int kBlocksPerSm, int kSlabs,
          unsigned kSpecial = kNothing>
constexpr ClusterVariant variant(const char* name, bool automatic) {
  using Kernel =
      ReleasedKernel<ClusterPlan<kSize, kCluster, kRowsPerThread, kBlocksPerSm, kSlabs>, kSpecial>;
  return cluster_variant<Kernel, ReleasedShared<Kernel>, loss_released<Kernel>,
                         Formulation::released>(name, automatic);
}

// name: size, blocks of a cluster, resident blocks, what is special. Of the automatic ones of a
// size the first that the device can hold is chosen; the others wait for bench/gpu_sweep.py to
// compare them. Those with one block on a multiprocessor, where nothing runs while it loads, are
// among them: whether they are faster than the general path is not known.
constexpr ClusterVariant kVariants[] = {
    variant<112, 2, 14, 4, 2>("112/2x4", true),
    variant<128, 2, 16, 3, 2>("128/2x3", true),
    variant<224, 4, 14, 2, 2>("224/4x2", true),
    variant<256, 8, 16, 3, 2>("256/8x3", true),
    variant<384, 8, 12, 1, 3>("384/8x1", false),
    variant<448, 8, 14, 1, 3>("448/8x1", false),
    variant<512, 16, 16, 1, 3>("512/16x1", false),
    variant<224, 8, 14, 4, 2>("224/8x4", false),
    variant<224, 4, 14, 2, 3>("224/4x2 three slabs", false),
    variant<224, 8, 14, 3, 2, kApart>("224/8x3 apart", false),
    variant<224, 8, 14, 4, 2, kOneWalks>("224/8x4 one walks", false),
#if HARMONIZER_CUDA_SIGNALS
    variant<224, 4, 14, 2, 2, kSignals>("224/4x2 signals", false),
    variant<224, 8, 14, 3, 2, kApart | kSignals>("224/8x3 apart, signals", false),
#endif
};

}  // namespace

ClusterVariants released_variants() {
  return {kVariants, static_cast<int>(sizeof(kVariants) / sizeof(kVariants[0]))};
}

}  // namespace harmonizer::cuda
