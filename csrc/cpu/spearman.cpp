// Spearman's rank correlation of pairs of maps, by radix sort; rank_correlation in
// harmonizer_ext/alignment/ranks.py is the same in PyTorch. A sort by comparison takes many times
// as long: a map has 50 000 pixels, and a key of 32 bits three digits.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "isa.h"
#include "parallel.h"
#include "rows.h"

namespace harmonizer::cpu {
namespace {

constexpr int kDigitBits = 11;  // the counters of one digit, 8 KiB, fit the first cache
constexpr int kBuckets = 1 << kDigitBits;

template <class Real>
using Key = std::conditional_t<sizeof(Real) == 8, uint64_t, uint32_t>;

template <class Real>
constexpr int kDigits = (8 * sizeof(Real) + kDigitBits - 1) / kDigitBits;

// An unsigned number that orders as the value does: a positive one has its sign bit set, a negative
// one all bits inverted. Both zeros have the same.
template <class Real>
inline Key<Real> ordered_key(Real value) {
  using K = Key<Real>;
  constexpr K sign = K(1) << (8 * sizeof(Real) - 1);
  value += Real(0);  // -0 to +0
  K bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits & sign ? ~bits : bits | sign;
}

template <class Key>
inline uint32_t digit_of(Key key, int digit) {
  return static_cast<uint32_t>(key >> (digit * kDigitBits)) & (kBuckets - 1);
}

template <class Real>
struct SpearmanWorkspace {
  struct Record {
    Key<Real> key;
    uint32_t index;
  };
  Key<Real>* keys;
  Record* from;
  Record* to;
  uint32_t* counts[kDigits<Real>];
  int32_t* ranks_a;
  int32_t* ranks_b;

  SpearmanWorkspace(void* base, const SpearmanParams& p) : arena_(base) {
    const int64_t pixels = p.height * p.width;
    keys = arena_.take<Key<Real>>(pixels);
    from = arena_.take<Record>(pixels);
    to = arena_.take<Record>(pixels);
    for (auto& digit : counts) digit = arena_.take<uint32_t>(kBuckets);
    ranks_a = arena_.take<int32_t>(pixels);
    ranks_b = arena_.take<int32_t>(pixels);
  }
  size_t bytes() const { return arena_.used(); }

 private:
  Arena arena_;
};

// Fills the keys of one map; false where it holds a NaN.
template <class Real>
bool load_keys(Key<Real>* keys, const SpearmanParams& p, const Maps& maps, int64_t b) {
  const Real* map = static_cast<const Real*>(maps.data) + b * maps.stride_batch;
  bool ordered = true;
  for (int64_t y = 0; y < p.height; ++y) {
    const Real* row = map + y * maps.stride_row;
    Key<Real>* out = keys + y * p.width;
    for (int64_t x = 0; x < p.width; ++x) {
      const Real value = row[x * maps.stride_column];
      ordered &= value == value;
      out[x] = ordered_key(value);
    }
  }
  return ordered;
}

// Stable sort by one digit; counts become the first free place of each bucket.
template <class Record, class Get>
void scatter(Record* to, uint32_t* counts, uint32_t pixels, int digit, Get&& get) {
  uint32_t place = 0;
  for (int bucket = 0; bucket < kBuckets; ++bucket) {
    const uint32_t count = counts[bucket];
    counts[bucket] = place;
    place += count;
  }
  for (uint32_t i = 0; i < pixels; ++i) {
    const Record record = get(i);
    to[counts[digit_of(record.key, digit)]++] = record;
  }
}

// Writes, for each pixel of a map, how many lie below it minus how many lie above: its midrank,
// doubled and centred. False, and nothing written, where the map is constant or holds a NaN.
template <class Real>
bool centred_midranks(int32_t* ranks, const SpearmanParams& p, const Maps& maps, int64_t b,
                      SpearmanWorkspace<Real> work) {
  using Record = typename SpearmanWorkspace<Real>::Record;
  const uint32_t pixels = static_cast<uint32_t>(p.height * p.width);
  if (!load_keys<Real>(work.keys, p, maps, b)) return false;
  for (uint32_t* digit : work.counts) std::memset(digit, 0, kBuckets * sizeof(uint32_t));
  for (uint32_t i = 0; i < pixels; ++i)
    for (int digit = 0; digit < kDigits<Real>; ++digit)
      ++work.counts[digit][digit_of(work.keys[i], digit)];

  bool varies = false;
  for (int digit = 0; digit < kDigits<Real>; ++digit) {
    uint32_t* counts = work.counts[digit];
    if (counts[digit_of(work.keys[0], digit)] == pixels) continue;  // in all keys the same
    if (varies)
      scatter(work.to, counts, pixels, digit, [&](uint32_t i) { return work.from[i]; });
    else
      scatter(work.to, counts, pixels, digit, [&](uint32_t i) { return Record{work.keys[i], i}; });
    varies = true;
    std::swap(work.from, work.to);
  }
  if (!varies) return false;
  const Record* records = work.from;
  for (uint32_t first = 0, end; first < pixels; first = end) {
    for (end = first + 1; end < pixels && records[end].key == records[first].key;) ++end;
    const auto rank = static_cast<int32_t>(int64_t(first) + int64_t(end) - int64_t(pixels));
    for (uint32_t i = first; i < end; ++i) ranks[records[i].index] = rank;
  }
  return true;
}

// Whole numbers below 2^53 for up to 300 000 pixels: exact in any order.
double dot(const int32_t* a, const int32_t* b, int64_t count) {
  constexpr int kSums = 32;  // that the compiler may keep several registers of them
  double sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= count; i += kSums)
    for (int k = 0; k < kSums; ++k) sums[k] += double(a[i + k]) * double(b[i + k]);
  for (; i < count; ++i) sums[0] += double(a[i]) * double(b[i]);
  for (int k = 1; k < kSums; ++k) sums[0] += sums[k];
  return sums[0];
}

template <class Real>
void spearman_in(const SpearmanParams& p) {
  const size_t bytes = SpearmanWorkspace<Real>(nullptr, p).bytes();
  for_each_sample(p.batch, p.threads, p.workspace, bytes, [&](int64_t i, void* base) {
    const SpearmanWorkspace<Real> work(base, p);
    const int64_t pixels = p.height * p.width;
    if (!centred_midranks<Real>(work.ranks_a, p, p.a, i, work) ||
        !centred_midranks<Real>(work.ranks_b, p, p.b, i, work)) {
      p.correlations[i] = std::numeric_limits<double>::quiet_NaN();
      return;
    }
    const double scale = std::sqrt(dot(work.ranks_a, work.ranks_a, pixels)) *
                         std::sqrt(dot(work.ranks_b, work.ranks_b, pixels));
    const double correlation = dot(work.ranks_a, work.ranks_b, pixels) / scale;
    p.correlations[i] = std::min(1.0, std::max(-1.0, correlation));
  });
}

}  // namespace

namespace HARMONIZER_ISA {

size_t spearman_workspace_bytes(const SpearmanParams& p) {
  const size_t one = p.a.dtype == Dtype::float64 ? SpearmanWorkspace<double>(nullptr, p).bytes()
                                                 : SpearmanWorkspace<float>(nullptr, p).bytes();
  return one * static_cast<size_t>(p.threads);
}

void spearman(const SpearmanParams& p) {
  p.a.dtype == Dtype::float64 ? spearman_in<double>(p) : spearman_in<float>(p);
}

}  // namespace HARMONIZER_ISA
}  // namespace harmonizer::cpu
