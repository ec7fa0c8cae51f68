// Memory and its checks; memory.h says what addresses are.
#include "memory.h"

#include <cstring>
#include <map>
#include <string>

namespace ptx_on_host {
namespace {

struct Region {
  size_t bytes = 0;
  Shadow shadow;
};

struct Accessed {
  size_t bytes;
  AccessKind kind;
  const void* content;
};

std::map<uint64_t, Region>& regions() {
  static std::map<uint64_t, Region> all;
  return all;
}

// The registered memory that holds so many bytes from an address on, and where it begins.
std::pair<uint64_t, Region*> region_of(uint64_t address, size_t bytes) {
  auto after = regions().upper_bound(address);
  if (after == regions().begin()) return {0, nullptr};
  auto& [begin, region] = *--after;
  if (address + bytes > begin + region.bytes) return {0, nullptr};
  return {begin, &region};
}

void count(Thread& thread, const uint8_t* address, size_t bytes, Where where, bool write) {
  if (thread.counts == nullptr) return;
  const auto pc = static_cast<uint32_t>(thread.pc);
  thread.counts->accesses.push_back({pc, thread.counts->executed[pc],
                                     reinterpret_cast<uint64_t>(address),
                                     static_cast<uint8_t>(bytes), where, write});
}

// Reports an access that no barrier orders with an earlier one of another thread. Compilers let
// lanes write in one place what is the same in all: that is none.
void check_race(Thread& thread, Shadow& shadow, const uint8_t* address, size_t offset,
                size_t memory_bytes, const Accessed& accessed) {
  if (!thread.block->cluster->options->races) return;
  const bool same =
      accessed.content != nullptr && std::memcmp(address, accessed.content, accessed.bytes) == 0;
  const std::string race =
      shadow.access(thread, offset, accessed.bytes, accessed.kind, same, memory_bytes);
  if (!race.empty())
    fail(thread, race + " (byte " + std::to_string(offset) + " of " + std::to_string(memory_bytes) +
                     " of its memory)");
}

uint8_t* in_shared(Thread& thread, Block& owner, uint8_t* address, const Accessed& accessed) {
  const auto [bytes, kind, content] = accessed;
  const size_t offset = static_cast<size_t>(address - owner.shared);
  if (offset + bytes > owner.shared_bytes)
    fail(thread, "access of " + std::to_string(bytes) + " bytes at offset " +
                     std::to_string(offset) + " of " + std::to_string(owner.shared_bytes) +
                     " bytes of shared memory");
  if (&owner != thread.block) {
    if (owner.alive == 0) fail(thread, "access to the shared memory of a block that has ended");
    if (thread.block->cluster->phase == 0)
      fail(thread,
           "access to the shared memory of another block before any barrier of the "
           "cluster: that block may not have begun");
  }
  check_race(thread, owner.shadow, address, offset, owner.shared_bytes, accessed);
  count(thread, address, bytes, &owner == thread.block ? Where::shared : Where::shared_of_others,
        kind != AccessKind::read);
  return address;
}

uint8_t* in_window(Thread& thread, Space space, uint32_t window, const Accessed& accessed) {
  Block* owner = thread.block;
  const uint32_t rank = window >> kRankShift;
  if (rank != 0) {
    const auto& blocks = thread.block->cluster->blocks;
    if (rank > blocks.size()) fail(thread, "an address of a block that the cluster does not have");
    owner = blocks[rank - 1].get();
    if (space == Space::shared && owner != thread.block)
      fail(thread, "an address of another block's shared memory, used as one of the own");
  }
  const uint32_t offset = window & ((1u << kRankShift) - 1);
  if (offset < kSharedBase)
    fail(thread, "access below the beginning of shared memory, by " +
                     std::to_string(kSharedBase - offset) + " bytes");
  return in_shared(thread, *owner, owner->shared + (offset - kSharedBase), accessed);
}

bool within(uint64_t address, size_t bytes, const uint8_t* begin, size_t length) {
  const auto first = reinterpret_cast<uint64_t>(begin);
  return length != 0 && address >= first && address + bytes <= first + length;
}

uint8_t* in_global(Thread& thread, uint64_t address, const Accessed& accessed) {
  const auto [bytes, kind, content] = accessed;
  const Cluster& cluster = *thread.block->cluster;
  auto* const pointer = reinterpret_cast<uint8_t*>(address);
  const auto [begin, region] = region_of(address, bytes);
  if (region == nullptr) {
    for (const auto& [first, length] : cluster.module->variables)
      if (address >= first && address + bytes <= first + length) return pointer;
    std::string near;
    auto after = regions().upper_bound(address);
    if (after != regions().begin()) {
      --after;
      near = "; the memory before it ends " +
             std::to_string(static_cast<int64_t>(address + bytes - after->first) -
                            static_cast<int64_t>(after->second.bytes)) +
             " bytes earlier";
    }
    fail(thread,
         "access of " + std::to_string(bytes) + " bytes to global memory that is not there" + near);
  }
  check_race(thread, region->shadow, pointer, address - begin, region->bytes, accessed);
  count(thread, pointer, bytes, Where::global, kind != AccessKind::read);
  return pointer;
}

}  // namespace

void register_memory(const void* address, size_t bytes) {
  if (bytes == 0) return;
  Region region;
  region.bytes = bytes;
  regions()[reinterpret_cast<uint64_t>(address)] = std::move(region);
}

void forget_memory(const void* address) { regions().erase(reinterpret_cast<uint64_t>(address)); }

uint64_t address_in(Space space, uint64_t base, int64_t offset) {
  const uint64_t sum = base + static_cast<uint64_t>(offset);
  const bool window = space == Space::shared || space == Space::shared_cluster;
  return window ? static_cast<uint32_t>(sum) : sum;
}

uint8_t* access(Thread& thread, Space space, uint64_t address, size_t bytes, AccessKind kind,
                const void* content) {
  const Accessed accessed{bytes, kind, content};
  if (bytes > 1 && address % bytes != 0)
    fail(thread, "an access of " + std::to_string(bytes) +
                     " bytes that is not aligned to as many: " + "the address modulo 16 is " +
                     std::to_string(address % 16));
  auto* const pointer = reinterpret_cast<uint8_t*>(address);
  const Kernel& kernel = *thread.block->cluster->kernel;
  const auto& parameters = thread.block->cluster->parameters;
  switch (space) {
    case Space::shared:
    case Space::shared_cluster:
      return in_window(thread, space, static_cast<uint32_t>(address), accessed);
    case Space::local:
      if (!within(address, bytes, thread.local, kernel.local_bytes))
        fail(thread, "access outside of local memory");
      count(thread, pointer, bytes, Where::local, kind != AccessKind::read);
      return pointer;
    case Space::param:
      if (!within(address, bytes, parameters.data(), parameters.size()))
        fail(thread, "access outside of the parameters");
      return pointer;
    case Space::generic:
      if (Block* owner = owner_of(thread, address))
        return in_shared(thread, *owner, pointer, accessed);
      if (within(address, bytes, thread.local, kernel.local_bytes) ||
          within(address, bytes, parameters.data(), parameters.size()))
        return pointer;
      break;
    default: break;
  }
  return in_global(thread, address, accessed);
}

Block* owner_of(Thread& thread, uint64_t generic) {
  const auto* const pointer = reinterpret_cast<const uint8_t*>(generic);
  for (const auto& block : thread.block->cluster->blocks)
    // One past the end belongs to it too, so that an access there is said to be behind it.
    if (pointer >= block->shared && pointer <= block->shared + block->shared_bytes)
      return block.get();
  return nullptr;
}

uint64_t to_generic(Thread& thread, uint32_t window) {
  Block* owner = thread.block;
  if (const uint32_t rank = window >> kRankShift) owner = owner->cluster->blocks.at(rank - 1).get();
  const int64_t offset = int64_t{window & ((1u << kRankShift) - 1)} - kSharedBase;
  return reinterpret_cast<uint64_t>(owner->shared) + static_cast<uint64_t>(offset);
}

uint32_t to_window(Thread& thread, uint64_t generic, bool of_cluster) {
  Block* const owner = owner_of(thread, generic);
  if (owner == nullptr)
    fail(thread, "an address that is not one of shared memory, converted to one");
  const auto offset = static_cast<uint32_t>(generic - reinterpret_cast<uint64_t>(owner->shared));
  if (owner == thread.block) return offset + kSharedBase;
  if (!of_cluster)
    fail(thread, "an address of another block's shared memory, converted to one of the own");
  return (offset + kSharedBase) | (owner->rank + 1) << kRankShift;
}

}  // namespace ptx_on_host
