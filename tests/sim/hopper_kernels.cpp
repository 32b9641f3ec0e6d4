// The instructions of sm_90a, as arrays, and a small pipeline of them with a fault wherever one can be made.

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include "kernels.h"
#include "ptx_hopper.h"

namespace py = pybind11;

namespace kernels {
namespace {

using namespace fastformer;
template <class T> using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

TensorMap map_of(const Array<uint16_t>& matrix, uint32_t box_rows) {
  const auto rows = static_cast<uint64_t>(matrix.shape(0)), columns = static_cast<uint64_t>(matrix.shape(1));
  return sim::tensor_map(matrix.data(), {columns, rows}, {columns * 2}, {64, box_rows});
}

// Shared memory (before the wait, after it) where a box of 64 columns from (x, y) on has been copied to.
py::tuple tma_load(Array<uint16_t> matrix, int box_rows, int x, int y) {
  const TensorMap map = map_of(matrix, static_cast<uint32_t>(box_rows));
  const py::ssize_t bytes = box_rows * 128;
  Array<uint16_t> before({box_rows, 64}), after({box_rows, 64});
  sim::launch("tma_load", {1, 1, 1}, {32, 1, 1}, static_cast<size_t>(bytes) + 8, [&] {
    DYNAMIC_SHARED(shared);
    auto* barrier = reinterpret_cast<uint64_t*>(shared + bytes);
    if (threadIdx.x > 0) return;
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_proxy_async();
    ptx::mbarrier_arrive_expect_tx(barrier, static_cast<int>(bytes));
    ptx::tma_load(shared, &map, barrier, x, y);
    std::memcpy(before.mutable_data(), shared, static_cast<size_t>(bytes));
    ptx::mbarrier_wait(barrier, 0);
    std::memcpy(after.mutable_data(), shared, static_cast<size_t>(bytes));
  });
  return py::make_tuple(before, after);
}

// a (64, 64) and b (kN, 64), or their transposes, of 16 bits; c (128, kN / 2) is what d begins with, or is left out of
// it. Returns d (128, kN / 2).
template <class T, int kN, bool kADepth, bool kBDepth>
Array<float> wgmma(Array<uint16_t> a, Array<uint16_t> b, Array<float> c, bool accumulate) {
  Array<float> out({128, kN / 2});
  const TensorMap a_map = map_of(a, 64), b_map = map_of(b, kBDepth ? kN : 64);
  constexpr int kSquare = 64 * 128, kBytes = kSquare * (1 + kN / 64);
  sim::launch("wgmma", {1, 1, 1}, {128, 1, 1}, kBytes + 8, [&] {
    DYNAMIC_SHARED(shared);
    auto* barrier = reinterpret_cast<uint64_t*>(shared + kBytes);
    if (threadIdx.x == 0) {
      ptx::mbarrier_init(barrier, 1);
      ptx::fence_proxy_async();
      ptx::mbarrier_arrive_expect_tx(barrier, kBytes);
      ptx::tma_load(shared, &a_map, barrier, 0, 0);
      for (int i = 0; i < (kBDepth ? 1 : kN / 64); ++i)
        ptx::tma_load(shared + kSquare * (1 + i), &b_map, barrier, i * 64, 0);
    }
    __syncthreads();
    ptx::mbarrier_wait(barrier, 0);
    float d[kN / 8][4];
    std::copy_n(c.data(threadIdx.x, 0), kN / 2, d[0]);
    const uint64_t a0 = ptx::wgmma_tile(shared), b0 = ptx::wgmma_tile(shared + kSquare, kBDepth ? 0 : kSquare);
    ptx::wgmma_fence(d);
    for (int k = 0; k < 4; ++k)
      ptx::wgmma<T, kN, kADepth, kBDepth>(d, a0 + k * ptx::kNextDepth<kADepth>, b0 + k * ptx::kNextDepth<kBDepth>,
                                          accumulate || k > 0);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>(d);
    std::copy_n(d[0], kN / 2, out.mutable_data(threadIdx.x, 0));
  });
  return out;
}

template <class T, int kN> void bind_wgmma(py::module_& m, const char* name) {
  m.def(name, [](Array<uint16_t> a, Array<uint16_t> b, bool a_depth, bool b_depth, Array<float> c, bool accumulate) {
    if (a_depth) return b_depth ? wgmma<T, kN, true, true>(a, b, c, accumulate)
                                : wgmma<T, kN, true, false>(a, b, c, accumulate);
    return b_depth ? wgmma<T, kN, false, true>(a, b, c, accumulate) : wgmma<T, kN, false, false>(a, b, c, accumulate);
  });
}

// A producer and a warpgroup that multiplies, five rounds through two stages, which is a matrix of ones of depth 320: d
// is 320 everywhere. `fault` says what is done wrong.
Array<float> pipeline(const std::string& fault) {
  constexpr int kRounds = 5, kStages = 2, kBytes = 3 * 64 * 128;
  const auto is = [&](const char* name) { return fault == name; };
  Array<uint16_t> ones({192, 64 * kRounds});
  std::fill_n(ones.mutable_data(), ones.size(), uint16_t(0x3c00));
  const TensorMap map = map_of(ones, 192);
  Array<float> out({128, 64});
  sim::launch("pipeline", {1, 1, 1}, {160, 1, 1}, kStages * kBytes + 64, [&] {
    DYNAMIC_SHARED(shared);
    auto* full = reinterpret_cast<uint64_t*>(shared + kStages * kBytes);
    uint64_t* empty = full + kStages;
    if (threadIdx.x == 0 && !is("no initialisation")) {
      for (int stage = 0; stage < kStages; ++stage) {
        ptx::mbarrier_init(full + stage, 1);
        ptx::mbarrier_init(empty + stage, is("an arrival less") ? 3 : 4);
      }
      if (!is("no fence of the initialisation")) ptx::fence_proxy_async();
    }
    if (!is("no barrier after the initialisation")) __syncthreads();
    if (threadIdx.x >= 128) {
      if (threadIdx.x > 128) return;
      for (int round = 0; round < kRounds; ++round) {
        const int stage = round % kStages, times = round / kStages;
        if (!is("no wait for an empty stage"))
          ptx::mbarrier_wait(empty + stage, (times + (is("wrong parity of an empty stage") ? 0 : 1)) % 2);
        ptx::mbarrier_arrive_expect_tx(full + stage, is("too few bytes expected")    ? kBytes / 2
                                                     : is("too many bytes expected") ? kBytes + 128
                                                                                     : kBytes);
        ptx::tma_load(shared + (is("one stage for both") ? 0 : stage * kBytes), &map, full + stage, round * 64, 0);
      }
      return;
    }
    float d[16][4] = {};
    const int rounds = is("a stage is left unread") ? kRounds - 1 : kRounds;
    for (int round = 0; round < rounds; ++round) {
      const int stage = round % kStages, times = round / kStages;
      if (!is("no wait for a full stage"))
        ptx::mbarrier_wait(full + stage, (times + (is("wrong parity of a full stage") ? 1 : 0)) % 2);
      if (!is("no fence of the registers")) ptx::wgmma_fence(d);
      uint64_t a = ptx::wgmma_tile(shared + stage * kBytes), b = ptx::wgmma_tile(shared + stage * kBytes + 64 * 128);
      if (is("a warp multiplies another tile") && threadIdx.x / 32 == 3) b -= 2;
      if (is("a lane gives another tile") && threadIdx.x == 3) b -= 2;
      if (is("a tile behind the end") && round == 1) b += 64 * 1024 / 16;
      for (int k = 0; k < 4; ++k)
        ptx::wgmma<f16, 128, true, true>(d, a + k * ptx::kNextDepth<true>, b + k * ptx::kNextDepth<true>, true);
      if (!is("no commit")) ptx::wgmma_commit();
      const float early = d[0][0];
      if (!is("no wait before a stage is given back")) ptx::wgmma_wait<0>(d);
      if (is("d is read before the wait")) d[0][0] = early;
      if (is("a store where it is multiplied")) {
        ptx::wgmma_fence(d);
        ptx::wgmma<f16, 128, true, true>(d, a, b, true);
        ptx::wgmma_commit();
        if (threadIdx.x == 0) store_shared(reinterpret_cast<float*>(shared + stage * kBytes), 0.0f);
        ptx::wgmma_wait<0>(d);
      }
      if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(empty + stage);
      if (is("an arrival more") && threadIdx.x == 0) ptx::mbarrier_arrive(empty + stage);
    }
    if (is("no wait before a stage is given back")) ptx::wgmma_wait<0>(d);
    std::copy_n(d[0], 64, out.mutable_data(threadIdx.x, 0));
  });
  return out;
}

}  // namespace

void bind_hopper(py::module_& m) {
  m.def("tma_load", tma_load);
  bind_wgmma<f16, 128>(m, "wgmma_f16_128");
  bind_wgmma<f16, 256>(m, "wgmma_f16_256");
  bind_wgmma<bf16, 128>(m, "wgmma_bf16_128");
  bind_wgmma<bf16, 256>(m, "wgmma_bf16_256");
  m.def("pipeline", pipeline);
  m.def("tensor_map", [](Array<uint16_t> data, int offset, std::vector<uint64_t> sizes, uint64_t stride, uint32_t box) {
    sim::tensor_map(data.data() + offset, {sizes.at(0), sizes.at(1)}, {stride}, {box, 8});
  });
}

}  // namespace kernels
