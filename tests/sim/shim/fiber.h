// Fibers: stacks that a thread switches between. AddressSanitizer and ThreadSanitizer are told of each switch.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if defined(__x86_64__)
#define SIM_OWN_SWITCH 1
#else
#define SIM_OWN_SWITCH 0
#include <ucontext.h>
#endif

#ifdef SIM_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif
#ifdef SIM_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace sim {

// What one fiber did before it comes before what another does after.
inline void happens_before(void* object) {
#ifdef SIM_TSAN
  __tsan_release(object);
#else
  (void)object;
#endif
}
inline void happens_after(void* object) {
#ifdef SIM_TSAN
  __tsan_acquire(object);
#else
  (void)object;
#endif
}

// While it lives, ThreadSanitizer does not watch this fiber: the engine's own memory has no races, for one fiber runs at
// a time.
// (That the engine is compiled without it is not enough: memset, memmove and the like are always watched.)
struct Unwatched {
#ifdef SIM_TSAN
  Unwatched() {
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
  }
  ~Unwatched() {
    AnnotateIgnoreWritesEnd("", 0);
    AnnotateIgnoreReadsEnd("", 0);
  }
#else
  Unwatched() {}
#endif
  Unwatched(const Unwatched&) = delete;
};

#if SIM_OWN_SWITCH
extern "C" void sim_switch(void** save_stack, void* load_stack);  // sim.cpp
#endif

class Fiber {
 public:
  // The calling thread's own stack.
  Fiber() = default;
  // A stack of `bytes` that will run main, which never returns.
  Fiber(size_t bytes, void (*main)()) : size_(bytes), main_(main) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    mapped_ = bytes + page;
    void* memory = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) abort_because("no memory for the stacks of the threads");
    mprotect(memory, page, PROT_NONE);  // a stack that overflows ends here
    bottom_ = static_cast<char*>(memory) + page;
    restart();
  }
  Fiber(const Fiber&) = delete;

  // Forgets where it was: the next switch to it begins main anew.
  void restart() {
#if SIM_OWN_SWITCH
    void** top = reinterpret_cast<void**>(bottom_ + size_);
    *--top = nullptr;                          // main's return address, and the alignment that a call gives
    *--top = reinterpret_cast<void*>(main_);   // popped by ret
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    stack_pointer_ = top;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = bottom_;
    context_.uc_stack.ss_size = size_;
    context_.uc_link = nullptr;
    makecontext(&context_, main_, 0);
#endif
#ifdef SIM_ASAN
    __asan_unpoison_memory_region(bottom_, size_);
    fake_stack_ = nullptr;
#endif
#ifdef SIM_TSAN
    tsan_ = __tsan_create_fiber(0);  // one that was given up can not be destroyed in the midst of its work
#endif
  }

  // The calling thread continues in `to`; comes back when someone switches to `from`.
  static void switch_from_to(Fiber& from, Fiber& to) {
#ifdef SIM_TSAN
    if (!from.tsan_) from.tsan_ = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(to.tsan_, 1);  // 1: orders nothing
#endif
#ifdef SIM_ASAN
    __sanitizer_start_switch_fiber(&from.fake_stack_, to.bottom_, to.size_);
    previous = &from;
#endif
#if SIM_OWN_SWITCH
    sim_switch(&from.stack_pointer_, to.stack_pointer_);
#else
    swapcontext(&from.context_, &to.context_);
#endif
    from.arrived();
  }

  // To be called first in main.
  void arrived() {
#ifdef SIM_ASAN
    const void* bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(fake_stack_, &bottom, &size);
    if (!previous->main_) {  // it came from the thread's own stack: now its bounds are known
      previous->bottom_ = static_cast<char*>(const_cast<void*>(bottom));
      previous->size_ = size;
    }
#endif
  }

 private:
  static void abort_because(const char* what) {
    std::fprintf(stderr, "sim: %s\n", what);
    std::abort();
  }

  char* bottom_ = nullptr;
  size_t size_ = 0, mapped_ = 0;
  void (*main_)() = nullptr;
#if SIM_OWN_SWITCH
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
#ifdef SIM_ASAN
  void* fake_stack_ = nullptr;
  static inline Fiber* previous = nullptr;
#endif
#ifdef SIM_TSAN
  void* tsan_ = nullptr;
#endif
};

}  // namespace sim
