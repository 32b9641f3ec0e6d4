// The two products of a feed-forward network: which thread does what.
#pragma once

#include "gemm.h"
#include "phases.h"

namespace fastformer {

inline int64_t quantized_bytes(const GemmArgs& args) {
  return wants_quantizing(args) ? quantized_bytes(args.rows, args.depth) : 0;
}
// Adds the quantization of the rows of a where they are not quantized yet, into quantized_bytes(args) of memory.
inline void add_quantization(Phases& phases, GemmArgs& args, char* memory) {
  if (!wants_quantizing(args)) return;
  args.quantized = quantized_rows(memory, 0, args.rows, args.depth);
  phases.add_rows(args.rows, args.depth, [=](int64_t begin, int64_t end) { quantize(args, begin, end); });
}
// Adds a product; memory as above.
inline void add_gemm(Phases& phases, GemmArgs args, char* memory) {
  add_quantization(phases, args, memory);
  const GemmTasks tasks(args, phases.threads());
  phases.add(tasks.count(), tasks.bytes(), tasks);
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
    return hidden_bytes() + (quantized_bytes(second_) + 63) / 64 * 64 + quantized_bytes(first_);
  }

  void add_to(Phases& phases, char* memory) {
    if (blocks_) return is_int8() ? add_quantized_blocks(phases) : add_blocks(phases);
    if (is_int8() && quantized_groups(first_.columns) % phases.threads() == 0) return add_quantized_groups(phases, memory);
    second_.a = first_.output = memory;
    add_gemm(phases, first_, memory + hidden_bytes());
    add_gemm(phases, second_, memory + hidden_bytes());
  }

 private:
  bool is_int8() const { return second_.b_type == PanelType::int8; }
  int64_t hidden_bytes() const { return (first_.rows * row_bytes_ + 63) / 64 * 64; }

  void add_blocks(Phases& phases) const {
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

  // A group of the hidden activation, quantized while it is in L2, into second.quantized; hidden_group_bytes of memory.
  static void hidden_group(GemmArgs first, GemmArgs second, int64_t begin, int64_t end, int64_t group, char* memory) {
    constexpr int64_t kPanels = kQuantizedGroup / kQuantizedColumns;
    const auto [kernel, panels, scratch_bytes] = product_of(first);
    first.output_stride = second.a_row_stride = kGroupStride;
    // Rows and columns count from the start of the tensor.
    second.a = first.output = memory + scratch_bytes - (begin * kGroupStride + group * kQuantizedGroup) * 4;
    kernel(first, begin, end, group * kPanels, std::min(panels, (group + 1) * kPanels), memory);
    quantize(second, begin, end, group, group + 1);
  }
  int64_t hidden_group_bytes(int64_t rows) const {
    return product_of(first_).scratch_bytes + (rows * kGroupStride * 4 + 63) / 64 * 64;
  }

  // A group for each thread.
  void add_quantized_groups(Phases& phases, char* memory) {
    const int64_t rows = first_.rows, hidden = first_.columns;
    second_.quantized = quantized_rows(memory, 0, rows, hidden);
    add_quantization(phases, first_, memory + (quantized_bytes(rows, hidden) + 63) / 64 * 64);
    const int64_t bytes = hidden_group_bytes(rows);
    phases.add(quantized_groups(hidden), bytes, [=, first = first_, second = second_](int64_t group) {
      hidden_group(first, second, 0, rows, group, static_cast<char*>(scratch(bytes)));
    });
    add_gemm(phases, second_, nullptr);
  }

  void add_quantized_blocks(Phases& phases) const {
    const int64_t rows = first_.rows, hidden = first_.columns, blocks = blocks_, block_rows = (rows + blocks - 1) / blocks;
    const int64_t group_bytes = hidden_group_bytes(block_rows);
    const int64_t hidden_bytes = (quantized_bytes(block_rows, hidden) + 63) / 64 * 64;
    const int64_t input_bytes = wants_quantizing(first_) ? quantized_bytes(block_rows, first_.depth) : 0;
    const int64_t bytes = group_bytes + hidden_bytes + input_bytes;
    phases.add(blocks, bytes, [=, first = first_, second = second_](int64_t block) {
      const int64_t begin = rows * block / blocks, end = rows * (block + 1) / blocks;
      char* memory = static_cast<char*>(scratch(bytes));
      GemmArgs mine1 = first, mine2 = second;
      if (wants_quantizing(first)) {
        mine1.quantized = quantized_rows(memory + group_bytes + hidden_bytes, begin, end - begin, first.depth);
        quantize(mine1, begin, end);
      }
      mine2.quantized = quantized_rows(memory + group_bytes, begin, end - begin, hidden);
      for (int64_t group = 0; group < quantized_groups(hidden); ++group)
        hidden_group(mine1, mine2, begin, end, group, memory);
      gemm_serial(mine2, begin, end, memory);
    });
  }

  static constexpr int64_t kGroupStride = kQuantizedGroup + 16;  // of a row of floats, as of the hidden activation above
  GemmArgs first_, second_;
  int64_t row_bytes_, blocks_;
};

}  // namespace fastformer
