// Dropout masks by Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
// Layout and test vectors: fastformer/reference.py.
#pragma once

#include "device.h"

namespace fastformer {

struct Dropout {
  const int64_t* seed = nullptr;  // in device memory: nobody waits for it on the host
  uint32_t threshold = 0;         // random words below it drop the element; 0: no dropout
  float scale = 1;                // of what is kept
};

// Four words of random bits. Those of columns c, c + 16, c + 32, c + 48 where c0 = c / 64 * 16 + c % 16, c % 64 < 16.
__device__ __forceinline__ void philox(uint32_t (&words)[4], uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2,
                                       uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = __umulhi(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
    const uint32_t high1 = __umulhi(c2, 0xCD9E8D57u), low1 = c2 * 0xCD9E8D57u;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

}  // namespace fastformer
