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

#include "cuda_left_out.h"
#include "harmonizer.h"

#ifdef HARMONIZER_CUDA
#include <cuda_runtime_api.h>
#endif

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

// What differs between the devices: the functions, what says where to run, and whether the host may
// read the tensors.
struct Cpu {
  using Place = int32_t;  // threads
  using LossPlace = Place;
  static constexpr bool reads_host_memory = true;
  template <class Params>
  static void put(Params& p, Place threads) {
    p.threads = threads;
  }
  static constexpr auto loss_bytes = hx::cpu::loss_workspace_bytes;
  static constexpr auto pyramid_bytes = hx::cpu::pyramid_workspace_bytes;
  static constexpr auto pyramid_adjoint_bytes = hx::cpu::pyramid_adjoint_workspace_bytes;
  static constexpr auto standardize_bytes = hx::cpu::standardize_workspace_bytes;
  static constexpr auto positive_part_mse_bytes = hx::cpu::positive_part_mse_workspace_bytes;
  static constexpr auto loss = hx::cpu::loss;
  static constexpr auto pyramid = hx::cpu::pyramid;
  static constexpr auto pyramid_adjoint = hx::cpu::pyramid_adjoint;
  static constexpr auto standardize = hx::cpu::standardize;
  static constexpr auto positive_part_mse = hx::cpu::positive_part_mse;
};

#ifdef HARMONIZER_CUDA
struct Cuda {
  using Place = std::tuple<int32_t, uintptr_t>;  // device, stream
  // The same, and variant and prefetch of LossParams.
  using LossPlace = std::tuple<int32_t, uintptr_t, int32_t, int32_t>;
  static constexpr bool reads_host_memory = false;
  template <class Params>
  static void put(Params& p, const Place& place) {
    p.device = std::get<0>(place);
    p.stream = to_pointer(std::get<1>(place));
  }
  static void put(hx::LossParams& p, const LossPlace& place) {
    std::tie(p.device, std::ignore, p.variant, p.prefetch) = place;
    p.stream = to_pointer(std::get<1>(place));
  }
  static constexpr auto loss_bytes = hx::cuda::loss_workspace_bytes;
  static constexpr auto pyramid_bytes = hx::cuda::pyramid_workspace_bytes;
  static constexpr auto pyramid_adjoint_bytes = hx::cuda::pyramid_adjoint_workspace_bytes;
  static constexpr auto standardize_bytes = hx::cuda::standardize_workspace_bytes;
  static constexpr auto positive_part_mse_bytes = hx::cuda::positive_part_mse_workspace_bytes;
  static constexpr auto loss = hx::cuda::loss;
  static constexpr auto pyramid = hx::cuda::pyramid;
  static constexpr auto pyramid_adjoint = hx::cuda::pyramid_adjoint;
  static constexpr auto standardize = hx::cuda::standardize;
  static constexpr auto positive_part_mse = hx::cuda::positive_part_mse;
};
#endif

