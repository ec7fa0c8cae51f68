// Stands in for the CUDA header of this name: the group of a thread-block cluster.
#pragma once

#include <cstddef>

#include "cuda_runtime.h"

namespace cooperative_groups {

class cluster_group {
 public:
  using Where = cuda_on_host::Where;

  static unsigned block_rank() { return cuda_on_host::cluster_rank(); }
  static unsigned num_blocks() { return cuda_on_host::cluster_blocks(); }
  static void sync(Where where = Where::current()) { cuda_on_host::sync_cluster(where); }
  // Without the token that CUDA 12 returns here: CUDA 11.8 has none.
  static void barrier_arrive(Where where = Where::current()) {
    cuda_on_host::arrive_cluster(where);
  }
  static void barrier_wait(Where where = Where::current()) { cuda_on_host::wait_cluster(where); }

  // The same place in the shared memory of another block.
  template <class T>
  static T* map_shared_rank(T* address, int rank) {
    return cuda_on_host::in_block(address, rank);
  }
};

inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
