// Runs every CPU kernel on buffers of exactly the size that the contract names, so that a sanitizer
// sees any access outside them. Built by tests/test_native.py with -fsanitize; values are checked
// by the Python tests, here only that what should be finite is.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "../../csrc/harmonizer.h"

using namespace harmonizer;

namespace {

int failures = 0;

size_t bytes_of(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

// An allocation of its own for every buffer: neighbours would hide an overrun.
using Buffer = std::unique_ptr<char[], void (*)(char*)>;
Buffer allocate(size_t bytes) {
  return Buffer(static_cast<char*>(std::malloc(bytes)), [](char* p) { std::free(p); });
}

// Small positive values with a valid bit pattern in every dtype.
Buffer values(Dtype dtype, int64_t count, unsigned seed) {
  Buffer buffer = allocate(count * bytes_of(dtype));
  for (int64_t i = 0; i < count; ++i) {
    seed = seed * 1664525u + 1013904223u;
    const float value = 0.25f + static_cast<float>(seed >> 16) / 65536.0f;
    if (dtype == Dtype::float64) reinterpret_cast<double*>(buffer.get())[i] = value;
    if (dtype == Dtype::float32) reinterpret_cast<float*>(buffer.get())[i] = value;
    if (dtype == Dtype::bfloat16 || dtype == Dtype::float16)
      reinterpret_cast<uint16_t*>(buffer.get())[i] = 0x3800 + (seed >> 24);
  }
  return buffer;
}

Maps dense(const Buffer& buffer, Dtype dtype, int64_t channels, int64_t height, int64_t width) {
  return {buffer.get(), dtype, channels * height * width, height * width, width, 1};
}

Maps channels_last(const Buffer& buffer, Dtype dtype, int64_t channels, int64_t height,
                   int64_t width) {
  return {buffer.get(), dtype, channels * height * width, 1, width * channels, channels};
}

Buffer workspace(size_t bytes) {
  return Buffer(static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)),
                [](char* p) { std::free(p); });
}

void expect_finite(const char* what, const Buffer& rows, bool in_double, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const double value = in_double ? reinterpret_cast<const double*>(rows.get())[i]
                                   : reinterpret_cast<const float*>(rows.get())[i];
    if (!std::isfinite(value)) {
      std::printf("%s: row %d is not finite\n", what, static_cast<int>(i));
      ++failures;
    }
  }
}

struct Size {
  int64_t channels, height, width;
  int levels;
};

void check_loss(Size s, Dtype saliency_dtype, Dtype heatmap_dtype, Formulation formulation,
                Distance distance, bool last) {
  const int64_t batch = 3, pixels = s.height * s.width;
  const bool in_double = saliency_dtype == Dtype::float64 || heatmap_dtype == Dtype::float64;
  const Dtype accumulation = in_double ? Dtype::float64 : Dtype::float32;
  const Buffer saliency = values(saliency_dtype, batch * s.channels * pixels, 1);
  const Buffer heatmaps = values(heatmap_dtype, batch * pixels, 2);
  const Buffer weights = values(accumulation, batch, 3);
  const Buffer rows = values(accumulation, batch, 4), std = values(accumulation, batch, 5);
  const Buffer gradient = allocate(batch * pixels * bytes_of(saliency_dtype));
  LossParams p;
  p.batch = batch;
  p.channels = s.channels;
  p.height = s.height;
  p.width = s.width;
  p.levels = s.levels;
  p.formulation = formulation;
  p.distance = distance;
  p.saliency = last ? channels_last(saliency, saliency_dtype, s.channels, s.height, s.width)
                    : dense(saliency, saliency_dtype, s.channels, s.height, s.width);
  p.heatmaps = dense(heatmaps, heatmap_dtype, 1, s.height, s.width);
  p.weights = weights.get();
  p.rows = rows.get();
  p.saliency_std = std.get();
  p.threads = 2;
  const Buffer work = workspace(cpu::loss_workspace_bytes(p));
  p.workspace = work.get();
  for (void* target : {static_cast<void*>(nullptr), static_cast<void*>(gradient.get())}) {
    p.gradient = target;
    cpu::loss(p);
    expect_finite("loss", rows, in_double, batch);
    expect_finite("std", std, in_double, batch);
  }
}

