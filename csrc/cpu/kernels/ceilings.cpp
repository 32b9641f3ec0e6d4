// The loops behind `fastformer bench`'s percentages: no kernel can be faster than these.
#include "vec.h"
#include "ceilings.h"

namespace fastformer::FASTFORMER_ISA {

constexpr int kChains = 12;  // sums that don't wait for each other: more than a unit's latency times the units

int64_t multiply_adds(int64_t rounds) {
  Vec<float> sum[kChains];
  for (int i = 0; i < kChains; ++i) sum[i] = splat(float(i + 3));  // they go to 2
  const Vec<float> factor = splat(0.5f), term = splat(1.0f);
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) sum[i] = sum[i] * factor + term;
  }
  for (int i = 0; i < kChains; ++i) asm volatile("" : : "m"(sum[i]));
  return rounds * kChains * kLanes<float> * 2;
}

int32_t read(const void* memory, int64_t bytes, int64_t times) {
  constexpr int kSums = 8;
  Vec<int32_t> sum[kSums] = {};
  for (int64_t t = 0; t < times; ++t) {
    for (int64_t at = 0; at < bytes; at += kSums * kVecBytes) {
#pragma GCC unroll 8
      for (int i = 0; i < kSums; ++i) {
        Vec<int32_t> x;
        memcpy(&x, (const char*)memory + at + i * kVecBytes, sizeof(x));
        sum[i] += x;
      }
    }
    asm volatile("" : : : "memory");  // the next time is read again
  }
  for (int i = 1; i < kSums; ++i) sum[0] += sum[i];
  return sum[0][0];
}

#if defined(__AVX512F__)

int64_t multiply_adds_vnni(int64_t rounds) {
  Vec<int32_t> sum[kChains] = {}, a = Vec<int32_t>{} + 0x01010101, b = a;
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) asm volatile("vpdpbusd %2, %1, %0" : "+v"(sum[i]) : "v"(a), "v"(b));
  }
  return rounds * kChains * 64 * 2;
}

__attribute__((target("amx-tile"))) int64_t multiply_adds_amx(int64_t rounds) {
  struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  _tile_loadconfig(&config);  // all tiles 0
  for (int64_t r = 0; r < rounds; ++r) {
    asm volatile("tdpbusd %tmm6, %tmm4, %tmm0");
    asm volatile("tdpbusd %tmm7, %tmm4, %tmm1");
    asm volatile("tdpbusd %tmm6, %tmm5, %tmm2");
    asm volatile("tdpbusd %tmm7, %tmm5, %tmm3");
  }
  _tile_release();
  return rounds * 4 * 16 * 16 * 64 * 2;
}

#endif

}  // namespace fastformer::FASTFORMER_ISA