template <class Device, class Params, class Place>
Params shaped(const Shape& shape, const Place& place) {
  Params p;
  p.batch = shape[0];
  p.channels = shape[1];
  p.height = shape[2];
  p.width = shape[3];
  Device::put(p, place);
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

// Defines <prefix>_loss and so on, with the kernels of one device.
template <class Device>
void define(py::module_& m, const std::string& prefix) {
  using Place = typename Device::Place;
  const auto name = [&](const char* operation) { return prefix + "_" + operation; };

  m.def(name("loss").c_str(),
        [](Shape shape, int32_t levels, int32_t formulation, int32_t distance,
           const MapsTuple& saliency, const MapsTuple& heatmaps, uintptr_t weights, uintptr_t rows,
           uintptr_t saliency_std, uintptr_t gradient, typename Device::LossPlace place,
           const py::function& allocate) {
          auto p = shaped<Device, hx::LossParams>(shape, place);
          p.levels = checked_levels(levels);
          p.formulation = static_cast<hx::Formulation>(formulation);
          p.distance = static_cast<hx::Distance>(distance);
          p.saliency = to_maps(saliency);
          p.heatmaps = to_maps(heatmaps);
          p.weights = to_pointer(weights);
          if constexpr (Device::reads_host_memory) {
            const bool in_double =
                p.saliency.dtype == hx::Dtype::float64 || p.heatmaps.dtype == hx::Dtype::float64;
            in_double ? check_weights<double>(p.weights, p.batch)
                      : check_weights<float>(p.weights, p.batch);
          }
          p.rows = to_pointer(rows);
          p.saliency_std = to_pointer(saliency_std);
          p.gradient = to_pointer(gradient);
          run(p, Device::loss_bytes(p), allocate, Device::loss);
        });

  m.def(name("pyramid").c_str(),
        [](Shape shape, int32_t levels, const MapsTuple& maps,
           const std::vector<uintptr_t>& outputs, Place place, const py::function& allocate) {
          auto p = shaped<Device, hx::PyramidParams>(shape, place);
          p.levels = checked_levels(levels);
          p.maps = to_maps(maps);
          for (int l = 1; l < p.levels; ++l) p.outputs[l] = to_pointer(outputs.at(l - 1));
          run(p, Device::pyramid_bytes(p), allocate, Device::pyramid);
        });

  m.def(name("pyramid_adjoint").c_str(),
        [](Shape shape, const std::vector<MapsTuple>& gradients, uintptr_t output, Place place,
           const py::function& allocate) {
          auto p = shaped<Device, hx::PyramidAdjointParams>(shape, place);
          p.levels = checked_levels(static_cast<int32_t>(gradients.size()) + 1);
          for (int l = 1; l < p.levels; ++l) p.gradients[l] = to_maps(gradients[l - 1]);
          p.output = to_pointer(output);
          run(p, Device::pyramid_adjoint_bytes(p), allocate, Device::pyramid_adjoint);
        });

  m.def(name("standardize").c_str(),
        [](Shape shape, const MapsTuple& maps, const std::optional<MapsTuple>& grad,
           uintptr_t output, Place place, const py::function& allocate) {
          auto p = shaped<Device, hx::StandardizeParams>(shape, place);
          p.maps = to_maps(maps);
          if (grad) p.grad = to_maps(*grad);
          p.output = to_pointer(output);
          run(p, Device::standardize_bytes(p), allocate, Device::standardize);
        });

  m.def(name("positive_part_mse").c_str(),
        [](std::array<int64_t, 3> shape, const MapsTuple& a, const MapsTuple& b, uintptr_t grad,
           uintptr_t rows, uintptr_t grad_a, uintptr_t grad_b, Place place,
           const py::function& allocate) {
          hx::PositivePartMseParams p;
          p.batch = shape[0];
          p.height = shape[1];
          p.width = shape[2];
          Device::put(p, place);
          p.a = to_maps(a);
          p.b = to_maps(b);
          p.grad = to_pointer(grad);
          p.rows = to_pointer(rows);
          p.grad_a = to_pointer(grad_a);
          p.grad_b = to_pointer(grad_b);
          run(p, Device::positive_part_mse_bytes(p), allocate, Device::positive_part_mse);
        });
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native kernels of harmonizer_ext; see csrc/harmonizer.h. Not a public interface.";
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
  define<Cpu>(m, "cpu");
  m.def("cpu_spearman",
        [](std::array<int64_t, 3> shape, const MapsTuple& a, const MapsTuple& b,
           uintptr_t correlations, Cpu::Place threads, const py::function& allocate) {
          hx::SpearmanParams p;
          p.batch = shape[0];
          p.height = shape[1];
          p.width = shape[2];
          p.threads = threads;
          p.a = to_maps(a);
          p.b = to_maps(b);
          p.correlations = static_cast<double*>(to_pointer(correlations));
          run(p, hx::cpu::spearman_workspace_bytes(p), allocate, hx::cpu::spearman);
        });
  m.def("cpu_instruction_set", &hx::cpu::instruction_set);
  m.def("cpu_use_instruction_set", &hx::cpu::use_instruction_set);

#ifdef HARMONIZER_CUDA
  m.attr("cuda") = true;
  m.attr("cuda_architectures") = HARMONIZER_CUDA_ARCHITECTURES;  // "sm_80 sm_90 compute_90"
  m.attr("cuda_runtime_version") = CUDART_VERSION;               // 13000 for 13.0
  // The newest CUDA that the driver serves, in the same form; 0 without a driver.
  m.def("cuda_driver_version", [] {
    int version = 0;
    cudaDriverGetVersion(&version);
    return version;
  });
  define<Cuda>(m, "cuda");
  m.def("cuda_loss_variants", [] {
    py::list variants;
    for (int32_t number = 1; hx::cuda::loss_variant(number).name; ++number) {
      const hx::cuda::LossVariant variant = hx::cuda::loss_variant(number);
      variants.append(py::dict(py::arg("number") = number, py::arg("name") = variant.name,
                               py::arg("size") = variant.size,
                               py::arg("formulation") = static_cast<int32_t>(variant.formulation),
                               py::arg("cluster") = variant.cluster,
                               py::arg("threads") = variant.threads,
                               py::arg("shared_bytes") = variant.shared_bytes));
    }
    return variants;
  });
#else
  m.attr("cuda") = false;
  m.attr("cuda_left_out") = HARMONIZER_CUDA_LEFT_OUT;  // empty where the build was not told
#endif
}
