// Small kernels with a fault each, and without it: what the simulator must catch and what it must let pass.

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <memory>

#include "kernels.h"
#include "ptx.h"

namespace py = pybind11;

namespace kernels {
namespace {

using namespace fastformer;

// What the threads write, in memory of its own, so that AddressSanitizer knows its end.
struct Output {
  explicit Output(int size) : size(size), data(new float[static_cast<size_t>(size)]) {
    std::fill(data.get(), data.get() + size, 0.0f);
  }
  std::vector<float> values() const { return std::vector<float>(data.get(), data.get() + size); }
  int size;
  std::unique_ptr<float[]> data;
};

void run(const char* name, int blocks, int threads, const std::function<void()>& thread, size_t shared_bytes = 0) {
  sim::launch(name, {unsigned(blocks), 1, 1}, {unsigned(threads), 1, 1}, shared_bytes, thread);
}

// Each thread reads what its neighbour has written.
std::vector<float> missing_sync(bool fault) {
  Output out(64);
  run("missing_sync", 1, 64, [&] {
    SHARED_ARRAY(float, box, 64);
    const int t = threadIdx.x;
    box[t] = float(t);
    if (!fault) __syncthreads();
    out.data[t] = box[(t + 1) % 64];
  });
  return out.values();
}

// The second round writes while others still read the first.
std::vector<float> missing_trailing_sync(bool fault) {
  Output out(64);
  run("missing_trailing_sync", 1, 64, [&] {
    SHARED_ARRAY(float, box, 64);
    const int t = threadIdx.x;
    for (int round = 0; round < 2; ++round) {
      box[t] = float(t);  // the same value: no order of the threads shows the fault
      __syncthreads();
      out.data[t] = box[(t + 32) % 64];
      if (!fault) __syncthreads();
    }
  });
  return out.values();
}

std::vector<float> missing_warp_sync(bool fault) {
  Output out(32);
  run("missing_warp_sync", 1, 32, [&] {
    SHARED_ARRAY(float, box, 32);
    const int t = threadIdx.x;
    box[t] = float(t);
    if (!fault) __syncwarp();
    out.data[t] = box[(t + 1) % 32];
  });
  return out.values();
}

// Blocks have no order.
std::vector<float> blocks_write_one_address(bool fault) {
  Output out(64);
  run("blocks_write_one_address", 2, 32, [&] { out.data[threadIdx.x + (fault ? 0 : blockIdx.x * 32)] = 1; });
  return out.values();
}

std::vector<float> atomics(bool fault) {
  Output out(1);
  run("atomics", 4, 64, [&] {
    if (fault)
      out.data[0] += 1;
    else
      atomicAdd(&out.data[0], 1.0f);
  });
  return out.values();
}

std::vector<float> missing_wait(bool fault) {
  Output out(32);
  std::vector<float> source(32, 7);
  run("missing_wait", 1, 32, [&] {
    SHARED_ARRAY(float, box, 32);
    const int t = threadIdx.x;
    ptx::cp_async<4>(&box[t], &source[t]);
    ptx::cp_async_commit();
    if (!fault) ptx::cp_async_wait<0>();
    __syncthreads();
    out.data[t] = box[(t + 1) % 32];
  });
  return out.values();
}

std::vector<float> wait_for_one_group_too_few(bool fault) {
  Output out(32);
  std::vector<float> source(64, 7);
  run("wait_for_one_group_too_few", 1, 32, [&] {
    SHARED_ARRAY(float, box, 64);
    const int t = threadIdx.x;
    for (int stage = 0; stage < 2; ++stage) {
      ptx::cp_async<4>(&box[stage * 32 + t], &source[stage * 32 + t]);
      ptx::cp_async_commit();
    }
    if (fault)
      ptx::cp_async_wait<1>();
    else
      ptx::cp_async_wait<0>();
    __syncthreads();
    out.data[t] = box[32 + t];
  });
  return out.values();
}

std::vector<float> shared_never_written(bool fault) {
  Output out(32);
  run("shared_never_written", 1, 32, [&] {
    SHARED_ARRAY(float, box, 32);
    if (!fault || threadIdx.x != 5) box[threadIdx.x] = 1;
    __syncthreads();
    out.data[threadIdx.x] = box[threadIdx.x];
  });
  return out.values();
}

std::vector<float> shared_index(bool fault) {
  Output out(32);
  run("shared_index", 1, 32, [&] {
    SHARED_ARRAY(float, box, 32);
    box[threadIdx.x + (fault ? 1 : 0)] = 1;
  });
  return out.values();
}

std::vector<float> shared_vector(bool fault) {
  Output out(32);
  run("shared_vector", 1, 32, [&] {
    DYNAMIC_SHARED(bytes);
    auto* vectors = reinterpret_cast<float4*>(bytes);
    store_shared(vectors + threadIdx.x + (fault ? 1 : 0), make_float4(1, 2, 3, 4));
  }, 32 * sizeof(float4));
  return out.values();
}

// Through a plain pointer: only AddressSanitizer sees it.
std::vector<float> shared_pointer(bool fault) {
  Output out(32);
  run("shared_pointer", 1, 32, [&] {
    DYNAMIC_SHARED(bytes);
    reinterpret_cast<float*>(bytes)[threadIdx.x + (fault ? 1 : 0)] = 1;
  }, 32 * sizeof(float));
  return out.values();
}

std::vector<float> global_pointer(bool fault) {
  Output out(32);
  run("global_pointer", 1, 32, [&] { out.data[threadIdx.x + (fault ? 1 : 0)] = 1; });
  return out.values();
}

std::vector<float> misaligned_vector(bool fault) {
  Output out(40);
  run("misaligned_vector", 1, 1, [&] {
    Vector<float, 2> pair = {};
    float* to = out.data.get() + (fault ? 1 : 2);
    store<true>(to, pair, 2);
  });
  return out.values();
}

std::vector<float> misaligned_copy(bool fault) {
  Output out(32);
  alignas(16) float source[32] = {};
  run("misaligned_copy", 1, 1, [&] {
    SHARED_ARRAY(float, box, 32);
    ptx::cp_async<16>(&box[0], source + (fault ? 1 : 4));
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
  });
  return out.values();
}

std::vector<float> divergent_shuffle(bool fault) {
  Output out(32);
  run("divergent_shuffle", 1, 32, [&] {
    float x = 1;
    if (!fault || threadIdx.x < 16) x += __shfl_xor_sync(~0u, x, 1);
    x += __shfl_xor_sync(~0u, x, 2);
    out.data[threadIdx.x] = x;
  });
  return out.values();
}

std::vector<float> shuffle_from_outside_the_mask(bool fault) {
  Output out(32);
  run("shuffle_from_outside_the_mask", 1, 32, [&] {
    float x = 1;
    if (threadIdx.x < 16) x = __shfl_sync(0xffffu, x, fault ? 16 : 15);
    out.data[threadIdx.x] = x;
  });
  return out.values();
}

std::vector<float> lane_not_in_its_mask(bool fault) {
  Output out(32);
  run("lane_not_in_its_mask", 1, 32, [&] {
    if (threadIdx.x < (fault ? 17 : 16)) __syncwarp(0xffffu);
  });
  return out.values();
}

std::vector<float> divergent_barrier(bool fault) {
  Output out(64);
  run("divergent_barrier", 1, 64, [&] {
    if (fault && threadIdx.x >= 32) {
      __syncthreads();
    } else {
      __syncthreads();
    }
    if (!fault) __syncthreads();
  });
  return out.values();
}

std::vector<float> return_before_barrier(bool fault) {
  Output out(64);
  run("return_before_barrier", 1, 64, [&] {
    if (fault && threadIdx.x == 40) return;
    __syncthreads();
  });
  return out.values();
}

std::vector<float> deadlock(bool fault) {
  Output out(64);
  run("deadlock", 1, 64, [&] {
    if (threadIdx.x < 32)
      ptx::barrier_sync(1, 64);
    else
      ptx::barrier_sync(fault ? 2 : 1, 64);
  });
  return out.values();
}

std::vector<float> endless_spin(bool fault) {
  Output out(64);
  int ready = 0;
  run("endless_spin", 1, 64, [&] {
    if (threadIdx.x == 63 && !fault) atomicExch(&ready, 1);
    while (atomicAdd(&ready, 0) == 0) __nanosleep(100);
  });
  return out.values();
}

std::vector<float> mma_of_half_a_warp(bool fault) {
  Output out(32);
  run("mma_of_half_a_warp", 1, fault ? 16 : 32, [&] {
    float d[4] = {};
    const uint32_t a[4] = {}, b[2] = {};
    ptx::mma_m16n8k16<f16>(d, a, b);
  });
  return out.values();
}

std::vector<float> too_many_threads(bool fault) {
  Output out(32);
  run("too_many_threads", 1, fault ? 1025 : 1024, [] {});
  return out.values();
}

std::vector<float> too_much_shared(bool fault) {
  Output out(32);
  run("too_much_shared", 1, 32, [] { DYNAMIC_SHARED(bytes); bytes[0] = 0; }, (fault ? 228 : 227) * 1024);
  return out.values();
}

// A 64 x 64 tile of 16 bits, read by ldmatrix.x4: all its 16 x 16 squares. Swizzled, chunk c of row r is at
// c ^ (r % 8).
void read_tile(bool swizzle) {
  run("read_tile", 1, 32, [&] {
    DYNAMIC_SHARED(bytes);
    const int lane = threadIdx.x;
    for (int chunk = lane; chunk < 64 * 8; chunk += 32) {
      const int row = chunk / 8, place = swizzle ? chunk % 8 ^ row % 8 : chunk % 8;
      store_shared(reinterpret_cast<uint4*>(bytes) + row * 8 + place, make_uint4(0, 0, 0, 0));
    }
    __syncthreads();
    for (int row = 0; row < 64; row += 16)
      for (int column = 0; column < 8; column += 2) {
        uint32_t registers[4];
        const int r = row + lane % 16, c = column + lane / 16;
        ptx::ldmatrix<4>(registers, bytes + r * 128 + (swizzle ? c ^ r % 8 : c) * 16);
      }
  }, 64 * 128);
}

// Lane l reads element l * stride of 4, 8 or 16 bytes.
template <class V> void read_strided(int stride) {
  run("read_strided", 1, 32, [&] {
    DYNAMIC_SHARED(bytes);
    auto* vectors = reinterpret_cast<V*>(bytes);
    load_shared(vectors + threadIdx.x * static_cast<unsigned>(stride));
  }, sizeof(V) * static_cast<size_t>(31 * stride + 1));
}

}  // namespace

void bind_faults(py::module_& m) {
  py::module_ faults = m.def_submodule("faults");
#define BIND(name) faults.def(#name, name)
  BIND(missing_sync);
  BIND(missing_trailing_sync);
  BIND(missing_warp_sync);
  BIND(blocks_write_one_address);
  BIND(atomics);
  BIND(missing_wait);
  BIND(wait_for_one_group_too_few);
  BIND(shared_never_written);
  BIND(shared_index);
  BIND(shared_vector);
  BIND(shared_pointer);
  BIND(global_pointer);
  BIND(misaligned_vector);
  BIND(misaligned_copy);
  BIND(divergent_shuffle);
  BIND(shuffle_from_outside_the_mask);
  BIND(lane_not_in_its_mask);
  BIND(divergent_barrier);
  BIND(return_before_barrier);
  BIND(deadlock);
  BIND(endless_spin);
  BIND(mma_of_half_a_warp);
  BIND(too_many_threads);
  BIND(too_much_shared);
#undef BIND
  m.def("read_tile", read_tile);
  m.def("read_strided", [](int bytes, int stride) {
    bytes == 4 ? read_strided<float>(stride) : bytes == 8 ? read_strided<float2>(stride) : read_strided<float4>(stride);
  });
}

}  // namespace kernels
