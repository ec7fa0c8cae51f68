// The fused loss on the CPU: row losses and the unit gradient of one sample in a few passes over a
// working set that stays in the second-level cache.
//
// Released (8): load and statistics; difference and level 1 together; coarse levels; adjoint;
// gradient. Paper (9): load and statistics; both level 1 maps and all sums of level 0 together;
// coarse levels; adjoint and gradient in one pass, because its sums need no adjoint.
#include "isa.h"
#include "parallel.h"
#include "rows.h"

namespace harmonizer::cpu {
namespace {

template <class Real>
constexpr Real kNaN = std::numeric_limits<Real>::quiet_NaN();

template <class Real>
struct LossWorkspace {
  Scratch<Real> scratch;
  Plane<Real> saliency[kMaxLevels];  // channel mean and its pyramid; released: level 0 only
  Plane<Real> heatmap[kMaxLevels];   // human map and its pyramid; released: the difference's

  LossWorkspace(void* base, const LossParams& p) : arena_(base) {
    scratch = Scratch<Real>(arena_, p.width);
    int64_t height = p.height, width = p.width;
    for (int l = 0; l < p.levels; ++l) {
      if (l == 0 || p.formulation == Formulation::paper)
        saliency[l] = Plane<Real>(arena_, height, width);
      heatmap[l] = Plane<Real>(arena_, height, width);
      height = halved(height);
      width = halved(width);
    }
  }
  size_t bytes() const { return arena_.used(); }

 private:
  Arena arena_;
};

// Gradients of so many bytes are written past the caches: what reads them next finds no more than
// the last of them there, and a line need not be read to be written. Below it they stay.
constexpr int64_t kStreamedBytes = int64_t{4} << 20;

template <class Real>
struct Sample {
  const LossParams& params;
  LossWorkspace<Real>& work;
  int64_t index;
  Real weight;
  bool streams =
      params.batch * params.height * params.width * int64_t{sizeof(Real)} >= kStreamedBytes;

  Real* row_loss() const { return static_cast<Real*>(params.rows) + index; }
  Real* saliency_std() const { return static_cast<Real*>(params.saliency_std) + index; }

