// CUDA threads as fibers: each has a stack of its own and gives way only where it waits.
//
// Threads of the operating system would do as well, but a thousand of them at a barrier cost a
// thousand times two system calls. What is gained besides speed: the same schedule every time, and
// a deadlock is seen.
#pragma once

#include <cstddef>

#include "machine.h"

namespace cuda_on_host {

class Fiber {
 public:
  // The fiber that main() is has no body.
  explicit Fiber(void (*body)());
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Leaves `from`, which runs, for this one; returns when somebody switches back.
  void switch_from(Fiber& from);

 private:
  [[noreturn]] static void begin();
  void (*body_)();
  void* stack_pointer_ = nullptr;
  const void* stack_ = nullptr;
  size_t stack_bytes_ = 0;
  void* address_sanitizer_ = nullptr;
};

}  // namespace cuda_on_host
