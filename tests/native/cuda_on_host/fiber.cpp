// Of the machine only this is compiled with a sanitizer, which has to be told of every switch.
#include "fiber.h"

#include <pthread.h>
#include <sys/mman.h>

#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#define CUDA_ON_HOST_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define CUDA_ON_HOST_ASAN 1
#endif
#endif

extern "C" {
#ifdef CUDA_ON_HOST_ASAN
void __sanitizer_start_switch_fiber(void**, const void*, size_t);
void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
#endif
// Saves the registers that a function must keep, and the stack pointer, takes up another stack.
void cuda_on_host_switch(void** save, void* stack_pointer);
}

#if defined(__x86_64__)
asm(R"(
  .text
  .globl cuda_on_host_switch
  .type cuda_on_host_switch, @function
cuda_on_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size cuda_on_host_switch, . - cuda_on_host_switch
  .section .note.GNU-stack, "", @progbits
  .text
)");
constexpr int kWords = 8, kReturn = 6;  // six registers, where to go, alignment
#elif defined(__aarch64__)
asm(R"(
  .text
  .globl cuda_on_host_switch
  .type cuda_on_host_switch, %function
cuda_on_host_switch:
  stp x19, x20, [sp, #-160]!
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  ldp x19, x20, [sp], #160
  ret
  .size cuda_on_host_switch, . - cuda_on_host_switch
  .section .note.GNU-stack, "", %progbits
  .text
)");
constexpr int kWords = 20, kReturn = 11;
#else
#error "cuda_on_host knows how to switch stacks on x86-64 and aarch64 only"
#endif

namespace cuda_on_host {
namespace {

// Room for the frames of a kernel with a sanitizer's red zones; only what is touched costs memory.
constexpr size_t kStackBytes = 256 * 1024, kGuardBytes = 64 * 1024;

Fiber* entering;  // the fiber switched to, for its first step

}  // namespace

Fiber::Fiber(void (*body)()) : body_(body) {
  if (body == nullptr) {
    pthread_attr_t attributes;
    void* stack = nullptr;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &stack, &stack_bytes_);
    pthread_attr_destroy(&attributes);
    stack_ = stack;
    return;
  }
  // Never freed: the machine keeps its fibers as long as the process runs. Below lies a guard.
  void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0)
    fail("no memory for the stack of a thread");
  char* stack = static_cast<char*>(memory) + kGuardBytes;
  stack_ = stack;
  stack_bytes_ = kStackBytes;
  void** top = reinterpret_cast<void**>(stack + kStackBytes) - kWords;
  top[kReturn] = reinterpret_cast<void*>(&Fiber::begin);
  stack_pointer_ = top;
}

// Not instrumented: between the two switches it would be recorded for the wrong fiber.
__attribute__((no_sanitize("address"))) void Fiber::switch_from(Fiber& from) {
  entering = this;
#ifdef CUDA_ON_HOST_ASAN
  __sanitizer_start_switch_fiber(&from.address_sanitizer_, stack_, stack_bytes_);
#endif
  cuda_on_host_switch(&from.stack_pointer_, stack_pointer_);
#ifdef CUDA_ON_HOST_ASAN
  __sanitizer_finish_switch_fiber(from.address_sanitizer_, nullptr, nullptr);
#endif
}

__attribute__((no_sanitize("address"))) void Fiber::begin() {
#ifdef CUDA_ON_HOST_ASAN
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  entering->body_();
  __builtin_unreachable();
}

}  // namespace cuda_on_host
