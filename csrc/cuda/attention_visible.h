// Who sees whom in attention: the band, the mask, dropout.
#pragma once

#include "attention_tiles.h"

namespace fastformer::attention {

struct Band {
  int lowest, highest;  // visible diagonals, at most kFar from 0
  __device__ __forceinline__ bool sees(int query, int key) const {
    return key - query >= lowest && key - query <= highest;
  }
};
__device__ __forceinline__ Band band_of(const Args& args, int queries, int keys) {
  const int offset = keys - queries;
  return {max(offset - args.window_left, -kFar), min(offset + args.window_right, args.causal_right)};
}

// Which columns some rows see: all are in begin .. end - 1; those from whole_begin to whole_end - 1 are seen by all.
struct Columns {
  int begin, end, whole_begin, whole_end;
  __device__ __forceinline__ bool whole(int first, int count) const {
    return first >= whole_begin && first + count <= whole_end;
  }
};
// Rows first .. last, columns begin .. end - 1; rows are queries and columns keys, or with (-highest, -lowest) for the
// band the other way round. `begin` is cut down to whole tiles.
__device__ __forceinline__ Columns visible_columns(int first, int last, Band band, int begin, int end, int tile) {
  Columns columns;
  columns.whole_begin = max(begin, last + band.lowest);
  columns.whole_end = min(end, first + band.highest + 1);
  columns.begin = max(begin, first + band.lowest) / tile * tile;
  columns.end = min(end, last + band.highest + 1);
  return columns;
}

__device__ __forceinline__ bool mask_shows(const Mask& mask, int64_t at) {
  if (mask.is_bool) return static_cast<const uint8_t*>(mask.data)[at] != 0;
  return static_cast<const float*>(mask.data)[at] != -INFINITY;
}
// To be added to a score of unit kUnit<T>. The lowest finite number hides less than -inf: it must not become -inf.
template <class T> __device__ __forceinline__ float mask_value(const Mask& mask, int64_t at) {
  const float value = static_cast<const float*>(mask.data)[at] * kUnit<T>;
  return value == -INFINITY ? -3.4028234663852886e38f : value;
}
__device__ __forceinline__ int64_t mask_offset(const Mask& mask, int sequence, int head, int query) {
  return sequence * mask.stride_sequence + head * mask.stride_head + query * mask.stride_row;
}

// First and last + 1 of the keys begin .. end - 1 that a mask shows to all queries, and whether it does nothing in
// between. Each warp looks for itself.
struct MaskedKeys {
  int begin, end;
  bool plain;
};
__device__ __forceinline__ MaskedKeys keys_of_mask(const Mask& mask, int64_t offset, int begin, int end) {
  int first = end, last = -1, hidden = 0, changed = 0;
#pragma unroll 2
  for (int key = begin + lane(); key < end; key += 32) {
    const int64_t at = offset + key * mask.stride_column;
    const bool seen = mask_shows(mask, at);
    hidden += !seen;
    changed += !mask.is_bool && static_cast<const float*>(mask.data)[at] != 0;
    if (seen) {
      first = min(first, key);
      last = key;
    }
  }
  first = __reduce_min_sync(~0u, first);
  last = __reduce_max_sync(~0u, last);
  hidden = __reduce_add_sync(~0u, hidden);
  changed = __reduce_add_sync(~0u, changed);
  const int outside = first > last ? end - begin : first - begin + (end - 1 - last);
  return {min(first, last + 1), last + 1, hidden == outside && (mask.is_bool || changed == outside)};
}

// Of the mask too; bit 4 j + e is that of element e of c[j]. shows(e / 2, row of the warp, column of the tile).
template <int kColumns, class F> __device__ __forceinline__ uint32_t visible_bits(F shows) {
  const int lane = ptx::opaque(attention::lane());
  uint32_t bits = 0;
#pragma unroll 2
  for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      bits |= uint32_t(shows(e / 2, row_of_element(e, lane), column_of_element(j, e, lane))) << (4 * j + e);
  return bits;
}

// Adds a float mask to scores where it is seen; mask_at(e / 2, row of the warp, column of the tile).
template <class T, int kColumns, class F>
__device__ __forceinline__ void add_mask(float (&scores)[kColumns / 8][4], const Mask& mask, uint32_t seen,
                                         F mask_at) {
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j) {
    const int lane = ptx::opaque(attention::lane());
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (seen >> (4 * j + e) & 1)
        scores[j][e] += mask_value<T>(mask, mask_at(e / 2, row_of_element(e, lane), column_of_element(j, e, lane)));
  }
}
template <int kBlocks> __device__ __forceinline__ void hide(float (&scores)[kBlocks][4], uint32_t seen) {
#pragma unroll
  for (int j = 0; j < kBlocks; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (!(seen >> (4 * j + e) & 1)) scores[j][e] = -INFINITY;
}

// ---- Dropout: 64 neighbouring keys of a query are 64 bits.

using Kept = Vector<uint32_t, 2>;

// Does dropout keep the probabilities of keys 64 block .. + 63 for the rows at position(row)?
template <int kRows, int kWarps, class F>
__device__ __forceinline__ void draw_kept(Kept* kept, const Dropout& dropout, int block, int sequence, F position) {
  const auto seed = static_cast<uint64_t>(*dropout.seed);
  const int lane = ptx::opaque(attention::lane());
#pragma unroll 1
  for (int first = 2 * warp(); first < kRows; first += 2 * kWarps) {
    const int row = first + lane / 16;
    const Position at = position(row);
    uint32_t words[4], bits[4];
    philox(words, seed, block * 16 + lane % 16, at.row, at.head, sequence);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      bits[i] = __ballot_sync(~0u, words[i] >= dropout.threshold) >> lane / 16 * 16 & 0xffff;
    if (lane % 16 == 0) store_shared(kept + row, Kept{{bits[0] | bits[1] << 16, bits[2] | bits[3] << 16}});
  }
}
__device__ __forceinline__ bool is_kept(const Kept& kept, int key) {
  return (key % 64 < 32 ? kept.values[0] : kept.values[1]) >> key % 32 & 1;
}

}  // namespace fastformer::attention
