// Running a grid: clusters one after another, their threads by turns; machine.h has the idea.
#include "machine.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "memory.h"

namespace ptx_on_host {
namespace {

constexpr uint8_t kJunk = 0xff;  // every float of it is a NaN
constexpr uint64_t kJunkRegister = 0xdeadbeefdeadbeef;

uint32_t next_serial() {
  static uint32_t serial = 0;
  return ++serial;
}

uint64_t special_register(const Thread& thread, const std::string& name) {
  const Block& block = *thread.block;
  const Launch& launch = *block.cluster->launch;
  const auto& size = launch.block;
  const uint32_t index[3] = {thread.index % size[0], thread.index / size[0] % size[1],
                             thread.index / size[0] / size[1]};
  const uint32_t cluster = launch.cluster;
  const size_t dot = name.find('.');
  const std::string base = name.substr(0, dot);
  const size_t d = dot == std::string::npos ? 0 : static_cast<size_t>(name[dot + 1] - 'x');
  if (d < 3) {
    if (base == "%tid") return index[d];
    if (base == "%ntid") return size[d];
    if (base == "%ctaid") return block.position[d];
    if (base == "%nctaid") return launch.grid[d];
    if (base == "%clusterid") return d == 0 ? block.position[0] / cluster : block.position[d];
    if (base == "%nclusterid") return d == 0 ? launch.grid[0] / cluster : launch.grid[d];
    if (base == "%cluster_ctaid") return d == 0 ? block.rank : 0;
    if (base == "%cluster_nctaid") return d == 0 ? cluster : 1;
  }
  if (name == "%laneid") return thread.lane;
  if (name == "%warpid") return thread.warp;
  if (name == "%nwarpid") return (block.threads.size() + 31) / 32;
  if (name == "%cluster_ctarank") return block.rank;
  if (name == "%cluster_nctarank") return cluster;
  if (name == "%is_explicit_cluster") return cluster > 1;
  if (name == "%lanemask_eq") return uint64_t{1} << thread.lane;
  if (name == "%lanemask_lt") return (uint64_t{1} << thread.lane) - 1;
  if (name == "%lanemask_le") return (uint64_t{2} << thread.lane) - 1;
  if (name == "%lanemask_gt") return 0xffffffff & ~((uint64_t{2} << thread.lane) - 1);
  if (name == "%lanemask_ge") return 0xffffffff & ~((uint64_t{1} << thread.lane) - 1);
  if (name == "%dynamic_smem_size") return launch.dynamic_shared_bytes;
  throw Error("the special register " + name + " is not known");
}

size_t static_shared(const Kernel& kernel) { return (kernel.static_shared_bytes + 15) / 16 * 16; }

void set_presets(Thread& thread, const Kernel& kernel) {
  for (const Preset& preset : kernel.presets) {
    uint64_t& value = thread.registers[preset.reg];
    switch (preset.kind) {
      case Preset::Kind::special: value = special_register(thread, preset.name); break;
      case Preset::Kind::parameter:
        value = reinterpret_cast<uint64_t>(thread.block->cluster->parameters.data()) +
                static_cast<uint64_t>(preset.offset);
        break;
      case Preset::Kind::local:
        value = reinterpret_cast<uint64_t>(thread.local) + static_cast<uint64_t>(preset.offset);
        break;
      case Preset::Kind::dynamic_shared:
        value = kSharedBase + static_shared(kernel) + static_cast<uint64_t>(preset.offset);
        break;
    }
  }
}

// What every cluster of a launch uses again.
struct Workspace {
  std::vector<uint64_t> registers;
  std::vector<uint8_t> local;
  std::vector<ThreadCounts> counts;
};

void make_cluster(Cluster& cluster, uint64_t number, Workspace& workspace) {
  const Kernel& kernel = *cluster.kernel;
  const Launch& launch = *cluster.launch;
  const size_t per_block = size_t{launch.block[0]} * launch.block[1] * launch.block[2];
  const size_t threads = per_block * launch.cluster;
  const size_t local_bytes = (kernel.local_bytes + 15) / 16 * 16;
  workspace.registers.assign(kernel.registers * threads, kJunkRegister);
  workspace.local.assign(local_bytes * threads + 16, kJunk);
  auto* const local = reinterpret_cast<uint8_t*>(
      (reinterpret_cast<uintptr_t>(workspace.local.data()) + 15) / 16 * 16);
  if (cluster.options->counts != nullptr) {
    workspace.counts.resize(threads);
    for (ThreadCounts& counts : workspace.counts) {
      counts.executed.assign(kernel.code.size(), 0);
      counts.accesses.clear();
    }
  }
  cluster.threads.resize(threads);
  for (uint32_t rank = 0; rank < launch.cluster; ++rank) {
    auto block = std::make_unique<Block>();
    block->cluster = &cluster;
    block->rank = rank;
    const uint64_t id = number * launch.cluster + rank;
    block->position[0] = static_cast<uint32_t>(id % launch.grid[0]);
    block->position[1] = static_cast<uint32_t>(id / launch.grid[0] % launch.grid[1]);
    block->position[2] = static_cast<uint32_t>(id / launch.grid[0] / launch.grid[1]);
    block->shared_bytes = static_shared(kernel) + launch.dynamic_shared_bytes;
    block->storage.assign(block->shared_bytes + 2 * kSharedAlignment, kJunk);
    block->shared = reinterpret_cast<uint8_t*>(
        (reinterpret_cast<uintptr_t>(block->storage.data()) + kSharedAlignment - 1) /
        kSharedAlignment * kSharedAlignment);
    block->alive = static_cast<uint32_t>(per_block);
    for (size_t index = 0; index < per_block; ++index) {
      const size_t i = rank * per_block + index;
      Thread& thread = cluster.threads[i];
      thread.registers = workspace.registers.data() + kernel.registers * i;
      thread.local = local + local_bytes * i;
      thread.block = block.get();
      thread.index = static_cast<uint32_t>(index);
      thread.number = static_cast<uint32_t>(i);
      thread.lane = thread.index % 32;
      thread.warp = thread.index / 32;
      if (cluster.options->counts != nullptr) thread.counts = &workspace.counts[i];
      block->threads.push_back(&thread);
    }
    cluster.blocks.push_back(std::move(block));
  }
  cluster.alive = static_cast<uint32_t>(threads);
  for (Thread& thread : cluster.threads) set_presets(thread, kernel);
}

void end_thread(Thread& thread) {
  Block& block = *thread.block;
  if (!thread.copies.empty())
    fail(thread, "a thread ends before the asynchronous copies that it began were waited for");
  thread.state = State::ended;
  --block.alive;
  --block.cluster->alive;
  ++block.cluster->events;
  for (int number = 0; number < 16; ++number)
    if (block.barriers[number].expected == 0) check_barrier(block, number);
  check_cluster_barrier(*block.cluster);
}

// Lets a thread execute at most so many instructions.
void step(Thread& thread, uint64_t most) {
  Cluster& cluster = *thread.block->cluster;
  const Instruction* const code = cluster.kernel->code.data();
  for (; most != 0; --most) {
    const Instruction& instruction = code[thread.pc];
    cluster.current = &instruction;
    if (thread.counts != nullptr) ++thread.counts->executed[thread.pc];
    if (++thread.executed > cluster.options->most_instructions)
      fail(thread, "a thread that has executed " + std::to_string(thread.executed - 1) +
                       " instructions: an endless loop");
    if (instruction.predicate >= 0 &&
        ((thread.registers[instruction.predicate] & 1) != 0) == instruction.predicate_negated) {
      ++thread.pc;
      continue;
    }
    switch (instruction.execute(thread, instruction)) {
      case Outcome::next: ++thread.pc; break;
      case Outcome::jumped: break;
      case Outcome::waits: return;
      case Outcome::yielded:
        ++thread.pc;
        thread.polls = thread.polled_at == cluster.events ? thread.polls + 1 : 1;
        thread.polled_at = cluster.events;
        return;
      case Outcome::ended: end_thread(thread); return;
    }
  }
}

// Whether a thread waits, or polls again and again while nothing happens.
bool is_stuck(const Thread& thread) {
  if (thread.state != State::ready) return true;
  return thread.polls > 1 && thread.polled_at == thread.block->cluster->events;
}

[[noreturn]] void report_deadlock(const Cluster& cluster) {
  std::map<std::string, int> places;
  for (const Thread& thread : cluster.threads)
    if (thread.state != State::ended)
      ++places[place_of(*cluster.module, cluster.kernel->code[thread.pc])];
  std::string text = cluster.kernel->name + ": deadlock:";
  for (const auto& [place, threads] : places)
    text += "\n  " + std::to_string(threads) + " threads wait at " + place;
  throw Error(text);
}

// Lets threads go on until none of them can. Returns whether any could.
bool run_while_possible(const std::vector<Thread*>& threads) {
  bool any = false;
  for (bool progress = true; progress;) {
    progress = false;
    for (Thread* thread : threads) {
      if (is_stuck(*thread)) continue;
      step(*thread, ~uint64_t{0});
      progress = any = true;
    }
  }
  return any;
}

// One warp as far as it can go before another, and one block before another.
void run_in_order(Cluster& cluster) {
  std::vector<std::vector<std::vector<Thread*>>> blocks;  // warps of threads
  const bool descending = cluster.options->order == Order::descending;
  for (const auto& block : cluster.blocks) {
    std::vector<std::vector<Thread*>> warps;
    for (Thread* thread : block->threads) {
      if (thread->lane == 0) warps.emplace_back();
      warps.back().push_back(thread);
    }
    if (descending)
      for (auto& warp : warps) std::reverse(warp.begin(), warp.end());
    if (descending) std::reverse(warps.begin(), warps.end());
    blocks.push_back(std::move(warps));
  }
  if (descending) std::reverse(blocks.begin(), blocks.end());
  while (cluster.alive != 0) {
    bool any = false;
    for (const auto& warps : blocks)
      for (bool progress = true; progress;) {
        progress = false;
        for (const auto& warp : warps) progress |= run_while_possible(warp);
        any |= progress;
      }
    if (cluster.alive != 0 && !any) report_deadlock(cluster);
  }
}

// A few instructions of one thread, then of another.
void run_shuffled(Cluster& cluster, std::mt19937_64& random) {
  std::vector<Thread*> threads;
  for (Thread& thread : cluster.threads) threads.push_back(&thread);
  const uint64_t most = cluster.options->order == Order::shuffled ? 400 : 7;
  while (cluster.alive != 0) {
    std::shuffle(threads.begin(), threads.end(), random);
    bool any = false;
    for (Thread* thread : threads) {
      if (is_stuck(*thread)) continue;
      step(*thread, 1 + random() % most);
      any = true;
    }
    if (cluster.alive != 0 && !any) report_deadlock(cluster);
  }
}

}  // namespace

std::string place_of(const Module& module, const Instruction& instruction) {
  std::string place;
  const auto file = module.files.find(instruction.file);
  if (file != module.files.end())
    place = file->second + ":" + std::to_string(instruction.line) + " in ";
  return place + "`" + instruction.text + "`";
}

void fail(const Thread& thread, const std::string& what) {
  const Block& block = *thread.block;
  const Cluster& cluster = *block.cluster;
  throw Error(cluster.kernel->name + ", block (" + std::to_string(block.position[0]) + ", " +
              std::to_string(block.position[1]) + ", " + std::to_string(block.position[2]) +
              "), thread " + std::to_string(thread.index) + ": " + what + "; at " +
              place_of(*cluster.module, *cluster.current));
}

void check_barrier(Block& block, int number) {
  Barrier& barrier = block.barriers[number];
  const uint32_t wanted = barrier.expected != 0 ? barrier.expected : block.alive;
  if (barrier.arrived == 0 || barrier.arrived < wanted) return;
  std::map<uint32_t, int> place_of_warp;
  for (Thread* thread : block.threads) {
    if (thread->state != State::at_barrier || thread->barrier != number) continue;
    if (barrier.expected == 0 && block.alive != block.threads.size())
      fail(*thread, "a barrier of the block, of which some threads have ended");
    const auto [found, first] = place_of_warp.emplace(thread->warp, thread->pc);
    if (!first && found->second != thread->pc)
      fail(*thread, "threads of one warp wait at different barriers");
  }
  barrier.meeting.complete(block.cluster->threads.size());
  for (Thread* thread : block.threads) {
    if (thread->state != State::at_barrier || thread->barrier != number) continue;
    barrier.meeting.pass(*thread);
    thread->state = State::ready;
    ++thread->pc;
  }
  barrier.arrived = 0;
  barrier.expected = 0;
  ++block.cluster->events;
}

void check_cluster_barrier(Cluster& cluster) {
  if (cluster.arrived == 0 || cluster.arrived < cluster.alive) return;
  cluster.arrived = 0;
  ++cluster.phase;
  ++cluster.events;
  cluster.meeting.complete(cluster.threads.size());
  for (Thread& thread : cluster.threads) {
    if (thread.state != State::at_cluster_barrier) continue;
    cluster.meeting.pass(thread);
    thread.state = State::ready;
    thread.arrived_at_cluster = false;
    ++thread.pc;
  }
}

void run(const Module& module, const Kernel& kernel, const Launch& launch, const Options& options,
         const void* const* arguments) {
  const uint64_t threads = uint64_t{launch.block[0]} * launch.block[1] * launch.block[2];
  if (threads == 0 || threads > 1024)
    throw Error(kernel.name + ": " + std::to_string(threads) + " threads in a block");
  if (kernel.max_threads != 0 && threads > kernel.max_threads)
    throw Error(kernel.name + ": " + std::to_string(threads) +
                " threads in a block, compiled for " + std::to_string(kernel.max_threads));
  if (kernel.required_threads != 0 && threads != kernel.required_threads)
    throw Error(kernel.name + ": " + std::to_string(threads) +
                " threads in a block, compiled for just " +
                std::to_string(kernel.required_threads));
  if (launch.cluster == 0 || launch.grid[0] % launch.cluster != 0)
    throw Error(kernel.name + ": a grid that is not of whole clusters");
  const uint64_t clusters =
      uint64_t{launch.grid[0]} * launch.grid[1] * launch.grid[2] / launch.cluster;
  std::vector<uint64_t> order(clusters);
  std::iota(order.begin(), order.end(), 0);
  std::mt19937_64 random(options.seed);
  if (options.order == Order::descending) std::reverse(order.begin(), order.end());
  if (options.order >= Order::shuffled) std::shuffle(order.begin(), order.end(), random);
  if (options.clusters != 0 && options.clusters < clusters) order.resize(options.clusters);
  Workspace workspace;
  const uint32_t first_serial = next_serial();
  for (const uint64_t number : order) {
    Cluster cluster;
    cluster.kernel = &kernel;
    cluster.module = &module;
    cluster.options = &options;
    cluster.launch = &launch;
    cluster.current = kernel.code.data();
    cluster.serial = next_serial();
    cluster.first_serial = first_serial;
    cluster.parameters.assign(kernel.parameter_bytes, kJunk);
    for (size_t i = 0; i < kernel.parameters.size(); ++i)
      std::memcpy(cluster.parameters.data() + kernel.parameters[i].offset, arguments[i],
                  kernel.parameters[i].bytes);
    make_cluster(cluster, number, workspace);
    if (options.order >= Order::shuffled)
      run_shuffled(cluster, random);
    else
      run_in_order(cluster);
    if (options.counts != nullptr) options.counts->add(cluster);
  }
}

}  // namespace ptx_on_host
