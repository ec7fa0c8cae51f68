// Standardize and cut, and its derivative, on the CPU; MATH.md (3), (3').
#include "isa.h"
#include "parallel.h"
#include "rows.h"

namespace harmonizer::cpu {
namespace {

template <class Real>
struct StandardizeWorkspace {
  Plane<Real> map;
  Plane<Real> grad;

  StandardizeWorkspace(void* base, const StandardizeParams& p) : arena_(base) {
    map = Plane<Real>(arena_, p.height, p.width);
    if (p.grad.data) grad = Plane<Real>(arena_, p.height, p.width);
  }
  size_t bytes() const { return arena_.used(); }

 private:
  Arena arena_;
};

template <class Real, class T>
void forward(T* out, const Plane<Real>& map, const Statistics<Real>& stats) {
  // Arithmetic carries a NaN through; only the cut would swallow it.
  const Vec<Real> poison = splat(stats.finite ? Real(0) : std::numeric_limits<Real>::quiet_NaN());
  const Vec<Real> mean = splat(stats.mean), scale = splat(stats.scale);
  for (int64_t y = 0; y < map.height; ++y)
    store_row<Real>(out + y * map.width, map.width, [&](int64_t x) {
      return positive_part<Real>(load(map.row(y) + x) - mean) * scale + poison;
    });
}

template <class Real, class T>
void backward(T* out, const Plane<Real>& map, const Plane<Real>& grad,
              const Statistics<Real>& stats) {
  const Vec<Real> poison = splat(stats.finite ? Real(0) : std::numeric_limits<Real>::quiet_NaN());
  const Vec<Real> mean = splat(stats.mean), scale = splat(stats.scale);
  Sum<Real> sum_g, sum_ge;
  for (int64_t y = 0; y < map.height; ++y) {
    Vec<Real> g_sum{}, ge_sum{};
    for_row<Real>(map.width, [&](int64_t x, Mask<Real> mask) {
      const Vec<Real> e = load(map.row(y) + x) - mean;
      const Vec<Real> g = mask & (e > Real(0)) ? load(grad.row(y) + x) : Vec<Real>{};
      g_sum += g;
      ge_sum += g * e;
      store(grad.row(y) + x, g);
    });
    sum_g.add_row(g_sum);
    sum_ge.add_row(ge_sum);
  }
  const double pixels = double(map.height) * double(map.width), std = stats.std;
  const Vec<Real> g_mean = splat(static_cast<Real>(sum_g.total() / pixels));
  const Vec<Real> slope =
      splat(static_cast<Real>(std > 0 ? sum_ge.total() / pixels * double(stats.scale) / std : 0.0));
  for (int64_t y = 0; y < map.height; ++y)
    store_row<Real>(out + y * map.width, map.width, [&](int64_t x) {
      return scale * (load(grad.row(y) + x) - g_mean - (load(map.row(y) + x) - mean) * slope) +
             poison;
    });
}

template <class Real>
void standardize_in(const StandardizeParams& p) {
  const size_t bytes = StandardizeWorkspace<Real>(nullptr, p).bytes();
  for_each_sample(p.batch * p.channels, p.threads, p.workspace, bytes, [&](int64_t i, void* base) {
    const StandardizeWorkspace<Real> work(base, p);
    const int64_t b = i / p.channels, c = i % p.channels;
    Moments<Real> moments;
    for (int64_t y = 0; y < p.height; ++y) {
      load_row(work.map.row(y), p.maps, b, c, 1, y, p.width);
      moments.add_row(work.map.row(y), p.width);
      if (p.grad.data) load_row(work.grad.row(y), p.grad, b, c, 1, y, p.width);
    }
    const Statistics<Real> stats = moments.finish(p.width);
    with_storage<Real>(p.maps.dtype, [&](auto* type) {
      using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
      T* out = static_cast<T*>(p.output) + i * p.height * p.width;
      if (p.grad.data)
        backward(out, work.map, work.grad, stats);
      else
        forward(out, work.map, stats);
    });
  });
}

}  // namespace

namespace HARMONIZER_ISA {

size_t standardize_workspace_bytes(const StandardizeParams& p) {
  const size_t one = p.maps.dtype == Dtype::float64
                         ? StandardizeWorkspace<double>(nullptr, p).bytes()
                         : StandardizeWorkspace<float>(nullptr, p).bytes();
  return one * static_cast<size_t>(p.threads);
}

void standardize(const StandardizeParams& p) {
  p.maps.dtype == Dtype::float64 ? standardize_in<double>(p) : standardize_in<float>(p);
}

}  // namespace HARMONIZER_ISA
}  // namespace harmonizer::cpu
