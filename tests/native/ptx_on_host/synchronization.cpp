// Instructions with which threads wait for each other: bar, barrier, fence, mbarrier.
//
// This machine executes one access after another, so that a fence has nothing to do; what it would
// order, barriers order here. Weaker forms (.relaxed) would not, and are refused.
#include <cstring>

#include "execute.h"
#include "memory.h"
#include "statement.h"

namespace ptx_on_host {
namespace {

// --- barriers of a block ------------------------------------------------------------------------

Barrier& arrive(Thread& thread, const Instruction& i) {
  const auto number = bits_of(thread, i.from[0]);
  if (number >= 16) fail(thread, "barrier " + std::to_string(number) + " of 16");
  Barrier& barrier = thread.block->barriers[number];
  if (i.from.size() > 1) {
    const auto expected = read<uint32_t>(thread, i.from[1]);
    if (barrier.arrived != 0 && barrier.expected != expected)
      fail(thread, "a barrier at which others have come for another number of threads");
    barrier.expected = expected;
  }
  ++barrier.arrived;
  barrier.meeting.arrive(thread);
  return barrier;
}

Outcome wait_for_block(Thread& thread, const Instruction& i) {
  arrive(thread, i);
  thread.state = State::at_barrier;
  thread.barrier = static_cast<int>(bits_of(thread, i.from[0]));
  check_barrier(*thread.block, thread.barrier);
  // The last to come has been sent on with the others.
  return thread.state == State::ready ? Outcome::jumped : Outcome::waits;
}

Outcome arrive_at_block(Thread& thread, const Instruction& i) {
  arrive(thread, i);
  check_barrier(*thread.block, static_cast<int>(bits_of(thread, i.from[0])));
  return Outcome::next;
}

// --- barriers of a cluster ----------------------------------------------------------------------

Outcome arrive_at_cluster(Thread& thread, const Instruction&) {
  Cluster& cluster = *thread.block->cluster;
  if (thread.arrived_at_cluster)
    fail(thread, "a second arrival at the barrier of the cluster, with no wait after the first");
  thread.arrived_at_cluster = true;
  thread.cluster_phase = cluster.phase;
  ++cluster.arrived;
  cluster.meeting.arrive(thread);
  check_cluster_barrier(cluster);
  return Outcome::next;
}

Outcome wait_for_cluster(Thread& thread, const Instruction&) {
  Cluster& cluster = *thread.block->cluster;
  if (!thread.arrived_at_cluster)
    fail(thread, "a wait at the barrier of the cluster, with no arrival before it");
  if (cluster.phase == thread.cluster_phase) {
    thread.state = State::at_cluster_barrier;
    return Outcome::waits;
  }
  thread.arrived_at_cluster = false;
  cluster.meeting.pass(thread);
  return Outcome::next;
}

void build_barrier(Statement& s, Instruction& i) {
  i.category = Category::barriers;
  if (s.take("warp")) return build_warp_barrier(s, i);
  if (s.take("cluster")) {
    const int kind = s.take_one_of({"arrive", "wait"});
    if (kind < 0) s.refuse();
    s.take(kind == 0 ? "release" : "acquire");
    s.take("aligned");
    i.execute = kind == 0 ? arrive_at_cluster : wait_for_cluster;
    return;
  }
  s.take("cta");
  s.take("aligned");
  const int kind = s.take_one_of({"sync", "arrive"});
  if (kind < 0) s.refuse();
  for (size_t k = 0; k < s.operands(); ++k) i.from.push_back(s.value(k, Type::u32));
  if (i.from.empty()) s.refuse("names no barrier");
  i.execute = kind == 0 ? wait_for_block : arrive_at_block;
}

// --- mbarrier -----------------------------------------------------------------------------------

// What an mbarrier holds in its eight bytes, which PTX leaves open.
struct MBarrier {
  uint32_t pending : 20, spare : 12;  // arrivals that this phase still waits for
  uint32_t expected : 20, other_spare : 11, phase : 1;
};
static_assert(sizeof(MBarrier) == 8);

struct Reached {
  MBarrier* barrier;
  Meeting* meeting;
};

Reached reach(Thread& thread, const Instruction& i, AccessKind kind) {
  const uint64_t address = address_in(i.space, bits_of(thread, i.from[0]), i.offset);
  auto* const at = access(thread, i.space, address, sizeof(MBarrier), kind);
  Block& owner = *owner_of(thread, reinterpret_cast<uint64_t>(at));
  return {reinterpret_cast<MBarrier*>(at),
          &owner.mbarriers[static_cast<uint64_t>(at - owner.shared)]};
}

bool initialized(const Reached& reached) {
  // Memory begins as ones in every bit.
  return reached.barrier->spare == 0 && reached.barrier->expected != 0;
}

Outcome initialize_mbarrier(Thread& thread, const Instruction& i) {
  const Reached reached = reach(thread, i, AccessKind::write);
  const auto arrivals = read<uint32_t>(thread, i.from[1]);
  if (arrivals == 0 || arrivals >= 1u << 20)
    fail(thread, "an mbarrier for " + std::to_string(arrivals) + " arrivals");
  *reached.barrier = {};
  reached.barrier->pending = arrivals;
  reached.barrier->expected = arrivals;
  *reached.meeting = Meeting();
  return Outcome::next;
}

Outcome invalidate_mbarrier(Thread& thread, const Instruction& i) {
  *reach(thread, i, AccessKind::write).barrier = {};
  return Outcome::next;
}

Outcome arrive_at_mbarrier(Thread& thread, const Instruction& i) {
  const Reached reached = reach(thread, i, AccessKind::atomic);
  if (!initialized(reached)) fail(thread, "an arrival at an mbarrier that was not initialized");
  MBarrier& barrier = *reached.barrier;
  const uint32_t arrivals = i.from.size() > 1 ? read<uint32_t>(thread, i.from[1]) : 1;
  if (arrivals > barrier.pending)
    fail(thread, "more arrivals at an mbarrier than it was initialized for");
  uint64_t state;
  std::memcpy(&state, &barrier, sizeof state);
  if (!i.to.empty()) write(thread, i.to[0], state);
  reached.meeting->arrive(thread);
  barrier.pending -= arrivals;
  ++thread.block->cluster->events;
  if (barrier.pending == 0) {
    barrier.pending = barrier.expected;
    barrier.phase ^= 1;
    reached.meeting->complete(thread.block->cluster->threads.size());
  }
  return Outcome::next;
}

Outcome poll_mbarrier(Thread& thread, const Instruction& i) {
  const Reached reached = reach(thread, i, AccessKind::atomic);
  if (!initialized(reached)) fail(thread, "a wait at an mbarrier that was not initialized");
  const uint64_t given = bits_of(thread, i.from[1]);
  // By the phase's parity, or by the state that an arrival returned.
  const bool phase = i.flag ? (given & 1) != 0 : given >> 63 != 0;
  const bool complete = (reached.barrier->phase != 0) != phase;
  write(thread, i.to[0], static_cast<uint8_t>(complete));
  if (!complete) return Outcome::yielded;
  reached.meeting->pass(thread);
  return Outcome::next;
}

void build_mbarrier(Statement& s, Instruction& i) {
  i.category = Category::barriers;
  const int kind = s.take_one_of({"init", "inval", "arrive", "test_wait", "try_wait"});
  if (kind < 0) s.refuse();
  i.flag = kind >= 3 && s.take("parity");
  if (kind >= 2) s.take(kind == 2 ? "release" : "acquire");
  s.take_one_of({"cta", "cluster"});
  i.space = s.take_space();
  if (s.take_type() != Type::b64) s.refuse();
  size_t operand = 0;
  if (kind >= 3 || (kind == 2 && s.operand(0)[0] != '['))
    i.to.push_back(s.value(operand++, kind >= 3 ? Type::pred : Type::b64));
  i.from.push_back(s.address(operand++, &i.offset));
  if (operand < s.operands())
    i.from.push_back(s.value(operand++, kind >= 3 && !i.flag ? Type::b64 : Type::u32));
  static constexpr Execute kCode[] = {initialize_mbarrier, invalidate_mbarrier, arrive_at_mbarrier,
                                      poll_mbarrier, poll_mbarrier};
  i.execute = kCode[kind];
  if ((kind == 0 || kind >= 3) && i.from.size() < 2) s.refuse("has too few operands");
}

// --- fences -------------------------------------------------------------------------------------

void build_fence(Statement& s, Instruction& i) {
  i.category = Category::barriers;
  s.take_one_of({"mbarrier_init", "acq_rel", "sc"});
  s.take("release");
  s.take_one_of({"cta", "cluster", "gpu", "sys", "gl"});
  i.execute = nothing;
}

}  // namespace

void add_synchronization(Builders& builders) {
  builders["bar"] = build_barrier;
  builders["barrier"] = build_barrier;
  builders["mbarrier"] = build_mbarrier;
  builders["fence"] = build_fence;
  builders["membar"] = build_fence;
}

}  // namespace ptx_on_host