void check_blocks(Size s, Dtype dtype) {
  const int64_t batch = 2, maps = batch * s.channels, pixels = s.height * s.width;
  const Buffer input = values(dtype, maps * pixels, 6), grad = values(dtype, maps * pixels, 7);
  const Buffer output = allocate(maps * pixels * bytes_of(dtype));

  PyramidParams down;
  PyramidAdjointParams up;
  down.batch = up.batch = batch;
  down.channels = up.channels = s.channels;
  down.height = up.height = s.height;
  down.width = up.width = s.width;
  down.levels = up.levels = s.levels;
  down.threads = up.threads = 2;
  down.maps = dense(input, dtype, s.channels, s.height, s.width);
  std::vector<Buffer> levels;
  for (int64_t l = 1, h = s.height, w = s.width; l < s.levels; ++l) {
    h = (h + 1) / 2;
    w = (w + 1) / 2;
    levels.push_back(allocate(maps * h * w * bytes_of(dtype)));
    down.outputs[l] = levels.back().get();
    up.gradients[l] = dense(levels.back(), dtype, s.channels, h, w);
  }
  if (s.levels > 1) {
    const Buffer down_work = workspace(cpu::pyramid_workspace_bytes(down));
    down.workspace = down_work.get();
    cpu::pyramid(down);
    up.output = output.get();
    const Buffer up_work = workspace(cpu::pyramid_adjoint_workspace_bytes(up));
    up.workspace = up_work.get();
    cpu::pyramid_adjoint(up);
  }

  StandardizeParams standardize;
  standardize.batch = batch;
  standardize.channels = s.channels;
  standardize.height = s.height;
  standardize.width = s.width;
  standardize.maps = down.maps;
  standardize.output = output.get();
  standardize.threads = 2;
  for (bool backward : {false, true}) {
    if (backward) standardize.grad = dense(grad, dtype, s.channels, s.height, s.width);
    const Buffer work = workspace(cpu::standardize_workspace_bytes(standardize));
    standardize.workspace = work.get();
    cpu::standardize(standardize);
  }

  const bool in_double = dtype == Dtype::float64;
  const Dtype accumulation = in_double ? Dtype::float64 : Dtype::float32;
  const Buffer rows = values(accumulation, maps, 8), upstream = values(accumulation, maps, 9);
  const Buffer grad_b = allocate(maps * pixels * bytes_of(dtype));
  PositivePartMseParams mse;
  mse.batch = maps;
  mse.height = s.height;
  mse.width = s.width;
  mse.a = dense(input, dtype, 1, s.height, s.width);
  mse.b = dense(grad, dtype, 1, s.height, s.width);
  mse.threads = 2;
  const Buffer work = workspace(cpu::positive_part_mse_workspace_bytes(mse));
  mse.workspace = work.get();
  mse.rows = rows.get();
  cpu::positive_part_mse(mse);
  expect_finite("positive_part_mse", rows, in_double, maps);
  mse.grad = upstream.get();
  mse.grad_a = output.get();
  mse.grad_b = grad_b.get();
  cpu::positive_part_mse(mse);
}

// Every kind of map: no two values the same, many, all, and not a number.
void check_spearman(Size s, Dtype dtype) {
  const int64_t batch = 4, pixels = s.height * s.width;
  const Buffer a = values(dtype, batch * pixels, 10), b = values(dtype, batch * pixels, 11);
  const auto set = [&](int64_t i, double value) {
    if (dtype == Dtype::float64)
      reinterpret_cast<double*>(b.get())[i] = value;
    else
      reinterpret_cast<float*>(b.get())[i] = static_cast<float>(value);
  };
  for (int64_t i = 0; i < pixels; ++i) {
    set(pixels + i, i % 3 ? -0.0 : -1.5);
    set(2 * pixels + i, 0.25);
  }
  set(4 * pixels - 1, NAN);
  const Buffer correlations = allocate(batch * sizeof(double));
  const auto* out = reinterpret_cast<const double*>(correlations.get());
  SpearmanParams p;
  p.batch = batch;
  p.height = s.height;
  p.width = s.width;
  p.a = dense(a, dtype, 1, s.height, s.width);
  p.b = dense(b, dtype, 1, s.height, s.width);
  p.correlations = reinterpret_cast<double*>(correlations.get());
  p.threads = 2;
  const Buffer work = workspace(cpu::spearman_workspace_bytes(p));
  p.workspace = work.get();
  cpu::spearman(p);
  if (pixels > 1) expect_finite("spearman", correlations, true, 2);
  if (!std::isnan(out[2]) || !std::isnan(out[3])) {
    std::printf("spearman: a constant map or a NaN has a correlation\n");
    ++failures;
  }
}

}  // namespace

int main() {
  const Size sizes[] = {{1, 1, 1, 3},   {3, 1, 7, 5},   {3, 2, 2, 4},   {4, 5, 3, 6},
                        {3, 31, 33, 5}, {1, 16, 16, 2}, {3, 64, 47, 1}, {2, 33, 130, 6}};
  const Dtype dtypes[] = {Dtype::float32, Dtype::float64, Dtype::bfloat16, Dtype::float16};
  int sets = 0;
  for (const char* isa : {"baseline", "avx2", "avx512"}) {
    if (!cpu::use_instruction_set(isa)) continue;
    ++sets;
    for (const Size& size : sizes)
      for (Dtype dtype : {Dtype::float32, Dtype::float64}) check_spearman(size, dtype);
    for (const Size& size : sizes)
      for (Dtype dtype : dtypes) {
        check_blocks(size, dtype);
        for (Dtype heatmap : {dtype, Dtype::float32})
          for (bool last : {false, true}) {
            check_loss(size, dtype, heatmap, Formulation::released, Distance::mse, last);
            check_loss(size, dtype, heatmap, Formulation::paper, Distance::mse, last);
            check_loss(size, dtype, heatmap, Formulation::paper, Distance::l2, last);
          }
      }
  }
  std::printf("%d instruction sets, %d failures\n", sets, failures);
  return failures != 0;
}
