// Instructions that the lanes of a warp execute together: shfl, vote, match, redux, elect,
// bar.warp.sync, ldmatrix, stmatrix. None orders memory but bar.warp.sync, as PTX says.
#include <algorithm>
#include <cstring>

#include "execute.h"
#include "memory.h"
#include "statement.h"

namespace ptx_on_host {
namespace {

struct Lanes {
  Thread* at[32] = {};
  uint32_t mask = 0;
};

// What names the lanes that take part: the last operand, or all.
uint32_t mask_of(const Thread& thread, const Instruction& i) {
  return i.flag ? 0xffffffff : read<uint32_t>(thread, i.from.back());
}

// The lanes, once all have come. Until then false, and the thread waits.
bool gather(Thread& thread, const Instruction& i, Lanes& lanes) {
  lanes.mask = mask_of(thread, i);
  if (!(lanes.mask >> thread.lane & 1)) fail(thread, "a lane that its own member mask leaves out");
  const auto& threads = thread.block->threads;
  for (uint32_t lane = 0; lane < 32; ++lane) {
    if (!(lanes.mask >> lane & 1)) continue;
    const size_t index = size_t{thread.warp} * 32 + lane;
    if (index >= threads.size())
      fail(thread, "a member mask of lanes that the block does not have");
    Thread* const other = threads[index];
    if (other->state == State::ended) fail(thread, "a member mask with a lane that has ended");
    if (other != &thread && (other->state != State::at_collective || other->pc != thread.pc)) {
      thread.state = State::at_collective;
      return false;
    }
    lanes.at[lane] = other;
  }
  for (const Thread* other : lanes.at)
    if (other != nullptr && mask_of(*other, i) != lanes.mask)
      fail(thread, "lanes with different member masks");
  return true;
}

// Sends on all but the one that has just come, which goes on by itself.
Outcome release(Thread& thread, const Lanes& lanes) {
  for (Thread* other : lanes.at) {
    if (other == nullptr || other == &thread) continue;
    other->state = State::ready;
    ++other->pc;
  }
  ++thread.block->cluster->events;
  return Outcome::next;
}

// --- shfl ---------------------------------------------------------------------------------------

enum class Shuffle : int8_t { up, down, butterfly, index };

Outcome shuffle(Thread& thread, const Instruction& i) {
  Lanes lanes;
  if (!gather(thread, i, lanes)) return Outcome::waits;
  uint32_t given[32] = {};
  for (uint32_t lane = 0; lane < 32; ++lane)
    if (lanes.at[lane]) given[lane] = read<uint32_t>(*lanes.at[lane], i.from[0]);
  for (uint32_t lane = 0; lane < 32; ++lane) {
    Thread* const to = lanes.at[lane];
    if (to == nullptr) continue;
    const int by = static_cast<int>(read<uint32_t>(*to, i.from[1]) & 31);
    const auto control = read<uint32_t>(*to, i.from[2]);
    const int clamp = control & 31, segment = control >> 8 & 31, here = static_cast<int>(lane);
    const int first = here & segment, last = first | (clamp & ~segment);
    int source = here;
    bool inside = false;
    switch (static_cast<Shuffle>(i.variant)) {
      case Shuffle::up:
        source = here - by;
        inside = source >= last;
        break;
      case Shuffle::down:
        source = here + by;
        inside = source <= last;
        break;
      case Shuffle::butterfly:
        source = here ^ by;
        inside = source <= last;
        break;
      case Shuffle::index:
        source = first | (by & ~segment);
        inside = source <= last;
        break;
    }
    if (!inside) source = here;
    if (lanes.at[source] == nullptr) fail(*to, "a shuffle from a lane that takes no part");
    write(*to, i.to[0], given[source]);
    if (i.to.size() > 1) write(*to, i.to[1], static_cast<uint8_t>(inside));
  }
  return release(thread, lanes);
}

void build_shuffle(Statement& s, Instruction& i) {
  i.category = Category::shuffles;
  if (!s.take("sync")) s.refuse();
  i.variant = static_cast<int8_t>(s.take_one_of({"up", "down", "bfly", "idx"}));
  if (i.variant < 0) s.refuse();
  s.usual_operands(i, s.take_type(), 4);
  i.execute = shuffle;
}

// --- vote and match -----------------------------------------------------------------------------

enum class Vote : int8_t { ballot, any, all, uniform };

Outcome vote(Thread& thread, const Instruction& i) {
  Lanes lanes;
  if (!gather(thread, i, lanes)) return Outcome::waits;
  uint32_t ballot = 0;
  for (uint32_t lane = 0; lane < 32; ++lane)
    if (lanes.at[lane] && read_predicate(*lanes.at[lane], i.from[0])) ballot |= 1u << lane;
  uint32_t result = 0;
  switch (static_cast<Vote>(i.variant)) {
    case Vote::ballot: result = ballot; break;
    case Vote::any: result = ballot != 0; break;
    case Vote::all: result = ballot == lanes.mask; break;
    case Vote::uniform: result = ballot == 0 || ballot == lanes.mask; break;
  }
  for (Thread* to : lanes.at)
    if (to != nullptr) write(*to, i.to[0], result);
  return release(thread, lanes);
}

void build_vote(Statement& s, Instruction& i) {
  i.category = Category::shuffles;
  if (!s.take("sync")) s.refuse();
  i.variant = static_cast<int8_t>(s.take_one_of({"ballot", "any", "all", "uni"}));
  if (i.variant < 0) s.refuse();
  s.take_type();
  i.to.push_back(s.value(0, Type::b32));
  i.from.push_back(s.value(1, Type::pred));
  i.from.push_back(s.value(2, Type::b32));
  i.execute = vote;
}

Outcome match_any(Thread& thread, const Instruction& i) {
  Lanes lanes;
  if (!gather(thread, i, lanes)) return Outcome::waits;
  uint32_t same[32] = {};
  for (uint32_t lane = 0; lane < 32; ++lane)
    for (uint32_t other = 0; other < 32; ++other)
      if (lanes.at[lane] && lanes.at[other] &&
          bits_of(*lanes.at[lane], i.from[0]) == bits_of(*lanes.at[other], i.from[0]))
        same[lane] |= 1u << other;
  for (uint32_t lane = 0; lane < 32; ++lane)
    if (lanes.at[lane]) write(*lanes.at[lane], i.to[0], same[lane]);
  return release(thread, lanes);
}

void build_match(Statement& s, Instruction& i) {
  i.category = Category::shuffles;
  if (!s.take("any") || !s.take("sync")) s.refuse();
  s.usual_operands(i, s.take_type(), 2);
  i.execute = match_any;
}

// --- redux and elect ----------------------------------------------------------------------------

enum class Reduction : int8_t { add, min, max, and_, or_, xor_ };

template <class X>
Outcome reduce(Thread& thread, const Instruction& i) {
  Lanes lanes;
  if (!gather(thread, i, lanes)) return Outcome::waits;
  X total = 0;
  bool begun = false;
  for (const Thread* lane : lanes.at) {
    if (lane == nullptr) continue;
    const X value = read<X>(*lane, i.from[0]);
    if (!begun) {
      total = value;
      begun = true;
      continue;
    }
    switch (static_cast<Reduction>(i.variant)) {
      case Reduction::add: total = static_cast<X>(total + value); break;
      case Reduction::min: total = std::min(total, value); break;
      case Reduction::max: total = std::max(total, value); break;
      case Reduction::and_: total = total & value; break;
      case Reduction::or_: total = total | value; break;
      case Reduction::xor_: total = total ^ value; break;
    }
  }
  for (Thread* to : lanes.at)
    if (to != nullptr) write(*to, i.to[0], total);
  return release(thread, lanes);
}

void build_reduction(Statement& s, Instruction& i) {
  i.category = Category::shuffles;
  if (!s.take("sync")) s.refuse();
  i.variant = static_cast<int8_t>(s.take_one_of({"add", "min", "max", "and", "or", "xor"}));
  if (i.variant < 0) s.refuse();
  const Type type = s.take_type();
  s.usual_operands(i, type, 2);
  if (is_float(type)) s.refuse();
  i.execute = type == Type::s32 ? reduce<int32_t> : reduce<uint32_t>;
}

Outcome elect(Thread& thread, const Instruction& i) {
  Lanes lanes;
  if (!gather(thread, i, lanes)) return Outcome::waits;
  const auto leader = static_cast<uint32_t>(__builtin_ctz(lanes.mask));
  for (uint32_t lane = 0; lane < 32; ++lane) {
    if (lanes.at[lane] == nullptr) continue;
    write(*lanes.at[lane], i.to[0], leader);
    if (i.to.size() > 1) write(*lanes.at[lane], i.to[1], static_cast<uint8_t>(lane == leader));
  }
  return release(thread, lanes);
}

void build_elect(Statement& s, Instruction& i) {
  i.category = Category::shuffles;
  if (!s.take("sync")) s.refuse();
  s.usual_operands(i, Type::b32, 1);
  i.execute = elect;
}

// --- matrices of eight rows of eight two-byte elements ------------------------------------------

// Lane 8 m + r has the address of row r of matrix m. Register m of lane 4 r + c has elements 2 c
// and 2 c + 1 of row r of that matrix, or with .trans of its column r.
template <bool kStore>
Outcome move_matrices(Thread& thread, const Instruction& i) {
  Lanes lanes;
  if (!gather(thread, i, lanes)) return Outcome::waits;
  const auto& registers = kStore ? i.from : i.to;
  const size_t first = kStore ? 1 : 0, matrices = registers.size() - first;
  const bool transposed = i.variant != 0;
  for (uint32_t row = 0; row < 8 * matrices; ++row) {
    Thread& owner = *lanes.at[row];
    const uint64_t address = address_in(i.space, bits_of(owner, i.from[0]), i.offset);
    uint8_t* const at =
        access(owner, i.space, address, 16, kStore ? AccessKind::write : AccessKind::read);
    for (uint32_t column = 0; column < 8; ++column) {
      const uint32_t r = transposed ? column : row % 8, c = transposed ? row % 8 : column;
      Thread& holder = *lanes.at[4 * r + c / 2];
      const Operand& held = registers[first + row / 8];
      const uint32_t shift = 16 * (c % 2);
      auto both = read<uint32_t>(holder, held);
      auto element = static_cast<uint16_t>(both >> shift);
      if (kStore) {
        std::memcpy(at + 2 * column, &element, 2);
      } else {
        std::memcpy(&element, at + 2 * column, 2);
        both = (both & ~(0xffffu << shift)) | uint32_t{element} << shift;
        write(holder, held, both);
      }
    }
  }
  return release(thread, lanes);
}

Builder matrix_builder(bool store) {
  return [store](Statement& s, Instruction& i) {
    i.category = Category::shared_memory;
    i.flag = true;  // all lanes take part
    if (!s.take("sync") || !s.take("aligned") || !s.take("m8n8")) s.refuse();
    static constexpr size_t kMatrices[] = {1, 2, 4};
    const int count = s.take_one_of({"x1", "x2", "x4"});
    i.variant = s.take("trans") ? 1 : 0;
    i.space = s.take_space();
    if (count < 0 || s.take_type() != Type::b16) s.refuse();
    i.from.push_back(s.address(store ? 0 : 1, &i.offset));
    const std::vector<Operand> registers = s.values(store ? 1 : 0, Type::b32);
    if (registers.size() != kMatrices[count]) s.refuse("has not as many registers as it says");
    if (store)
      i.from.insert(i.from.end(), registers.begin(), registers.end());
    else
      i.to = registers;
    i.execute = store ? move_matrices<true> : move_matrices<false>;
  };
}

// --- bar.warp.sync ------------------------------------------------------------------------------

Outcome wait_for_warp(Thread& thread, const Instruction& i) {
  Lanes lanes;
  if (!gather(thread, i, lanes)) return Outcome::waits;
  Meeting meeting;
  for (Thread* lane : lanes.at)
    if (lane != nullptr) meeting.arrive(*lane);
  meeting.complete(thread.block->cluster->threads.size());
  for (Thread* lane : lanes.at)
    if (lane != nullptr) meeting.pass(*lane);
  return release(thread, lanes);
}

}  // namespace

void build_warp_barrier(Statement& s, Instruction& i) {
  if (!s.take("sync")) s.refuse();
  i.from.push_back(s.value(0, Type::b32));
  i.execute = wait_for_warp;
}

void add_collectives(Builders& builders) {
  builders["shfl"] = build_shuffle;
  builders["vote"] = build_vote;
  builders["match"] = build_match;
  builders["redux"] = build_reduction;
  builders["elect"] = build_elect;
  builders["ldmatrix"] = matrix_builder(false);
  builders["stmatrix"] = matrix_builder(true);
}

}  // namespace ptx_on_host
