// The register tile that every matrix product is made of.
#pragma once

#include "vec.h"

namespace fastformer::FASTFORMER_ISA {

// A tile has kTileRows x (kTileVecs vectors) accumulators: 24 of 32 registers with AVX-512, 12 of 16 elsewhere.
constexpr int kTileRows = 6;
constexpr int kTileVecs = kVecBytes == 64 ? 4 : 2;
template <class S> constexpr int kTileColumns = kTileVecs * kLanes<S>;

// c = a b, or c += a b, for a tile of ROWS x (VECS vectors): a (ROWS, depth), or (depth, ROWS) if TRANSPOSED, with
// rows `lda` apart, b (depth, columns) with rows `ldb` apart, c with rows `ldc` apart. The product is summed before it
// is added to c: a long sum is made of short ones, which keeps its rounding error small. Every step of the depth brings
// LINES cache lines of `next`, `next_step` bytes on, into L2: spread like this the prefetches cost nothing, in a burst
// they stall the loads. b may hold 16 bits, B.
template <class S, int ROWS, int VECS, bool ACCUMULATE, int LINES = 0, bool TRANSPOSED = false, class B = S>
FF_INLINE void tile_product(int64_t depth, const S* a, int64_t lda, const B* b, int64_t ldb, S* c, int64_t ldc,
                            const char* next = nullptr, int64_t next_step = 0) {
  Vec<S> acc[ROWS][VECS];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < VECS; ++j) acc[i][j] = zero<S>();
  for (int64_t k = 0; k < depth; ++k) {
#pragma GCC unroll 4
    for (int line = 0; line < LINES; ++line) __builtin_prefetch(next + k * next_step + 64 * line, 0, 2);
    Vec<S> bk[VECS];
#pragma GCC unroll 4
    for (int j = 0; j < VECS; ++j) bk[j] = load(b + k * ldb + j * kLanes<S>);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      const Vec<S> aik = splat<S>(TRANSPOSED ? a[k * lda + i] : a[i * lda + k]);
#pragma GCC unroll 4
      for (int j = 0; j < VECS; ++j) acc[i][j] += aik * bk[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < VECS; ++j) {
      S* out = c + i * ldc + j * kLanes<S>;
      store(out, ACCUMULATE ? load(out) + acc[i][j] : acc[i][j]);
    }
}

}  // namespace fastformer::FASTFORMER_ISA
