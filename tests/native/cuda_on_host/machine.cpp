// Runs a grid, one cluster of blocks at a time.
//
// What it promises, beyond running: a block's shared memory is exactly as large as asked for and
// full of NaN, and gone with the block, which AddressSanitizer sees. What CUDA leaves undefined
// ends the process with a message. Races are not looked for here, but in what nvcc compiled:
// ptx_on_host does that.
//
// Settings, from the environment (those of the device are in host_device.cpp):
//   HARMONIZER_REVERSE=1   the last cluster first, and its last thread: no result may depend on it
#include "machine.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "../host_device.h"
#include "cuda_runtime.h"
#include "fiber.h"

namespace cuda_on_host {
namespace {

struct Block;
struct Cluster;
struct Warp;

struct Thread {
  explicit Thread(void (*body)()) : fiber(body) {}
  Fiber fiber;
  Cluster* cluster = nullptr;
  Block* block = nullptr;
  Warp* warp = nullptr;
  unsigned number = 0, lane = 0;  // in the block, in the warp
  uint3 thread_index{}, block_index{};
  enum { idle, arrived } at_cluster = idle;
  int cluster_phase = 0;
  const char* waits_in = nullptr;
  Where waits_at;
};

Thread& main_thread() {
  static Thread thread(nullptr);
  return thread;
}
Thread* self = nullptr;     // the one that runs
std::deque<Thread*> ready;  // those that could
int running = 0;            // those of the cluster that have not exited

[[noreturn]] void deadlock();

// Gives way, to come back when somebody has put this thread among the ready ones.
void give_way() {
  Thread* own = self;
  if (ready.empty() && running > 0) deadlock();
  Thread* next = &main_thread();
  if (!ready.empty()) {
    next = ready.front();
    ready.pop_front();
  }
  self = next;
  if (next != own) next->fiber.switch_from(own->fiber);
  threadIdx = own->thread_index;
  blockIdx = own->block_index;
}

// --- barriers -----------------------------------------------------------------------------------

class Barrier {
 public:
  explicit Barrier(int members) : members_(members), missing_(members) {}

  // All must come to the same place of the source, unless where is null; returns the phase.
  int arrive(const char* what = nullptr, const Where* where = nullptr) {
    if (where != nullptr) {
      if (place_.line() == 0) place_ = *where;
      if (place_.line() != where->line() ||
          std::strcmp(place_.file_name(), where->file_name()) != 0)
        fail("%s at %s:%u, but others who must take part are at %s:%u", what, where->file_name(),
             where->line(), place_.file_name(), place_.line());
    }
    const int phase = phase_;
    if (--missing_ == 0) open();
    return phase;
  }
  void wait(int phase, const char* what, const Where& where) {
    if (phase_ == phase) {
      self->waits_in = what;
      self->waits_at = where;
      waiting_.push_back(self);
      give_way();
    }
  }
  // For good: an exited thread is not waited for.
  void leave() {
    --members_;
    arrive();
  }
  int phase() const { return phase_; }

