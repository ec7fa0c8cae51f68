// Plan, workspace and order of the launches of the general path.
#include "loss_general.cuh"

#include <algorithm>

namespace harmonizer::cuda {
namespace {

// Pixels per multiprocessor below which the fixed part of a chunk's launches would count.
constexpr int64_t kFillPixels = 1 << 16;
// A small map costs as much as one of so many pixels.
constexpr int64_t kLeastPixels = 1 << 10;
// Bytes per pixel that later launches of a chunk find in the cache: both maps and the levels.
constexpr int64_t kCachedBytes = 12;

constexpr int kSlabStep = 8 * kMomentsThreads;  // pixels that a block takes at a time
constexpr int kSlab = 4 * kSlabStep, kLargestSlab = 1 << 20;
constexpr int kMomentsBlocks = 8;  // a multiprocessor
constexpr int kDownRows = 16, kFewestDownRows = 4, kDownWarpsWanted = 12;
constexpr int kUpRows = 8, kUpWarpsWanted = 24;

template <class T>
T divided(T a, T b) {
  return (a + b - 1) / b;
}

DownTiling down_tiling(int height, int width, int64_t samples, int multiprocessors) {
  DownTiling t{};
  const int coarse_height = halved(height);
  t.groups = width / 4 + (width % 4 != 0);
  if (t.groups <= kWarp) {
    t.tiles = 1;
    t.tile_groups = t.groups;
    t.segments = kWarp / t.groups;
  } else {
    t.tiles = divided(t.groups, kWarp - 2);
    t.tile_groups = divided(t.groups, t.tiles);
    t.segments = 1;
  }
  int64_t units = 0;
  const auto cut = [&](int rows) {
    t.strip_rows = divided(coarse_height, divided(coarse_height, rows));
    t.strips = divided(coarse_height, t.strip_rows);
    units = static_cast<int64_t>(t.tiles) * divided(t.strips, t.segments);
  };
  cut(kDownRows);
  for (int rows = kDownRows / 2; rows >= kFewestDownRows; rows /= 2)
    if (samples * units < static_cast<int64_t>(kDownWarpsWanted) * multiprocessors) cut(rows);
  t.blocks = static_cast<int>(divided<int64_t>(units, kDownWarps));
  return t;
}

UpTiling up_tiling(int height, int width, int64_t samples, int multiprocessors) {
  UpTiling t{};
  const int coarse_height = halved(height);
  t.groups = width / 4 + (width % 4 != 0);
  int64_t threads = 0;
  const auto cut = [&](int rows) {
    t.strip_rows = std::min(rows, coarse_height);
    t.strips = divided(coarse_height, t.strip_rows);
    threads = static_cast<int64_t>(t.groups) * t.strips;
  };
  cut(kUpRows);
  for (int rows = kUpRows / 2; rows > 0; rows /= 2)
    if (samples * threads < static_cast<int64_t>(kUpWarpsWanted) * kWarp * multiprocessors)
      cut(rows);
  t.blocks = static_cast<int>(divided<int64_t>(threads, kUpThreads));
  return t;
}

bool columns_adjoin(const Maps& maps, int64_t width) {
  return width == 1 || maps.stride_column == 1;
}

}  // namespace

GeneralPlan general_plan(const LossParams& p, const DeviceLimits& limits) {
  GeneralPlan plan{};
  const int height = static_cast<int>(p.height), width = static_cast<int>(p.width);
  const int64_t pixels = p.height * p.width;
  const int64_t multiprocessors = std::max(limits.multiprocessors, 1);

  const int64_t size = std::max(pixels, kLeastPixels);
  const int64_t by_cache = limits.l2_bytes / 2 / (kCachedBytes * size);
  const int64_t by_fill = divided(multiprocessors * kFillPixels, size);
  const int64_t most = std::max({by_cache, by_fill, int64_t{1}});
  plan.chunk = divided(std::max(p.batch, int64_t{1}), divided(std::max(p.batch, int64_t{1}), most));

  const bool mean_is_there =
      p.channels == 1 && p.saliency.dtype == Dtype::float32 && columns_adjoin(p.saliency, p.width);
  plan.mean_in_gradient =
      !mean_is_there && p.gradient != nullptr && p.saliency.dtype == Dtype::float32;
  plan.store_mean = !mean_is_there && !plan.mean_in_gradient;
  plan.store_heatmap = p.heatmaps.dtype != Dtype::float32 || !columns_adjoin(p.heatmaps, p.width);

  int64_t slab = kSlab;
  const auto blocks = [&](int64_t of) { return plan.chunk * divided(pixels, of); };
  while (slab < kLargestSlab && divided(pixels, slab) > kPartsAtOnce &&
         blocks(2 * slab) >= kMomentsBlocks * multiprocessors)
    slab *= 2;
  while (slab > kSlabStep && blocks(slab) < kMomentsBlocks * multiprocessors) slab /= 2;
  // Of even length, so that the last is not a short one.
  slab = divided(divided(pixels, divided(pixels, slab)), int64_t{kSlabStep}) * kSlabStep;
  plan.slab = static_cast<int>(slab);
  plan.slabs = static_cast<int>(divided(pixels, slab));

  plan.count = p.levels;
  plan.first = p.levels;
  for (int l = 0, h = height, w = width; l < p.levels; ++l, h = halved(h), w = halved(w)) {
    LevelPlan& level = plan.levels[l];
    level.height = h;
    level.width = w;
    if (l == 0) continue;
    level.pitch = (w + 3) / 4 * 4;
    // A level of more pixels fits nowhere; its floats might not even fit an int.
    if (plan.first < l || level.pixels() > (1 << 20)) continue;
    const size_t bytes = coarse_shared_bytes(p.formulation, h, w, p.levels - l);
    if (bytes > static_cast<size_t>(limits.shared_bytes)) continue;
    plan.first = l;
    plan.coarse_bytes = bytes;
  }
  if (plan.first == p.levels) plan.coarse_bytes = coarse_shared_bytes(p.formulation, 0, 0, 0);
  for (int l = 0; l < plan.first; ++l) {
    LevelPlan& level = plan.levels[l];
    level.down = down_tiling(level.height, level.width, plan.chunk, limits.multiprocessors);
    level.up = up_tiling(level.height, level.width, plan.chunk, limits.multiprocessors);
  }
  return plan;
}

namespace {

// Where a chunk's launches find what others left.
struct Workspace {
  float* mean = nullptr;
  float* heatmap = nullptr;
  MomentsPair* parts[kMaxLevels] = {};
  MomentsPair* merged[kMaxLevels] = {};
  float4* sums[kMaxLevels] = {};
  float* a[kMaxLevels] = {};  // levels of the saliency, or of the difference
  float* b[kMaxLevels] = {};  // of the human map; released: level 1 of (m - mu)+
  __half* mask = nullptr;
  float2* dots = nullptr;
  LevelConstants* constants = nullptr;

