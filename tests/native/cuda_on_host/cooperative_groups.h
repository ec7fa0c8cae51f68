// Stands in for the CUDA header of this name: the group of a thread-block cluster.
#pragma once

#include <cstddef>

#include "cuda_runtime.h"

namespace cooperative_groups {

class cluster_group {
 public:
  using arrival_token = struct Token {};
  using Where = cuda_on_host::Where;

  static unsigned block_rank() { return cuda_on_host::cluster_rank(); }
  static unsigned num_blocks() { return cuda_on_host::cluster_blocks(); }
  static void sync(Where where = Where::current()) { cuda_on_host::sync_cluster(where); }
  static arrival_token barrier_arrive(Where where = Where::current()) {
    cuda_on_host::arrive_cluster(where);
    return {};
  }
  static void barrier_wait(Where where = Where::current()) { cuda_on_host::wait_cluster(where); }
  static void barrier_wait(arrival_token&&, Where where = Where::current()) {
    cuda_on_host::wait_cluster(where);
  }

  // The same place in the shared memory of another block.
  template <class T>
  static T* map_shared_rank(T* address, int rank) {
    return cuda_on_host::in_block(address, rank);
  }
};

inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
