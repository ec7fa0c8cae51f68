// What a kernel costs, counted while it is executed: instructions, and how memory is accessed.
//
// A warp issues an instruction once for all its lanes that are at it. Counted is, for every warp
// and instruction, how often the lane that executed it most often did: no lane waits for others
// here, so that this is the least that a warp has to issue.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "program.h"

namespace ptx_on_host {

struct Cluster;
struct Launch;
struct Thread;

enum class Where : uint8_t { global, shared, shared_of_others, local, count };

// One access of one thread.
struct Access {
  uint32_t pc, occurrence;  // the how-manieth time that the thread executed this instruction
  uint64_t address;
  uint8_t bytes;
  Where where;
  bool write;
};

struct ThreadCounts {
  std::vector<uint32_t> executed;  // of every instruction
  std::vector<Access> accesses;
};

// Accesses of one kind. Pieces are the 32-byte sectors of global memory, or the passes over the
// banks that shared memory needs (wavefronts); ideal is how many would do for as many bytes.
struct Traffic {
  uint64_t requests = 0, lanes = 0, bytes = 0, pieces = 0, ideal = 0;
};

class Counts {
 public:
  // Sums over what the threads of a cluster have done.
  void add(const Cluster& cluster);
  // As a JSON object, all kernels that were counted so far.
  std::string json() const;

 private:
  struct PerKernel {
    const Kernel* kernel = nullptr;
    const Module* module = nullptr;
    uint64_t blocks = 0, threads = 0;
    std::vector<uint64_t> thread_instructions, warp_instructions;  // of every instruction
    std::array<std::array<Traffic, 2>, static_cast<size_t>(Where::count)> traffic{};
    std::map<uint32_t, uint64_t> excess;  // pieces beyond the ideal, of every instruction
  };
  void add_traffic(PerKernel& counts, const std::vector<const Access*>& accesses);
  std::map<std::string, PerKernel> kernels_;
};

}  // namespace ptx_on_host