  Workspace(const LossParams& p, const GeneralPlan& plan, void* base)
      : base_(static_cast<char*>(base)) {
    const bool paper = p.formulation == Formulation::paper, gradient = p.gradient != nullptr;
    const int64_t n = plan.chunk;
    if (plan.store_mean) take(mean, n * plan.map_floats());
    if (plan.store_heatmap) take(heatmap, n * plan.map_floats());
    for (int l = 0; l < plan.first; ++l) {
      const LevelPlan& level = plan.levels[l];
      if (l == 0 || paper) {
        take(parts[l], n * plan.parts(l));
        merged[l] = parts[l];
        if (plan.parts(l) > kPartsAtOnce) take(merged[l], n);
      }
      take(sums[l], n * level.down.blocks);
    }
    for (int l = 1; l <= plan.first && l < plan.count; ++l) {
      const int64_t plane = plan.levels[l].plane();
      take(a[l], n * plane);
      if (paper || (l == 1 && gradient)) take(b[l], n * plane);
      if (!paper && l == 1 && gradient) take(mask, n * plane);
    }
    if (!paper && gradient && plan.first > 1) take(dots, n * plan.levels[1].up.blocks);
    if (gradient) take(constants, n * (paper ? plan.first : 1));
  }
  size_t bytes() const { return used_; }

