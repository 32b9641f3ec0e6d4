// A GPU in one thread: runs the kernels of csrc/cuda on the CPU, block after block, each CUDA thread on its own fiber.
// docs/sim.md tells what is checked. Kernels see this through cuda_runtime.h and csrc/cuda/{device,ptx,launch}.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <string>
#include <vector>

namespace sim {

using Where = std::source_location;

struct Index3 {
  unsigned x = 1, y = 1, z = 1;
};

// What a CUDA thread knows of itself.
struct Self {
  Index3 thread_index, block_index, block_dim, grid_dim;
  int index = 0;  // in the block, x fastest
  int lane() const { return index % 32; }
  int warp() const { return index / 32; }
};
extern Self* self;

enum class Order { forward, reverse, random };  // which of the threads (or blocks) that can run does

struct Options {
  Order threads = Order::forward;
  Order blocks = Order::forward;
  uint64_t seed = 0;
  bool lazy_copies = false;      // cp.async, TMA, wgmma: the destination is NaN until it is waited for
  bool hopper = false;           // the device's compute capability is 9.0, else 8.0
  bool count_conflicts = false;  // of load_shared and store_shared; those of ldmatrix are always counted
};
Options& options();  // at first from FASTFORMER_SIM, e.g. "reverse,lazy" or "random=7,lazy"

// What one launch did.
struct Launch {
  std::string kernel;
  Index3 grid, block;
  int64_t shared_bytes = 0;        // of a block, static and dynamic
  int64_t mma = 0;                 // warp instructions
  int64_t ldmatrix = 0;            // warp instructions
  int64_t wgmma = 0;               // warpgroup instructions
  int64_t copied_bytes = 0;        // by cp.async and TMA, without the zeros that they fill in
  int64_t shared_wavefronts = 0;   // of ldmatrix and, where asked for, load_shared and store_shared
  int64_t bank_conflicts = 0;      // wavefronts beyond the least
};
std::vector<Launch>& launches();  // since the program started or a test cleared them

// Runs `thread` for each thread of the grid. Throws std::runtime_error that names kernel, block, thread and what is
// wrong.
void launch(const std::string& kernel, Index3 grid, Index3 block, size_t dynamic_shared,
            const std::function<void()>& thread);

// Ends the launch with an error.
[[noreturn]] void fault(const std::string& what, Where where);

// __syncthreads and named barriers: id 0 to 15, `count` threads. Returns how many came with a predicate that is true.
int barrier(int id, int count, bool predicate, const char* name, Where where);
void barrier_arrive(int id, int count, Where where);

// Waits until every thread of the warp's mask has come here; the last one runs exchange(payloads of the 32 lanes, who).
using Exchange = void (*)(void* const* payload, unsigned lanes, Where where);
void collective(const char* name, unsigned mask, void* payload, Exchange exchange, Where where);
constexpr unsigned kWholeWarp = ~0u;

uint64_t shuffle(const char* name, unsigned mask, uint64_t value, int source_lane, Where where);
void sync_warp(unsigned mask, Where where);
unsigned ballot(const char* name, unsigned mask, bool predicate, Where where);
unsigned match_any(unsigned mask, uint64_t value, Where where);
enum class Reduction { add, min, max, bit_and, bit_or, bit_xor };
uint32_t reduce(const char* name, unsigned mask, uint32_t value, Reduction reduction, bool is_signed, Where where);
unsigned active_mask();
void yield();  // of a thread that spins

// Shared memory: poisoned with NaN when a block starts.
void* shared_array(const void* tag, size_t bytes, size_t alignment, const char* name);
unsigned char* dynamic_shared();
void check_shared(const void* pointer, size_t bytes, size_t alignment, const char* what, Where where,
                  bool writes = false);
void note_shared_access(const void* pointer, size_t bytes, Where where);

// The rows of ldmatrix: the addresses that lanes 0 to 8 * count - 1 gave, for every lane.
struct MatrixRows {
  const void* row;
  int count;
  const void* rows[32];
};
void exchange_rows(MatrixRows& rows, Where where);

// d += a b. The arrays are this lane's fragments.
enum class Operand { f16, bf16, tf32 };
void mma_m16n8(Operand type, float* d, const uint32_t* a, const uint32_t* b, Where where);

// cp.async
struct Copy {
  void* destination;
  const void* source;
  int bytes, source_bytes;  // the rest is zero
};
void copy_start(const Copy& copy, Where where);  // checks, and notes it
void copy_commit();
std::vector<Copy> copy_wait(int groups_left);  // those that have to be made now: none unless lazy

inline void copy_make(const Copy& copy) {  // here, so that sanitizers see the thread that copies
  char* to = static_cast<char*>(copy.destination);
  const char* from = static_cast<const char*>(copy.source);
  for (int i = 0; i < copy.bytes; ++i) to[i] = i < copy.source_bytes ? from[i] : 0;
}
inline void copy_poison(const Copy& copy) {
  char* to = static_cast<char*>(copy.destination);
  for (int i = 0; i < copy.bytes; ++i) to[i] = static_cast<char>(0xff);
}

// A pointer into a shared array that knows its ends.
template <class T> class Shared {
 public:
  Shared(T* data, int64_t size, const char* name) : data_(data), begin_(0), end_(size), name_(name) {}
  T& operator[](int64_t i) const { return at(i); }
  T& operator*() const { return at(0); }
  Shared operator+(int64_t n) const { return Shared(data_ + n, begin_ - n, end_ - n, name_); }
  operator T*() const { return data_; }

 private:
  Shared(T* data, int64_t begin, int64_t end, const char* name) : data_(data), begin_(begin), end_(end), name_(name) {}
  T& at(int64_t i) const {
    if (i < begin_ || i >= end_)
      fault("index " + std::to_string(i - begin_) + " of the shared array " + name_ + "[" +
                std::to_string(end_ - begin_) + "]", {});
    return data_[i];
  }
  T* data_;
  int64_t begin_, end_;
  const char* name_;
};

}  // namespace sim
