// Chooses, when the module is loaded, the kernels compiled for the best instruction set that this
// processor has.
#include <cstring>
#include <initializer_list>

#include "isa.h"

namespace harmonizer::cpu {
namespace {

enum class Isa { baseline, avx2, avx512 };
constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

bool runs(Isa isa) {
#if defined(HARMONIZER_X86_VARIANTS)
  switch (isa) {
    case Isa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
    case Isa::avx2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::baseline: break;
  }
#endif
  return isa == Isa::baseline;
}

Isa best() {
  for (Isa isa : {Isa::avx512, Isa::avx2})
    if (runs(isa)) return isa;
  return Isa::baseline;
}

Isa current = best();

}  // namespace

#if defined(HARMONIZER_X86_VARIANTS)
#define HARMONIZER_DISPATCH(function, params)          \
  switch (current) {                                   \
    case Isa::avx512: return avx512::function(params); \
    case Isa::avx2: return avx2::function(params);     \
    case Isa::baseline: break;                         \
  }                                                    \
  return baseline::function(params)
#else
#define HARMONIZER_DISPATCH(function, params) return baseline::function(params)
#endif

size_t loss_workspace_bytes(const LossParams& p) { HARMONIZER_DISPATCH(loss_workspace_bytes, p); }
size_t pyramid_workspace_bytes(const PyramidParams& p) {
  HARMONIZER_DISPATCH(pyramid_workspace_bytes, p);
}
size_t pyramid_adjoint_workspace_bytes(const PyramidAdjointParams& p) {
  HARMONIZER_DISPATCH(pyramid_adjoint_workspace_bytes, p);
}
size_t standardize_workspace_bytes(const StandardizeParams& p) {
  HARMONIZER_DISPATCH(standardize_workspace_bytes, p);
}
size_t positive_part_mse_workspace_bytes(const PositivePartMseParams& p) {
  HARMONIZER_DISPATCH(positive_part_mse_workspace_bytes, p);
}
size_t spearman_workspace_bytes(const SpearmanParams& p) {
  HARMONIZER_DISPATCH(spearman_workspace_bytes, p);
}

void loss(const LossParams& p) { HARMONIZER_DISPATCH(loss, p); }
void pyramid(const PyramidParams& p) { HARMONIZER_DISPATCH(pyramid, p); }
void pyramid_adjoint(const PyramidAdjointParams& p) { HARMONIZER_DISPATCH(pyramid_adjoint, p); }
void standardize(const StandardizeParams& p) { HARMONIZER_DISPATCH(standardize, p); }
void positive_part_mse(const PositivePartMseParams& p) {
  HARMONIZER_DISPATCH(positive_part_mse, p);
}
void spearman(const SpearmanParams& p) { HARMONIZER_DISPATCH(spearman, p); }

const char* instruction_set() { return kNames[static_cast<int>(current)]; }

bool use_instruction_set(const char* name) {
  for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512})
    if (std::strcmp(name, kNames[static_cast<int>(isa)]) == 0 && runs(isa)) {
      current = isa;
      return true;
    }
  return false;
}

}  // namespace harmonizer::cpu