 private:
  void open() {
    ready.insert(ready.end(), waiting_.begin(), waiting_.end());
    waiting_.clear();
    missing_ = members_;
    place_ = Where();
    ++phase_;
  }
  int members_, missing_, phase_ = 0;
  Where place_;
  std::vector<Thread*> waiting_;
};

// Some lanes of a warp that shuffle or synchronize together. Two sets of values: a lane may be a
// shuffle ahead of another that has yet to read, but not two.
struct Group {
  explicit Group(unsigned mask) : shuffle(std::popcount(mask)), sync(std::popcount(mask)) {}
  Barrier shuffle, sync;
  uint64_t value[2][32] = {};
};

struct Warp {
  unsigned existing = 0, exited = 0;
  std::map<unsigned, Group> groups;  // by mask
};

struct Block {
  Block(unsigned rank, int threads, size_t bytes)
      : rank(rank),
        shared(std::malloc(bytes)),
        bytes(bytes),
        threads_left(threads),
        barrier(threads),
        warps((threads + 31) / 32) {
    for (int i = 0; i < threads; ++i) warps[i / 32].existing |= 1u << i % 32;
  }
  const unsigned rank;
  void* const shared;  // exactly as large as asked for: a sanitizer sees the byte behind it
  const size_t bytes;
  int threads_left;
  Barrier barrier;
  std::vector<Warp> warps;
};

// An mbarrier's only phase.
struct Mbarrier {
  uint64_t arrivals, missing;
  std::vector<Thread*> waiting;
};

struct Cluster {
  explicit Cluster(int threads) : barrier(threads) {}
  Barrier barrier;
  std::map<const void*, Mbarrier> mbarriers;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<Thread*> threads;
};

void deadlock() {
  std::map<std::string, int> waiting;
  for (const Thread* thread : self->cluster->threads)
    if (thread->waits_in != nullptr)
      ++waiting[std::string(thread->waits_in) + " at " + thread->waits_at.file_name() + ":" +
                std::to_string(thread->waits_at.line())];
  std::string text;
  for (const auto& [where, count] : waiting)
    text += "\n  " + std::to_string(count) + " threads wait in " + where;
  fail("deadlock:%s", text.c_str());
}

// --- a grid -------------------------------------------------------------------------------------

struct Call {
  void (*body)(void*);
  void* arguments;
};
Call* call = nullptr;

// What a thread does for good: runs the kernel, gives way, and does it again when it is called.
void serve() {
  for (;;) {
    threadIdx = self->thread_index;
    blockIdx = self->block_index;
    Block& block = *self->block;
    if (self->number == 0) std::memset(block.shared, 0xff, block.bytes);
    block.barrier.wait(block.barrier.arrive(), "begin", Where());
    call->body(call->arguments);
    if (self->at_cluster != Thread::idle) fail("exits between arriving at the cluster and waiting");
    self->warp->exited |= 1u << self->lane;
    self->waits_in = nullptr;
    block.barrier.leave();
    // Gone with its last thread, whoever in the cluster may still want to read it: that is why the
    // cluster hears of it only afterwards.
    if (--block.threads_left == 0) std::free(block.shared);
    self->cluster->barrier.leave();
    --running;
    give_way();
  }
}

// Threads are kept from launch to launch.
Thread& thread_of(unsigned number) {
  static std::vector<std::unique_ptr<Thread>> threads;
  while (threads.size() <= number) threads.push_back(std::make_unique<Thread>(&serve));
  return *threads[number];
}

void run_cluster(const cudaLaunchConfig_t& config, unsigned blocks, uint64_t number,
                 bool reversed) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  const unsigned threads = block.x * block.y * block.z;
  Cluster cluster(static_cast<int>(blocks * threads));
  for (unsigned rank = 0; rank < blocks; ++rank) {
    const uint64_t b = number * blocks + rank;
    cluster.blocks.push_back(std::make_unique<Block>(rank, threads, config.dynamicSmemBytes));
    for (unsigned i = 0; i < threads; ++i) {
      Thread& thread = thread_of(rank * threads + i);
      thread.cluster = &cluster;
      thread.block = cluster.blocks.back().get();
      thread.warp = &thread.block->warps[i / 32];
      thread.number = i;
      thread.lane = i % 32;
      thread.thread_index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
      thread.block_index = {static_cast<unsigned>(b % grid.x),
                            static_cast<unsigned>(b / grid.x % grid.y),
                            static_cast<unsigned>(b / grid.x / grid.y)};
      thread.waits_in = nullptr;
      cluster.threads.push_back(&thread);
    }
  }
  ready.assign(cluster.threads.begin(), cluster.threads.end());
  if (reversed) std::reverse(ready.begin(), ready.end());
  running = static_cast<int>(ready.size());
  self = &main_thread();
  give_way();
}

Group& group_of(unsigned mask, const char* what) {
  Warp& warp = *self->warp;
  if (!(mask >> self->lane & 1)) fail("%s: mask %08x leaves out the calling lane", what, mask);
  if (mask & ~warp.existing)
    fail("%s: mask %08x names lanes that do not exist, the warp has %08x", what, mask,
         warp.existing);
  if (mask & warp.exited) fail("%s: lanes %08x have exited", what, mask & warp.exited);
  return warp.groups.try_emplace(mask, mask).first->second;
}

// What the lanes of the mask gave.
const uint64_t* exchange_all(unsigned mask, uint64_t value, const char* what, const Where& where) {
  Group& group = group_of(mask, what);
  uint64_t* values = group.value[group.shuffle.phase() % 2];
  values[self->lane] = value;
  group.shuffle.wait(group.shuffle.arrive(what, &where), what, where);
  return values;
}

Mbarrier& mbarrier_at(const uint64_t* address, uint64_t held) {
  const auto found = self->cluster->mbarriers.find(address);
  if (found == self->cluster->mbarriers.end() || found->second.arrivals != held)
    fail("what is used as an mbarrier was not initialized");
  return found->second;
}

}  // namespace

