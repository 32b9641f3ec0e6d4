// Attention forward, padded or packed: output and the log-sum-exp of each row.
//
// A block computes 16 rows of one head for each warp against the keys that they see, a tile at a time, with an online
// softmax (Dao, "FlashAttention-2", 2023); the next tile comes by cp.async meanwhile. Tiles that are seen whole are not
// checked, those that nobody sees are left out. Where queries are few, as in decoding, those of all heads of a group
// share a tile, and the keys are split between blocks whose outputs `combine_kernel` adds up by their log-sum-exp,
// always in the same order (Dao et al., "Flash-Decoding", 2023).
#pragma once

#include "attention_visible.h"

namespace fastformer::attention {

template <class T, int kSize> struct ForwardShape {
  static constexpr bool kExact = std::is_same_v<T, float>;
  static constexpr int kWarps = 4, kThreads = 32 * kWarps, kRows = 16 * kWarps;
  static constexpr int kKeys = kExact ? (kSize <= 64 ? 32 : kSize <= 128 ? 16 : 8)
                                      : kSize <= 64 ? 64 : kSize <= 128 ? 32 : 16;
  static constexpr bool kKeepQuery = !kExact && kSize <= 64;  // in registers
  static constexpr int kColumns = kSlice<kSize>;             // of value and output
  static constexpr int kStage = kKeys * (kSize + kColumns);  // a key and a value tile
  static constexpr int kTiles = kRows * kSize + 2 * kStage, kScratchOfAll = kWarps * kScratch<T, kKeys>;
  static constexpr size_t kSharedBytes = sizeof(T) * kTiles + sizeof(float) * kScratchOfAll + sizeof(Kept) * 2 * kRows;
};

__device__ __forceinline__ float finite_maximum(float m) { return m == -INFINITY ? 0 : m; }  // of a row without a key
// Of the largest score and the sum of the others' distances to it, in natural units.
template <class T> __device__ __forceinline__ float log_sum_exp(float m, float l) {
  if constexpr (std::is_same_v<T, float>) return m + logf(l);
  return (m + log2f(l)) * kLn2;
}

// Over the four lanes that have a row.
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// The scores of more keys, in the first or second row of each lane, become probabilities; what was summed before is now
// against the new largest score, m. l is this lane's share of the row's sum.
template <class T, int kKeys, int kColumns>
__device__ __forceinline__ void online_softmax(int half, Accumulator<kKeys>& p, Accumulator<kColumns>& out, float& m,
                                               float& l) {
  float largest = -INFINITY;
#pragma unroll
  for (int j = 0; j < kKeys / 8; ++j) largest = fmaxf(largest, fmaxf(p[j][2 * half], p[j][2 * half + 1]));
  largest = fmaxf(m, row_max(largest));
  const float shift = finite_maximum(largest), rescale = exponential<T>(m - shift);
  m = largest;
  l *= rescale;
#pragma unroll
  for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
    for (int e = 2 * half; e < 2 * half + 2; ++e) {
      p[j][e] = exponential<T>(p[j][e] - shift);
      l += p[j][e];
    }
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j) {
    out[j][2 * half] *= rescale;
    out[j][2 * half + 1] *= rescale;
  }
}

// Sums of the warp's rows (from first_row on, of `rows`) that are NaN, taken again without the hidden keys, whose 0 may
// have met a value that is not finite. A row at a time by the whole warp: it is not often needed.
template <class T, int kColumns, class P, class R>
__device__ __forceinline__ void take_again(Accumulator<kColumns>& out, const float (&m)[2], const ForwardArgs& args,
                                           bool masked, int sequence, int kv_head, Span keys, Band band, int begin,
                                           int end, int first_column, int first_row, int rows, P position,
                                           R row_pointer) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    bool is_nan = false;
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) is_nan |= isnan(out[j][2 * half]) || isnan(out[j][2 * half + 1]);
    uint32_t lanes = __ballot_sync(~0u, is_nan);
#pragma unroll 1
    for (int group = 0; group < 8; ++group, lanes >>= 4) {
      const int row = first_row + group + 8 * half;
      if (!(lanes & 15) || row >= rows) continue;
      const bool own = lane() / 4 == group;
      const Position p = position(row);
      const int64_t mask_row = mask_offset(args.mask, sequence, p.head, p.row);
      const float shift = finite_maximum(__shfl_sync(~0u, m[half], 4 * group));
      const float scale = args.scale * kUnit<T>;
      const T* const q = row_pointer(args.query, row);
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j)
        if (own) out[j][2 * half] = out[j][2 * half + 1] = 0;
