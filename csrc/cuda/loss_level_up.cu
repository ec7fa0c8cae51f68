// The adjoint (4') of a level: of large levels, and of level 0 together with the gradient.
//
// A thread owns four fine columns and walks down a strip of coarse rows, each of which it spreads
// over its columns once; three of them make two fine rows.
#include <type_traits>

#include "loss_general.cuh"

namespace harmonizer::cuda {
namespace {

constexpr int kWarps = kUpThreads / kWarp;

struct UpShared {
  float2 dots[kWarps];
};

// A coarse row, spread over four fine columns.
struct Spread {
  float column[4];
};

// Four columns of a row; beyond the width nothing is read or written.
template <bool kVector>
__device__ inline void load_columns(const float* p, int inside, float (&v)[4]) {
  if constexpr (kVector) {
    const float4 four = load4(p);
    v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = i < inside ? p[i] : 0.f;
  }
}
template <bool kVector, class T>
__device__ inline void store_columns(T* p, int inside, const float (&v)[4]) {
  if constexpr (kVector) {
    store4(p, make_float4(v[0], v[1], v[2], v[3]));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < inside) p[i] = narrow<T>(v[i]);
  }
}

template <Up kUp, class T, bool kVector>
__global__ void __launch_bounds__(kUpThreads) loss_level_up(const UpArguments a) {
  const UpTiling& t = a.tiling;
  const int sample = static_cast<int>(blockIdx.x) / t.blocks;
  const int block = static_cast<int>(blockIdx.x) - sample * t.blocks;
  const unsigned item = static_cast<unsigned>(block) * kUpThreads + threadIdx.x;
  const int strip = static_cast<int>(item / static_cast<unsigned>(t.groups));
  const int group = static_cast<int>(item) - strip * t.groups;
  const float weight = a.weights[sample];
  const int coarse_height = halved(a.height), coarse_width = halved(a.width);
  const int x = 4 * group, inside = min(a.width - x, 4);
  const int first_y = strip * t.strip_rows;
  const int end_y = strip < t.strips ? min(first_y + t.strip_rows, coarse_height) : first_y;
  const int64_t fine_y = 2 * static_cast<int64_t>(first_y);
  // What is read may lie where this is written: a pixel belongs to one thread.
  T* out = static_cast<T*>(a.out) + (sample * a.out_sample + fine_y * a.out_pitch + x);
  if (weight == 0.f) {
    if (kUp == Up::level) return;
    const float zeros[4] = {};
    for (int64_t y = fine_y; y < 2 * static_cast<int64_t>(end_y) && y < a.height; ++y) {
      store_columns<kVector>(out, inside, zeros);
      out += a.out_pitch;
    }
    return;
  }

  const float* at_a = a.a.data + (sample * a.a.sample + fine_y * a.a.pitch + x);
  const float* at_b = nullptr;
  LevelConstants constants{};
  if constexpr (kUp != Up::level) {
    at_b = a.b.data + (sample * a.b.sample + fine_y * a.b.pitch + x);
    constants = a.constants[sample];
  }
  const float factor = a.factor * weight;

  const bool odd = !kVector && a.width % 2 != 0;
  const int coarse_x = 2 * group;
  const bool second = coarse_x + 1 < coarse_width, third = coarse_x + 2 < coarse_width;
  const float* coarse =
      a.coarse.data
          ? a.coarse.data + (sample * a.coarse.sample + first_y * a.coarse.pitch + coarse_x)
          : nullptr;
  const auto spread = [&](const float* p, bool there) {
    if (!there) return Spread{};
    Spread s;
    const float2 own = *reinterpret_cast<const float2*>(p);
    const float before = group > 0 ? p[-1] : 0.f, here = own.x, next = second ? own.y : 0.f;
    const float after = third ? p[2] : 0.f;
    const float inner = kTap0 * (before + next) + kTap2 * here;
    const float inner_next = kTap0 * (here + after) + kTap2 * next;
    const float between = kTap1 * (here + next);
    s.column[0] = odd ? inner : kTap1 * (before + here);
    s.column[1] = odd ? between : inner;
    s.column[2] = odd ? inner_next : between;
    s.column[3] = odd ? kTap1 * (next + after) : inner_next;
    return s;
  };

  const AdjointTaps vertical(a.height % 2 != 0);
  Spread above, here;
  if (coarse && first_y < end_y) {
    above = spread(coarse - a.coarse.pitch, first_y > 0);
    here = spread(coarse, true);
  } else {
    above = here = Spread{};
  }
  float2 dots = make_float2(0.f, 0.f);
  for (int y = first_y; y < end_y; ++y) {
    // All of a step's reads before its first write, which the compiler would not move them over.
    const bool both = 2u * static_cast<unsigned>(y) + 1u < static_cast<unsigned>(a.height);
    float m[2][4], h[2][4];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      if (k == 1 && !both) break;
      load_columns<kVector>(at_a, inside, m[k]);
      at_a += a.a.pitch;
      if constexpr (kUp != Up::level) {
        load_columns<kVector>(at_b, inside, h[k]);
        at_b += a.b.pitch;
      }
    }
    Spread below{};
    if (coarse) {
      coarse += a.coarse.pitch;
      below = spread(coarse, y + 1 < coarse_height);
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      if (k == 1 && !both) break;
      const float* taps = k ? vertical.second : vertical.first;
      float v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float up =
            taps[0] * above.column[i] + taps[1] * here.column[i] + taps[2] * below.column[i];
        if constexpr (kUp == Up::level) {
          v[i] = factor * m[k][i] + up;
        } else {
          const LevelGradient& gradient = constants.gradient;
          if constexpr (kUp == Up::paper) {
            v[i] = gradient(m[k][i], h[k][i]) + up;
          } else {
            const float e = m[k][i] - gradient.difference.mean;
            const float q = constants.chain * gradient.difference(m[k][i], h[k][i]) + up;
            v[i] = gradient.derivative(e > 0.f ? q : 0.f, e);
          }
        }
      }
      if constexpr (kUp == Up::level) {
        if (a.dots) {
          const int64_t at = out - static_cast<T*>(a.out);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (i >= inside) break;
            dots.x += v[i] * widen(a.mask[at + i]);
            dots.y += v[i] * a.positive[at + i];
          }
        }
      }
      store_columns<kVector>(out, inside, v);
      out += a.out_pitch;
    }
    above = here;
    here = below;
  }

  if constexpr (kUp == Up::level) {
    if (!a.dots) return;
    UpShared& shared = shared_layout<UpShared>();
    const float2 of_warp = make_float2(warp_sum(dots.x), warp_sum(dots.y));
    if (threadIdx.x % kWarp == 0) shared.dots[threadIdx.x / kWarp] = of_warp;
    __syncthreads();
    if (threadIdx.x > 0) return;
    float2 total = shared.dots[0];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) {
      total.x += shared.dots[w].x;
      total.y += shared.dots[w].y;
    }
    a.dots[static_cast<int64_t>(sample) * t.blocks + block] = total;
  }
}

template <Up kUp, class T>
void launch_kind(const UpArguments& a, bool vector, const Grid& grid, void* stream) {
  if (vector)
    launch<loss_level_up<kUp, T, true>>(grid, stream, a);
  else
    launch<loss_level_up<kUp, T, false>>(grid, stream, a);
}

}  // namespace

void launch_level_up(const UpArguments& a, Up kind, bool vector, void* stream) {
  const int64_t blocks = static_cast<int64_t>(a.samples) * a.tiling.blocks;
  const Grid grid{"loss_level_up", dim3(static_cast<unsigned>(blocks)), kUpThreads,
                  sizeof(UpShared)};
  if (kind == Up::level) {
    launch_kind<Up::level, float>(a, vector, grid, stream);
    return;
  }
  with_storage(a.out_dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (kind == Up::released)
      launch_kind<Up::released, T>(a, vector, grid, stream);
    else
      launch_kind<Up::paper, T>(a, vector, grid, stream);
  });
}

}  // namespace harmonizer::cuda
