// One kernel of one warp around each instruction: what every lane gives and gets, as arrays.

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include "kernels.h"
#include "philox.h"
#include "ptx.h"

namespace py = pybind11;

namespace kernels {
namespace {

using namespace fastformer;
template <class T> using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

void one_warp(const char* name, const std::function<void()>& thread, size_t shared_bytes = 0) {
  sim::launch(name, {1, 1, 1}, {32, 1, 1}, shared_bytes, thread);
}

// tile: shared memory of 16-bit elements; row[lane]: where the lane's row begins in it.
template <int kCount, bool kTranspose> Array<uint32_t> ldmatrix(Array<uint16_t> tile, Array<int64_t> row) {
  Array<uint32_t> out({32, kCount});
  const auto from = tile.unchecked<1>();
  const auto rows = row.unchecked<1>();
  auto to = out.mutable_unchecked<2>();
  one_warp("ldmatrix", [&] {
    DYNAMIC_SHARED(shared);
    auto* elements = reinterpret_cast<uint16_t*>(shared);
    for (py::ssize_t i = threadIdx.x; i < from.shape(0); i += 32) elements[i] = from(i);
    __syncwarp();
    uint32_t registers[kCount];
    ptx::ldmatrix<kCount, kTranspose>(registers, elements + rows(threadIdx.x));
    for (int m = 0; m < kCount; ++m) to(threadIdx.x, m) = registers[m];
  }, static_cast<size_t>(2 * tile.size()));
  return out;
}

// a: (32, 4), b: (32, 2) registers, c: (32, 4); returns d.
template <class Mma> Array<float> mma(Array<uint32_t> a, Array<uint32_t> b, Array<float> c, Mma multiply) {
  Array<float> out({32, 4});
  const auto as = a.unchecked<2>(), bs = b.unchecked<2>();
  const auto cs = c.unchecked<2>();
  auto ds = out.mutable_unchecked<2>();
  one_warp("mma", [&] {
    const auto lane = threadIdx.x;
    uint32_t ra[4], rb[2];
    float d[4];
    for (int i = 0; i < 4; ++i) ra[i] = as(lane, i), d[i] = cs(lane, i);
    for (int i = 0; i < 2; ++i) rb[i] = bs(lane, i);
    multiply(d, ra, rb);
    for (int i = 0; i < 4; ++i) ds(lane, i) = d[i];
  });
  return out;
}

// out[lane] of f(value[lane], argument) with all lanes there.
template <class F> auto each_lane(F f) {
  return [f](Array<int32_t> values, int argument, int width) {
    Array<int32_t> out(32);
    const auto from = values.unchecked<1>();
    auto to = out.mutable_unchecked<1>();
    one_warp("lanes", [&] { to(threadIdx.x) = static_cast<int32_t>(f(from(threadIdx.x), argument, width)); });
    return out;
  };
}

template <class From, class To, class F> auto each_element(F f) {
  return [f](Array<From> values) {
    Array<To> out(values.size());
    for (py::ssize_t i = 0; i < values.size(); ++i) out.mutable_at(i) = f(values.at(i));
    return out;
  };
}

// Copies kBytes for each lane, `valid` of them; returns shared memory as bytes (before the wait, after it).
template <int kBytes> py::tuple cp_async(Array<uint8_t> source, int valid) {
  Array<uint8_t> before(32 * kBytes), after(32 * kBytes);
  const uint8_t* from = source.data();
  uint8_t *first = before.mutable_data(), *second = after.mutable_data();
  one_warp("cp_async", [&] {
    DYNAMIC_SHARED(shared);
    uint8_t* own = shared + threadIdx.x * kBytes;
    ptx::cp_async<kBytes>(own, from + threadIdx.x * kBytes, valid);
    ptx::cp_async_commit();
    for (int i = 0; i < kBytes; ++i) first[threadIdx.x * kBytes + i] = own[i];
    ptx::cp_async_wait<0>();
    for (int i = 0; i < kBytes; ++i) second[threadIdx.x * kBytes + i] = own[i];
  }, 32 * kBytes);
  return py::make_tuple(before, after);
}

// Three groups of one copy each: how many have arrived when all but `left` are waited for.
template <int kLeft> int copies_after_wait() {
  alignas(4) const uint32_t source[3] = {1, 1, 1};
  int arrived = 0;
  one_warp("cp_async groups", [&] {
    DYNAMIC_SHARED(shared);
    auto* words = reinterpret_cast<uint32_t*>(shared);
    if (threadIdx.x > 0) return;
    for (int i = 0; i < 3; ++i) {
      ptx::cp_async<4>(words + i, source + i);
      ptx::cp_async_commit();
    }
    ptx::cp_async_wait<kLeft>();
    for (int i = 0; i < 3; ++i) arrived += words[i] == 1;
  }, 12);
  return arrived;
}

// Producers and consumers on two named barriers: the sum of what came through.
int named_barriers(int rounds) {
  int total = 0;
  sim::launch("named barriers", {1, 1, 1}, {64, 1, 1}, 0, [&] {
    SHARED_ARRAY(int, box, 32);
    const int lane = threadIdx.x % 32;
    for (int round = 0; round < rounds; ++round) {
      if (threadIdx.x < 32) {
        if (round > 0) ptx::barrier_sync(2, 64);  // it is empty
        box[lane] = round * 32 + lane;
        ptx::barrier_arrive(1, 64);
      } else {
        ptx::barrier_sync(1, 64);  // it is full
        total += box[lane];
        if (round + 1 < rounds) ptx::barrier_arrive(2, 64);
      }
    }
  });
  return total;
}

// The order in which threads and blocks come to the end.
std::vector<int> order_of_threads(int blocks, int threads) {
  std::vector<int> order;
  sim::launch("order", {unsigned(blocks), 1, 1}, {unsigned(threads), 1, 1}, 0, [&] {
    __syncthreads();
    order.push_back(static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x));
  });
  return order;
}

// Every block adds what its threads have; the last one to come reads the sum.
int64_t last_block_sums(int blocks, int threads) {
  int64_t sum = 0, result = 0;
  unsigned done = 0;
  sim::launch("last block", {unsigned(blocks), 1, 1}, {unsigned(threads), 1, 1}, 0, [&] {
    SHARED_ARRAY(int, last, 1);
    atomicAdd(&sum, int64_t(blockIdx.x * blockDim.x + threadIdx.x));
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last[0] = atomicInc(&done, gridDim.x - 1) == gridDim.x - 1;
    __syncthreads();
    if (last[0] && threadIdx.x == 0) result = sum;
  });
  return result;
}

// Each thread's indices, in the order of the threads: (block, thread, x y z of both).
Array<uint32_t> indices(std::array<unsigned, 3> grid, std::array<unsigned, 3> block) {
  const py::ssize_t n = py::ssize_t(block[0]) * block[1] * block[2], blocks = py::ssize_t(grid[0]) * grid[1] * grid[2];
  Array<uint32_t> out({blocks, n, py::ssize_t(6)});
  auto to = out.mutable_unchecked<3>();
  sim::launch("indices", {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, 0, [&] {
    const auto b = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    const auto t = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    const unsigned own[] = {blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z};
    for (int i = 0; i < 6; ++i) to(b, t, i) = own[i];
  });
  return out;
}

}  // namespace

void bind_instructions(py::module_& m) {
  m.def("ldmatrix", [](int count, bool transpose, Array<uint16_t> tile, Array<int64_t> row) {
    switch (count) {
      case 1: return transpose ? ldmatrix<1, true>(tile, row) : ldmatrix<1, false>(tile, row);
      case 2: return transpose ? ldmatrix<2, true>(tile, row) : ldmatrix<2, false>(tile, row);
      default: return transpose ? ldmatrix<4, true>(tile, row) : ldmatrix<4, false>(tile, row);
    }
  });
  m.def("mma_f16", [](Array<uint32_t> a, Array<uint32_t> b, Array<float> c) {
    return mma(a, b, c, [](auto& d, auto& ra, auto& rb) { ptx::mma_m16n8k16<f16>(d, ra, rb); });
  });
  m.def("mma_bf16", [](Array<uint32_t> a, Array<uint32_t> b, Array<float> c) {
    return mma(a, b, c, [](auto& d, auto& ra, auto& rb) { ptx::mma_m16n8k16<bf16>(d, ra, rb); });
  });
  m.def("mma_tf32", [](Array<uint32_t> a, Array<uint32_t> b, Array<float> c) {
    return mma(a, b, c, [](auto& d, auto& ra, auto& rb) { ptx::mma_m16n8k8_tf32(d, ra, rb); });
  });
  m.def("to_tf32", each_element<float, uint32_t>([](float x) { return ptx::to_tf32(x); }));
  m.def("to_f16", each_element<float, uint16_t>([](float x) { return __half_as_ushort(__float2half_rn(x)); }));
  m.def("from_f16", each_element<uint16_t, float>([](uint16_t x) { return __half2float(__ushort_as_half(x)); }));
  m.def("to_bf16", each_element<float, uint16_t>([](float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }));
  m.def("from_bf16",
        each_element<uint16_t, float>([](uint16_t x) { return __bfloat162float(__ushort_as_bfloat16(x)); }));
  m.def("exp2_approx", each_element<float, float>([](float x) { return ptx::exp2_approx(x); }));
  m.def("tanh_approx", each_element<float, float>([](float x) { return ptx::tanh_approx(x); }));
  m.def("reciprocal_approx", each_element<float, float>([](float x) { return ptx::reciprocal_approx(x); }));
  m.def("philox", [](int64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
    uint32_t words[4];
    philox(words, static_cast<uint64_t>(seed), c0, c1, c2, c3);
    return std::vector<uint32_t>(words, words + 4);
  });

  m.def("shfl", each_lane([](int v, int lane, int width) { return __shfl_sync(~0u, v, lane, width); }));
  m.def("shfl_up", each_lane([](int v, int n, int width) { return __shfl_up_sync(~0u, v, unsigned(n), width); }));
  m.def("shfl_down", each_lane([](int v, int n, int width) { return __shfl_down_sync(~0u, v, unsigned(n), width); }));
  m.def("shfl_xor", each_lane([](int v, int n, int width) { return __shfl_xor_sync(~0u, v, n, width); }));
  m.def("ballot", each_lane([](int v, int, int) { return __ballot_sync(~0u, v); }));
  m.def("any", each_lane([](int v, int, int) { return __any_sync(~0u, v); }));
  m.def("all", each_lane([](int v, int, int) { return __all_sync(~0u, v); }));
  m.def("match_any", each_lane([](int v, int, int) { return __match_any_sync(~0u, v); }));
  m.def("reduce_add", each_lane([](int v, int, int) { return __reduce_add_sync(~0u, v); }));
  m.def("reduce_min", each_lane([](int v, int, int) { return __reduce_min_sync(~0u, v); }));
  m.def("reduce_max", each_lane([](int v, int, int) { return __reduce_max_sync(~0u, v); }));
  m.def("reduce_xor", each_lane([](int v, int, int) { return __reduce_xor_sync(~0u, v); }));
  m.def("syncthreads_count", each_lane([](int v, int, int) { return __syncthreads_count(v); }));
  m.def("syncthreads_or", each_lane([](int v, int, int) { return __syncthreads_or(v); }));
  m.def("syncthreads_and", each_lane([](int v, int, int) { return __syncthreads_and(v); }));
  // Each half of the warp on its own, the odd ones first through a shuffle of their own.
  m.def("partial_masks", each_lane([](int v, int, int) {
    const bool upper = sim::self->lane() >= 16;
    const unsigned mask = upper ? 0xffff0000u : 0x0000ffffu;
    if (upper) v = __shfl_xor_sync(mask, v, 1);
    return __reduce_add_sync(mask, v);
  }));

  m.def("byte_perm", [](uint32_t x, uint32_t y, uint32_t s) { return __byte_perm(x, y, s); });
  m.def("brev", [](uint32_t x) { return __brev(x); });
  m.def("umulhi", [](uint32_t x, uint32_t y) { return __umulhi(x, y); });

  m.def("cp_async_4", cp_async<4>);
  m.def("cp_async_8", cp_async<8>);
  m.def("cp_async_16", cp_async<16>);
  m.def("copies_after_wait", [] {
    return std::vector{copies_after_wait<0>(), copies_after_wait<1>(), copies_after_wait<2>(), copies_after_wait<3>()};
  });
  m.def("named_barriers", named_barriers);
  m.def("order_of_threads", order_of_threads);
  m.def("last_block_sums", last_block_sums);
  m.def("indices", indices);
}

}  // namespace kernels
