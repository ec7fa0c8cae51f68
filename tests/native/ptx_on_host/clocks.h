// Which accesses to memory are ordered: vector clocks of the threads of a cluster.
//
// Every thread counts its releases (arrivals at barriers). What a thread knows of the others is a
// list of their counts, which all who met at a barrier share. An access at count n of thread a
// happened before what thread b does now if b knows of a count of a that is larger than n: some
// chain of barriers leads from one to the other. Two accesses to the same bytes, one of them a
// write, that are not ordered so are a race, whatever order this machine ran them in.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace ptx_on_host {

struct Thread;

using Knowledge = std::shared_ptr<const std::vector<uint32_t>>;

struct Time {
  Knowledge known;     // counts of the others' releases; null: of none
  uint32_t count = 1;  // of own releases, from 1
};

// Those who arrive at a barrier leave here what they know; those who pass it take it along.
class Meeting {
 public:
  void arrive(Thread& thread);
  // All who were to come have arrived: what they left is what is taken, until the next time.
  void complete(size_t threads_of_cluster);
  void pass(Thread& thread) const;

 private:
  std::vector<Knowledge> known_;                         // of those who arrived, each once
  std::vector<Knowledge> merged_;                        // those that completed_ is made of
  std::vector<std::pair<uint32_t, uint32_t>> arrivals_;  // their numbers and counts
  Knowledge completed_;
};

enum class AccessKind : uint8_t { read, write, atomic };

// Who last read and wrote every two bytes of a piece of memory.
class Shadow {
 public:
  // Nothing, or how this access races with an earlier one. A write of the same content as is there
  // already does not race with the write that made it.
  std::string access(const Thread& thread, size_t offset, size_t bytes, AccessKind kind,
                     bool same_content, size_t bytes_of_memory);

 private:
  struct Stamp {
    uint32_t cluster = 0;  // its serial number; 0 is nobody
    uint32_t thread = 0;
    uint32_t count = 0;
    uint32_t pc = 0;
    bool atomic = false;
  };
  struct Cell {
    Stamp writer, reader, other_reader;  // the two readers are of different warps
  };
  static bool ordered(const Stamp& earlier, const Thread& thread);
  std::vector<Cell> cells_;
};

}  // namespace ptx_on_host
