// Between the host side of matrix products and their kernels, which are compiled for one type in each matmul_<type>.cu.
#pragma once

#include "matmul.h"

namespace fastformer {

struct OperandArg {
  const void* data;
  int64_t count, stride;
  bool aligned;  // may 16 bytes of a row move as one?
};

struct MatmulArgs {
  int64_t depth;
  OperandArg a, b;
  int64_t tiles_m = 0, tiles_n = 0;  // set by the launch
  int64_t split_depth;               // of each split of the depth: blockIdx.y
  float* partial;                    // (splits, M, N), the result where the depth is split; else null
  Epilogue epilogue;
};

struct Split {
  bool large_tiles;
  int64_t count, depth;  // of the splits
};

// The epilogue of a sum of parts (splits, rows, columns), added in order, or of rows that are there as they are.
struct FinishArgs {
  int64_t rows, columns;
  int64_t column_units;  // of 64 columns
  const float* partial;  // or null
  int64_t splits;
  const void* values;  // where partial is null: (rows, columns)
  int64_t stride;
  Epilogue epilogue;
};

// partial (groups, columns): the sums over group_rows rows each.
struct ColumnSumsArgs {
  int64_t rows, columns, group_rows;
  const void* values;
  int64_t stride;
  bool aligned;  // may 4 neighbours move as one?
  float* partial;
};

template <class T> struct Launches {
  static void matmul(const OnDeviceOf& device, const char* name, MatmulArgs args, const Split& split,
                     bool a_depth_adjacent, bool b_depth_adjacent);
  static void finish(const OnDeviceOf& device, const char* name, const FinishArgs& args);
  static void column_sums(const OnDeviceOf& device, int groups, const ColumnSumsArgs& args);
};

// The same on sm_90a, for 16-bit types and operands that TMA takes. Large tiles are 128 x 256, the others 128 x 128.
template <class T> struct HopperLaunches {
  static void matmul(const OnDeviceOf& device, const char* name, MatmulArgs args, const Split& split,
                     bool a_depth_adjacent, bool b_depth_adjacent);
};

// Starts a kernel of a block for each tile of the product and part of the depth.
template <class Tile, class... Parameters, class... Maps>
void launch_tiles(const OnDeviceOf& device, const char* name, MatmulArgs args, const Split& split, int threads,
                  void (*kernel)(const MatmulArgs, Parameters...), const Maps&... maps) {
  args.tiles_m = (args.a.count + Tile::kM - 1) / Tile::kM;
  args.tiles_n = (args.b.count + Tile::kN - 1) / Tile::kN;
  STD_TORCH_CHECK(args.tiles_m * args.tiles_n <= INT32_MAX, "fastformer_cuda takes products of up to 2^31 - 1 tiles");
  const dim3 blocks(static_cast<unsigned>(args.tiles_m * args.tiles_n), static_cast<unsigned>(split.count));
  launch(device,
         {name, {{"rows", args.a.count}, {"columns", args.b.count}, {"depth", args.depth}}, blocks,
          dim3(static_cast<unsigned>(threads)), Tile::kSharedBytes},
         kernel, args, maps...);
}

}  // namespace fastformer