 private:
  template <class T>
  void take(T*& pointer, int64_t count) {
    if (base_) pointer = reinterpret_cast<T*>(base_ + used_);
    used_ += (static_cast<size_t>(count) * sizeof(T) + 255) / 256 * 256;
  }
  char* base_;
  size_t used_ = 0;
};

int64_t bytes_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

const char* advanced(const void* data, Dtype dtype, int64_t elements) {
  return static_cast<const char*>(data) + elements * bytes_of(dtype);
}
Maps advanced(const Maps& maps, int64_t samples) {
  Maps from = maps;
  from.data = advanced(maps.data, maps.dtype, samples * maps.stride_batch);
  return from;
}

using cuda::in_fours;  // the one below would hide it
bool in_fours(const Planes& planes, int64_t width) {
  return width % 4 == 0 && planes.sample % 4 == 0 && planes.pitch % 4 == 0 &&
         in_fours(planes.data, Dtype::float32);
}

bool rows_adjoin(const Maps& maps, int64_t height, int64_t width) {
  return height == 1 || maps.stride_row == width * maps.stride_column;
}

// One chunk of samples, launch by launch.
class Chunk {
 public:
  Chunk(const LossParams& p, const GeneralPlan& plan, int64_t from)
      : p_(p),
        plan_(plan),
        work_(p, plan, p.workspace),
        from_(from),
        samples_(static_cast<int>(std::min(plan.chunk, p.batch - from))),
        paper_(p.formulation == Formulation::paper),
        weights_(static_cast<const float*>(p.weights) + from),
        saliency_(advanced(p.saliency, from)),
        heatmaps_(advanced(p.heatmaps, from)) {
    const int64_t pixels = plan.levels[0].pixels();
    if (p.gradient)
      gradient_ = const_cast<char*>(advanced(p.gradient, p.saliency.dtype, from * pixels));
    if (plan.store_mean)
      mean_ = {work_.mean, plan.map_floats(), p.width};
    else if (plan.mean_in_gradient)
      mean_ = {static_cast<float*>(gradient_), pixels, p.width};
    else
      mean_ = as_planes(saliency_);
    heatmap_ = plan.store_heatmap ? Planes{work_.heatmap, plan.map_floats(), p.width}
                                  : as_planes(heatmaps_);
  }

  void run() {
    moments();
    for (int l = 0; l < plan_.first; ++l) level_down(l);
    const CoarseArguments coarse = coarse_arguments();
    launch_coarse(coarse, p_.formulation, plan_.coarse_bytes, p_.stream);
    if (!p_.gradient) return;
    for (int l = plan_.first - 1; l > 0; --l) level_up(l);
    if (!paper_ && plan_.first > 1) launch_finish(coarse, p_.stream);
    level_up(0);
  }

 private:
  static Planes as_planes(const Maps& maps) {
    return {static_cast<float*>(const_cast<void*>(maps.data)), maps.stride_batch, maps.stride_row};
  }
  bool has(int level) const { return level < plan_.count; }
  Planes plane(float* const* levels, int l) const {
    if (!has(l)) return {};
    return {levels[l], plan_.levels[l].plane(), plan_.levels[l].pitch};
  }
  // The maps that a level is made of.
  Planes first_map(int l) const { return l == 0 ? mean_ : plane(work_.a, l); }
  Planes second_map(int l) const {
    if (l == 0) return heatmap_;
    return paper_ ? plane(work_.b, l) : Planes{};
  }
  bool vector(int l) const {
    const int64_t width = plan_.levels[l].width;
    return in_fours(first_map(l), width) && in_fours(second_map(l), width);
  }
  // Merges a level's moments first where they are many.
  int ready_parts(int l) const {
    const int count = plan_.parts(l);
    if (count <= kPartsAtOnce) return count;
    launch_merge(work_.parts[l], count, work_.merged[l], weights_, samples_, p_.stream);
    return 1;
  }

  void moments() const {
    MomentsArguments a{};
    a.saliency = saliency_;
    a.heatmaps = heatmaps_;
    a.weights = weights_;
    a.channels = static_cast<int>(p_.channels);
    a.pixels = plan_.levels[0].pixels();
    a.width = static_cast<int>(p_.width);
    a.share = share();
    if (plan_.store_mean || plan_.mean_in_gradient) a.mean = mean_;
    if (plan_.store_heatmap) a.heatmap = heatmap_;
    a.parts = work_.parts[0];
    a.slab = plan_.slab;
    a.slabs = plan_.slabs;
    bool vector = a.pixels % 4 == 0;
    if (rows_adjoin(a.saliency, p_.height, p_.width) &&
        rows_adjoin(a.heatmaps, p_.height, p_.width)) {
      a.width = static_cast<int>(a.pixels);
      for (Maps* maps : {&a.saliency, &a.heatmaps}) {
        maps->stride_row = a.pixels * maps->stride_column;
        vector = vector && maps->stride_column == 1 && maps->stride_batch % 4 == 0 &&
                 in_fours(maps->data, maps->dtype);
      }
      vector = vector && (a.channels == 1 || a.saliency.stride_channel % 4 == 0);
    } else {
      vector = false;
    }
    for (const Planes& out : {a.mean, a.heatmap})
      vector = vector && (!out.data || in_fours(out.data, Dtype::float32));
    launch_moments(a, vector, samples_, p_.stream);
  }