  // Calls f with row y of this sample's gradient, typed.
  template <class F>
  HARMONIZER_INLINE void with_gradient_row(int64_t y, F&& f) const {
    with_storage<Real>(params.saliency.dtype, [&](auto* type) {
      using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
      f(static_cast<T*>(params.gradient) + (index * params.height + y) * params.width);
    });
  }
  // Writes value(x), a register, to row y of the gradient.
  template <class Value>
  HARMONIZER_INLINE void store_gradient_row(int64_t y, Value&& value) const {
    with_gradient_row(y, [&](auto* out) {
      if (streams)
        stream_row<Real>(out, params.width, value);
      else
        store_row<Real>(out, params.width, value);
    });
  }
  void fill(Real value, Real std) const {
    *row_loss() = value;
    *saliency_std() = std;
    if (!params.gradient) return;
    for (int64_t y = 0; y < params.height; ++y)
      with_gradient_row(y, [&](auto* out) {
        store_row<Real>(out, params.width, [&](int64_t) { return splat(value); });
      });
  }
};

template <class Real>
struct BothStatistics {
  Statistics<Real> saliency;
  Statistics<Real> heatmap;
  bool finite() const { return saliency.finite && heatmap.finite; }
};

constexpr int64_t kRowsAhead = 2;

template <class Real>
BothStatistics<Real> load_maps(const Sample<Real>& s) {
  const LossParams& p = s.params;
  Moments<Real> m, h;
  for (int64_t y = 0; y < p.height; ++y) {
    Real* m_row = s.work.saliency[0].row(y);
    Real* h_row = s.work.heatmap[0].row(y);
    if (y + kRowsAhead < p.height) {
      prefetch_row<Real>(p.saliency, s.index, p.channels, y + kRowsAhead, p.width);
      prefetch_row<Real>(p.heatmaps, s.index, 1, y + kRowsAhead, p.width);
    }
    load_row(m_row, p.saliency, s.index, 0, p.channels, y, p.width);
    load_row(h_row, p.heatmaps, s.index, 0, 1, y, p.width);
    m.add_row(m_row, p.width);
    h.add_row(h_row, p.width);
  }
  return {m.finish(p.width), h.finish(p.width)};
}

// --- released formulation ---

template <class Real>
void released(const Sample<Real>& s) {
  const LossParams& p = s.params;
  const Scratch<Real>& scratch = s.work.scratch;
  const Plane<Real>& m = s.work.saliency[0];
  const BothStatistics<Real> stats = load_maps(s);
  if (!stats.finite()) return s.fill(kNaN<Real>, kNaN<Real>);
  *s.saliency_std() = stats.saliency.std;

  // Maxima of the standardized maps follow from those of the maps; (7).
  const double r = stats.saliency.scale, r_h = stats.heatmap.scale;
  const double s_max = (static_cast<double>(stats.saliency.maximum) - stats.saliency.mean) * r;
  const double t_max = (static_cast<double>(stats.heatmap.maximum) - stats.heatmap.mean) * r_h;
  const double rescale = r_h / (t_max + kMaximumEpsilon) * (s_max + kMaximumEpsilon);
  const Vec<Real> mean = splat(stats.saliency.mean), mean_h = splat(stats.heatmap.mean);
  const Vec<Real> scale = splat(stats.saliency.scale), scale_h = splat(static_cast<Real>(rescale));

  // Level 0: the difference replaces the human map row by row, just ahead of level 1.
  const Plane<Real>* d = s.work.heatmap;
  Sum<Real> energy[kMaxLevels];
  const auto difference = [&](int64_t y) {
    const Real* m_row = m.row(y);
    Real* d_row = d[0].row(y);
    Vec<Real> squares{};
    for_row<Real>(p.width, [&](int64_t x, Mask<Real> mask) {
      const Vec<Real> v =
          keep<Real>(mask, positive_part<Real>(load(m_row + x) - mean) * scale -
                               positive_part<Real>(load(d_row + x) - mean_h) * scale_h);
      squares += v * v;
      store(d_row + x, v);
    });
    energy[0].add_row(squares);
  };
  int64_t done = 0;
  for (int l = 0; l + 1 < p.levels; ++l) {
    const Plane<Real>&fine = d[l], &coarse = d[l + 1];
    for (int64_t y = 0; y < coarse.height; ++y) {
      if (l == 0)
        for (; done < fine.height && done <= 2 * y + 3; ++done) difference(done);
      Real* out = coarse.row(y);
      downsample_row<Real>(out, y, fine.height, fine.width, scratch,
                           [&](int64_t i) { return row_or_zeros(fine, i, scratch); });
      Vec<Real> squares{};
      for (int64_t x = 0; x < coarse.pitch; x += kLanes<Real>) {
        const Vec<Real> v = load(out + x);
        squares += v * v;
      }
      energy[l + 1].add_row(squares);
    }
  }
  for (; done < p.height; ++done) difference(done);

  double loss = 0;
  for (int l = 0; l < p.levels; ++l)
    loss += energy[l].total() / (double(d[l].height) * double(d[l].width));
  *s.row_loss() = static_cast<Real>(s.weight * loss / p.levels);
  if (!p.gradient) return;

  // Adjoint, coarse to fine, in place: q_l = c_l p_l + D* q_(l+1); (12).
  const auto factor = [&](int l) {
    return splat(static_cast<Real>(2.0 * s.weight /
                                   (double(p.levels) * double(d[l].height) * double(d[l].width))));
  };
  const int last = p.levels - 1;
  if (last > 0) {
    const Vec<Real> c = factor(last);
    for (int64_t y = 0; y < d[last].height; ++y)
      for (int64_t x = 0; x < d[last].pitch; x += kLanes<Real>)
        store(d[last].row(y) + x, c * load(d[last].row(y) + x));
  }
  for (int l = last - 1; l > 0; --l) {
    const Vec<Real> c = factor(l);
    const Plane<Real>& coarse = d[l + 1];
    for (int64_t y = 0; y < d[l].height; ++y) {
      Real* row = d[l].row(y);
      upsample_row<Real>(
          y, d[l].height, d[l].width, scratch,
          [&](int64_t i) { return row_or_zeros(coarse, i, scratch); },
          [&](int64_t x, Vec<Real> up, Mask<Real> mask) {
            store(row + x, keep<Real>(mask, c * load(row + x) + up));
          });
    }
  }

  // Level 0: only pixels above the mean carry a gradient; the two sums of (13) on the way.
  const Vec<Real> c = factor(0);
  Sum<Real> sum_g, sum_ge;
  for (int64_t y = 0; y < p.height; ++y) {
    Real* row = d[0].row(y);
    const Real* m_row = m.row(y);
    Vec<Real> g_sum{}, ge_sum{};
    const auto cut = [&](int64_t x, Vec<Real> up, Mask<Real> mask) {
      const Vec<Real> e = load(m_row + x) - mean;
      const Vec<Real> g = mask & (e > Real(0)) ? c * load(row + x) + up : Vec<Real>{};
      g_sum += g;
      ge_sum += g * e;
      store(row + x, g);
    };
    if (p.levels == 1) {
      for_row<Real>(p.width, [&](int64_t x, Mask<Real> mask) { cut(x, Vec<Real>{}, mask); });
    } else {
      upsample_row<Real>(
          y, p.height, p.width, scratch, [&](int64_t i) { return row_or_zeros(d[1], i, scratch); },
          cut);
    }
    sum_g.add_row(g_sum);
    sum_ge.add_row(ge_sum);
  }
  const double pixels = double(p.height) * double(p.width);
  const double std = stats.saliency.std;
  const double slope = std > 0 ? sum_ge.total() / pixels * r / std : 0.0;
  const double share = r / double(p.channels);
  const Vec<Real> a = splat(static_cast<Real>(share));
  const Vec<Real> g_mean = splat(static_cast<Real>(sum_g.total() / pixels));
  const Vec<Real> k = splat(static_cast<Real>(slope));
  for (int64_t y = 0; y < p.height; ++y) {
    const Real* g_row = d[0].row(y);
    const Real* m_row = m.row(y);
    s.store_gradient_row(y, [&](int64_t x) {
      return a * (load(g_row + x) - g_mean - (load(m_row + x) - mean) * k);
    });
  }
}

// --- paper formulation ---

// What the gradient of one level needs once its sums are known; (15).
template <class Real>
struct LevelGradient {
  Vec<Real> mean, scale, mean_h, scale_h;
  Vec<Real> factor, g_mean, slope;

