// The fused loss: one cluster per sample where the map, its layout and the GPU allow it, else the
// general path.
#include <algorithm>

#ifdef HARMONIZER_CUDA_CLUSTERS
#include "loss_cluster_variants.cuh"
#endif
#include "loss_general.cuh"

namespace harmonizer::cuda {
namespace {

#ifdef HARMONIZER_CUDA_CLUSTERS

// Whether rows are dense, and four pixels of one can be read at once, anywhere in the batch.
bool reads_quads(const Maps& maps, int64_t width) {
  return maps.stride_row == width && in_fours(maps, width);
}

const ClusterVariant* numbered(int32_t number) {
  for (const ClusterVariants& all : {released_variants(), paper_variants()}) {
    if (number >= 1 && number <= all.count) return all.begin + number - 1;
    number -= all.count;
  }
  return nullptr;
}

// Why a specialization cannot do this call; nullptr if it can.
const char* why_not(const ClusterVariant& variant, const LossParams& p,
                    const DeviceLimits& limits) {
  const LossVariant& v = variant.description;
  if (p.formulation != v.formulation) return "it is compiled for the other formulation";
  if (p.height != v.size || p.width != v.size) return "it is compiled for another size";
  if (p.levels <= v.slabs) return "it needs more levels";
  if (!reads_quads(p.saliency, p.width) || !reads_quads(p.heatmaps, p.width))
    return "rows of both maps must be dense and aligned to four pixels";
  if (limits.architecture < 90) return "the GPU has no thread-block clusters";
  if (v.shared_bytes > limits.shared_bytes) return "the GPU has too little shared memory";
  if (v.cluster > 8 && limits.architecture / 10 != 9 && limits.architecture / 10 != 10)
    return "the GPU has no clusters of 16 blocks";
  if (!variant.fits(p.device))
    return "the GPU has no room for one cluster of it (a MIG slice, a limit of MPS and small "
           "groups of multiprocessors are reasons); variant 0 chooses one that fits";
  return nullptr;
}

const ClusterVariant* choose(const LossParams& p, const DeviceLimits& limits) {
  if (p.variant > 0) {
    const ClusterVariant* variant = numbered(p.variant);
    if (!variant) throw std::runtime_error("variant: there is no such specialization");
    if (const char* reason = why_not(*variant, p, limits))
      throw std::runtime_error(std::string("variant ") + variant->description.name + ": " + reason);
    return variant;
  }
  if (p.variant < 0) return nullptr;
  const ClusterVariants all =
      p.formulation == Formulation::released ? released_variants() : paper_variants();
  const ClusterVariant* end = all.begin + all.count;
  const ClusterVariant* found = std::find_if(all.begin, end, [&](const ClusterVariant& v) {
    return v.automatic && !why_not(v, p, limits);
  });
  return found == end ? nullptr : found;
}

#endif

}  // namespace

LossVariant loss_variant([[maybe_unused]] int32_t number) {
#ifdef HARMONIZER_CUDA_CLUSTERS
  if (const ClusterVariant* variant = numbered(number)) return variant->description;
#endif
  return {};
}

size_t loss_workspace_bytes(const LossParams& p) {
  check_current(p.device);
  const DeviceLimits& limits = device_limits(p.device);
#ifdef HARMONIZER_CUDA_CLUSTERS
  if (choose(p, limits)) return 0;
#endif
  return general_workspace_bytes(p, limits);
}

void loss(const LossParams& p) {
  if (p.batch == 0) return;
  check_current(p.device);
  const DeviceLimits& limits = device_limits(p.device);
#ifdef HARMONIZER_CUDA_CLUSTERS
  if (const ClusterVariant* variant = choose(p, limits)) return variant->launch(p);
#endif
  general_loss(p, limits);
}

}  // namespace harmonizer::cuda
