// The native API: raw pointers, sizes and strides; no PyTorch and no Python below this line.
//
// Every operation is a plain struct of parameters and one function per device that takes it. The
// caller validates, allocates every output and the workspace, and keeps them alive; the functions
// never allocate. Strides are counted in elements. "Accumulation type" means double where an input
// is float64 and float otherwise. Equation numbers refer to harmonizer_ext/MATH.md.
#pragma once

#include <cstddef>
#include <cstdint>

// CMakeLists.txt takes such flags back; a compiler that obeys them nevertheless must not go unseen.
#if defined(__FAST_MATH__) || defined(__NO_SIGNED_ZEROS__) || defined(__ASSOCIATIVE_MATH__) || \
    defined(__RECIPROCAL_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error "harmonizer_ext tests for NaN and orders its sums: compile without -ffast-math and its parts"
#endif

namespace harmonizer {

enum class Dtype : int32_t { float32, float64, bfloat16, float16 };
enum class Formulation : int32_t { released, paper };
enum class Distance : int32_t { mse, l2 };

constexpr int kMaxLevels = 16;

// A batch of maps with channels, read through its strides.
struct Maps {
  const void* data = nullptr;
  Dtype dtype = Dtype::float32;
  int64_t stride_batch = 0;
  int64_t stride_channel = 0;
  int64_t stride_row = 0;
  int64_t stride_column = 0;
};

// What every operation is given besides its maps.
struct Call {
  void* workspace = nullptr;  // as many bytes as its *_workspace_bytes() says, 64-byte aligned
  int32_t threads = 1;        // cpu
  int32_t device = 0;         // cuda
  void* stream = nullptr;     // cuda: a cudaStream_t
};

// Row losses and the unit gradient in one pass; (8), (9), (11) to (16).
struct LossParams : Call {
  int64_t batch = 0;
  int64_t channels = 0;
  int64_t height = 0;
  int64_t width = 0;
  int32_t levels = 0;
  Formulation formulation = Formulation::released;
  Distance distance = Distance::mse;
  Maps saliency;
  Maps heatmaps;                  // one channel
  const void* weights = nullptr;  // (batch), accumulation type
  void* rows = nullptr;           // (batch), accumulation type
  void* saliency_std = nullptr;   // (batch), accumulation type
  void* gradient = nullptr;       // (batch, height, width) of saliency's dtype; null: not wanted
  int32_t variant = 0;            // cuda: 0 chooses; see loss_variant()
  int32_t prefetch = 0;           // cuda: how many samples ahead to ask the memory for; 0: none
};

// Levels 1 to levels-1 of the Gaussian pyramid; (4).
struct PyramidParams : Call {
  int64_t batch = 0;
  int64_t channels = 0;
  int64_t height = 0;
  int64_t width = 0;
  int32_t levels = 0;
  Maps maps;
  void* outputs[kMaxLevels] = {};  // outputs[l]: (batch, channels, h_l, w_l) of maps' dtype, l >= 1
};

// Adjoint of the above: sum over l of the l-fold adjoint of gradients[l]; (4').
struct PyramidAdjointParams : Call {
  int64_t batch = 0;
  int64_t channels = 0;
  int64_t height = 0;
  int64_t width = 0;
  int32_t levels = 0;
  Maps gradients[kMaxLevels];  // gradients[l], l >= 1; all of one dtype
  void* output = nullptr;      // (batch, channels, height, width) of that dtype
};

// Positive part of the standardized maps (3), or, where grad.data is set, its derivative (3').
struct StandardizeParams : Call {
  int64_t batch = 0;
  int64_t channels = 0;
  int64_t height = 0;
  int64_t width = 0;
  Maps maps;
  Maps grad;
  void* output = nullptr;  // (batch, channels, height, width) of maps' dtype
};

// Mean squared difference of positive parts (6), or, where grad is set, its derivatives (6').
struct PositivePartMseParams : Call {
  int64_t batch = 0;
  int64_t height = 0;
  int64_t width = 0;
  Maps a;
  Maps b;
  const void* grad = nullptr;  // (batch), accumulation type
  void* rows = nullptr;        // (batch), accumulation type; forward only
  void* grad_a = nullptr;      // (batch, height, width) of a's dtype; backward only
  void* grad_b = nullptr;      // (batch, height, width) of b's dtype; backward only
};

// Spearman's rank correlation of pairs of maps, ties sharing their mean rank.
struct SpearmanParams : Call {
  int64_t batch = 0;
  int64_t height = 0;
  int64_t width = 0;               // height * width below 2^31
  Maps a;                          // float32 or float64
  Maps b;                          // of the same dtype
  double* correlations = nullptr;  // (batch); NaN where a map is constant or holds a NaN
};

namespace cpu {

// Bytes of workspace that the call will use; depends on sizes, dtypes, levels and threads only.
size_t loss_workspace_bytes(const LossParams&);
size_t pyramid_workspace_bytes(const PyramidParams&);
size_t pyramid_adjoint_workspace_bytes(const PyramidAdjointParams&);
size_t standardize_workspace_bytes(const StandardizeParams&);
size_t positive_part_mse_workspace_bytes(const PositivePartMseParams&);
size_t spearman_workspace_bytes(const SpearmanParams&);

void loss(const LossParams&);
void pyramid(const PyramidParams&);
void pyramid_adjoint(const PyramidAdjointParams&);
void standardize(const StandardizeParams&);
void positive_part_mse(const PositivePartMseParams&);
void spearman(const SpearmanParams&);

// The instruction set in use: "avx512", "avx2" or "baseline"; the best at first.
const char* instruction_set();
// Switches to another one, for tests; false, and no change, where this processor lacks it. Must not
// run while a kernel does.
bool use_instruction_set(const char* name);

}  // namespace cpu

// Launches on the given device, which must be the current one, and stream, and returns; nothing
// waits. Only dtypes of up to 32 bits. Throws std::runtime_error with the kernel's name where a
// launch fails.
namespace cuda {

// The workspace is 256-byte aligned memory of that device.
size_t loss_workspace_bytes(const LossParams&);
size_t pyramid_workspace_bytes(const PyramidParams&);
size_t pyramid_adjoint_workspace_bytes(const PyramidAdjointParams&);
size_t standardize_workspace_bytes(const StandardizeParams&);
size_t positive_part_mse_workspace_bytes(const PositivePartMseParams&);

void loss(const LossParams&);
void pyramid(const PyramidParams&);
void pyramid_adjoint(const PyramidAdjointParams&);
void standardize(const StandardizeParams&);
void positive_part_mse(const PositivePartMseParams&);

// A compiled specialization of the loss for square maps of one size, one cluster of blocks a
// sample.
struct LossVariant {
  const char* name = nullptr;
  int32_t size = 0;
  Formulation formulation = Formulation::released;
  int32_t cluster = 0;  // blocks
  int32_t threads = 0;  // of a block
  int32_t slabs = 0;    // levels that are shared out between the blocks of a cluster
  int64_t shared_bytes = 0;
};
// Number 1 and up; a name of nullptr behind the last. -1 in LossParams is the general path.
LossVariant loss_variant(int32_t number);

}  // namespace cuda
}  // namespace harmonizer
