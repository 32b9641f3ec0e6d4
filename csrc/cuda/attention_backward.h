// Attention backward, padded or packed: the probabilities come back tile by tile from the scores and the log-sum-exp.
//
// With S = scale Q K^T + mask, P = exp(S - lse) and Pd = dropout(P):
//   dV = Pd^T dO,  dP = dropout(dO V^T),  dS = P (dP - delta) with delta = rowsum(dO O),  dQ = scale dS K,
//   dK = scale dS^T Q                                              (Dao, "FlashAttention-2", 2023, algorithm 2)
// grad_key_value_kernel has a block for each tile of keys of a key/value head, which goes over the queries that see it,
// of all query heads of its group; its scores are transposed, so that P and dS are left operands as they come.
// grad_query_kernel has a block for each tile of queries of a head, which goes over the keys. Every element is written
// by one block, which adds in a fixed order: no atomics, the same bits each time.
#pragma once

#include "attention_visible.h"

namespace fastformer::attention {

// kRows rows of two tensors stay in shared memory, tiles of kColumns rows of two others come by turns.
template <class T, int kSize, bool kOfKeys> struct BackwardShape {
  static constexpr bool kExact = std::is_same_v<T, float>;
  static constexpr int kWarps = kExact && kSize > 128 ? 2 : 4, kThreads = 32 * kWarps, kRows = 16 * kWarps;
  static constexpr int kColumns = kExact ? (kSize <= 64 ? 32 : 8) : kSize <= 64 ? 32 : 16;
  static constexpr int kTiles = kSize * (2 * kRows + 4 * kColumns), kScratchOfAll = kWarps * kScratch<T, kColumns>;
  static constexpr int kKept = 2 * (kOfKeys ? kColumns : kRows);
  static constexpr size_t kSharedBytes = sizeof(T) * kTiles + sizeof(float) * kScratchOfAll + sizeof(Kept) * kKept +
                                         (kOfKeys ? sizeof(float) * 4 * kColumns : 0);
};

// lse in the scores' unit; inf for a row that sees no key: then its probabilities are 0.
template <class T> __device__ __forceinline__ float lse_of_scores(float lse) {
  return lse == -INFINITY ? INFINITY : lse * kUnit<T>;
}

constexpr int kDeltaWarps = 4;
// rowsum(dO O): a row for each warp.
template <class T> __global__ void __launch_bounds__(32 * kDeltaWarps) delta_kernel(const DeltaArgs args) {
  const int64_t index = int64_t(blockIdx.x) * kDeltaWarps + warp();
  if (index >= args.count) return;
  const int row = int(index % args.rows), head = int(index / args.rows % args.heads);
  const int sequence = int(index / args.rows / args.heads);
  const T* const grad = row_of<const T>(args.grad_output, sequence, head, row);
  const T* const out = row_of<const T>(args.output, sequence, head, row);
  float sum = 0;
  for (int column = lane(); column < args.value_dim; column += 32)
    sum += to_float(grad[column * args.grad_output.stride_column]) * to_float(out[column * args.output.stride_column]);
  sum = warp_sum(sum);
  if (lane() == 0) *row_of(args.delta, sequence, head, row) = sum;
}

template <class T, int kSize>
__global__ void __launch_bounds__(BackwardShape<T, kSize, true>::kThreads, 1)
    grad_key_value_kernel(const BackwardArgs args) {
  using Shape = BackwardShape<T, kSize, true>;
  constexpr int kRows = Shape::kRows, kQueries = Shape::kColumns, kThreads = Shape::kThreads;
  constexpr int kColumns = kSlice<kSize>;
  static_assert(Shape::kSharedBytes <= kMostShared);
  DYNAMIC_SHARED(memory);
  T* const key_tile = reinterpret_cast<T*>(memory);
  T* const value_tile = key_tile + kRows * kSize;
  T* const query_tiles = value_tile + kRows * kSize;  // two stages of a tile of queries and one of their gradients
  float* const scratches = reinterpret_cast<float*>(key_tile + Shape::kTiles);
  float* const scratch = scratches + warp() * kScratch<T, kQueries>;
  Kept* const kept_of_stages = reinterpret_cast<Kept*>(scratches + Shape::kScratchOfAll);
  float* const lse_of_stages = reinterpret_cast<float*>(kept_of_stages + Shape::kKept);
  float* const delta_of_stages = lse_of_stages + 2 * kQueries;

  int index = blockIdx.x;
  const int first_column = index % kSlices<kSize> * kColumns, tile = (index /= kSlices<kSize>) % args.tiles;
  const int kv_head = (index /= args.tiles) % args.kv_heads, sequence = index / args.kv_heads;
  const int groups = args.heads / args.kv_heads;
  const Span queries = sequence_rows(args.queries, sequence), keys = sequence_rows(args.keys, sequence);
  const int first = tile * kRows, rows = min(keys.rows - first, kRows);
  if (rows <= 0) return;

  const Band band = band_of(args, queries.rows, keys.rows);
  const Columns columns =
      visible_columns(first, first + rows - 1, {-band.highest, -band.lowest}, 0, queries.rows, kQueries);
  int tiles = columns.begin < columns.end ? (columns.end - columns.begin + kQueries - 1) / kQueries : 0;
  bool masked = args.mask.data != nullptr;
  if (masked && args.mask.stride_row == 0 && args.mask.stride_head == 0) {
    const MaskedKeys shown = keys_of_mask(args.mask, mask_offset(args.mask, sequence, 0, 0), first, first + rows);
    if (shown.begin == shown.end) tiles = 0;
    masked = !shown.plain || shown.begin > first || shown.end < first + rows;
  }
  const bool has_dropout = args.dropout.threshold != 0;

  const auto load_rows = [&](T* to, const Input& x, int size) {
    load_tile<kRows, kSize, kThreads>(to, x, size, row_of<const T>(x, sequence, kv_head, keys.first + first), rows);
  };
  const auto load_queries = [&](int index, int stage) {
    const int head = kv_head * groups + index / tiles, start = columns.begin + index % tiles * kQueries;
    const auto load = [&](T* to, const Input& x, int size) {
      load_tile<kQueries, kSize, kThreads>(to, x, size, row_of<const T>(x, sequence, head, queries.first + start),
                                           queries.rows - start);
    };
    T* const to = query_tiles + 2 * stage * kQueries * kSize;
    load(to, args.query, args.head_dim);
    load(to + kQueries * kSize, args.grad_output, args.value_dim);
    if (int row = threadIdx.x; row < kQueries) {
      const bool inside = start + row < queries.rows;
      const int query = queries.first + start + row;
      store_shared(lse_of_stages + stage * kQueries + row,
                   inside ? lse_of_scores<T>(*row_of(args.lse, sequence, head, query)) : INFINITY);
      store_shared(delta_of_stages + stage * kQueries + row, inside ? *row_of(args.delta, sequence, head, query) : 0);
    }
    if (has_dropout)
      draw_kept<kQueries, Shape::kWarps>(kept_of_stages + stage * kQueries, args.dropout, first / 64, sequence,
                                         [&](int row) { return Position{head, start + row}; });
  };

  load_rows(key_tile, args.key, args.head_dim);
  load_rows(value_tile, args.value, args.value_dim);
  ptx::cp_async_commit();

  T* const own_keys = key_tile + 16 * warp() * kSize;
  T* const own_values = value_tile + 16 * warp() * kSize;
  const LeftRows<T, kSize, false> left_keys(own_keys), left_values(own_values);
  const float scale = args.scale * kUnit<T>;
  Accumulator<kColumns> grad_key = {}, grad_value = {};
  int stage = 1;
#pragma unroll 1
  for (int index = -1; index < groups * tiles; ++index, stage ^= 1) {  // first: only a load
    if (index >= 0) {
      ptx::cp_async_wait<0>();
      __syncthreads();  // this tile has come, and nobody reads the one before it any more
    }
    if (index + 1 < groups * tiles) load_queries(index + 1, stage ^ 1);
    ptx::cp_async_commit();
    if (index < 0 || 16 * warp() >= rows) continue;
    const int head = kv_head * groups + index / tiles, start = columns.begin + index % tiles * kQueries;
    const auto mask_at = [&](int, int row, int column) {
      return mask_offset(args.mask, sequence, head, start + column) +
             (first + 16 * warp() + row) * args.mask.stride_column;
    };
    uint32_t seen = ~0u;
    if (masked || !columns.whole(start, kQueries)) {
      seen = visible_bits<kQueries>([&](int, int row, int column) {
        const int key = 16 * warp() + row;
        return key < rows && start + column < queries.rows && band.sees(start + column, first + key) &&
               (!masked || mask_shows(args.mask, mask_at(0, row, column)));
      });
      if (!__any_sync(~0u, seen)) continue;
    }
    const T* const query_tile = query_tiles + 2 * stage * kQueries * kSize;
    const T* const grad_tile = query_tile + kQueries * kSize;
    const float* const lse = lse_of_stages + stage * kQueries;
    const float* const delta = delta_of_stages + stage * kQueries;

    Accumulator<kQueries> p = {};
    multiply_transposed<kQueries>(p, left_keys, query_tile);
    const bool adds_mask = masked && !args.mask.is_bool;
#pragma unroll
    for (int j = 0; j < kQueries / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (adds_mask) p[j][e] *= scale;
    if (adds_mask) add_mask<T, kQueries>(p, args.mask, seen, mask_at);
    const float factor = adds_mask ? 1 : scale;  // one rounding less where it can be
#pragma unroll
    for (int j = 0; j < kQueries / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float x = fmaf(p[j][e], factor, -load_shared(lse + column_of_element(j, e)));
        p[j][e] = seen >> (4 * j + e) & 1 ? exponential<T>(x) : 0;
      }
    uint32_t kept = ~0u;
    if (has_dropout) kept = visible_bits<kQueries>([&](int, int row, int column) {
      const int key = first + 16 * warp() + row;
      return is_kept(load_shared(kept_of_stages + stage * kQueries + column), key);
    });
    const auto drop = [&](float x, int j, int e) { return kept >> (4 * j + e) & 1 ? x * args.dropout.scale : 0; };
    Accumulator<kQueries> dropped;
#pragma unroll
    for (int j = 0; j < kQueries / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) dropped[j][e] = drop(p[j][e], j, e);
    multiply<kQueries, kColumns, kSize>(grad_value, dropped, grad_tile + first_column, scratch);

    Accumulator<kQueries> ds = {};
    multiply_transposed<kQueries>(ds, left_values, grad_tile);
#pragma unroll
    for (int j = 0; j < kQueries / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float grad = drop(ds[j][e], j, e) - load_shared(delta + column_of_element(j, e));
        ds[j][e] = seen >> (4 * j + e) & 1 ? p[j][e] * grad : 0;
      }
    multiply<kQueries, kColumns, kSize>(grad_key, ds, query_tile + first_column, scratch);
  }
  ptx::cp_async_wait<0>();  // where there was no tile: for the rows that others have copied here
  __syncthreads();

#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) grad_key[j][e] *= args.scale;
  const auto store = [&](const Accumulator<kColumns>& grad, T* tile, const Output& x, int size) {
    store_rows<kSize, kColumns>(grad, tile, x.aligned, size - first_column, [&](int row) {
      const int key = 16 * warp() + row;
      T* const to = key < rows ? row_of<T>(x, sequence, kv_head, keys.first + first + key) : nullptr;
      return to ? to + first_column : nullptr;
    });
  };
  store(grad_key, own_keys, args.grad_key, args.head_dim);
  store(grad_value, own_values, args.grad_value, args.value_dim);
}

template <class T, int kSize>
__global__ void __launch_bounds__(BackwardShape<T, kSize, false>::kThreads, 1)
    grad_query_kernel(const BackwardArgs args) {
  using Shape = BackwardShape<T, kSize, false>;
  constexpr int kRows = Shape::kRows, kKeys = Shape::kColumns, kThreads = Shape::kThreads;
  constexpr int kColumns = kSlice<kSize>;
  static_assert(Shape::kSharedBytes <= kMostShared);
  DYNAMIC_SHARED(memory);
  T* const query_tile = reinterpret_cast<T*>(memory);
  T* const grad_tile = query_tile + kRows * kSize;
  T* const key_tiles = grad_tile + kRows * kSize;  // two stages of a key and a value tile each
  float* const scratches = reinterpret_cast<float*>(query_tile + Shape::kTiles);
  float* const scratch = scratches + warp() * kScratch<T, kKeys>;
  Kept* const kept_of_blocks = reinterpret_cast<Kept*>(scratches + Shape::kScratchOfAll);  // of 64 keys, by turns

  int index = blockIdx.x;
  const int first_column = index % kSlices<kSize> * kColumns;
  const int tile = args.tiles - 1 - (index /= kSlices<kSize>) % args.tiles;  // causal: most keys first
  const int head = (index /= args.tiles) % args.heads, sequence = index / args.heads;
  const int kv_head = head / (args.heads / args.kv_heads);
  const Span queries = sequence_rows(args.queries, sequence), keys = sequence_rows(args.keys, sequence);
  const int first = tile * kRows, rows = min(queries.rows - first, kRows);
  if (rows <= 0) return;

  int begin = 0, end = keys.rows;
  bool masked = args.mask.data != nullptr;
  if (masked && args.mask.stride_row == 0) {
    const MaskedKeys shown = keys_of_mask(args.mask, mask_offset(args.mask, sequence, head, 0), begin, end);
    begin = shown.begin, end = shown.end, masked = !shown.plain;
  }
  const Band band = band_of(args, queries.rows, keys.rows);
  const Columns columns = visible_columns(first, first + rows - 1, band, begin, end, kKeys);
  const bool has_dropout = args.dropout.threshold != 0;

  const auto load_rows = [&](T* to, const Input& x, int size) {
    load_tile<kRows, kSize, kThreads>(to, x, size, row_of<const T>(x, sequence, head, queries.first + first), rows);
  };
  const auto load_keys = [&](int start, int stage) {
    const auto load = [&](T* to, const Input& x, int size) {
      load_tile<kKeys, kSize, kThreads>(to, x, size, row_of<const T>(x, sequence, kv_head, keys.first + start),
                                        keys.rows - start);
    };
    T* const to = key_tiles + 2 * stage * kKeys * kSize;
    load(to, args.key, args.head_dim);
    load(to + kKeys * kSize, args.value, args.value_dim);
    if (has_dropout && (start == columns.begin || start % 64 == 0))
      draw_kept<kRows, Shape::kWarps>(kept_of_blocks + start / 64 % 2 * kRows, args.dropout, start / 64, sequence,
                                      [&](int row) { return Position{head, first + row}; });
  };

  load_rows(query_tile, args.query, args.head_dim);
  load_rows(grad_tile, args.grad_output, args.value_dim);
  ptx::cp_async_commit();

  T* const own_queries = query_tile + 16 * warp() * kSize;
  const LeftRows<T, kSize, false> left_queries(own_queries), left_grads(grad_tile + 16 * warp() * kSize);
  const float scale = args.scale * kUnit<T>;
  float lse[2], delta[2];
  int64_t mask_at[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = first + 16 * warp() + row_of_element(2 * half);
    const bool inside = query < queries.rows;
    lse[half] = inside ? lse_of_scores<T>(*row_of(args.lse, sequence, head, queries.first + query)) : INFINITY;
    delta[half] = inside ? *row_of(args.delta, sequence, head, queries.first + query) : 0;
    mask_at[half] = mask_offset(args.mask, sequence, head, query);
  }

  Accumulator<kColumns> grad_query = {};
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
    uint32_t seen = ~0u;
    if (masked || !columns.whole(start, kKeys)) {
      seen = visible_bits<kKeys>([&](int half, int row, int column) {
        const int query = 16 * warp() + row, key = start + column;
        return query < rows && key >= begin && key < end && band.sees(first + query, key) &&
               (!masked || mask_shows(args.mask, mask_at[half] + key * args.mask.stride_column));
      });
      if (!__any_sync(~0u, seen)) continue;
    }
    const T* const key_tile = key_tiles + 2 * stage * kKeys * kSize;
    Accumulator<kKeys> p = {};
    multiply_transposed<kKeys>(p, left_queries, key_tile);
    const bool adds_mask = masked && !args.mask.is_bool;
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (adds_mask) p[j][e] *= scale;
    if (adds_mask)
      add_mask<T, kKeys>(p, args.mask, seen, [&](int half, int, int column) {
        return mask_at[half] + (start + column) * args.mask.stride_column;
      });
    const float factor = adds_mask ? 1 : scale;  // one rounding less where it can be
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float x = fmaf(p[j][e], factor, -lse[e / 2]);
        p[j][e] = seen >> (4 * j + e) & 1 ? exponential<T>(x) : 0;
      }
    Accumulator<kKeys> ds = {};
    multiply_transposed<kKeys>(ds, left_grads, key_tile + kKeys * kSize);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Kept kept = {{~0u, ~0u}};
      if (has_dropout)
        kept = load_shared(kept_of_blocks + start / 64 % 2 * kRows + 16 * warp() + row_of_element(2 * half));
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          const bool stays = is_kept(kept, start + column_of_element(j, e));
          const float grad = (stays ? ds[j][e] * args.dropout.scale : 0) - delta[half];
          ds[j][e] = seen >> (4 * j + e) & 1 ? p[j][e] * grad : 0;
        }
    }
    multiply<kKeys, kColumns, kSize>(grad_query, ds, key_tile + first_column, scratch);
  }
  ptx::cp_async_wait<0>();  // where there was no tile: for the rows that others have copied here
  __syncthreads();