#pragma unroll 1
      for (int key = begin; key < end; ++key) {
        const int64_t mask_key = mask_row + key * args.mask.stride_column;
        if (!band.sees(p.row, key) || (masked && !mask_shows(args.mask, mask_key))) continue;
        const T* const k = row_of<const T>(args.key, sequence, kv_head, keys.first + key);
        const T* const v = row_of<const T>(args.value, sequence, kv_head, keys.first + key);
        float score = 0;
#pragma unroll 1
        for (int c = lane(); c < args.head_dim; c += 32)
          score += to_float(q[c * args.query.stride_column]) * to_float(k[c * args.key.stride_column]);
        score = warp_sum(score) * scale;
        if (masked && !args.mask.is_bool) score += mask_value<T>(args.mask, mask_key);
        float probability = exponential<T>(score - shift);
        if (args.dropout.threshold) {
          uint32_t words[4];
          philox(words, static_cast<uint64_t>(*args.dropout.seed), key / 64 * 16 + key % 16, p.row, p.head, sequence);
          const int word = key / 16 % 4;
          const uint32_t drawn = word < 2 ? (word ? words[1] : words[0]) : word == 2 ? words[2] : words[3];
          if (drawn < args.dropout.threshold) probability = 0;
        }
        const int lane = ptx::opaque(attention::lane());  // or every column's address is kept in registers
#pragma unroll
        for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int column = first_column + column_of_element(j, i, lane);
            if (own && column < args.value_dim)
              out[j][2 * half + i] += probability * to_float(v[column * args.value.stride_column]);
          }
      }
    }
  }
}

// Divides by the sums, of which each lane has its share; m becomes the log-sum-exp.
template <class T, int kColumns>
__device__ __forceinline__ void normalize(Accumulator<kColumns>& out, float (&m)[2], const float (&l)[2],
                                          float dropout_scale) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float sum = row_sum(l[half]), factor = sum == 0 ? 0 : dropout_scale / sum;
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
      out[j][2 * half] *= factor;
      out[j][2 * half + 1] *= factor;
    }
    m[half] = log_sum_exp<T>(m[half], sum);
  }
}

