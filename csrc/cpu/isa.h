// One namespace per instruction set; the build compiles every kernel file once for each and says
// which in HARMONIZER_ISA.
#pragma once

#include "../harmonizer.h"

namespace harmonizer::cpu {

#define HARMONIZER_DECLARE_KERNELS(isa)                                   \
  namespace isa {                                                         \
  size_t loss_workspace_bytes(const LossParams&);                         \
  size_t pyramid_workspace_bytes(const PyramidParams&);                   \
  size_t pyramid_adjoint_workspace_bytes(const PyramidAdjointParams&);    \
  size_t standardize_workspace_bytes(const StandardizeParams&);           \
  size_t positive_part_mse_workspace_bytes(const PositivePartMseParams&); \
  size_t spearman_workspace_bytes(const SpearmanParams&);                 \
  void loss(const LossParams&);                                           \
  void pyramid(const PyramidParams&);                                     \
  void pyramid_adjoint(const PyramidAdjointParams&);                      \
  void standardize(const StandardizeParams&);                             \
  void positive_part_mse(const PositivePartMseParams&);                   \
  void spearman(const SpearmanParams&);                                   \
  }

HARMONIZER_DECLARE_KERNELS(baseline)
HARMONIZER_DECLARE_KERNELS(avx2)
HARMONIZER_DECLARE_KERNELS(avx512)

#undef HARMONIZER_DECLARE_KERNELS

}  // namespace harmonizer::cpu
