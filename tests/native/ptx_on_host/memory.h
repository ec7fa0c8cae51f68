// Addresses of every state space, and what no access may do.
//
// Global addresses are those of the host, of memory that has been registered. Generic addresses of
// shared and local memory are those of the host too. Addresses of the shared window are 32-bit: a
// block's own begin at kSharedBase, those of a block of rank r of the cluster have r + 1 in their
// highest byte.
#pragma once

#include <cstddef>
#include <cstdint>

#include "machine.h"

namespace ptx_on_host {

constexpr uint32_t kSharedBase = 1024;  // as on GPUs, where the system has what is below
constexpr uint32_t kRankShift = 24;
constexpr size_t kSharedAlignment = 1024;

// Memory that kernels may access.
void register_memory(const void* address, size_t bytes);
void forget_memory(const void* address);

// The host's address of what a thread accesses, after every check: that it lies in memory that is
// there, that it is aligned, that its block is alive, that no other access races with it.
// `content` is what will be written, where that is known.
uint8_t* access(Thread& thread, Space space, uint64_t address, size_t bytes, AccessKind kind,
                const void* content = nullptr);

// The address that an operand and an offset give in a state space.
uint64_t address_in(Space space, uint64_t base, int64_t offset);

// The block of the cluster whose shared memory holds a generic address, or null.
Block* owner_of(Thread& thread, uint64_t generic);
// From the shared window to generic addresses, and back.
uint64_t to_generic(Thread& thread, uint32_t window);
uint32_t to_window(Thread& thread, uint64_t generic, bool of_cluster);

}  // namespace ptx_on_host