template <class T, int kSize>
__global__ void __launch_bounds__(ForwardShape<T, kSize>::kThreads, 1) forward_kernel(const ForwardArgs args) {
  using Shape = ForwardShape<T, kSize>;
  constexpr int kRows = Shape::kRows, kKeys = Shape::kKeys, kThreads = Shape::kThreads, kColumns = Shape::kColumns;
  static_assert(Shape::kSharedBytes <= kMostShared);
  DYNAMIC_SHARED(memory);
  T* const query_tile = reinterpret_cast<T*>(memory);
  T* const key_tiles = query_tile + kRows * kSize;  // two stages of a key and a value tile each
  float* const scratches = reinterpret_cast<float*>(query_tile + Shape::kTiles);
  float* const scratch = scratches + warp() * kScratch<T, kKeys>;
  Kept* const kept_of_blocks = reinterpret_cast<Kept*>(scratches + Shape::kScratchOfAll);  // of 64 keys, by turns
  T* const own_rows = query_tile + 16 * warp() * kSize;

  const int stack = args.stack, head_sets = args.heads / stack;
  int index = blockIdx.x;
  const int first_column = index % kSlices<kSize> * kColumns;
  const int part = (index /= kSlices<kSize>) % args.parts;
  const int tile = args.tiles - 1 - (index /= args.parts) % args.tiles;  // causal: those with most keys begin first
  const int first_head = (index /= args.tiles) % head_sets * stack, sequence = index / head_sets;
  const int kv_head = first_head / (args.heads / args.kv_heads);
  const Span queries = sequence_rows(args.queries, sequence), keys = sequence_rows(args.keys, sequence);
  const int first = tile * kRows, rows = min(queries.rows * stack - first, kRows);
  if (rows <= 0) return;

  const auto position = [&](int row) {
    return Position{first_head + (first + row) % stack, (first + row) / stack};
  };
  const auto row_pointer = [&]<class X>(const X& x, int row) {
    const Position at = position(row);
    using Element = std::conditional_t<std::is_same_v<X, Input>, const T, T>;
    return row_of<Element>(x, sequence, at.head, queries.first + at.row);
  };

  int begin = args.parts == 1 ? 0 : part * args.part_keys;
  int end = args.parts == 1 ? keys.rows : min(begin + args.part_keys, keys.rows);
  bool masked = args.mask.data != nullptr;
  if (masked && args.mask.stride_row == 0 && (stack == 1 || args.mask.stride_head == 0)) {
    const MaskedKeys shown = keys_of_mask(args.mask, mask_offset(args.mask, sequence, first_head, 0), begin, end);
    begin = shown.begin, end = shown.end, masked = !shown.plain;
  }
  const Band band = band_of(args, queries.rows, keys.rows);
  const Columns columns = visible_columns(first / stack, (first + rows - 1) / stack, band, begin, end, kKeys);
  const bool has_dropout = args.dropout.threshold != 0;

  const auto load_keys = [&](int start, int stage) {
    T* const to = key_tiles + stage * Shape::kStage;
    const auto row = [&](const Input& x) { return row_of<const T>(x, sequence, kv_head, keys.first + start); };
    load_tile<kKeys, kSize, kThreads>(to, args.key, args.head_dim, row(args.key), keys.rows - start);
    load_tile<kKeys, kColumns, kThreads>(to + kKeys * kSize, args.value, args.value_dim - first_column,
                                         row(args.value) + first_column * args.value.stride_column, keys.rows - start);
    if (has_dropout && (start == columns.begin || start % 64 == 0))
      draw_kept<kRows, Shape::kWarps>(kept_of_blocks + start / 64 % 2 * kRows, args.dropout, start / 64, sequence,
                                      position);
  };

  load_tile<kRows, kSize, kThreads>(query_tile, args.query, args.head_dim,
                                    [&](int row) { return row < rows ? row_pointer(args.query, row) : nullptr; });
  ptx::cp_async_commit();
  LeftRows<T, kSize, Shape::kKeepQuery> left(own_rows);

  const float scale = args.scale * kUnit<T>;
  const Position at[2] = {position(16 * warp() + row_of_element(0)), position(16 * warp() + row_of_element(2))};
  const int64_t mask_at[2] = {mask_offset(args.mask, sequence, at[0].head, at[0].row),
                              mask_offset(args.mask, sequence, at[1].head, at[1].row)};
  float m[2] = {-INFINITY, -INFINITY}, l[2] = {};  // of each row the largest score; this lane's share of the sum
  Accumulator<kColumns> out = {};

  int stage = 1;
#pragma unroll 1
  for (int start = columns.begin - kKeys; start < columns.end; start += kKeys, stage ^= 1) {  // first: only a load
    if (start >= columns.begin) {
      ptx::cp_async_wait<0>();
      __syncthreads();  // this tile has come, and nobody reads the one before it any more
    }
    if (start + kKeys < columns.end) load_keys(start + kKeys, stage ^ 1);
    ptx::cp_async_commit();
    if (start < columns.begin || 16 * warp() >= rows) continue;
    if (start == columns.begin) left.keep();
    uint32_t seen = ~0u;
    if (masked || !columns.whole(start, kKeys)) {
      seen = visible_bits<kKeys>([&](int half, int row, int column) {
        const int key = start + column;
        return 16 * warp() + row < rows && key >= begin && key < end && band.sees(at[half].row, key) &&
               (!masked || mask_shows(args.mask, mask_at[half] + key * args.mask.stride_column));
      });
      if (!__any_sync(~0u, seen)) continue;
    }
    const T* const key_tile = key_tiles + stage * Shape::kStage;
    Accumulator<kKeys> p = {};  // scores, then probabilities
    multiply_transposed<kKeys>(p, left, key_tile);
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) p[j][e] *= scale;
    if (masked && !args.mask.is_bool)
      add_mask<T, kKeys>(p, args.mask, seen, [&](int half, int, int column) {
        return mask_at[half] + (start + column) * args.mask.stride_column;
      });
    hide(p, seen);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      online_softmax<T, kKeys, kColumns>(half, p, out, m[half], l[half]);
      if (has_dropout) {
        const Kept* const from = kept_of_blocks + start / 64 % 2 * kRows + 16 * warp() + row_of_element(2 * half);
        const Kept kept = load_shared(from);
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e)
            if (!is_kept(kept, start + column_of_element(j, e))) p[j][e] = 0;
      }
    }
    multiply<kKeys, kColumns, kColumns>(out, p, key_tile + kKeys * kSize, scratch);
  }

  ptx::cp_async_wait<0>();  // where there was no tile: for the rows that others have copied here
  __syncthreads();

  take_again<T, kColumns>(out, m, args, masked, sequence, kv_head, keys, band, max(begin, columns.begin), columns.end,
                          first_column, 16 * warp(), rows, position, row_pointer);
  normalize<T, kColumns>(out, m, l, args.dropout.scale);
