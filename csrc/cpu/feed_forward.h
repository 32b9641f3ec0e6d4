// The two products of a feed-forward network: which thread does what.
#pragma once

#include "gemm.h"
#include "phases.h"

namespace fastformer {

// Adds a product; quantized_bytes(args) of memory where the rows of a are still to be quantized.
inline void add_gemm(Phases& phases, GemmArgs args, char* memory) {
  if (wants_quantizing(args)) {
    args.quantized = quantized_rows(memory, 0, args.rows, args.depth);
    const int64_t rows = quantized_grain(args);
    phases.add((args.rows + rows - 1) / rows, 0, [=](int64_t task) {
      quantize(args, task * rows, std::min(args.rows, (task + 1) * rows));
    });
  }
  const GemmTasks tasks(args, phases.threads());
  phases.add(tasks.count(), tasks.bytes(), tasks);
}
inline int64_t quantized_bytes(const GemmArgs& args) {
  return wants_quantizing(args) ? quantized_bytes(args.rows, args.depth) : 0;
}

// The hidden activation of a block of rows goes from the first product to the second within one core's L2 and never to
// memory; where there are too few rows for blocks, all threads share each product.
class FeedForward {
 public:
  // second reads what first writes: (rows, hidden) in the compute type, the rows a cache line further apart than they need
  // be, because at a distance of some KiB they would share cache sets.
  FeedForward(const GemmArgs& first, const GemmArgs& second, int64_t threads) : first_(first), second_(second) {
    const int64_t rows = first.rows, hidden = first.columns + 16;
    row_bytes_ = hidden * compute_bytes(first.dtype);
    first_.output_is_compute_type = second_.a_is_compute_type = true;
    first_.output_stride = second_.a_row_stride = hidden;
    second_.a_depth_stride = 1;
    // Of rows whose hidden activation stays in L2.
    const int64_t most = second.b_type == PanelType::int8 ? 256 : 192;
    blocks_ = ((rows + most - 1) / most + threads - 1) / threads * threads;
    if (threads > 1 && rows < blocks_ * most / 2) blocks_ = 0;
  }

  // of memory that the threads share
  int64_t bytes() const {
    if (blocks_) return 0;
    return hidden_bytes() + std::max(quantized_bytes(first_), quantized_bytes(second_));
  }

  void add_to(Phases& phases, char* memory) {
    if (blocks_) return add_blocks(phases);
    second_.a = first_.output = memory;
    add_gemm(phases, first_, memory + hidden_bytes());
    add_gemm(phases, second_, memory + hidden_bytes());
  }

 private:
  int64_t hidden_bytes() const { return (first_.rows * row_bytes_ + 63) / 64 * 64; }

  void add_blocks(Phases& phases) const {
    if (second_.b_type == PanelType::int8) return add_quantized_blocks(phases);
    const int64_t rows = first_.rows, blocks = blocks_, block_rows = (rows + blocks - 1) / blocks;
    const int64_t row_bytes = row_bytes_, block_bytes = (block_rows * row_bytes + 63) / 64 * 64;
    const int64_t work = std::max(serial_bytes(first_, block_rows), serial_bytes(second_, block_rows));
    phases.add(blocks, block_bytes + work, [=, first = first_, second = second_](int64_t block) {
      const int64_t begin = rows * block / blocks, end = rows * (block + 1) / blocks;
      char* memory = static_cast<char*>(scratch(block_bytes + work));
      GemmArgs mine1 = first, mine2 = second;
      mine2.a = mine1.output = memory - begin * row_bytes;  // rows count from the start of the tensor
      gemm_serial(mine1, begin, end, memory + block_bytes);
      gemm_serial(mine2, begin, end, memory + block_bytes);
    });
  }

  // The hidden activation leaves the core in 8 bits: each group of it is quantized before the next is computed.
  void add_quantized_blocks(Phases& phases) const {
    const int64_t rows = first_.rows, hidden = first_.columns, blocks = blocks_, block_rows = (rows + blocks - 1) / blocks;
    const int64_t group_stride = kQuantizedGroup + 16, group_bytes = (block_rows * group_stride * 4 + 63) / 64 * 64;
    const int64_t hidden_bytes = (quantized_bytes(block_rows, hidden) + 63) / 64 * 64;
    const int64_t bytes = group_bytes + hidden_bytes + serial_bytes(first_, block_rows);
    phases.add(blocks, bytes, [=, first = first_, second = second_](int64_t block) {
      const int64_t begin = rows * block / blocks, end = rows * (block + 1) / blocks;
      char* memory = static_cast<char*>(scratch(bytes));
      char* work = memory + group_bytes + hidden_bytes;
      GemmArgs mine1 = first, mine2 = second;
      if (wants_quantizing(first)) {
        mine1.quantized = quantized_rows(work + product_of(first).scratch_bytes, begin, end - begin, first.depth);
        quantize(mine1, begin, end);
      }
      mine1.output_stride = group_stride;
      mine2.quantized = quantized_rows(memory + group_bytes, begin, end - begin, hidden);
      const Product to_hidden = product_of(first), to_output = product_of(second);
      constexpr int64_t kPanels = kQuantizedGroup / kQuantizedColumns;  // of a group
      for (int64_t group = 0; group < quantized_groups(hidden); ++group) {
        // rows and columns count from the start of the tensor
        mine2.a = mine1.output = memory - (begin * group_stride + group * kQuantizedGroup) * 4;
        mine2.a_row_stride = group_stride;
        to_hidden.kernel(mine1, begin, end, group * kPanels, std::min(to_hidden.panels, (group + 1) * kPanels), work);
        quantize(mine2, begin, end, group, group + 1);
      }
      to_output.kernel(mine2, begin, end, 0, to_output.panels, work);
    });
  }

  GemmArgs first_, second_;
  int64_t row_bytes_, blocks_;
};

}  // namespace fastformer