  HARMONIZER_INLINE Vec<Real> difference(Vec<Real> x, Vec<Real> y) const {
    return positive_part<Real>(x - mean) * scale - positive_part<Real>(y - mean_h) * scale_h;
  }
  HARMONIZER_INLINE Vec<Real> operator()(Vec<Real> x, Vec<Real> y) const {
    const Vec<Real> e = x - mean;
    const Vec<Real> g = e > Real(0) ? difference(x, y) : Vec<Real>{};
    return factor * (g - g_mean - e * slope);
  }
};

template <class Real>
void paper(const Sample<Real>& s) {
  const LossParams& p = s.params;
  const Scratch<Real>& scratch = s.work.scratch;
  const Plane<Real>* x_level = s.work.saliency;
  const Plane<Real>* y_level = s.work.heatmap;
  BothStatistics<Real> stats = load_maps(s);
  const Real saliency_std = stats.finite() ? stats.saliency.std : kNaN<Real>;
  *s.saliency_std() = saliency_std;

  LevelGradient<Real> level[kMaxLevels];
  double loss = 0;
  for (int l = 0; l < p.levels; ++l) {
    // A coarse level of finite maps may overflow: at its border it is a mean with zeros.
    if (!stats.finite()) return s.fill(kNaN<Real>, saliency_std);
    const Plane<Real>&x = x_level[l], &y = y_level[l];
    const Statistics<Real> saliency = stats.saliency, heatmap = stats.heatmap;
    LevelGradient<Real>& grad = level[l];
    grad.mean = splat(saliency.mean);
    grad.scale = splat(saliency.scale);
    grad.mean_h = splat(heatmap.mean);
    grad.scale_h = splat(heatmap.scale);

    // The level's own sums and the next level's maps and moments in one visit of each row.
    Sum<Real> energies, sum_g, sum_ge;
    const auto visit = [&](int64_t row) {
      const Real *x_row = x.row(row), *y_row = y.row(row);
      Vec<Real> squares{}, g_sum{}, ge_sum{};
      for_row<Real>(x.width, [&](int64_t i, Mask<Real> mask) {
        const Vec<Real> e = load(x_row + i) - grad.mean;
        const Vec<Real> d = keep<Real>(mask, grad.difference(load(x_row + i), load(y_row + i)));
        const Vec<Real> g = e > Real(0) ? d : Vec<Real>{};
        squares += d * d;
        g_sum += g;
        ge_sum += g * e;
      });
      energies.add_row(squares);
      sum_g.add_row(g_sum);
      sum_ge.add_row(ge_sum);
    };
    int64_t visited = 0;
    if (l + 1 < p.levels) {
      Moments<Real> m, h;
      for (int64_t row = 0; row < x_level[l + 1].height; ++row) {
        for (; visited < x.height && visited <= 2 * row + 3; ++visited) visit(visited);
        Real *x_out = x_level[l + 1].row(row), *y_out = y_level[l + 1].row(row);
        downsample_row<Real>(x_out, row, x.height, x.width, scratch,
                             [&](int64_t i) { return row_or_zeros(x, i, scratch); });
        downsample_row<Real>(y_out, row, y.height, y.width, scratch,
                             [&](int64_t i) { return row_or_zeros(y, i, scratch); });
        m.add_row(x_out, x_level[l + 1].width);
        h.add_row(y_out, y_level[l + 1].width);
      }
      stats = {m.finish(x_level[l + 1].width), h.finish(y_level[l + 1].width)};
    }
    for (; visited < x.height; ++visited) visit(visited);

    const double pixels = double(x.height) * double(x.width), energy = energies.total();
    const double r = saliency.scale, std = saliency.std;
    double chain;  // derivative of the level's distance with respect to d, divided by d
    if (p.distance == Distance::mse) {
      loss += energy / pixels;
      chain = 2.0 / pixels;
    } else {
      const double norm = __builtin_sqrt(energy);
      loss += norm;
      chain = norm > 0 ? 1.0 / norm : 0.0;
    }
    grad.factor = splat(static_cast<Real>(s.weight * chain * r / double(p.channels)));
    grad.g_mean = splat(static_cast<Real>(sum_g.total() / pixels));
    grad.slope = splat(static_cast<Real>(std > 0 ? sum_ge.total() / pixels * r / std : 0.0));
  }
  *s.row_loss() = static_cast<Real>(s.weight * loss);
  if (!p.gradient) return;

  // Adjoint, coarse to fine, in place of the saliency's pyramid; (16).
  const int last = p.levels - 1;
  for (int l = last; l > 0; --l) {
    const Plane<Real>&x = x_level[l], &y = y_level[l];
    for (int64_t row = 0; row < x.height; ++row) {
      Real* x_row = x.row(row);
      const Real* y_row = y.row(row);
      const auto accumulate = [&](int64_t i, Vec<Real> up, Mask<Real> mask) {
        store(x_row + i, keep<Real>(mask, level[l](load(x_row + i), load(y_row + i)) + up));
      };
      if (l == last) {
        for_row<Real>(x.width,
                      [&](int64_t i, Mask<Real> mask) { accumulate(i, Vec<Real>{}, mask); });
      } else {
        upsample_row<Real>(
            row, x.height, x.width, scratch,
            [&](int64_t i) { return row_or_zeros(x_level[l + 1], i, scratch); }, accumulate);
      }
    }
  }
  for (int64_t row = 0; row < p.height; ++row) {
    Real* x_row = x_level[0].row(row);
    const Real* y_row = y_level[0].row(row);
    if (last > 0)
      upsample_row<Real>(
          row, p.height, p.width, scratch,
          [&](int64_t i) { return row_or_zeros(x_level[1], i, scratch); },
          [&](int64_t i, Vec<Real> up, Mask<Real>) {
            store(x_row + i, level[0](load(x_row + i), load(y_row + i)) + up);
          });
    else
      for_row<Real>(p.width, [&](int64_t i, Mask<Real>) {
        store(x_row + i, level[0](load(x_row + i), load(y_row + i)));
      });
    s.store_gradient_row(row, [&](int64_t i) { return load(x_row + i); });
  }
}

template <class Real>
void loss_in(const LossParams& p) {
  const size_t bytes = LossWorkspace<Real>(nullptr, p).bytes();
  for_each_sample(p.batch, p.threads, p.workspace, bytes, [&](int64_t b, void* base) {
    LossWorkspace<Real> work(base, p);
    work.scratch.clear();
    const Sample<Real> sample{p, work, b, static_cast<const Real*>(p.weights)[b]};
    // A row without a human map is not read: whatever it holds cannot matter.
    if (sample.weight == 0) return sample.fill(0, 0);
    p.formulation == Formulation::released ? released(sample) : paper(sample);
    if (sample.streams) stream_fence();
  });
}

bool in_double(const LossParams& p) {
  return p.saliency.dtype == Dtype::float64 || p.heatmaps.dtype == Dtype::float64;
}

}  // namespace

namespace HARMONIZER_ISA {

size_t loss_workspace_bytes(const LossParams& p) {
  const size_t one = in_double(p) ? LossWorkspace<double>(nullptr, p).bytes()
                                  : LossWorkspace<float>(nullptr, p).bytes();
  return one * static_cast<size_t>(p.threads);
}

void loss(const LossParams& p) { in_double(p) ? loss_in<double>(p) : loss_in<float>(p); }

}  // namespace HARMONIZER_ISA
}  // namespace harmonizer::cpu