  void level_down(int l) const {
    // The released loss has its last level's energy from the step that made it.
    if (!paper_ && l > 0 && !has(l + 1)) return;
    DownArguments a{};
    a.weights = weights_;
    a.a = first_map(l);
    a.b = second_map(l);
    a.height = plan_.levels[l].height;
    a.width = plan_.levels[l].width;
    if (has(l + 1)) {
      a.out_a = work_.a[l + 1];
      a.out_b = work_.b[l + 1];
      a.out_mask = work_.mask;
      a.out_sample = plan_.levels[l + 1].plane();
      a.out_pitch = plan_.levels[l + 1].pitch;
    }
    if (l == 0 || paper_) {
      a.part_count = ready_parts(l);
      a.parts = work_.merged[l];
    }
    if (paper_ && l + 1 < plan_.first) a.out_parts = work_.parts[l + 1];
    a.sums = work_.sums[l];
    a.tiling = plan_.levels[l].down;
    a.samples = samples_;
    Down kind = Down::level;
    if (paper_)
      kind = Down::paper;
    else if (l == 0)
      kind = p_.gradient ? Down::released : Down::released_value;
    launch_level_down(a, kind, vector(l), p_.stream);
  }

  CoarseArguments coarse_arguments() const {
    CoarseArguments a{};
    a.weights = weights_;
    a.rows = static_cast<float*>(p_.rows) + from_;
    a.saliency_std = static_cast<float*>(p_.saliency_std) + from_;
    a.distance = p_.distance;
    a.levels = plan_.count;
    a.first = plan_.first;
    a.gradient = p_.gradient != nullptr;
    a.share = share();
    for (int l = 0; l < plan_.first; ++l) {
      LargeLevel& level = a.large[l];
      level.parts = work_.merged[l];
      level.part_count = plan_.parts(l) > kPartsAtOnce ? 1 : plan_.parts(l);
      level.sums = work_.sums[l];
      const bool stepped = paper_ || l == 0 || has(l + 1);
      level.sum_count = stepped ? plan_.levels[l].down.blocks : 0;
      level.pixels = static_cast<float>(plan_.levels[l].pixels());
      level.next_pixels = has(l + 1) ? static_cast<float>(plan_.levels[l + 1].pixels()) : 1.f;
    }
    if (has(plan_.first)) {
      a.a = plane(work_.a, plan_.first);
      a.b = plane(work_.b, plan_.first);
      a.height = plan_.levels[plan_.first].height;
      a.width = plan_.levels[plan_.first].width;
    }
    a.positive = work_.b[1];
    a.mask = work_.mask;
    a.dots = work_.dots;
    a.dot_count = plan_.first > 1 ? plan_.levels[1].up.blocks : 0;
    a.constants = work_.constants;
    a.samples = samples_;
    return a;
  }

  void level_up(int l) const {
    UpArguments a{};
    a.weights = weights_;
    a.a = first_map(l);
    a.b = second_map(l);
    a.height = plan_.levels[l].height;
    a.width = plan_.levels[l].width;
    a.coarse = plane(work_.a, l + 1);
    a.constants = work_.constants + (paper_ ? static_cast<int64_t>(l) * samples_ : 0);
    bool fours = vector(l);
    if (l == 0) {
      a.out = gradient_;
      a.out_dtype = p_.saliency.dtype;
      a.out_sample = plan_.levels[0].pixels();
      a.out_pitch = p_.width;
      fours = fours && in_fours(a.out, a.out_dtype);
    } else {
      a.out = a.a.data;
      a.out_dtype = Dtype::float32;
      a.out_sample = a.a.sample;
      a.out_pitch = a.a.pitch;
    }
    if (!paper_ && l > 0) {
      a.factor = static_cast<float>(
          2.0 / (static_cast<double>(plan_.count) * static_cast<double>(plan_.levels[l].pixels())));
      a.positive = work_.b[1];
      a.mask = work_.mask;
      if (l == 1) a.dots = work_.dots;
    }
    a.tiling = plan_.levels[l].up;
    a.samples = samples_;
    const Up kind = paper_ ? Up::paper : l == 0 ? Up::released : Up::level;
    launch_level_up(a, kind, fours, p_.stream);
  }

  float share() const { return 1.f / static_cast<float>(p_.channels); }

  const LossParams& p_;
  const GeneralPlan& plan_;
  const Workspace work_;
  const int64_t from_;
  const int samples_;
  const bool paper_;
  const float* weights_;
  const Maps saliency_, heatmaps_;
  void* gradient_ = nullptr;
  Planes mean_, heatmap_;
};

}  // namespace

size_t general_workspace_bytes(const LossParams& p, const DeviceLimits& limits) {
  return Workspace(p, general_plan(p, limits), nullptr).bytes();
}

void general_loss(const LossParams& p, const DeviceLimits& limits) {
  const GeneralPlan plan = general_plan(p, limits);
  for (int64_t from = 0; from < p.batch; from += plan.chunk) Chunk(p, plan, from).run();
}

}  // namespace harmonizer::cuda
