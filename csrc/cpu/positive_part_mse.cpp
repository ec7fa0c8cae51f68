// Mean squared difference of positive parts, and its derivatives, on the CPU; MATH.md (6), (6').
#include "isa.h"
#include "parallel.h"
#include "rows.h"

namespace harmonizer::cpu {
namespace {

template <class Real>
struct MseWorkspace {
  Real* a;
  Real* b;

  MseWorkspace(void* base, int64_t width) : arena_(base) {
    a = arena_.take<Real>(padded<Real>(width));
    b = arena_.take<Real>(padded<Real>(width));
  }
  size_t bytes() const { return arena_.used(); }

 private:
  Arena arena_;
};

// Unlike a maximum, this lets NaN through.
template <class Real>
HARMONIZER_INLINE Vec<Real> relu(Vec<Real> v) {
  return v < Real(0) ? Vec<Real>{} : v;
}

template <class Real>
Real forward(const PositivePartMseParams& p, const MseWorkspace<Real>& work, int64_t i) {
  Sum<Real> energy;
  for (int64_t y = 0; y < p.height; ++y) {
    load_row(work.a, p.a, i, 0, 1, y, p.width);
    load_row(work.b, p.b, i, 0, 1, y, p.width);
    Vec<Real> squares{};
    // The padding of both rows is zero and adds nothing.
    for (int64_t x = 0; x < p.width; x += kLanes<Real>) {
      const Vec<Real> d = relu<Real>(load(work.a + x)) - relu<Real>(load(work.b + x));
      squares += d * d;
    }
    energy.add_row(squares);
  }
  return static_cast<Real>(energy.total() / (double(p.height) * double(p.width)));
}

template <class Real>
void backward(const PositivePartMseParams& p, const MseWorkspace<Real>& work, int64_t i) {
  const double upstream = static_cast<const Real*>(p.grad)[i];
  const Vec<Real> factor =
      splat(static_cast<Real>(2.0 * upstream / (double(p.height) * double(p.width))));
  for (int64_t y = 0; y < p.height; ++y) {
    load_row(work.a, p.a, i, 0, 1, y, p.width);
    load_row(work.b, p.b, i, 0, 1, y, p.width);
    const auto store_gradient = [&](void* out, Dtype dtype, const Real* own, const Real* other) {
      with_storage<Real>(dtype, [&](auto* type) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
        store_row<Real>(
            static_cast<T*>(out) + (i * p.height + y) * p.width, p.width, [&](int64_t x) {
              const Vec<Real> v = load(own + x);
              const Vec<Real> d = factor * (relu<Real>(v) - relu<Real>(load(other + x)));
              return v <= Real(0) ? Vec<Real>{} : d;
            });
      });
    };
    store_gradient(p.grad_a, p.a.dtype, work.a, work.b);
    store_gradient(p.grad_b, p.b.dtype, work.b, work.a);
  }
}

template <class Real>
void positive_part_mse_in(const PositivePartMseParams& p) {
  const size_t bytes = MseWorkspace<Real>(nullptr, p.width).bytes();
  for_each_sample(p.batch, p.threads, p.workspace, bytes, [&](int64_t i, void* base) {
    const MseWorkspace<Real> work(base, p.width);
    if (p.grad)
      backward(p, work, i);
    else
      static_cast<Real*>(p.rows)[i] = forward(p, work, i);
  });
}

bool in_double(const PositivePartMseParams& p) {
  return p.a.dtype == Dtype::float64 || p.b.dtype == Dtype::float64;
}

}  // namespace

namespace HARMONIZER_ISA {

size_t positive_part_mse_workspace_bytes(const PositivePartMseParams& p) {
  const size_t one = in_double(p) ? MseWorkspace<double>(nullptr, p.width).bytes()
                                  : MseWorkspace<float>(nullptr, p.width).bytes();
  return one * static_cast<size_t>(p.threads);
}

void positive_part_mse(const PositivePartMseParams& p) {
  in_double(p) ? positive_part_mse_in<double>(p) : positive_part_mse_in<float>(p);
}

}  // namespace HARMONIZER_ISA
}  // namespace harmonizer::cpu
