// The only file that knows Python: turns addresses and sizes into parameter structs.
//
// The Python side (harmonizer_ext/backends) has validated everything and keeps every tensor alive
// during the call; the global interpreter lock is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "harmonizer.h"

namespace py = pybind11;
namespace hx = harmonizer;

namespace {

// (address, dtype, (stride_batch, stride_channel, stride_row, stride_column))
using MapsTuple = std::tuple<uintptr_t, int32_t, std::array<int64_t, 4>>;

hx::Maps to_maps(const MapsTuple& t) {
  const auto& [address, dtype, strides] = t;
  hx::Maps maps;
  maps.data = reinterpret_cast<const void*>(address);
  maps.dtype = static_cast<hx::Dtype>(dtype);
  maps.stride_batch = strides[0];
  maps.stride_channel = strides[1];
  maps.stride_row = strides[2];
  maps.stride_column = strides[3];
  return maps;
}

void* to_pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

using Shape = std::array<int64_t, 4>;  // batch, channels, height, width

template <class Params>
Params shaped(const Shape& shape, int32_t threads) {
  Params p;
  p.batch = shape[0];
  p.channels = shape[1];
  p.height = shape[2];
  p.width = shape[3];
  p.threads = threads;
  return p;
}

// Calls allocate(bytes), a Python function that gives a tensor, then the kernel without the lock.
template <class Params, class Kernel>
void run(Params& p, size_t bytes, const py::function& allocate, Kernel kernel) {
  const py::object workspace = allocate(bytes);
  p.workspace = to_pointer(workspace.attr("data_ptr")().cast<uintptr_t>());
  py::gil_scoped_release unlocked;
  kernel(p);
}

// Reads (count) weights of the accumulation type before the kernel does.
template <class Real>
void check_weights(const void* weights, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const Real weight = static_cast<const Real*>(weights)[i];
    if (weight < 0)
      throw py::value_error("tokens: expected weights >= 0, got a negative one in row " +
                            std::to_string(i));
  }
}

int32_t checked_levels(int32_t levels) {
  if (levels < 1 || levels > hx::kMaxLevels)
    throw std::invalid_argument("levels: expected 1 to " + std::to_string(hx::kMaxLevels));
  return levels;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native kernels of harmonizer_ext; see csrc/harmonizer.h. Not a public interface.";
  m.def("cpu_instruction_set", &hx::cpu::instruction_set);
  m.def("cpu_use_instruction_set", &hx::cpu::use_instruction_set);
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif

  m.def("cpu_loss", [](Shape shape, int32_t levels, int32_t formulation, int32_t distance,
                       const MapsTuple& saliency, const MapsTuple& heatmaps, uintptr_t weights,
                       uintptr_t rows, uintptr_t saliency_std, uintptr_t gradient, int32_t threads,
                       const py::function& allocate) {
    auto p = shaped<hx::LossParams>(shape, threads);
    p.levels = checked_levels(levels);
    p.formulation = static_cast<hx::Formulation>(formulation);
    p.distance = static_cast<hx::Distance>(distance);
    p.saliency = to_maps(saliency);
    p.heatmaps = to_maps(heatmaps);
    p.weights = to_pointer(weights);
    const bool in_double =
        p.saliency.dtype == hx::Dtype::float64 || p.heatmaps.dtype == hx::Dtype::float64;
    in_double ? check_weights<double>(p.weights, p.batch)
              : check_weights<float>(p.weights, p.batch);
    p.rows = to_pointer(rows);
    p.saliency_std = to_pointer(saliency_std);
    p.gradient = to_pointer(gradient);
    run(p, hx::cpu::loss_workspace_bytes(p), allocate, hx::cpu::loss);
  });

  m.def("cpu_pyramid",
        [](Shape shape, int32_t levels, const MapsTuple& maps,
           const std::vector<uintptr_t>& outputs, int32_t threads, const py::function& allocate) {
          auto p = shaped<hx::PyramidParams>(shape, threads);
          p.levels = checked_levels(levels);
          p.maps = to_maps(maps);
          for (int l = 1; l < p.levels; ++l) p.outputs[l] = to_pointer(outputs.at(l - 1));
          run(p, hx::cpu::pyramid_workspace_bytes(p), allocate, hx::cpu::pyramid);
        });

  m.def("cpu_pyramid_adjoint", [](Shape shape, const std::vector<MapsTuple>& gradients,
                                  uintptr_t output, int32_t threads, const py::function& allocate) {
    auto p = shaped<hx::PyramidAdjointParams>(shape, threads);
    p.levels = checked_levels(static_cast<int32_t>(gradients.size()) + 1);
    for (int l = 1; l < p.levels; ++l) p.gradients[l] = to_maps(gradients[l - 1]);
    p.output = to_pointer(output);
    run(p, hx::cpu::pyramid_adjoint_workspace_bytes(p), allocate, hx::cpu::pyramid_adjoint);
  });

  m.def("cpu_standardize",
        [](Shape shape, const MapsTuple& maps, const std::optional<MapsTuple>& grad,
           uintptr_t output, int32_t threads, const py::function& allocate) {
          auto p = shaped<hx::StandardizeParams>(shape, threads);
          p.maps = to_maps(maps);
          if (grad) p.grad = to_maps(*grad);
          p.output = to_pointer(output);
          run(p, hx::cpu::standardize_workspace_bytes(p), allocate, hx::cpu::standardize);
        });

  m.def("cpu_positive_part_mse", [](std::array<int64_t, 3> shape, const MapsTuple& a,
                                    const MapsTuple& b, uintptr_t grad, uintptr_t rows,
                                    uintptr_t grad_a, uintptr_t grad_b, int32_t threads,
                                    const py::function& allocate) {
    hx::PositivePartMseParams p;
    p.batch = shape[0];
    p.height = shape[1];
    p.width = shape[2];
    p.threads = threads;
    p.a = to_maps(a);
    p.b = to_maps(b);
    p.grad = to_pointer(grad);
    p.rows = to_pointer(rows);
    p.grad_a = to_pointer(grad_a);
    p.grad_b = to_pointer(grad_b);
    run(p, hx::cpu::positive_part_mse_workspace_bytes(p), allocate, hx::cpu::positive_part_mse);
  });
}