void fail(const char* format, ...) {
  std::fprintf(stderr, "cuda_on_host: thread (%u, %u, %u) of block (%u, %u, %u): ", threadIdx.x,
               threadIdx.y, threadIdx.z, blockIdx.x, blockIdx.y, blockIdx.z);
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fputc('\n', stderr);
  std::fflush(stderr);
  std::_Exit(3);
}

void* shared_memory() { return self->block->shared; }
void* shared_memory_of(unsigned rank) {
  const auto& blocks = self->cluster->blocks;
  if (rank >= blocks.size()) fail("asks for block %u of a cluster of %zu", rank, blocks.size());
  return blocks[rank]->shared;
}
unsigned cluster_blocks() { return static_cast<unsigned>(self->cluster->blocks.size()); }
unsigned cluster_rank() { return self->block->rank; }

void sync_block(const Where& where) {
  Barrier& barrier = self->block->barrier;
  barrier.wait(barrier.arrive("__syncthreads", &where), "__syncthreads", where);
}

void sync_warp(unsigned mask, const Where& where) {
  // Lanes that never were are, as all of them is what a caller without a mask means.
  Barrier& barrier = group_of(mask & self->warp->existing, "__syncwarp").sync;
  barrier.wait(barrier.arrive("__syncwarp", &where), "__syncwarp", where);
}

void arrive_cluster(const Where& where) {
  if (self->at_cluster != Thread::idle) fail("arrives at the cluster twice without waiting");
  self->at_cluster = Thread::arrived;
  self->cluster_phase = self->cluster->barrier.arrive();
}

void wait_cluster(const Where& where) {
  if (self->at_cluster == Thread::idle) fail("waits for the cluster without having arrived");
  self->cluster->barrier.wait(self->cluster_phase, "a barrier of the cluster", where);
  self->at_cluster = Thread::idle;
}

void sync_cluster(const Where& where) {
  arrive_cluster(where);
  wait_cluster(where);
}

void init_mbarrier(const uint64_t* mbarrier, unsigned arrivals) {
  if (arrivals == 0) fail("an mbarrier for no arrivals");
  if (!self->cluster->mbarriers.try_emplace(mbarrier, Mbarrier{arrivals, arrivals, {}}).second)
    fail("an mbarrier is initialized twice");
}

void arrive_mbarrier(const uint64_t* mbarrier, uint64_t held, const Where& where) {
  Mbarrier& state = mbarrier_at(mbarrier, held);
  if (state.missing == 0) fail("more arrivals at an mbarrier than the %lu that it is for", held);
  if (--state.missing > 0) return;
  ready.insert(ready.end(), state.waiting.begin(), state.waiting.end());
  state.waiting.clear();
}

void wait_mbarrier(const uint64_t* mbarrier, uint64_t held, const Where& where) {
  Mbarrier& state = mbarrier_at(mbarrier, held);
  if (state.missing > 0) {
    self->waits_in = "mbarrier_wait";
    self->waits_at = where;
    state.waiting.push_back(self);
    give_way();
  }
}

uint64_t exchange(unsigned mask, uint64_t value, unsigned source, const Where& where) {
  const uint64_t* values = exchange_all(mask, value, "a shuffle", where);
  // What a lane outside the mask holds is undefined: NaN in every type.
  return mask >> source & 1 ? values[source] : ~uint64_t{0};
}

unsigned ballot(unsigned mask, bool predicate, const Where& where) {
  const uint64_t* values = exchange_all(mask, predicate, "a vote", where);
  unsigned votes = 0;
  for (unsigned lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) votes |= static_cast<unsigned>(values[lane]) << lane;
  return votes;
}

cudaError_t run_grid(const void* kernel, const cudaLaunchConfig_t& config, void (*body)(void*),
                     void* arguments) {
  unsigned blocks = 1;
  if (const cudaError_t error = host_device::check_launch(kernel, config, &blocks)) return error;
  static const bool reversed = std::getenv("HARMONIZER_REVERSE") != nullptr;
  Call the_call{body, arguments};
  call = &the_call;
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  const uint64_t clusters =
      uint64_t{config.gridDim.x} / blocks * config.gridDim.y * config.gridDim.z;
  for (uint64_t turn = 0; turn < clusters; ++turn)
    run_cluster(config, blocks, reversed ? clusters - 1 - turn : turn, reversed);
  return cudaSuccess;
}

}  // namespace cuda_on_host
