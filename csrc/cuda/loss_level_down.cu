// A level's sums and the step (4) to the next one, for levels of any size.
//
// A warp walks down a strip of rows, a lane its group of four columns: the vertical taps are sums
// in registers, and the horizontal ones reach the neighbouring lanes by shuffles.
#include <cmath>

#include "loss_general.cuh"

namespace harmonizer::cuda {
namespace {

struct DownShared {
  Difference difference;
  float4 sums[kDownWarps];
  MomentsPair moments[kDownWarps];
};

template <Down kDown>
constexpr int kMapsOf = kDown == Down::level ? 1 : 2;
template <Down kDown>
constexpr int kPlanesOf = kDown == Down::released ? 3
                          : kDown == Down::paper  ? 2
                                                  : 1;

// What a lane walks along. Lanes beyond both ends of a tile hold the columns its taps reach into;
// the one before it is the warp's last, so that the first lanes are those that own pixels.
struct Lane {
  int group, strip;
  bool reads, owns;
  bool left, right;  // whether the neighbouring lanes hold the neighbouring columns

  __device__ Lane(const DownTiling& t, int unit, int lane) {
    const int strips = unit / t.tiles, tile = unit - strips * t.tiles;
    if (t.tiles == 1) {
      const int segment = lane / t.groups;
      group = lane - segment * t.groups;
      strip = strips * t.segments + segment;
      reads = owns = segment < t.segments && strip < t.strips;
      left = group > 0;
      right = group + 1 < t.groups;
    } else {
      const int column = lane == kWarp - 1 ? -1 : lane;
      group = tile * t.tile_groups + column;
      strip = strips;
      left = right = true;
      reads = strip < t.strips && column <= t.tile_groups && group >= 0 && group < t.groups;
      owns = reads && column >= 0 && column < t.tile_groups;
    }
  }
};

// Four pixels of a row of each map.
template <int kMaps>
struct Row {
  float value[kMaps][4];
  unsigned inside;  // bit i: column i lies in the map
};

// What is kept of a plane's rows on the way down: the next coarse row so far, and the last row.
struct Vertical {
  float next[4], last[4];
};

// Moments of a lane's few pixels, which lie side by side: shifted by the first of them.
struct LocalMoments {
  float shift = 0, sum = 0, squares = 0, maximum = -FLT_MAX;

  __device__ void add(float v, bool first) {
    if (first) shift = v;
    const float apart = v - shift;
    sum += apart;
    squares += apart * apart;
    maximum = fmaxf(maximum, v);
  }
  __device__ void add(float2 pair, bool second, bool first) {
    add(pair.x, first);
    if (second) add(pair.y, false);
  }
  __device__ Moments moments(int count) const {
    Moments m;
    if (count == 0) return m;
    m.count = static_cast<float>(count);
    const float apart = sum / m.count;
    m.mean = shift + apart;
    m.m2 = squares_about_mean(squares, sum * apart);
    m.maximum = maximum;
    return m;
  }
};

template <Down kDown, bool kVector>
__global__ void __launch_bounds__(kDownWarps* kWarp) loss_level_down(const DownArguments a) {
  constexpr int kMaps = kMapsOf<kDown>, kPlanes = kPlanesOf<kDown>;
  // Below every mean, so that what lies outside is cut to zero like any pixel. The paper's pyramid
  // is of the maps as they are.
  constexpr float kOutside = kDown == Down::paper || kDown == Down::level ? 0.f : -INFINITY;
  DownShared& shared = shared_layout<DownShared>();
  const DownTiling& t = a.tiling;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane_index = static_cast<int>(threadIdx.x) % kWarp;
  // From the last sample to the first: the moments' launch, in the other direction, has left the
  // last ones in the cache.
  const int from_end = static_cast<int>(blockIdx.x) / t.blocks;
  const int block = static_cast<int>(blockIdx.x) - from_end * t.blocks;
  const int sample = a.samples - 1 - from_end;
  if (a.weights[sample] == 0.f) return;

  const int unit = block * kDownWarps + warp;
  const Lane lane(t, unit, lane_index);
  const unsigned height = static_cast<unsigned>(a.height);
  const int coarse_height = halved(a.height), coarse_width = halved(a.width);
  const bool odd = !kVector && a.width % 2 != 0;
  const int first_y = lane.strip * t.strip_rows;
  const int x = 4 * lane.group;
  // Unsigned, so that rows above the map are beyond its end as well.
  const int before_y = 1 + a.height % 2;
  unsigned row = 2u * static_cast<unsigned>(first_y) - static_cast<unsigned>(before_y);
  const int64_t first_row = 2 * static_cast<int64_t>(first_y) - before_y;

  const float* at[kMaps];
  at[0] = a.a.data + (sample * a.a.sample + first_row * a.a.pitch + x);
  if constexpr (kMaps == 2) at[1] = a.b.data + (sample * a.b.sample + first_row * a.b.pitch + x);
  unsigned columns = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (lane.reads && (kVector || x + i < a.width)) columns |= 1u << i;

  const auto fetch = [&](Row<kMaps>& out) {
    out.inside = row < height ? columns : 0u;
#pragma unroll
    for (int map = 0; map < kMaps; ++map) {
      const float* p = at[map];
      at[map] += map ? a.b.pitch : a.a.pitch;
      if constexpr (kVector) {
        float4 v = make_float4(kOutside, kOutside, kOutside, kOutside);
        if (out.inside) v = load4_kept(p);
        out.value[map][0] = v.x;
        out.value[map][1] = v.y;
        out.value[map][2] = v.z;
        out.value[map][3] = v.w;
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) out.value[map][i] = out.inside >> i & 1u ? p[i] : kOutside;
      }
    }
    ++row;
  };