#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) grad_query[j][e] *= args.scale;
  const Output& x = args.grad_query;
  store_rows<kSize, kColumns>(grad_query, own_queries, x.aligned, args.head_dim - first_column, [&](int row) {
    const int query = 16 * warp() + row;
    T* const to = query < rows ? row_of<T>(x, sequence, head, queries.first + first + query) : nullptr;
    return to ? to + first_column : nullptr;
  });
}

template <class T> void backward(const OnDeviceOf& device, const DeltaArgs& delta, BackwardArgs args) {
  if (delta.count)
    launch(device,
           {"attention_delta", {{"rows", delta.count}}, blocks_of((delta.count + kDeltaWarps - 1) / kDeltaWarps),
            dim3(32 * kDeltaWarps)},
           delta_kernel<T>, delta);
  with_head_size(args, [&]<int kSize>() {
    const auto run = [&]<bool kOfKeys>(const char* name, void (*kernel)(BackwardArgs), int longest, int64_t heads) {
      using Shape = BackwardShape<T, kSize, kOfKeys>;
      args.tiles = (longest + Shape::kRows - 1) / Shape::kRows;
      const int64_t blocks = args.sequences * heads * args.tiles;
      if (blocks == 0) return;
      launch(device,
             {name,
              {{"sequences", args.sequences}, {"heads", args.heads}, {"queries", args.max_queries},
               {"keys", args.max_keys}, {"head size", args.head_dim}},
              blocks_of(blocks), dim3(Shape::kThreads), Shape::kSharedBytes},
             kernel, args);
    };
    run.template operator()<true>("attention_grad_key_value", grad_key_value_kernel<T, kSize>, args.max_keys,
                                  int64_t(args.kv_heads) * kSlices<kSize>);
    run.template operator()<false>("attention_grad_query", grad_query_kernel<T, kSize>, args.max_queries,
                                   int64_t(args.heads) * kSlices<kSize>);
  });
}

}  // namespace fastformer::attention
