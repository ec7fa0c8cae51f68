// The machine that executes a kernel: threads in blocks in clusters, one thread at a time.
//
// It is sequentially consistent and takes instructions one by one, so that what a barrier is for
// would not show by itself. Three things make it show: the order of threads can be changed, every
// register and all shared memory begin as junk, and clocks (clocks.h) tell which accesses no
// barrier orders.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "clocks.h"
#include "count.h"
#include "program.h"

namespace ptx_on_host {

enum class Order : uint8_t {
  ascending,    // a warp as far as it can go, then the next; a block, then the next
  descending,   // the same from the last block and the last thread on
  shuffled,     // some hundred instructions of a thread, then of another
  interleaved,  // a few instructions
};

struct Options {
  Order order = Order::ascending;
  uint64_t seed = 1;
  bool races = true;                        // report accesses that no barrier orders
  uint64_t most_instructions = 1ull << 31;  // of one thread; more are an endless loop
  uint64_t clusters = 0;                    // as many of the grid and no more; 0 is all of it
  Counts* counts = nullptr;                 // what to count into, if anything
};

struct Launch {
  uint32_t grid[3] = {1, 1, 1}, block[3] = {1, 1, 1};
  uint32_t cluster = 1;  // blocks, along x
  size_t dynamic_shared_bytes = 0;
};

// A copy of cp.async, which is made when it is waited for.
struct Copy {
  uint64_t to, from;
  uint32_t bytes, from_bytes;
  int group;
};

enum class State : uint8_t { ready, at_barrier, at_collective, at_cluster_barrier, ended };

struct Block;
struct Cluster;

struct Thread {
  uint64_t* registers = nullptr;
  int pc = 0;
  State state = State::ready;
  Block* block = nullptr;
  uint32_t index = 0;   // in its block
  uint32_t number = 0;  // in its cluster
  uint32_t lane = 0, warp = 0;
  uint8_t* local = nullptr;
  int barrier = 0;  // the one it waits at
  bool arrived_at_cluster = false;
  uint64_t cluster_phase = 0;  // in which it arrived
  Time time;
  std::vector<Copy> copies;
  int copy_group = 0;
  uint64_t executed = 0;              // instructions
  uint64_t polls = 0, polled_at = 0;  // in vain, since which event of the cluster
  ThreadCounts* counts = nullptr;
};

// bar.sync and bar.arrive.
struct Barrier {
  uint32_t arrived = 0;
  uint32_t expected = 0;  // 0: every thread of the block
  Meeting meeting;
};

struct Block {
  Cluster* cluster = nullptr;
  uint32_t rank = 0;
  uint32_t position[3] = {0, 0, 0};
  std::vector<Thread*> threads;
  uint32_t alive = 0;
  Barrier barriers[16];
  std::map<uint64_t, Meeting> mbarriers;  // by their offset in shared memory
  std::vector<uint8_t> storage;
  uint8_t* shared = nullptr;
  size_t shared_bytes = 0;
  Shadow shadow;
};

struct Cluster {
  const Kernel* kernel = nullptr;
  const Module* module = nullptr;
  const Options* options = nullptr;
  const Launch* launch = nullptr;
  const Instruction* current = nullptr;  // being executed
  uint32_t serial = 0;                   // no other cluster has it
  uint32_t first_serial = 0;             // of this launch
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<Thread> threads;
  std::vector<uint8_t> parameters;
  uint32_t alive = 0, arrived = 0;
  uint64_t phase = 0;  // how often the cluster's barrier has been passed
  Meeting meeting;
  uint64_t events = 0;  // what ends a wait: barriers passed, arrivals, threads that ended
};

// Throws Error with the place: kernel, instruction, source line, block and thread.
[[noreturn]] void fail(const Thread& thread, const std::string& what);

// "name.cuh:12 in `ld.global.f32 ...`" of an instruction.
std::string place_of(const Module& module, const Instruction& instruction);

// Whether a barrier is complete; then lets those who wait there go on.
void check_barrier(Block& block, int number);
void check_cluster_barrier(Cluster& cluster);

// Executes a kernel with arguments as cudaLaunchKernel takes them. Throws Error.
void run(const Module& module, const Kernel& kernel, const Launch& launch, const Options& options,
         const void* const* arguments);

}  // namespace ptx_on_host