  // The rows before the first step, on their way while the statistics are merged.
  Row<kMaps> before[3];
#pragma unroll
  for (int k = 0; k < 3; ++k) fetch(before[k]);
  Difference difference{};
  if constexpr (kDown != Down::level) {
    if (warp == 0) {
      const MomentsPair m =
          warp_merge_parts(a.parts + static_cast<int64_t>(sample) * a.part_count, a.part_count);
      if (lane_index == 0) {
        const BothStatistics both = both_statistics(m.saliency, m.heatmap);
        shared.difference =
            kDown == Down::paper ? paper_difference(both) : released_difference(both);
      }
    }
    __syncthreads();
    difference = shared.difference;
  }

  LevelSums sums;
  const auto make = [&](const Row<kMaps>& in, bool counts, float(&out)[kPlanes][4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kDown == Down::level) {
        out[0][i] = in.value[0][i];
      } else if constexpr (kDown == Down::paper) {
        out[0][i] = in.value[0][i];
        out[1][i] = in.value[1][i];
        if (counts && in.inside >> (kVector ? 0 : i) & 1u)
          sums.add(difference, in.value[0][i], in.value[1][i]);
      } else {
        const float e = in.value[0][i] - difference.mean, cut = fmaxf(e, 0.f);
        const float d = cut * difference.scale -
                        fmaxf(in.value[1][i] - difference.mean_h, 0.f) * difference.scale_h;
        out[0][i] = d;
        if constexpr (kDown == Down::released) {
          out[1][i] = cut;
          out[2][i] = e > 0.f ? 1.f : 0.f;
        }
        if (counts) {
          sums.energy += d * d;
          if constexpr (kDown == Down::released) {
            sums.g += e > 0.f ? d : 0.f;
            sums.g_e += d * cut;
          }
        }
      }
    }
  };

