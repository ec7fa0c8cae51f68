// One sample at a time on every thread, each with its own piece of the workspace.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include <cstddef>
#include <cstdint>

namespace harmonizer::cpu {
namespace {

// body(index, workspace of this thread). Samples are independent: the schedule cannot change a bit.
template <class Body>
inline void for_each_sample(int64_t count, int threads, void* workspace, size_t bytes_per_thread,
                            Body&& body) {
  char* base = static_cast<char*>(workspace);
#ifdef _OPENMP
  if (threads > 1 && count > 1) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t i = 0; i < count; ++i) body(i, base + omp_get_thread_num() * bytes_per_thread);
    return;
  }
#endif
  (void)threads;
  (void)bytes_per_thread;
  for (int64_t i = 0; i < count; ++i) body(i, base);
}

}  // namespace
}  // namespace harmonizer::cpu