#pragma unroll
  for (int half = 0; half < 2; ++half)
    if (first_column == 0 && lane() % 4 == 0 && 16 * warp() + row_of_element(2 * half) < rows)
      *(row_of(args.lse, sequence, at[half].head, queries.first + at[half].row) + part * args.part_stride_lse) =
          m[half];
  if (args.parts > 1) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (16 * warp() + row_of_element(2 * half) >= rows) continue;
      float* const to = row_of<float>(args.output, sequence, at[half].head, queries.first + at[half].row) +
                        part * args.part_stride_output;
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          if (const int column = first_column + column_of_element(j, i); column < args.value_dim)
            to[column] = out[j][2 * half + i];
    }
  } else {
    store_rows<kSize, kColumns>(out, own_rows, args.output.aligned, args.value_dim - first_column, [&](int row) {
      T* const to = 16 * warp() + row < rows ? row_pointer(args.output, 16 * warp() + row) : nullptr;
      return to ? to + first_column : nullptr;
    });
  }
}

constexpr int kCombineWarps = 4;
static_assert(kMostParts <= 32);  // a lane each

// The parts' outputs, weighted by exp(lse): a row for each warp.
template <class T> __global__ void __launch_bounds__(32 * kCombineWarps) combine_kernel(const CombineArgs args) {
  const int64_t index = int64_t(blockIdx.x) * kCombineWarps + warp();
  if (index >= args.count) return;
  const int row = int(index % args.rows), head = int(index / args.rows % args.heads);
  const int sequence = int(index / args.rows / args.heads);
  float* const lse = row_of(args.lse, sequence, head, row);
  T* const out = row_of<T>(args.output, sequence, head, row);
  const float* const part_lse = args.part_lse + (lse - args.lse.data);
  const float* const part_output = args.part_output + (out - static_cast<T*>(args.output.data));

  const float x = lane() < args.parts ? part_lse[lane() * args.part_stride_lse] * kUnit<T> : -INFINITY;
  float m = x;
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, lanes));
  const float weight = exponential<T>(x - finite_maximum(m)), l = warp_sum(weight);
  for (int first = 0; first < args.value_dim; first += 32) {
    const int column = first + lane();
    float sum = 0;
#pragma unroll 4
    for (int part = 0; part < args.parts; ++part) {
      const float factor = __shfl_sync(~0u, weight, part);
      if (column < args.value_dim) sum += factor * part_output[part * args.part_stride_output + column];
    }
    if (column < args.value_dim) out[column] = from_float<T>(l == 0 ? 0 : sum / l);
  }
  if (lane() == 0) *lse = log_sum_exp<T>(m, l);
}

template <class T> void forward(const OnDeviceOf& device, ForwardArgs args) {
  with_head_size(args, [&]<int kSize>() {
    using Shape = ForwardShape<T, kSize>;
    args.tiles = (args.max_queries * args.stack + Shape::kRows - 1) / Shape::kRows;
    const int64_t row_blocks = int64_t(args.sequences) * (args.heads / args.stack) * args.tiles;
    const int64_t blocks = row_blocks * args.parts * kSlices<kSize>;
    if (blocks == 0) return;
    launch(device,
           {"attention_forward",
            {{"sequences", args.sequences}, {"heads", args.heads}, {"queries", args.max_queries},
             {"keys", args.max_keys}, {"head size", args.head_dim}, {"parts", args.parts}},
            blocks_of(blocks), dim3(Shape::kThreads), Shape::kSharedBytes},
           forward_kernel<T, kSize>, args);
  });
}

template <class T> void combine(const OnDeviceOf& device, const CombineArgs& args) {
  if (args.count == 0) return;
  launch(device,
         {"attention_combine", {{"rows", args.count}, {"parts", args.parts}},
          blocks_of((args.count + kCombineWarps - 1) / kCombineWarps), dim3(32 * kCombineWarps)},
         combine_kernel<T>, args);
}

}  // namespace fastformer::attention