  // Rows up to the first step's belong to the strip above, where there is one.
  Vertical vertical[kPlanes];
  {
    const bool counts = first_y == 0;
    float v[3][kPlanes][4];
#pragma unroll
    for (int k = 0; k < 3; ++k) make(before[k], counts, v[k]);
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        vertical[plane].next[i] = v[0][plane][i] + 4.f * v[1][plane][i] + 6.f * v[2][plane][i];
        vertical[plane].last[i] = v[2][plane][i];
      }
    }
  }

  // Lanes of one warp walk equally far; where strips lie side by side, the first is the longest.
  const int warp_y = __shfl_sync(kAllLanes, first_y, 0);
  const int steps = min(t.strip_rows, coarse_height - warp_y);
  const int coarse_x = 2 * lane.group;
  const bool second = coarse_x + 1 < coarse_width;
  int64_t out_at = sample * a.out_sample + static_cast<int64_t>(first_y) * a.out_pitch + coarse_x;
  float energy = 0;
  LocalMoments local_a, local_b;
  int local_count = 0;
  Row<kMaps> ahead[2];
  if (steps > 0) {
    fetch(ahead[0]);
    fetch(ahead[1]);
  }
  for (int step = 0; step < steps; ++step) {
    float v[kPlanes][4];
    {
      float fourth[kPlanes][4], fifth[kPlanes][4];
      make(ahead[0], true, fourth);
      make(ahead[1], true, fifth);
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane) {
        Vertical& state = vertical[plane];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          v[plane][i] = state.next[i] + 4.f * fourth[plane][i] + fifth[plane][i];
          state.next[i] = state.last[i] + 4.f * fourth[plane][i] + 6.f * fifth[plane][i];
          state.last[i] = fifth[plane][i];
        }
      }
    }
    if (step + 1 < steps) {
      fetch(ahead[0]);
      fetch(ahead[1]);
    }
    if (!a.out_a) continue;
    float2 pair[kPlanes];
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
      const auto from_left = [&](float value) {
        const float got = __shfl_sync(kAllLanes, value, (lane_index + kWarp - 1) % kWarp);
        return lane.left ? got : 0.f;
      };
      const auto from_right = [&](float value) {
        const float got = __shfl_sync(kAllLanes, value, (lane_index + 1) % kWarp);
        return lane.right ? got : 0.f;
      };
      // The seven columns that two coarse pixels need, four of which are the lane's own.
      const float* own = v[plane];
      float c[7];
      if (odd) {
        c[0] = from_left(own[2]);
        c[1] = from_left(own[3]);
        c[2] = own[0], c[3] = own[1], c[4] = own[2], c[5] = own[3];
        c[6] = from_right(own[0]);
      } else {
        c[0] = from_left(own[3]);
        c[1] = own[0], c[2] = own[1], c[3] = own[2], c[4] = own[3];
        c[5] = from_right(own[0]);
        c[6] = from_right(own[1]);
      }
      constexpr float kNorm = kTap0 * kTap0;
      pair[plane] = make_float2(kNorm * (c[0] + c[4] + 4.f * (c[1] + c[3]) + 6.f * c[2]),
                                kNorm * (c[2] + c[6] + 4.f * (c[3] + c[5]) + 6.f * c[4]));
    }
    if (lane.owns && first_y + step < coarse_height) {
      *reinterpret_cast<float2*>(a.out_a + out_at) = pair[0];
      if constexpr (kDown == Down::released || kDown == Down::paper)
        *reinterpret_cast<float2*>(a.out_b + out_at) = pair[1];
      if constexpr (kDown == Down::released) {
        union {
          unsigned bits;
          __half value[2];
        } two;
        two.value[0] = narrow<__half>(pair[2].x);
        two.value[1] = narrow<__half>(pair[2].y);
        *reinterpret_cast<unsigned*>(a.out_mask + out_at) = two.bits;
      }
      if constexpr (kDown == Down::paper) {
        if (a.out_parts) {
          local_a.add(pair[0], second, local_count == 0);
          local_b.add(pair[1], second, local_count == 0);
          local_count += second ? 2 : 1;
        }
      } else {
        energy += pair[0].x * pair[0].x + (second ? pair[0].y * pair[0].y : 0.f);
      }
    }
    out_at += a.out_pitch;
  }

  if (!lane.owns) sums = LevelSums();
  const LevelSums of_warp = warp_sum(sums);
  energy = warp_sum(energy);
  if (lane_index == 0)
    shared.sums[warp] = make_float4(of_warp.energy, of_warp.g, of_warp.g_e, energy);
  const int64_t out_part = static_cast<int64_t>(sample) * t.blocks + block;
  bool waited = false;
  if constexpr (kDown == Down::paper) {
    if (a.out_parts) {
      waited = true;  // all warps wait in the merge
      const MomentsPair own{local_a.moments(local_count), local_b.moments(local_count)};
      const MomentsPair all = block_merge(own, shared.moments);
      if (threadIdx.x == 0) a.out_parts[out_part] = all;
    }
  }
  if (!waited) __syncthreads();
  if (threadIdx.x == 0) {
    float4 total = shared.sums[0];
#pragma unroll
    for (int w = 1; w < kDownWarps; ++w) {
      total.x += shared.sums[w].x;
      total.y += shared.sums[w].y;
      total.z += shared.sums[w].z;
      total.w += shared.sums[w].w;
    }
    a.sums[out_part] = total;
  }
}

template <Down kDown>
void launch_kind(const DownArguments& a, bool vector, const Grid& grid, void* stream) {
  if (vector)
    launch<loss_level_down<kDown, true>>(grid, stream, a);
  else
    launch<loss_level_down<kDown, false>>(grid, stream, a);
}

}  // namespace

void launch_level_down(const DownArguments& a, Down kind, bool vector, void* stream) {
  const int64_t blocks = static_cast<int64_t>(a.samples) * a.tiling.blocks;
  const Grid grid{"loss_level_down", dim3(static_cast<unsigned>(blocks)), kDownWarps * kWarp,
                  sizeof(DownShared)};
  if (kind == Down::released)
    launch_kind<Down::released>(a, vector, grid, stream);
  else if (kind == Down::released_value)
    launch_kind<Down::released_value>(a, vector, grid, stream);
  else if (kind == Down::paper)
    launch_kind<Down::paper>(a, vector, grid, stream);
  else
    launch_kind<Down::level>(a, vector, grid, stream);
}

}  // namespace harmonizer::cuda
