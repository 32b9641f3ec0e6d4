// Dropout masks by Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
// Layout and test vectors: fastformer/reference.py.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace fastformer::FASTFORMER_ISA {

// The products of the lower halves of each 64 bits.
FF_INLINE Vec<uint64_t> multiply_lower(Vec<uint64_t> a, uint32_t b) {
#if defined(__AVX512F__)
  return (Vec<uint64_t>)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
  return (Vec<uint64_t>)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#else
  return (a & 0xffffffffu) * uint64_t(b);
#endif
}

// The upper and the lower 32 bits of the products.
FF_INLINE void multiply(Vec<uint32_t> a, uint32_t b, Vec<uint32_t>& high, Vec<uint32_t>& low) {
  const Vec<uint64_t> even = multiply_lower(bit_cast<Vec<uint64_t>>(a), b);
  const Vec<uint64_t> odd = multiply_lower(bit_cast<Vec<uint64_t>>(a) >> 32, b);
  high = bit_cast<Vec<uint32_t>>((even >> 32) | (odd & 0xffffffff00000000u));
  low = bit_cast<Vec<uint32_t>>((even & 0xffffffffu) | (odd << 32));
}

// Random bits of 64 consecutive columns (block = column / 64) at counter words c1, c2, c3: bits[column % 64].
FF_INLINE void philox_block(uint64_t seed, uint32_t block, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t bits[64]) {
  constexpr int kLanes32 = kLanes<float>;
  for (int lane = 0; lane < 16; lane += kLanes32) {
    Vec<uint32_t> x0 = bit_cast<Vec<uint32_t>>(lane_numbers<float>()) + (block * 16 + uint32_t(lane));
    Vec<uint32_t> x1 = Vec<uint32_t>{} + c1, x2 = Vec<uint32_t>{} + c2, x3 = Vec<uint32_t>{} + c3;
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      Vec<uint32_t> hi0, lo0, hi1, lo1;
      multiply(x0, 0xD2511F53u, hi0, lo0);
      multiply(x2, 0xCD9E8D57u, hi1, lo1);
      x0 = hi1 ^ x1 ^ k0;
      x1 = lo1;
      x2 = hi0 ^ x3 ^ k1;
      x3 = lo0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    memcpy(bits + lane, &x0, sizeof(x0));
    memcpy(bits + 16 + lane, &x1, sizeof(x1));
    memcpy(bits + 32 + lane, &x2, sizeof(x2));
    memcpy(bits + 48 + lane, &x3, sizeof(x3));
  }
}

// The 64 random words that hold those of columns [column, column + 64) of one row, kept between calls.
struct RowDropout {
  Dropout dropout;
  uint32_t c1 = 0, c2 = 0, c3 = 0;
  uint32_t block = ~0u;
  uint32_t bits[64];

  RowDropout(Dropout d, uint64_t row) : dropout(d), c1(uint32_t(row)), c2(uint32_t(row >> 32)) {}
  RowDropout(Dropout d, uint32_t batch, uint32_t head, uint32_t query) : dropout(d), c1(query), c2(head), c3(batch) {}

  // dropout(x) for the vector whose first lane is `column`, a multiple of the number of lanes.
  template <class S> FF_INLINE Vec<S> apply(Vec<S> x, int64_t column) {
    if (uint32_t(column / 64) != block) {
      block = uint32_t(column / 64);
      philox_block(dropout.seed, block, c1, c2, c3, bits);
    }
    typedef uint32_t Words __attribute__((vector_size(4 * kLanes<S>)));
    Words words;
    memcpy(&words, bits + column % 64, sizeof(words));
    const IntVec<S> keep = __builtin_convertvector(words >= dropout.threshold, IntVec<S>);
    return keep ? x * S(dropout.scale) : Vec<S>{};
  }
};

}  // namespace fastformer::FASTFORMER_ISA
