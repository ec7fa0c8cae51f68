// The Gaussian pyramid and its adjoint on the CPU; MATH.md (4), (4').
#include "isa.h"
#include "parallel.h"
#include "rows.h"

namespace harmonizer::cpu {
namespace {

template <class Real>
struct PyramidWorkspace {
  Scratch<Real> scratch;
  Plane<Real> level[kMaxLevels];

  PyramidWorkspace(void* base, int64_t height, int64_t width, int levels) : arena_(base) {
    scratch = Scratch<Real>(arena_, width);
    for (int l = 0; l < levels; ++l) {
      level[l] = Plane<Real>(arena_, height, width);
      height = halved(height);
      width = halved(width);
    }
  }
  size_t bytes() const { return arena_.used(); }

 private:
  Arena arena_;
};

// Writes a plane to map `index` of a dense tensor of maps.
template <class Real>
void store_plane(void* out, Dtype dtype, int64_t index, const Plane<Real>& plane) {
  with_storage<Real>(dtype, [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    T* map = static_cast<T*>(out) + index * plane.height * plane.width;
    for (int64_t y = 0; y < plane.height; ++y)
      store_row<Real>(map + y * plane.width, plane.width,
                      [&](int64_t x) { return load(plane.row(y) + x); });
  });
}

template <class Real>
void load_plane(const Plane<Real>& plane, const Maps& maps, int64_t b, int64_t c) {
  for (int64_t y = 0; y < plane.height; ++y) load_row(plane.row(y), maps, b, c, 1, y, plane.width);
}

template <class Real>
void pyramid_in(const PyramidParams& p) {
  const size_t bytes = PyramidWorkspace<Real>(nullptr, p.height, p.width, p.levels).bytes();
  for_each_sample(p.batch * p.channels, p.threads, p.workspace, bytes, [&](int64_t i, void* base) {
    const PyramidWorkspace<Real> work(base, p.height, p.width, p.levels);
    work.scratch.clear();
    load_plane(work.level[0], p.maps, i / p.channels, i % p.channels);
    for (int l = 1; l < p.levels; ++l) {
      const Plane<Real>& fine = work.level[l - 1];
      for (int64_t y = 0; y < work.level[l].height; ++y)
        downsample_row<Real>(work.level[l].row(y), y, fine.height, fine.width, work.scratch,
                             [&](int64_t row) { return row_or_zeros(fine, row, work.scratch); });
      store_plane(p.outputs[l], p.maps.dtype, i, work.level[l]);
    }
  });
}

template <class Real>
void pyramid_adjoint_in(const PyramidAdjointParams& p) {
  const size_t bytes = PyramidWorkspace<Real>(nullptr, p.height, p.width, p.levels).bytes();
  for_each_sample(p.batch * p.channels, p.threads, p.workspace, bytes, [&](int64_t i, void* base) {
    const PyramidWorkspace<Real> work(base, p.height, p.width, p.levels);
    work.scratch.clear();
    for (int l = p.levels - 1; l >= 0; --l) {
      const Plane<Real>& plane = work.level[l];
      // Level 0 has no gradient of its own: the identity is the caller's tensor.
      if (l > 0) load_plane(plane, p.gradients[l], i / p.channels, i % p.channels);
      if (l == p.levels - 1) continue;
      const Plane<Real>& coarse = work.level[l + 1];
      for (int64_t y = 0; y < plane.height; ++y)
        upsample_row<Real>(
            y, plane.height, plane.width, work.scratch,
            [&](int64_t row) { return row_or_zeros(coarse, row, work.scratch); },
            [&](int64_t x, Vec<Real> up, Mask<Real> mask) {
              const Vec<Real> own = l > 0 ? load(plane.row(y) + x) : Vec<Real>{};
              store(plane.row(y) + x, keep<Real>(mask, own + up));
            });
    }
    store_plane(p.output, p.gradients[1].dtype, i, work.level[0]);
  });
}

template <class Real>
size_t workspace(int64_t height, int64_t width, int levels, int threads) {
  return PyramidWorkspace<Real>(nullptr, height, width, levels).bytes() *
         static_cast<size_t>(threads);
}

}  // namespace

namespace HARMONIZER_ISA {

size_t pyramid_workspace_bytes(const PyramidParams& p) {
  return p.maps.dtype == Dtype::float64 ? workspace<double>(p.height, p.width, p.levels, p.threads)
                                        : workspace<float>(p.height, p.width, p.levels, p.threads);
}
size_t pyramid_adjoint_workspace_bytes(const PyramidAdjointParams& p) {
  return p.gradients[1].dtype == Dtype::float64
             ? workspace<double>(p.height, p.width, p.levels, p.threads)
             : workspace<float>(p.height, p.width, p.levels, p.threads);
}

void pyramid(const PyramidParams& p) {
  p.maps.dtype == Dtype::float64 ? pyramid_in<double>(p) : pyramid_in<float>(p);
}
void pyramid_adjoint(const PyramidAdjointParams& p) {
  p.gradients[1].dtype == Dtype::float64 ? pyramid_adjoint_in<double>(p)
                                         : pyramid_adjoint_in<float>(p);
}

}  // namespace HARMONIZER_ISA
}  // namespace harmonizer::cpu
